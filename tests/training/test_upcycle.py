"""A run that starts as another: the same function, experts as copies, and nothing silently anew."""

import contextlib
import dataclasses
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prmoe_jax.cli import main
from prmoe_jax.config.loading import save
from prmoe_jax.config.schema import MoeConfig
from prmoe_jax.errors import UserError
from prmoe_jax.model.transformer import init_model
from prmoe_jax.nn.parameters import named_leaves
from prmoe_jax.parallel.mesh import make_mesh
from prmoe_jax.run.checkpoint import Checkpoints
from prmoe_jax.training import start
from prmoe_jax.training.start import check_fits, upcycled
from tests.support.batches import make_batch
from tests.support.configs import settings
from tests.support.models import layers_of
from tests.support.quick import forward, jit
from tests.support.runs import arguments, logged
from tests.support.tokenizers import byte_tokenizer


def init_from_run(source, target, noise=0.0):
    """The source's model, and the target's that starts as it."""
    check_fits(source, target)
    model, fresh = init_model(source), init_model(target)
    key = jax.random.key(5)
    return model, jit(lambda model: upcycled(model, fresh, key, noise))(model)


def activations(model):
    """Those of tokens; padding isn't routed."""
    batch = make_batch()
    x_BxLxD, _ = forward(model, batch.tokens_BxL, batch.segments_BxL)
    return np.asarray(x_BxLxD)[batch.segments_BxL > 0]


@pytest.mark.parametrize("text", ["4 layers, E=2+3, top 2", "4 layers, E=2+3, top 2, residual"])
def test_top_2_computes_what_the_dense_model_did(text):
    source = settings("4 layers", seed=3)
    model, grown = init_from_run(source, settings(text, model={"length": 8}))
    np.testing.assert_allclose(activations(grown), activations(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("4 layers, E=2+3, top 2, residual", {}),
        ("4 layers, E=4, top 2", {"expert_d_ff": 5}),
        ("4 layers, E=4+8, top 4, residual", {"expert_d_ff": 5, "residual_d_ff": 10}),
        ("2 layers, E=15, top 5", {"expert_d_ff": 2}),
    ],
)
def test_modern_models_and_slices_compute_what_the_dense_model_did(family, text, parts):
    """Copies and slices of swiglu MLPs, and of gelu ones with biases."""
    today = {"family": family, "heads": 4, "kv_heads": 2, "head_dim": 4}
    model = {} if family == "gpt2" else today
    dropless = {"capacity_factor": float("inf"), "eval_capacity_factor": float("inf")}
    source = settings(text.partition(",")[0], model=model, seed=3)
    target = settings(text, model=model | parts | {"normalize_top_k": "always"}, moe=dropless)
    check_fits(source, target)
    model, fresh = init_model(source), init_model(target)
    rng = np.random.default_rng(0)  # biases start at zero
    model = jax.tree.map(lambda x: x + jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype), model)
    grown = jit(lambda model: upcycled(model, fresh, jax.random.key(5), 0.0))(model)
    np.testing.assert_allclose(activations(grown), activations(model), rtol=1e-4, atol=1e-5)


def test_every_part_by_hand():
    """Experts and the residual MLP are the dense MLP, the router is the seed's, the rest stays."""
    target = settings("4 layers, E=2+3, residual")
    model, grown = init_from_run(settings("4 layers", seed=3), target)
    fresh = layers_of(init_model(target))
    for layer, (before, after) in enumerate(zip(layers_of(model), layers_of(grown), strict=True)):
        for name, leaf in after.items():
            if ".experts." in name:
                expected = before[name.replace("experts.", "")]
                assert len(leaf) == (0, 2, 0, 3)[layer]
                for expert in leaf:
                    np.testing.assert_array_equal(expert, expected)
            elif name in ("mlp.w_router", "mlp.w_mix", "mlp.b_mix"):
                np.testing.assert_array_equal(leaf, fresh[layer][name])
            else:
                np.testing.assert_array_equal(leaf, before[name.replace("mlp.mlp.", "mlp.")])
    for name in ("tokens", "positions", "norm.scale"):
        np.testing.assert_array_equal(named_leaves(grown)[name], named_leaves(model)[name])


def test_noise_makes_experts_differ():
    """By its share of the weight's spread, each its own; the residual MLP stays exact."""
    target = settings("2 layers, E=3, residual", model={"d_ff": 40, "d_model": 24})
    source = settings("2 layers", model={"d_ff": 40, "d_model": 24})
    model, grown = init_from_run(source, target, noise=0.2)
    before, after = layers_of(model)[1], layers_of(grown)[1]
    noise = (after["mlp.experts.w_in"] - before["mlp.w_in"]) / before["mlp.w_in"].std()
    np.testing.assert_allclose(noise.std((1, 2)), 0.2, rtol=0.1)
    assert np.abs(np.corrcoef(noise.reshape(3, -1))[np.triu_indices(3, 1)]).max() < 0.15
    np.testing.assert_array_equal(after["mlp.mlp.w_in"], before["mlp.w_in"])


def test_the_same_model_is_a_copy():
    values = settings("4 layers, E=2+3, residual", seed=3)
    model, copy = init_from_run(values, settings("4 layers, E=2+3, residual"))
    jax.tree.map(np.testing.assert_array_equal, model, copy)
    assert (init_model(settings("4 layers, E=2+3, residual")).tokens[...] != copy.tokens[...]).any()
    assert jnp.isfinite(copy.tokens[...]).all()


def test_noise_on_slices():
    """It is relative to the spread of the weight that it is added to."""
    sizes = {"d_ff": 40, "d_model": 24}
    target = settings("2 layers, E=4, top 2", model=sizes | {"expert_d_ff": 20})
    model, grown = init_from_run(settings("2 layers", model=sizes), target, noise=0.2)
    before, after = layers_of(model)[1]["mlp.w_out"], layers_of(grown)[1]["mlp.experts.w_out"]
    noise = (after - 2 * np.stack([before[:20], before[20:]] * 2)) / (2 * before.std())
    np.testing.assert_allclose(noise.std((1, 2)), 0.2, rtol=0.1)


def test_the_second_half_of_an_mlp_is_not_drawn():
    sampled = {"second_expert_sampling": True}
    halves = settings("2 layers, E=4, top 2", model={"expert_d_ff": 5}, moe=sampled)
    message = "moe.second_expert_sampling=True draws the second expert"
    with pytest.raises(UserError, match=message):
        check_fits(settings("2 layers"), halves)
    some = settings("4 layers, E=4, top 2", model={"expert_d_ff": 5}, moe=sampled)
    fewer, as_many = (
        settings(f"4 layers, {text}, top 2", model={"expert_d_ff": 5})
        for text in ("layers 1, E=4", "E=4")
    )
    with pytest.raises(UserError, match=message):
        check_fits(fewer, some)
    check_fits(settings("2 layers"), settings("2 layers, E=4, top 2", moe=sampled))
    check_fits(as_many, some)


def test_a_window_as_long_as_the_context_leaves_nothing_out():
    """Of two contexts, one shorter than the window of the run to start as."""

    def model(length, window=0):
        parts = {"length": length, "positions": "rotary", "sliding_window": window}
        return settings("2 layers", model=parts)

    check_fits(model(24, 12), model(12))
    check_fits(model(24, 12), model(20, 12))
    with pytest.raises(UserError, match="model.sliding_window=0, the run to start as has 12"):
        check_fits(model(24, 12), model(20))


@pytest.mark.parametrize(
    ("source", "target", "model", "message"),
    [
        ("4 layers", "6 layers, E=3", {}, "model.layers=6, the run to start as has 4"),
        ("4 layers", "4 layers, E=3", {"clip_qkv": 3.0}, "model.clip_qkv=3.0, the run to start as"),
        ("4 layers", "4 layers, E=3", {"d_ff": 12}, "model.d_ff=12, the run to start as has 10"),
        ("4 layers", "4 layers, E=3", {"length": 9}, "exceeds the 8 positions of the run to start"),
        ("4 layers", "4 layers, E=4, top 2", {"expert_d_ff": 3}, "doesn't divide the 10 hidden"),
        (
            "4 layers",
            "4 layers, E=3, top 2",
            {"expert_d_ff": 5},
            "layer 1, experts=3: with model.e",
        ),
        (
            "4 layers",
            "4 layers, E=4",
            {"expert_d_ff": 5},
            "model.top_k=1: with model.expert_d_ff=5",
        ),
        (
            "4 layers",
            "4 layers, E=4, top 2, residual",
            {"expert_d_ff": 5},
            "MLP beside the experts",
        ),
        ("4 layers, E=3", "4 layers", {}, "layer 1 has no experts, that of the run to start as 3"),
        ("4 layers, E=3", "4 layers, E=3+4", {}, "layer 3 has 4 experts, that of the run to star"),
        (
            "4 layers, E=3",
            "4 layers, E=3, residual",
            {},
            "model.residual=True, the run to start as",
        ),
    ],
)
def test_what_does_not_fit(source, target, model, message):
    with pytest.raises(UserError) as error:
        check_fits(settings(source), settings(target, model=model))
    assert message in str(error.value)


def test_kernels_of_the_run_to_start_as_do_not_matter(text, tmp_path, capsys):
    """It is read here, and was trained on another device. The same is true of other verbs."""
    dense = tmp_path / "dense"
    assert main(arguments(text, dense, "dense", **{"train.steps": 2})) == 0
    values = json.loads((dense / "config.json").read_text())
    values["model"]["attention"] = "splash"
    (dense / "config.json").write_text(json.dumps(values))
    changes = {"init.workdir": dense, "train.steps": 1}
    assert main(arguments(text, tmp_path / "run", "top2", **changes)) == 0
    capsys.readouterr()
    for verb in ["eval"], ["generate", "--tokens=3"]:
        assert main([*verb, f"--workdir={dense}"]) == 0
        line = "execution.attention=splash needs a tpu, this is a cpu; use auto, as is done here"
        assert line in capsys.readouterr().err


def test_a_run_goes_on_from_a_dense_one(text, tmp_path, capsys):
    """From the command line; a resumed run doesn't start again, and needs the other no more."""
    assert main(arguments(text, tmp_path / "dense", "dense", **{"train.steps": 40})) == 0
    changes = {"init.workdir": tmp_path / "dense", "init.noise": 0.01}
    changes |= {"optimizer.warmup_tokens": 10**4}
    top2 = arguments(text, tmp_path / "run", "top2", **changes | {"train.steps": 3})
    assert main(top2) == 0
    assert "starts as step 40 of " in capsys.readouterr().err
    assert main(arguments(text, tmp_path / "anew", "top2", **{"train.steps": 3})) == 0
    first, anew = (logged(tmp_path / name)[0]["loss"] for name in ("run", "anew"))
    assert first < anew - 0.5
    (tmp_path / "dense").rename(tmp_path / "elsewhere")
    assert main(arguments(text, tmp_path / "run", "top2", **changes | {"train.steps": 5})) == 0
    assert "starts as step" not in capsys.readouterr().err
    assert main(arguments(text, tmp_path / "again", "top2", **changes)) == 2
    assert "--config.init.workdir names the run to start as" in capsys.readouterr().err
    # What would have no effect, or another one than in the run to start as.
    for changes, message in (
        ({"init.noise": 0.01}, "init.noise=0.01 has no effect: the run to start as has all"),
        ({"model.normalize_top_k": "never"}, "normalize_top_k=never: the weights of a token's exp"),
    ):
        changes["init.workdir"] = tmp_path / "run"
        assert main(arguments(text, tmp_path / "again", "top2", **changes)) == 2
        assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """The folder of a dense run, to spoil copies of."""
    run = tmp_path_factory.mktemp("dense")
    values, tokenizer = settings("2 layers"), byte_tokenizer()
    with contextlib.closing(Checkpoints(run, keep=1)) as checkpoints:
        record = {"fingerprint": {"tokenizer": tokenizer.fingerprint}}
        checkpoints.save_model(2, jit(lambda: init_model(values))(), record)
    tokenizer.save(run / "tokenizer.json")
    save_config(values, run)
    return run


def save_config(values, run):
    """With the backends' names left open, as a run's own."""
    save(dataclasses.replace(values, moe=MoeConfig()), run / "config.json")


def written(name, content):
    return lambda run: (run / name).write_text(content)


def removed(name):
    return lambda run: shutil.rmtree(run / name)


def in_place(name, make):
    return lambda run: ((run / name).unlink(), make(run / name))


def truncated(run):
    """Every array file of the checkpoint loses its end."""
    for path in (run / "checkpoints" / "2" / "model").rglob("d/*"):
        os.truncate(path, 20)


def other_config(run):
    save_config(settings("2 layers", model={"length": 37}), run)


# Damage, and what is told before the setting's name.
DAMAGED = {
    "no folder": (shutil.rmtree, "no run in copy: config.json is missing"),
    "a file": (lambda run: (shutil.rmtree(run), run.touch()), "no run in copy: config.json is mis"),
    "no config": (lambda run: (run / "config.json").unlink(), "no run in copy: config.json is mis"),
    "half a config": (written("config.json", "{"), "copy/config.json is damaged: Expecting"),
    "deep config": (written("config.json", "[" * 10**5), "config.json is damaged: it is nested to"),
    "list as config": (written("config.json", "[]"), "config must be a group of settings, not []"),
    "config is a folder": (
        in_place("config.json", Path.mkdir),
        "config.json cannot be read: Is a directory",
    ),
    "config is a pipe": (
        in_place("config.json", os.mkfifo),
        "config.json: a pipe, a socket or a d",
    ),
    "no tokenizer": (
        lambda run: (run / "tokenizer.json").unlink(),
        "tokenizer.json: cannot be read: No such file",
    ),
    "tokenizer is a pipe": (
        in_place("tokenizer.json", os.mkfifo),
        "tokenizer.json: a pipe, a socket or a device",
    ),
    "no checkpoints": (removed("checkpoints"), "no checkpoint in "),
    "empty step": (
        lambda run: (removed("checkpoints/2")(run), (run / "checkpoints" / "2").mkdir()),
        "copy/checkpoints",
    ),
    "no model": (removed("checkpoints/2/model"), "copy/checkpoints"),
    "truncated": (truncated, "copy/checkpoints"),
    "another length": (other_config, "copy/checkpoints"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_or_foreign_folder(name, dense, tmp_path, monkeypatch):
    """One line that names the damage and the setting, and nothing hangs."""
    monkeypatch.chdir(tmp_path)
    damage, message = DAMAGED[name]
    shutil.copytree(dense, "copy")
    target = settings("2 layers, E=3", init={"workdir": "copy"})
    mesh = make_mesh(target, jax.devices()[:1])
    damage(Path("copy"))
    with pytest.raises(UserError) as error:
        start.init_from_run(target, mesh, byte_tokenizer())
    line = str(error.value)
    assert message in line and "\n" not in line
    assert line.endswith("; --config.init.workdir names the run to start as")
