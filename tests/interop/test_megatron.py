"""Megatron-DeepSpeed's checkpoints against what DeepSpeed itself wrote and computed.

The golden file holds the tensors of such a checkpoint (goldens/generate_megatron.py); where
DeepSpeed is installed, its files themselves are read, and it reads ours.
"""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from prmoe_jax.cli import main
from prmoe_jax.errors import UserError
from prmoe_jax.interop import deepspeed, torch_files
from prmoe_jax.model.transformer import Transformer, init_model
from prmoe_jax.nn.parameters import from_named
from prmoe_jax.run.restore import restore_run
from tests.support.configs import settings
from tests.support.extras import needs_extra
from tests.support.paths import GOLDENS
from tests.support.tokenizers import byte_tokenizer

needs_torch = needs_extra("interop", "torch")
needs_deepspeed = needs_extra("interop", "deepspeed")
SCRIPT = GOLDENS / "generate_megatron.py"
PREFIX = "language_model.encoder.layers."
TOKENS = "language_model.embedding.word_embeddings.weight"
GATE = PREFIX + "3.mlp.deepspeed_moe.gate.wg.weight"
EXPERT = PREFIX + "3.mlp.deepspeed_moe.experts.deepspeed_experts.4.dense_h_to_4h.weight"


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(SCRIPT.parent / "megatron" / "checkpoint.npz"))


def parts(golden):
    """The checkpoint's tensors by name, and Megatron's arguments."""
    arrays = {key.split("|")[1]: x for key, x in golden.items() if "|" in key}
    return arrays, json.loads(str(golden["arguments"]))


def logits(config, model: Transformer, golden):
    ids = golden["ids"].astype(np.int32)
    x_BxLxD, _ = model(ids, np.ones_like(ids))
    return np.asarray(model.logits(x_BxLxD))


def test_logits_and_every_bit_back(golden):
    """A pyramid with residuals: DeepSpeed's logits; and of each of its files each tensor."""
    config, leaves, found = deepspeed.converted(*parts(golden), Path("there"))
    assert found.startswith("90 tensors read, none missing")
    model = config.model
    assert (model.placement, model.experts, model.residual) == ("layers 1 3", (3, 5), True)
    assert (config.moe.eval_capacity_factor, config.moe.overflow) == (5.0, "random")
    shapes = jax.eval_shape(lambda: init_model(config))
    whole = from_named(leaves, shapes)
    np.testing.assert_allclose(logits(config, whole, golden), golden["logits"], atol=1e-5)

    written = deepspeed.files(config, leaves)
    flat = {f"{file}|{name}": x for file, xs in written.items() for name, x in xs.items()}
    assert flat.keys() == {key for key in golden if "|" in key}
    for key, array in flat.items():
        np.testing.assert_array_equal(array, golden[key], err_msg=key)


REFUSED = {
    "tensor parallel": ({"tensor_model_parallel_size": 2}, {}, "tensor_model_parallel_size=2, our"),
    "norm": ({"normalization": "rmsnorm"}, {}, "normalization='rmsnorm', our model has 'layernorm"),
    "grouped": ({"num_key_value_heads": 1}, {}, "num_key_value_heads=1, our model has 2"),
    "gelu": ({"bias_gelu_fusion": False}, {}, "bias_gelu_fusion=False means the exact GELU"),
    "heads": ({"num_attention_heads": None, "num_key_value_heads": None}, {}, "there: no usable "),
    "odd heads": (
        {"num_attention_heads": 3, "num_key_value_heads": 3}, {}, "model.d_model=16 is not divisi"
    ),
    "no top k": ({"topk": None}, {}, "there: no usable "),
    "lost expert": ({}, {EXPERT: None}, f"there lacks {EXPERT}"),
    "shape": ({}, {EXPERT: np.ones((20, 15))}, f"{EXPERT} has shape (20, 15), not (20, 16)"),
    "extra": ({}, {PREFIX + "0.mlp.more": np.ones(1)}, "has what this architecture doesn't: "),
    "hole": ({}, {PREFIX + "7.mlp.more": np.ones(1)}, "has what this architecture doesn't: "),
    # Arguments of other types and sizes.
    **{
        f"{name}={value!r:.20}": ({name: value}, {}, f"there: no usable {name}: it is ")
        for name, values in {
            "topk": ("a", 0, 1.5, True, [1]),
            "mlp_type": (["residual"], 1, None),
            "ffn_hidden_size": (0, -20, "x", 20.0),
            "moe_train_capacity_factor": ("x", math.nan, math.inf, -1.0, 10**400),
            "moe_min_capacity": (None, 4.5),
            "moe_token_dropping": ("no", 0),
            "hidden_dropout": ("x", [0.1]),
            "bias_gelu_fusion": ("x", [True]),
        }.items()
        for value in values
    },
    "heads in a list": ({"num_attention_heads": [2]}, {}, "num_key_value_heads=2, our model has ["),
    "all heads": (
        {"num_attention_heads": 10**20, "num_key_value_heads": None}, {}, "there: no usable num_att"
    ),
    "digits": ({"moe_min_capacity": 10**5000}, {}, "no usable moe_min_capacity: it is int, not a"),
    "kind of MLP": ({"mlp_type": "resid"}, {}, "mlp_type='resid' is not standard or residual"),
    "hidden width": ({"ffn_hidden_size": 10**9}, {}, "there: language_model.encoder.layers.0.mlp."),
    "too many": ({"topk": 4}, {}, "model.top_k=4 exceeds the 3 experts of the smallest MoE layer"),
    "epsilon": ({"layernorm_epsilon": np.ones(2)}, {}, "layernorm_epsilon=array([1., 1.]), our mo"),
    # Tensors of other shapes.
    "gate of 0-d": ({}, {GATE: np.float32(1)}, f"{GATE}: its shape is (), not a matrix's"),
    "gate of 1-d": ({}, {GATE: np.ones(5)}, f"{GATE}: its shape is (5,), not a matrix's"),
    "gate of 3-d": ({}, {GATE: np.ones((1, 5, 16))}, "its shape is (1, 5, 16), not a matrix's"),
    "gate of nothing": ({}, {GATE: np.ones((10**9, 0))}, "its shape is (1000000000, 0), not a mat"),
    "gate of others": ({}, {GATE: np.ones((4, 16))}, "has what this architecture doesn't: "),
    "tokens of 1-d": ({}, {TOKENS: np.ones(300)}, f"{TOKENS}: its shape is (300,), not a matrix's"),
    "no tokens": ({}, {TOKENS: None}, f"there lacks {TOKENS}"),
    "long number": ({}, {PREFIX + "9" * 5000 + ".x": np.ones(1)}, "has what this architecture doe"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_ours_would_compute_otherwise(name, golden):
    arrays, arguments = parts(golden)
    changed, tensors, message = REFUSED[name]
    arrays = {name: x for name, x in (arrays | tensors).items() if x is not None}
    with pytest.raises(UserError) as error:
        deepspeed.converted(arrays, arguments | changed, Path("there"))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("top_k", "overflow"), [(1, "random"), (2, "position"), (3, "probability")]
)
def test_whom_a_full_expert_keeps(top_k, overflow, golden, monkeypatch, caplog):
    """As DeepSpeed's gate does by default; another way is told of where a run is exported."""
    arrays, arguments = parts(golden)
    config, *_ = deepspeed.converted(arrays, arguments | {"topk": top_k}, Path("there"))
    assert (config.model.top_k, config.moe.overflow) == (top_k, overflow)
    monkeypatch.setattr(deepspeed, "require_torch", lambda: None)
    deepspeed.check_exportable(config)
    assert not caplog.text
    for other in {"random", "position", "probability"} - {overflow}:
        moe = dataclasses.replace(config.moe, overflow=other)
        deepspeed.check_exportable(dataclasses.replace(config, moe=moe))
        told = f"moe.overflow={other}: DeepSpeed's layer drops as overflow={overflow}"
        assert told in caplog.text
    caplog.clear()
    dense = dataclasses.replace(config.model, experts=(), placement="none")
    other = dataclasses.replace(config.moe, overflow="probability")
    deepspeed.check_exportable(dataclasses.replace(config, model=dense, moe=other))
    assert not caplog.text


UNKNOWN_THERE = {
    "moe.router=expert_choice": ({}, {"router": "expert_choice"}),
    "moe.scores=sigmoid": ({}, {"scores": "sigmoid"}),
    "moe.routed_scale=2.0": ({}, {"routed_scale": 2.0}),
    "moe.bias_update_rate=0.1": ({}, {"bias_update_rate": 0.1}),
    "DeepSpeed's layer drops tokens in both": ({}, {"capacity_factor": math.inf}),
    "model.norm=rmsnorm": ({"norm": "rmsnorm"}, {}),
    "model.norm_eps=1e-06": ({"norm_eps": 1e-6}, {}),
    "model.positions=rotary": ({"positions": "rotary"}, {}),
    "model.kv_heads=1": ({"kv_heads": 1}, {}),
    "model.sliding_window=3": ({"sliding_window": 3}, {}),
    "model.expert_d_ff=7": ({"expert_d_ff": 7}, {}),
}


@pytest.mark.parametrize("message", UNKNOWN_THERE)
def test_what_deepspeed_does_not_express_is_named(message, monkeypatch):
    monkeypatch.setattr(deepspeed, "require_torch", lambda: None)
    model, moe = UNKNOWN_THERE[message]
    with pytest.raises(UserError) as error:
        deepspeed.check_exportable(settings("2 layers, E=3", model=model, moe=moe))
    assert message in str(error.value)
    deepspeed.check_exportable(settings("2 layers, E=3"))


def test_torch_is_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch_files.importlib.util, "find_spec", lambda name: None)
    byte_tokenizer().save(tmp_path / "tokenizer.json")
    command = ["import", "--kind=deepspeed", f"--source={tmp_path}", f"--workdir={tmp_path / 'r'}"]
    assert main(command) == 2
    assert "DeepSpeed's checkpoints are torch files: pip install torch" in capsys.readouterr().err


def cyclic(torch):
    state = {"x": torch.ones(2)}
    return state | {"again": state, "more": {"again": state}}


# What a file may hold that is no weight, and the message.
TENSORS = {
    "NaN": (lambda t: {"a": {"b": t.tensor([1, math.nan])}}, "'a.b' holds NaN, infinity or number"),
    "infinity": (lambda t: {"a": t.tensor(math.inf).bfloat16()}, "'a' holds NaN, infinity or numb"),
    "beyond float32": (lambda t: {"a": t.tensor(1e39, dtype=t.float64)}, "'a' holds NaN, infinity"),
    "int64": (lambda t: {"a": t.ones(2, dtype=t.int64)}, "'a' holds torch.int64; weights are torc"),
    "complex": (lambda t: {"a": t.ones(2, dtype=t.complex64)}, "'a' holds torch.complex64; weight"),
    "bool": (lambda t: {"a": t.ones(2, dtype=t.bool)}, "'a' holds torch.bool; weights are"),
    "fp8": (lambda t: {"a": t.ones(2).to(t.float8_e4m3fn)}, "'a' holds torch.float8_e4m3fn; weigh"),
    "huge": (lambda t: {"a": t.ones(1).expand(10**12)}, "'a' is larger than the file"),
    "sparse": (lambda t: {"a": t.eye(3).to_sparse()}, "'a' is no plain tensor: "),
    "no numbers": (lambda t: {"a": t.ones(3, device="meta")}, "'a' is no plain tensor: "),
    "shared": (cyclic, "holds 'again.' twice"),
}  # fmt: skip


@needs_torch
@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_are_no_weights(name, tmp_path):
    import torch

    make, message = TENSORS[name]
    path = tmp_path / "state.pt"
    torch.save(make(torch), path)
    with pytest.raises(UserError) as error:
        torch_files.flat_arrays(torch_files.read_torch(path), path)
    assert f"{path}" in str(error.value) and message in str(error.value)
    assert "\n" not in str(error.value)


@needs_torch
def test_tensors_of_other_precision(tmp_path):
    """Parameters and every floating type that weights have, nested as deep as it gets."""
    import torch

    values = [0.5, -3.0, 2.0**-14]
    state = {
        "half": torch.tensor(values).half(),
        "brain": torch.nn.Parameter(torch.tensor(values).bfloat16()),
        "double": torch.tensor(values, dtype=torch.float64),
        "text": "no tensor",
    }
    for _ in range(3000):
        state = {"part": state}
    arrays = torch_files.flat_arrays(state, SCRIPT)
    assert {name.rpartition(".")[2] for name in arrays} == {"half", "brain", "double"}
    for array in arrays.values():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, np.float32(values))


def script(*options):
    # Another port than one that a test beside this one may have.
    environment = os.environ | {"MASTER_PORT": str(29600 + os.getpid() % 300)}
    subprocess.run([sys.executable, SCRIPT, *options], check=True, env=environment, timeout=600)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """What DeepSpeed's engine wrote, with a tokenizer beside it; and its golden file."""
    folder = tmp_path_factory.mktemp("deepspeed")
    script(f"--checkpoint={folder / 'checkpoint'}", f"--out={folder}")
    byte_tokenizer().save(folder / "checkpoint" / "tokenizer.json")
    return folder / "checkpoint"


@needs_deepspeed
def test_the_file_is_deepspeeds(checkpoint, golden):
    anew = np.load(checkpoint.parent / "checkpoint.npz")
    assert set(anew.files) == golden.keys()
    for key in golden.keys() - {"arguments", "versions"}:
        np.testing.assert_allclose(anew[key], golden[key], atol=1e-5, err_msg=key)


@needs_deepspeed
def test_deepspeed_in_and_out_again(checkpoint, tmp_path):
    """Its checkpoint becomes a run with its logits; ours, loaded by its engine, has them, too."""
    run, out = tmp_path / "run", tmp_path / "out"
    command = ["import", "--kind=deepspeed", f"--source={checkpoint}", f"--workdir={run}"]
    assert main(command) == 0
    config, _, model, _ = restore_run(run)
    theirs = np.load(checkpoint.parent / "checkpoint.npz")
    np.testing.assert_allclose(logits(config, model, theirs), theirs["logits"], atol=1e-5)
    assert main(["export", "--kind=deepspeed", f"--workdir={run}", f"--out={out}"]) == 0
    script(f"--load={out}", f"--out={tmp_path}")
    again = np.load(tmp_path / "checkpoint.npz")["logits"]
    np.testing.assert_array_equal(again, theirs["logits"])


class Payload:
    """Whoever unpickles this runs it."""

    def __reduce__(self):
        return (os.system, ("touch executed",))


def saved_as(path, content):
    import torch

    torch.save(content, path)


def saved(path, change):
    import torch

    content = torch.load(path, weights_only=False)
    torch.save(change(content), path)


MAIN = deepspeed.MAIN
EXPERT_FILE = "layer_1_expert_4_mp_rank_00_model_states.pt"
HOSTILE = {
    "payload": (
        lambda step: saved(step / MAIN, lambda x: x | {"more": Payload()}),
        f"{MAIN} calls 'posix.system', which no checkpoint needs; nothing of it was run",
    ),
    "payload of an expert": (
        lambda step: saved(step / EXPERT_FILE, lambda x: x | {"more": Payload()}),
        f"{EXPERT_FILE} calls 'posix.system'",
    ),
    "truncated": (
        lambda step: (step / EXPERT_FILE).write_bytes((step / EXPERT_FILE).read_bytes()[:3000]),
        f"{EXPERT_FILE} can't be read as torch's: ",
    ),
    "list": (lambda step: saved(step / MAIN, lambda x: [x]), f"{MAIN} holds no dict"),
    "args": (
        lambda step: saved(step / MAIN, lambda x: x | {"args": None}),
        f"{MAIN} lacks the module or the args that Megatron stores",
    ),
    "old": (
        lambda step: saved(step / MAIN, lambda x: x | {"checkpoint_version": 1.0}),
        f"{MAIN}: checkpoint_version=1.0; before 2 queries, keys and values",
    ),
    "an expert in two files": (
        lambda step: shutil.copy(step / EXPERT_FILE, step / EXPERT_FILE.replace("_4_", "_5_")),
        "layer_1_expert_5_mp_rank_00_model_states.pt belongs to no expert of this model",
    ),
    **{
        other: (
            lambda step, other=other: saved_as(step / other, {}),
            f"{other} belongs to no expert of this model, which is 4 layers, ",
        )
        for other in (
            EXPERT_FILE.replace("_4_", "_5_"),
            EXPERT_FILE.replace("rank_00", "rank_01"),
            MAIN.replace("rank_00", "rank_01"),
            "expert_4_mp_rank_00_model_states.pt",
        )
    },
    "a tensor with a hostile name": (
        lambda step: saved(
            step / EXPERT_FILE, lambda x: x | {"\x1b[2J" + "x" * 3000: next(iter(x.values()))}
        ),
        r"has what this architecture doesn't: '\x1b[2Jxx",
    ),
    "lost": (lambda step: (step / EXPERT_FILE).unlink(), f" lacks {PREFIX}3.mlp.deepspeed_moe"),
    "no main file": (lambda step: (step / MAIN).unlink(), f"{MAIN} is missing"),
    "elsewhere": (
        lambda step: (step.parent / "latest").write_text("../other"),
        "names '../other', which isn't beside it",
    ),
    "above": (
        lambda step: (step.parent / "latest").write_text(".."),
        "names '..', which isn't beside it",
    ),
    "garbage": (
        lambda step: (step.parent / "latest").write_bytes(bytes(range(256)) * 99),
        "latest names ",
    ),
    "no step": (lambda step: (step.parent / "latest").write_text("step9"), f"{MAIN} is missing"),
    "pipe": (
        lambda step: ((step.parent / "latest").unlink(), os.mkfifo(step.parent / "latest")),
        "latest is not a regular file",
    ),
    "folder": (
        lambda step: ((step / MAIN).unlink(), (step / MAIN).mkdir()),
        f"{MAIN} is not a regular file",
    ),
    "version": (
        lambda step: saved(step / MAIN, lambda x: x | {"checkpoint_version": math.nan}),
        f"{MAIN}: checkpoint_version=nan; before 2",
    ),
}


@needs_deepspeed
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(name, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint, "source")
    prepare, message = HOSTILE[name]
    prepare(Path("source/global_step1"))
    assert main(["import", "--kind=deepspeed", "--source=source", "--workdir=run"]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert message in line
    assert not Path("executed").exists() and not Path("run/config.json").exists()
