"""Whole runs: they learn, and killed, interrupted and resumed ones equal an undisturbed one."""

import json
import random
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prmoe_jax.cli import main
from prmoe_jax.config.loading import load
from prmoe_jax.errors import UserError
from prmoe_jax.model.layerwise import unstacked_blocks
from prmoe_jax.model.sizes import cost
from prmoe_jax.model.transformer import init_model
from prmoe_jax.run.checkpoint import Checkpoints
from prmoe_jax.run.metrics import of_layer, read_metrics
from prmoe_jax.tasks.score import Scorer
from prmoe_jax.training import loop
from prmoe_jax.training.evaluate import _worth
from prmoe_jax.training.preemption import PreemptionGuard
from tests.support.configs import settings
from tests.support.runs import (
    arguments,
    assert_same_run,
    finish,
    logged,
    parameters,
    start,
    wait_for_lines,
)

LONG = {
    "name": "2 layers, E=4, residual",
    "train.steps": 400,
    "checkpoint.every": 40,
    "eval.every": 60,
    "model.dropout": 0.1,
    "model.dtype": "bfloat16",
    "execution.cpu_products": "bfloat16",
    "moe.overflow": "random",
}


@pytest.fixture(scope="module")
def undisturbed(text, tmp_path_factory):
    """A run of 400 steps, with all randomness on and products of bfloat16; nothing stops it."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    assert main(arguments(text, workdir, **LONG)) == 0
    return workdir


@pytest.mark.slow
def test_killed_five_times_equals_undisturbed(text, undisturbed, tmp_path):
    """kill -9 at five random steps, the same command again each time."""
    command = arguments(text, tmp_path / "run", **LONG)
    kills = sorted(random.Random(1).sample(range(10, 380), 5))
    for line in kills:
        process = start(*command)
        wait_for_lines(tmp_path / "run", line, process)
        process.kill()
        finish(process)
    code, out, err = finish(start(*command))
    assert code == 0, err
    assert "resumed at step" in err
    assert_same_run(tmp_path / "run", undisturbed)


def test_sigterm_saves_and_resumes(text, undisturbed, tmp_path):
    workdir = tmp_path / "run"
    process = start(*arguments(text, workdir, **LONG))
    wait_for_lines(workdir, 50, process)
    process.terminate()
    code, _, err = finish(process)
    assert code == 0, err
    step, _ = parameters(workdir)
    assert f"interrupted: saved at step {step} of 400" in err
    assert logged(workdir)[-1]["step"] == step
    assert main(arguments(text, workdir, **LONG)) == 0
    assert_same_run(workdir, undisturbed)


@pytest.mark.parametrize(
    ("name", "normalize", "warned"),
    [
        ("1 layers, every 1, E=2", "always", True),
        ("1 layers, every 1, E=2, top 2", "always", False),
        ("1 layers, every 1, E=2", "auto", False),
        ("1 layers, every 1, E=1", "auto", True),
        ("1 layers", "always", False),
    ],
)
def test_a_router_whose_weight_is_always_one(name, normalize, warned, tmp_path, capsys):
    """The loss cannot reach it. The command ends before a step, at its missing text."""
    command = arguments((tmp_path / "none", tmp_path), tmp_path / "run", name)
    assert main([*command, f"--config.model.normalize_top_k={normalize}"]) == 2
    told = (
        "a token's only expert (model.top_k=1) always has the weight 1, by model.normalize_top_k="
        "always or since its layer has no other: the router learns from its auxiliary losses alone"
    )
    assert (told in capsys.readouterr().err) is warned


def stop_at(monkeypatch, step):
    """A signal in the middle of a step."""
    monkeypatch.setattr(
        "prmoe_jax.training.preemption.PreemptionGuard.at", lambda self, done: done >= step
    )


@pytest.mark.parametrize("step", [8, 12])
def test_what_was_due_at_an_interruption_is_evaluated(step, text, tmp_path, monkeypatch):
    """Stopped in a step where an evaluation is due, or in the last one."""
    settings = {"eval.every": 4}
    reference = arguments(text, tmp_path / "whole", "dense", **settings)
    assert main(reference) == 0
    command = arguments(text, tmp_path / "run", "dense", **settings)
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        assert main(command) == 0
    evaluated = [line["step"] for line in logged(tmp_path / "run") if "eval/loss" in line]
    assert evaluated == ([4] if step == 8 else [4, 8, 12])
    assert main(command) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(("decay", "warned"), [(0, True), (4096, False)])
def test_a_warm_up_longer_than_the_run_is_told(text, tmp_path, capsys, decay, warned):
    """Not where the schedule is that of a longer run."""
    schedule = {"optimizer.warmup_tokens": 4000, "optimizer.decay_tokens": decay}
    assert main(arguments(text, tmp_path / "run", "dense", **{"train.steps": 2} | schedule)) == 0
    told = "the run ends before the learning rate is reached: "
    assert (told in capsys.readouterr().err) is warned


def test_a_run_says_what_its_settings_come_to(text, tmp_path, capsys):
    """Capacity is rounded up; a warm-up is counted in tokens, and a decay may be a longer run's."""
    given = {"train.steps": 2, "optimizer.warmup_tokens": 64, "optimizer.decay_tokens": 4096}
    given |= {"moe.capacity_factor": 1.1, "moe.eval_capacity_factor": "inf", "model.experts": "4"}
    assert main(arguments(text, tmp_path / "run", "prmoe", **given)) == 0
    told = capsys.readouterr().err
    assert "capacity in training, of 32 tokens: 9 (4 experts)" in told
    assert "capacity in evaluation" not in told
    assert "optimizer.warmup_tokens=64 is no more than a step of 256 tokens, so that" in told
    assert "the run ends at step 2, before its learning rate has fallen, at step 16" in told
    last = logged(tmp_path / "run")[-2]
    nats, balance = (f"{x:.4f}" for x in (last["lm_loss"], 0.01 * last["aux_loss"]))
    assert f"step 2/2: loss {nats} + {balance} balance, " in told and last["step"] == 2
    counted = cost(load(tmp_path / "run/config.json").model)
    sizes = f"{counted.total_params:,} parameters, {counted.active_params:,} of them active"
    assert f"{sizes} in a token; 512 tokens to come, in 2 steps" in told


def test_the_time_to_come_is_told_once(text, tmp_path, capsys):
    assert main(arguments(text, tmp_path / "run", "1 layers", **{"train.steps": 8})) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "to the last step" in line]
    assert len(told) == 1 and told[0].startswith("step 6/8: about 0:00:0")


def test_complete_run_is_left_alone(text, tmp_path, capsys):
    command = arguments(text, tmp_path / "run", "dense", **{"train.steps": 3})
    assert main(command) == 0
    first = json.loads(capsys.readouterr().out)
    assert main(command) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == first
    assert "the run is complete: step 3 of 3" in captured.err


def test_a_router_that_ails_is_told(text, tmp_path, monkeypatch, capsys):
    """By the second evaluation in a row that finds it, and by the last one."""
    found = iter([{"01": "a"}, {}, {"01": "b"}, {"01": "c"}, {"01": "d"}, {"03": "e"}])
    monkeypatch.setattr(loop, "ailing", lambda metrics: next(found))
    every = {"train.steps": 6, "eval.every": 1, "eval.batches": 1}
    assert main(arguments(text, tmp_path / "run", "dense", **every)) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if ": layer " in line]
    assert told == ["step 4: layer 01: c", "step 6: layer 03: e"]


def test_what_a_layer_is_worth():
    """The sum of a layer's weights goes if its experts give 0, and stays if they are permuted."""
    config = settings("4 layers, E=2+3")
    model = init_model(config)

    def measured(model):
        experts = (block.mlp.experts for block in unstacked_blocks(model)[1::2])
        of_first, of_second = (float(jnp.abs(one.w_out[...]).sum()) for one in experts)
        return {"loss": of_first + 10 * of_second}

    experts = (block.mlp.experts for block in unstacked_blocks(model)[1::2])
    sums = [float(jnp.abs(one.w_out[...]).sum()) for one in experts]
    found = _worth(model, config, measured(model)["loss"], measured)
    assert found == pytest.approx(
        {
            "layers/01/loss_without_experts": -sums[0],
            "layers/01/loss_of_permuted_experts": 0,
            "layers/03/loss_without_experts": -10 * sums[1],
            "layers/03/loss_of_permuted_experts": 0,
        },
        rel=1e-4, abs=1e-2,
    )  # fmt: skip


def test_longer_run_on_the_same_schedule(text, tmp_path):
    """With decay_tokens given, 4 steps and then 4 more are the run of 8 steps."""
    assert main(arguments(text, tmp_path / "a", "dense", **{"train.steps": 4})) == 0
    assert main(arguments(text, tmp_path / "a", "dense", **{"train.steps": 8})) == 0
    assert main(arguments(text, tmp_path / "b", "dense", **{"train.steps": 8})) == 0
    jax.tree.map(
        np.testing.assert_array_equal, parameters(tmp_path / "a"), parameters(tmp_path / "b")
    )


@pytest.mark.parametrize("name", ["top2", "prmoe"])
def test_architectures_learn(text, tmp_path, name):
    """50 steps lower the loss, metrics have their keys, eval repeats the last evaluation."""
    assert main(arguments(text, tmp_path / "run", name, **{"train.steps": 50})) == 0
    lines = logged(tmp_path / "run")
    losses = [line["lm_loss"] for line in lines if "lm_loss" in line]
    assert len(losses) == 50
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 1
    keys = "step loss lm_loss aux_loss grad_norm learning_rate tokens drop_fraction".split()
    assert set(keys) <= lines[0].keys()
    experts = load(tmp_path / "run" / "config.json").model.schedule.experts
    for layer, count in enumerate(experts):
        for metric in ("expert_load", "drop_fraction", "router_entropy", "aux_loss"):
            assert (f"layers/{layer:02d}/{metric}" in lines[0]) == (count > 0)
        if count:
            assert len(lines[0][f"layers/{layer:02d}/expert_load"]) == count
    assert "eval/bits_per_byte" in lines[-1]


def test_the_last_evaluation_has_documents(text, tmp_path):
    """Their sums are the loss of the whole split."""
    more = {"eval.every": 2, "train.steps": 4, "eval.documents": True}
    assert main(arguments(text, tmp_path / "run", "2 layers, E=2", **more)) == 0
    before, last = (
        line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "eval/loss" in line
    )
    assert "eval/documents" not in before
    nats, tokens = np.sum(last["eval/documents"], axis=0)
    assert len(last["eval/documents"]) > 1 and tokens == last["eval/tokens"]
    assert nats / tokens == pytest.approx(last["eval/loss"], rel=1e-4)


def test_a_step_is_saved_before_it_is_evaluated(text, tmp_path, monkeypatch):
    """A kill during the evaluation, which may last long, loses nothing."""
    saved = []

    def killed(trainer, step, state):
        trainer.checkpoints.wait()
        saved.append(trainer.checkpoints.latest())
        raise KeyboardInterrupt

    monkeypatch.setattr("prmoe_jax.training.loop.Run.evaluate", killed)
    settings = {"train.steps": 4, "checkpoint.every": 2, "eval.every": 2}
    main(arguments(text, tmp_path / "run", **settings))
    assert saved == [2]


def test_eval_on_another_text(text, tmp_path, capsys):
    """The loss is the one that the run would have if this were its own text."""
    workdir = tmp_path / "run"
    assert main(arguments(text, workdir, **{"train.steps": 2})) == 0
    other = tmp_path / "other"
    other.mkdir()
    for i in range(40):
        (other / f"{i:02}.txt").write_text(f"Another text, number {i}, to measure on. " * 5)
    losses = []
    for options in [], [f"--corpus={other}"]:
        capsys.readouterr()
        assert main(["eval", f"--workdir={workdir}", "--json", *options]) == 0
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    settings = json.loads((workdir / "config.json").read_text())
    settings["data"]["corpus"] = str(other)
    assert losses[1] != losses[0]
    # Without being asked for, another text is refused: its split may hold text of the training.
    (workdir / "config.json").write_text(json.dumps(settings))
    assert main(["eval", f"--workdir={workdir}", "--json"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"data.corpus={other} is not the text that the run in {workdir} was trained on" in line
    assert main(["eval", f"--workdir={workdir}", "--json", f"--corpus={other}"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == losses[1]


def test_eval_of_other_windows(text, tmp_path, capsys):
    """A length has the loss of a run with that context; a batch size has the same loss."""
    workdir = tmp_path / "run"
    rotary = {"train.steps": 2, "model.positions": "rotary"}
    assert main(arguments(text, workdir, "2 layers, E=3", **rotary)) == 0

    def evaluated(*options, code=0):
        capsys.readouterr()
        assert main(["eval", f"--workdir={workdir}", "--json", *options]) == code
        out, err = capsys.readouterr()
        return err.splitlines()[-1] if code else json.loads(out)

    whole, short = evaluated(), evaluated("--length=8")
    assert short["loss"] != whole["loss"] and short["tokens"] == whole["tokens"]
    for size in 1, 3, 1000:
        assert evaluated(f"--batch-size={size}")["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    taught = [f"--teacher={workdir}", "--length=8", "--batch-size=3"]
    found = evaluated(*taught)
    assert found["teacher/loss"] == pytest.approx(short["loss"], rel=1e-6)
    assert found["teacher/agreement"] == 1
    line = evaluated("--length=33", code=2)
    assert "--length=33 must be from 1 to the run's context of 32 tokens" in line
    assert "--length=0 must be from 1" in evaluated("--length=0", code=2)
    assert "--batch-size=0 must be 1 or more windows" in evaluated("--batch-size=0", code=2)
    assert "--length is for the validation split" in evaluated(
        "--tasks=cloze", "--length=0", code=2
    )
    settings = json.loads((workdir / "config.json").read_text())
    settings["model"]["length"] = 8
    (workdir / "config.json").write_text(json.dumps(settings))
    assert evaluated() == short
    settings["model"]["length"], settings["moe"]["group_size"] = 32, 16
    (workdir / "config.json").write_text(json.dumps(settings))
    line = evaluated("--length=12", code=2)
    assert "--length=12: the run's moe.group_size=16 neither divides nor is a mult" in line
    assert evaluated("--length=8")["tokens"] == whole["tokens"]


def test_eval_and_generate(text, tmp_path, capsys):
    workdir = tmp_path / "run"
    settings = {"name": "4 layers, E=4+8, residual", "train.steps": 50}
    assert main(arguments(text, workdir, **settings)) == 0
    capsys.readouterr()
    assert main(["eval", f"--workdir={workdir}", "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    last = logged(workdir)[-1]
    for name in ("loss", "perplexity", "bits_per_byte", "drop_fraction"):
        assert metrics[name] == last[f"eval/{name}"]
    assert metrics["perplexity"] == pytest.approx(np.exp(metrics["loss"]))
    # Byte tokens: every byte and every document's end is one prediction.
    documents = 2  # 5 % of 40
    data_bytes = metrics["tokens"] - documents
    nats = metrics["loss"] * metrics["tokens"]
    assert metrics["bits_per_byte"] == pytest.approx(nats / np.log(2) / data_bytes)

    assert metrics["drop_fraction"] > 0
    for layer, experts in ((1, 4), (3, 8)):
        of = of_layer(metrics, f"{layer:02d}")
        load, by_expert = np.array(of["expert_load"]), np.array(of["expert_drop_fraction"])
        assert len(load) == len(by_expert) == experts
        assert (load * by_expert).sum() == pytest.approx(of["drop_fraction"])
        # Windows are full but for the last: all places in a group have about as many tokens.
        assert np.mean(of["position_drop_fraction"]) == pytest.approx(of["drop_fraction"], rel=0.1)
        assert of["position_drop_fraction"][0] == 0  # an expert has room for the first
        assert of["unserved_fraction"] == pytest.approx(of["drop_fraction"])  # top 1

    assert main(["eval", f"--workdir={workdir}", "--worth"]) == 0
    *_, head, first, second = capsys.readouterr().out.splitlines()
    assert {"layer", "dropped", "without", "permuted"} < set(head.split())
    for row, layer in ((first, "01"), (second, "03")):
        assert row.split()[0] == layer
        assert f"{metrics[f'layers/{layer}/drop_fraction']:.1%}" in row.split()
        assert row.count("nats") == 2
    assert main(["eval", f"--workdir={workdir}", "--worth", "--json"]) == 0
    worth = of_layer(json.loads(capsys.readouterr().out), "03")
    assert worth["loss_without_experts"] != worth["loss_of_permuted_experts"] != 0
    assert worth["loss_without_experts"] != 0

    command = ["generate", f"--workdir={workdir}", "--prompt=the ", "--tokens=20"]
    outputs = []
    for seed in (0, 0, 1):
        assert main([*command, f"--seed={seed}", "--json"]) == 0
        outputs.append(json.loads(capsys.readouterr().out)["text"])
    assert outputs[0] == outputs[1] != outputs[2]
    assert len(outputs[0]) > 0
    # As it comes; and several prompts at once, with several samples of each.
    assert main(command) == 0
    assert capsys.readouterr().out == f"the {outputs[0]}\n"
    assert main([*command, "--prompt=expert", "--samples=2", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["prompt"], row["seed"]) for row in rows] == [
        ("the ", 0), ("the ", 1), ("expert", 0), ("expert", 1)
    ]  # fmt: skip
    assert [row["text"] for row in rows[:2]] == [outputs[0], outputs[2]]


def test_a_run_whose_experts_choose_cannot_generate(text, tmp_path, capsys):
    settings = {"train.steps": 2, "moe.router": "expert_choice"}
    assert main(arguments(text, tmp_path / "run", "2 layers, E=4", **settings)) == 0
    assert "not causal" in capsys.readouterr().err
    assert main(["generate", f"--workdir={tmp_path / 'run'}", "--prompt=the"]) == 2
    (*_, line) = capsys.readouterr().err.splitlines()
    assert "this run's experts choose their tokens (moe.router=expert_choice)" in line
    # Nor be scored in tasks, by the same rule.
    with pytest.raises(UserError, match="it can neither generate nor be scored in tasks"):
        Scorer.restore(tmp_path / "run", batch_size=2)


def test_nan_stops_with_the_last_good_checkpoint(text, tmp_path, capsys):
    settings = {"optimizer.learning_rate": 1e30, "optimizer.clip_norm": "inf"}
    settings |= {"checkpoint.every": 1, "optimizer.warmup_tokens": 0}
    assert main(arguments(text, tmp_path / "run", "dense", **settings)) == 1
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert "is nan at step" in err or "is inf at step" in err
    # The weights of the last checkpoint gave this loss.
    bad = parameters(tmp_path / "run")[0]
    good = f"step {bad - 1} in {tmp_path / 'run'}" if bad > 1 else "none yet"
    assert f"the last good checkpoint is {good}; remove checkpoint {bad}, whose weights" in err


def test_a_last_step_that_spoils_the_weights_is_no_success(text, tmp_path, capsys):
    """Only the validation loss shows it."""
    settings = {"optimizer.learning_rate": 1e30, "optimizer.min_learning_rate": 1e30}
    settings |= {"train.steps": 1, "optimizer.warmup_tokens": 0}
    command = arguments(text, tmp_path / "run", "dense", **settings)
    for _ in range(2):
        assert main(command) == 1
        err = capsys.readouterr().err.strip().splitlines()[-1]
        assert "the validation loss is nan at step 1; the last good checkpoint is none yet" in err
        assert not any("eval/loss" in line for line in logged(tmp_path / "run"))


def test_profile(text, tmp_path):
    command = arguments(text, tmp_path / "run", **{"train.steps": 4, "log.every": 3})
    assert main([*command, "--profile=2:3"]) == 0
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    lines = logged(tmp_path / "run")
    assert [line["step"] for line in lines if "grad_norm" in line] == [3, 4]
    (events,) = (tmp_path / "run" / "tensorboard").iterdir()
    for name in (b"grad_norm", b"eval/loss", b"layers/03/drop_fraction"):
        assert name in events.read_bytes()
    with pytest.raises(
        UserError, match="--profile=2:9 must be two steps in their order, from 1 to"
    ):
        loop.train(load(tmp_path / "run" / "config.json"), tmp_path / "run", (2, 9))


def test_a_second_ctrl_c_ends_the_process():
    with PreemptionGuard() as guard:
        signal.raise_signal(signal.SIGINT)
        assert guard and guard.at(7)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_signal_while_text_is_prepared_ends_at_once(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "load_data", lambda *_: signal.raise_signal(signal.SIGINT))
    assert main(arguments(text, tmp_path / "run")) == 130
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_end_that_was_evaluated_has_its_checkpoint(text, tmp_path, monkeypatch):
    """Else a run that is killed between the two would be finished, and could not go on."""
    called = []
    for of, name in (Checkpoints, "save"), (Checkpoints, "wait"), (loop.Run, "evaluate"):
        method = getattr(of, name)

        def noted(*arguments, name=name, method=method):
            called.append(name)
            return method(*arguments)

        monkeypatch.setattr(of, name, noted)
    assert main(arguments(text, tmp_path / "run", "dense", **{"train.steps": 3})) == 0
    end = called.index("evaluate")
    assert called[:end].count("save") == 1 and called[end - 1] == "wait"


def test_interrupt_is_handled_as_sigterm(text, tmp_path):
    process = start(*arguments(text, tmp_path / "run", **LONG))
    wait_for_lines(tmp_path / "run", 5, process)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 0, err
    assert "interrupted: saved at step" in err
