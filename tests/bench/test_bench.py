"""`prmoe bench`: the rows' keys, the loads, and that every baseline computes what it says."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from configs import tiny
from prmoe_jax.bench import LOADS, decode, moe, timing, worker
from prmoe_jax.bench.baselines import peak_bytes
from prmoe_jax.cli import main
from prmoe_jax.config.loading import resolve
from prmoe_jax.errors import UserError
from prmoe_jax.model.sizes import cost
from tests.support.extras import needs_extra
from tests.support.lines import only_line

KEYS = """
    backend S M F E load dtype device jax median_s min_s max_s peak_bytes ratio_to_dense
    drop_fraction bytes_moved gb_per_s
""".split()


def test_rows(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    command = ["bench", "moe", "--sizes=64,8,16,4", "--sizes=32,8,8,2", "--repeats=3", "--json"]
    assert main([*command, "--load=zipf"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["S"] for row in rows] == sorted((row["S"] for row in rows), reverse=True)
    for row in rows:
        assert list(row) == KEYS
        assert 0 < row["min_s"] <= row["median_s"] <= row["max_s"]
        assert row["peak_bytes"] > 0
        assert (row["load"], row["dtype"]) == ("zipf", "float32")
    first = {row["backend"]: row for row in rows if row["S"] == 64}
    assert {"dense", "gather", "einsum", "gather, no experts", "einsum, no experts"} <= set(first)
    assert first["dense"]["ratio_to_dense"] == 1
    assert first["gather"]["drop_fraction"] == first["einsum"]["drop_fraction"] > 0
    assert first["gather, no experts"]["drop_fraction"] == first["gather"]["drop_fraction"]
    for name in ("copy", "dense", "dropless"):
        assert first[name]["drop_fraction"] == 0
    assert first["gather"]["bytes_moved"] == 3 * 2 * 4 * 8 * 16 * 4


def test_weights_are_in_the_compute_dtype(monkeypatch, capsys):
    """As the model casts them, once per step."""
    monkeypatch.setattr("prmoe_jax.nn.precision.multiplies_bfloat16", lambda: True)
    sizes = ["--sizes=64,8,16,4", "--repeats=1", "--json"]
    assert main(["bench", "moe", *sizes, "--dtype=bfloat16"]) == 0
    rows = {row["backend"]: row for row in json.loads(capsys.readouterr().out)}
    for name in ("gather", "einsum", "dropless"):
        assert rows[name]["bytes_moved"] == 3 * 2 * 4 * 8 * 16 * 2


@pytest.mark.parametrize(("platform", "calls"), [("cpu", 7), ("gpu", 1 + 2 + 5 * 3)])
def test_short_programs_are_called_often_on_an_accelerator(platform, calls, monkeypatch):
    """To launch one may take longer than its work. Calls of this one take 7 ms, the first 17."""
    clock, called = [0.0], []

    def program():
        clock[0] += 0.007 if called else 0.017
        called.append(1)

    jitted = SimpleNamespace(lower=lambda: SimpleNamespace(compile=lambda: program))
    program.memory_analysis = lambda: SimpleNamespace(
        argument_size_in_bytes=1,
        output_size_in_bytes=2,
        temp_size_in_bytes=4,
        alias_size_in_bytes=0,
    )
    monkeypatch.setattr(timing.jax, "jit", lambda function: jitted)
    monkeypatch.setattr(timing.jax, "default_backend", lambda: platform)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    timed = timing.compiled(None, ())
    times = timing.interleaved({"one": timed.seconds}, 5)
    assert times["one"] == pytest.approx([0.007] * 5)
    assert len(called) == calls
    assert timed.peak_bytes() == 7


def test_deepspeeds_layer_is_only_compared_with_on_a_cpu(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert worker.can_run("deepspeed")
    monkeypatch.setattr(worker.jax, "default_backend", lambda: "gpu")
    assert not worker.can_run("deepspeed")


def test_too_few_tokens_for_deepspeeds_layer(monkeypatch):
    monkeypatch.setattr(moe, "can_run", lambda package: True)
    with pytest.raises(
        UserError, match="--sizes=4,1,1,1: DeepSpeed's layer, .* more than 4 tokens"
    ):
        moe.bench_moe([moe.Size(4, 1, 1, 1)], ["uniform"], "float32", 1)


def test_the_room_on_an_accelerator_is_its_own(monkeypatch):
    device = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 3 << 30})
    monkeypatch.setattr(timing.jax, "local_devices", lambda: [device])
    timing.check_memory("--batch=8", 3 << 30)
    with pytest.raises(UserError, match="--batch=8 needs 4 GiB or more, there are 3; use a"):
        timing.check_memory("--batch=8", 4 << 30)


def test_table(capsys):
    assert main(["bench", "moe", "--sizes=32,8,8,2", "--repeats=1", "--dtype=bfloat16"]) == 0
    head, columns, *lines = capsys.readouterr().out.splitlines()
    assert head == "S=32 M=8 F=8 E=2, uniform load, bfloat16"
    assert columns.split() == [
        "backend",
        "median",
        "min",
        "max",
        "x",
        "dense",
        "peak",
        "GB/s",
        "dropped",
    ]
    assert [line.split()[0] for line in lines[:2]] == ["dense", "gather"]


def test_decode(capsys, monkeypatch):
    """A model, its dense base and a larger dense one."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    settings = ["length=128", "d_model=16", "heads=4", "d_ff=24", "vocab_size=300"]
    command = ["bench", "decode", f"--config={tiny.__file__}:2 layers, E=3, residual"]
    command += [f"--config.model.{setting}" for setting in settings]
    command += ["--config.data.tokenizer=bytes", "--repeats=2", "--batch=3", "--weights=int8"]
    assert main([*command, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["model"] for row in rows] == [
        "2 layers, E=3, residual", "dense base", "dense, 5 times as active"
    ]  # fmt: skip
    model, base, larger = rows
    assert model["active_params"] > base["params"] == base["active_params"]
    assert 1 < larger["params"] / (5 * model["active_params"]) < 1.6
    for row in rows:
        assert row["batch"] == 3
        assert 0 < row["min_ms"] <= row["ms_per_token"] <= row["max_ms"]
        assert row["tokens_per_s"] == pytest.approx(3000 / row["ms_per_token"])
    assert main([*command, "--prompt=120"]) == 2
    assert (
        "and 16 tokens more must fit model.length=128; use --prompt=112" in capsys.readouterr().err
    )
    assert main([*command, "--batch=0"]) == 2
    assert "--repeats and --batch must be 1 or more" in capsys.readouterr().err
    assert {row["mesh"] for row in rows} == {"one device"}
    assert main([*command, "--mesh=expert:3"]) == 2
    assert "mesh.expert=3 makes 3 devices, there are 1" in capsys.readouterr().err


DECODE = ["decode", f"--config={tiny.__file__}:2 layers, E=3", "--config.model.length=128"]


@pytest.mark.parametrize("load", LOADS)
def test_loads(load):
    """The router sends its tokens where the load says, within sampling error."""
    size = moe.Size(S=4000, M=64, F=8, E=8)
    x_SxM, w_MxE = moe.loaded_input(size, load)
    share_E = np.bincount((x_SxM @ w_MxE).argmax(1), minlength=8) / size.S
    expected_E = {
        "uniform": np.ones(8),
        "zipf": 1 / np.arange(1, 9),
        "skewed": np.array((225, 169, 121, 81, 49, 25, 9, 1)),
    }[load]
    np.testing.assert_allclose(share_E, expected_E / expected_E.sum(), atol=0.03)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["moe", "--sizes=4096,512"], "--sizes=4096,512 must be four counts S,M,F,E such as"),
        (["moe", "--sizes=a,b,c,d"], "--sizes=a,b,c,d must be four counts S,M,F,E such as"),
        (["moe", "--sizes=64,8,16,0"], "--sizes=64,8,16,0 must be four counts above 0"),
        (["moe", f"--sizes=64,8,16,{10**20}"], f"{10**20} must be four counts S,M,F,E such as"),
        (["moe", "--sizes=64,8,16,٤"], "--sizes=64,8,16,٤ must be four counts S,M,F,E such as"),
        (
            ["moe", "--sizes=64,99999999,99999999,2"],
            "--sizes=64,99999999,99999999,2 needs 149,011,633 GiB or more, there are",
        ),
        (["moe", "--sizes=99999999,8,8,2"], "--sizes=99999999,8,8,2 needs 37,252,906 GiB or more"),
        (["moe", "--repeats=-3"], "--repeats=-3 must be 1 or more"),
        (["moe", "--topology="], "--topology= is unknown; use one of"),
        ([*DECODE, "--repeats=0"], "--repeats and --batch must be 1 or more"),
        ([*DECODE, "--batch=8", "--batch=-1"], "--repeats and --batch must be 1 or more"),
        ([*DECODE, f"--batch={10**20}"], f"--batch={10**20} needs "),
        (["decode", "--config=paper:moe_24b"], "--config needs 3,"),
        ([*DECODE, "--prompt=0"], "--prompt=0 and 16 tokens more must fit model.length=128; use"),
        ([*DECODE, f"--prompt={10**20}"], f"--prompt={10**20} and 16 tokens more must fit model"),
        (
            [*DECODE, "--config.model.length=16"],
            "model.length=16 has no room for 16 tokens after a prompt; use 17 or more",
        ),
        ([*DECODE, "--mesh="], "--mesh= must be axes and their devices such as expert:4,tensor:2"),
        ([*DECODE, "--mesh=expert:0"], "--mesh=expert:0 must be axes and their devices"),
        ([*DECODE, "--mesh=expert:-1"], "--mesh=expert:-1 must be axes and their devices"),
        ([*DECODE, "--mesh=expert:٢"], "--mesh=expert:٢ must be axes and their devices"),
        ([*DECODE, "--mesh=data:1,data:1"], "--mesh=data:1,data:1 must be axes and their devices"),
        ([*DECODE, f"--mesh=expert:{10**20}"], f"--mesh=expert:{10**20} must be axes"),
        (
            [*DECODE, "--mesh=expert_inner:999999999"],
            "mesh.expert=1: mesh.expert_inner=999999999 exceeds it; use mesh.expert_inner=1",
        ),
        (
            [*DECODE, "--mesh=data:999999999,tensor:999999999"],
            "mesh.data=999999999 x mesh.tensor=999999999 makes 999999998000000001 devices, there",
        ),
        ([*DECODE, "--config.moe.router=expert_choice"], "moe.router=expert_choice"),
        (["moe", "--sizes=8,8,8,16", "--repeats=0"], "--repeats=0 must be 1 or more"),
        (["attention"], "invalid choice: 'attention'"),
        (["moe", "--topology=v9:4x4"], "--topology=v9:4x4 is unknown; use one of"),
        (["moe", "--topology=h100:1x8"], "--topology=h100:1x8: the compiler estimates cycles for"),
        (["moe", "--topology=2xv5e:2x2"], "--topology=2xv5e:2x2: a layer's exchange stays in a"),
        (["moe", "--topology=v5e:2x2", "--load=zipf"], "--load has no effect with --topology"),
        (["moe", "--topology=v5e:2x2", "--repeats=3"], "--repeats has no effect with --topology"),
    ],
)
def test_mistakes(arguments, message, capsys, monkeypatch):
    """Before any model is made."""
    monkeypatch.setattr(
        "prmoe_jax.bench.decode.init_sharded", lambda *_: pytest.fail("a model was made")
    )
    assert main(["bench", *arguments]) == 2
    line = only_line(capsys.readouterr().err)
    assert line.startswith("prmoe: ")
    assert message in line


def test_every_mesh_is_checked_before_a_model_is_made(capsys, monkeypatch):
    monkeypatch.setattr(
        "prmoe_jax.bench.decode.init_sharded", lambda *_: pytest.fail("a model was made")
    )
    assert main(["bench", *DECODE, "--mesh=data:1", "--mesh=data:3"]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("prmoe: mesh.data=3 makes 3 devices, there are 1;")


@needs_extra("tpu", "libtpu")
def test_cycles_by_the_real_compiler():
    """A layer over four chips that aren't there: one-hot products cost more than slots."""
    command = [sys.executable, "-m", "prmoe_jax", "bench", "moe", "--topology=v5e:2x2", "--json"]
    done = subprocess.run(
        [*command, "--sizes=1024,256,1024,16"], capture_output=True, text=True, check=True
    )
    dense, gather, einsum = json.loads(done.stdout)
    assert [row["backend"] for row in (dense, gather, einsum)] == ["dense", "gather", "einsum"]
    assert dense["ratio_to_dense"] == 1 < gather["ratio_to_dense"] < einsum["ratio_to_dense"]
    # Six products of 1024 tokens by 256 x 1024, on four matrix units of 128 x 128.
    assert dense["cycles"] > 6 * 1024 * 256 * 1024 / (4 * 128 * 128)
    assert gather["modelled_s"] == gather["cycles"] / 1.5e9


STEP = ["length=32", "d_model=16", "heads=2", "d_ff=24", "vocab_size=384", "dtype=float32"]


def bench_step(text, *more):
    command = ["bench", "step", f"--config={tiny.__file__}:{text}", "--repeats=2"]
    command += [f"--config.model.{setting}" for setting in STEP]
    return [*command, "--config.data.tokenizer=bytes", "--config.train.batch_size=4", *more]


def test_step(capsys, monkeypatch):
    """Ours alone where PyTorch isn't installed; as a table as well."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    # The mesh and the exchange over it have no effect on one device.
    spread = ["execution.exchange=hierarchical", "mesh.expert=4", "mesh.expert_inner=2"]
    spread = [f"--config.{setting}" for setting in spread]
    assert main(bench_step("2 layers, E=4, residual", "--json", *spread)) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["backend"], row["architecture"]) == ("prmoe_jax", "2 layers, E=4, residual")
    assert 0 < row["min_s"] <= row["median_s"] <= row["max_s"] and row["peak_bytes"] > 0
    assert row["tokens_per_s"] == pytest.approx(4 * 32 / row["median_s"])
    assert 0 < row["share_of_peak"] < 1
    assert main(bench_step("2 layers")) == 0
    head, columns, line = capsys.readouterr().out.splitlines()
    sizes = "d_model 16, d_ff 24, vocabulary 384, 4 x 32 tokens, accumulate 1"
    assert head.startswith(f"2 layers; {sizes}, adamw, ")
    assert columns.split()[:3] == ["backend", "products", "tokens/s"]
    assert line.split()[:2] == ["prmoe_jax", "float32"]
    assert main(bench_step("2 layers", "--repeats=0")) == 2
    assert "--repeats=0 must be 1 or more" in capsys.readouterr().err


@needs_extra("interop", "deepspeed")
def test_a_layer_beside_deepspeeds(capsys):
    assert main(["bench", "moe", "--sizes=64,8,16,4", "--repeats=1", "--json"]) == 0
    rows = {row["backend"]: row for row in json.loads(capsys.readouterr().out)}
    for name in ("deepspeed", "deepspeed, memory kept"):
        assert rows[name]["drop_fraction"] == rows["gather"]["drop_fraction"] > 0
        assert rows[name]["median_s"] > 0 and rows[name]["peak_bytes"] > 10**7


@needs_extra("interop", "transformers")
def test_decoding_beside_transformers(capsys):
    sizes = ["d_model=16", "heads=4", "d_ff=24", "vocab_size=300"]
    command = ["bench", *DECODE, *(f"--config.model.{size}" for size in sizes), "--repeats=1"]
    assert main([*command, "--config.data.tokenizer=bytes", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    theirs = {row["weights"]: row for row in rows if "transformers" in row["model"]}
    base = next(row for row in rows if row["model"] == "dense base")
    assert theirs.keys() == {"float32", "bfloat16"}
    for row in theirs.values():
        assert row["model"] == "transformers' GPT2LMHeadModel"
        assert row["params"] == base["params"] and row["ms_per_token"] > 0


@needs_extra("interop", "transformers")
def test_decoding_of_experts_beside_transformers(capsys):
    settings = ["d_model=16", "heads=4", "d_ff=24", "vocab_size=300", "length=128"]
    command = ["bench", "decode", f"--config={tiny.__file__}:2 layers, every 1, E=4, top 2"]
    command += [f"--config.model.{setting}" for setting in (*settings, "family=olmoe")]
    command += ["--config.moe.eval_capacity_factor=inf", "--config.data.tokenizer=bytes"]
    assert main([*command, "--repeats=1", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    theirs = {(row["model"], row["weights"]): row for row in rows if "transf" in row["model"]}
    assert set(theirs) == {
        (f"transformers' OlmoeForCausalLM, {kind}", dtype)
        for kind in ("eager", "grouped_mm")
        for dtype in ("float32", "bfloat16")
    }
    ours = next(row for row in rows if row["model"] == "2 layers, every 1, E=4, top 2")
    assert all(row["params"] == ours["params"] for row in theirs.values())


@needs_extra("interop", "deepspeed")
@pytest.mark.parametrize(
    ("text", "baseline"),
    [("2 layers", "pytorch"), ("2 layers, E=3, residual", "pytorch + deepspeed")],
)
def test_step_beside_pytorch(text, baseline, capsys):
    assert main(bench_step(text, "--config.model.dtype=bfloat16", "--json")) == 0
    rows = {row["backend"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows.keys() >= {"prmoe_jax"} | {
        baseline + form for form in ("", ", autocast", ", bfloat16 weights")
    }
    assert rows[baseline]["dtype"] == "float32"
    assert rows[f"{baseline}, autocast"]["dtype"] == "bfloat16"
    assert rows.pop("prmoe_jax, float32")["dtype"] == "float32"
    assert rows.pop("prmoe_jax")["share_of_peak"] > 0
    for row in rows.values():
        assert row["median_s"] > 0 and row["peak_bytes"] > 10**7 and row["share_of_peak"] > 0


def test_an_unfinished_build_is_refused(tmp_path, monkeypatch, capsys):
    """Torch would wait forever for the process that had begun it."""
    lock = tmp_path / "py_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert main(bench_step("2 layers, E=4, residual")) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith(f"prmoe: {lock} is there, because a process compiles DeepSpeed's")
    assert line.endswith("wait for that process, or delete the file if there is none")


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("optimizer.kind=muon", "the PyTorch step has optimizer.kind=adamw, not muon; it is left"),
        ("train.accumulate=2", "the PyTorch step has train.accumulate=1, not 2; it is left out"),
    ],
)
def test_a_step_unlike_pytorchs_is_timed_alone(setting, reason, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert main(bench_step("2 layers", f"--config.{setting}", "--json")) == 0
    out, err = capsys.readouterr()
    (row,) = json.loads(out)
    name, _, value = setting.rpartition(".")[2].partition("=")
    assert str(row["optimizer" if name == "kind" else name]) == value
    assert reason in err


def test_the_peak_memory_of_a_process_is_its_own():
    """Not that of the process that started it."""
    held = np.ones(2**26)  # 0.5 GB
    code = "from prmoe_jax.bench.baselines import peak_bytes; print(peak_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert 2**20 < int(done.stdout) < held.nbytes < peak_bytes()


def test_the_memory_of_a_cache_of_shared_keys(monkeypatch):
    """Keys and values of 2 of 8 heads, in float32; and the largest model."""
    asked = []
    monkeypatch.setattr(decode, "check_memory", lambda what, size: asked.append((what, size)))
    config = tiny.get_config("3 layers")
    config.model.d_model, config.model.heads, config.model.kv_heads = 64, 8, 2
    config.model.length = 4096
    models = [resolve(tiny.get_config(f"{layers} layers")) for layers in (2, 4, 3)]
    decode._check_memory(resolve(config), models, 40, 1984)
    room = decode.room(1984, decode.STEPS)
    assert asked == [
        ("--config", 4 * cost(models[1].model).total_params),
        ("--batch=40", 40 * room * 3 * (2 * 2 * 8) * 4),
    ]
