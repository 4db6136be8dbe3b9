"""Megatron-DeepSpeed's checkpoints against what DeepSpeed itself wrote and computed.

The golden file holds the tensors of such a checkpoint (goldens/generate_megatron.py); where
DeepSpeed is installed, its files themselves are read, and it reads ours.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from prmoe_jax.cli import main
from prmoe_jax.data.tokenizer import _bytes
from prmoe_jax.errors import UserError
from prmoe_jax.evaluate import restore_run
from prmoe_jax.interop import deepspeed, torch_files
from prmoe_jax.model import Transformer, resolve_backends
from prmoe_jax.step import init_model
from prmoe_jax.tree import named_leaves

SCRIPT = Path(__file__).parent / "goldens" / "generate_megatron.py"
PREFIX = "language_model.encoder.layers."
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
    factor = config.moe.eval_capacity_factor
    x_BxLxD, _ = model(ids, np.ones_like(ids), capacity_factor=factor)
    return np.asarray(model.logits(x_BxLxD))


def test_logits_and_every_bit_back(golden):
    """A pyramid with residuals: DeepSpeed's logits; and of each of its files each tensor."""
    config, leaves, found = deepspeed.converted(*parts(golden), Path("there"))
    assert found.startswith("90 tensors read, none missing")
    model = config.model
    assert (model.placement, model.experts, model.residual) == ("layers 1 3", (3, 5), True)
    assert (config.moe.eval_capacity_factor, config.moe.overflow) == (5.0, "random")
    config = resolve_backends(config, "cpu")
    shapes = jax.eval_shape(lambda: init_model(config))
    whole = jax.tree.unflatten(
        jax.tree.structure(shapes), [leaves[name] for name in named_leaves(shapes)]
    )
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
    "hole": ({}, {PREFIX + "7.mlp.more": np.ones(1)}, "holds the layers [0, 1, 2, 3, 7] of"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_ours_would_compute_otherwise(name, golden):
    arrays, arguments = parts(golden)
    changed, tensors, message = REFUSED[name]
    arrays = {name: x for name, x in (arrays | tensors).items() if x is not None}
    with pytest.raises(UserError) as error:
        deepspeed.converted(arrays, arguments | changed, Path("there"))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_torch_is_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch_files.importlib.util, "find_spec", lambda name: None)
    _bytes().save(tmp_path / "tokenizer.json")
    command = ["import", "--kind=deepspeed", f"--source={tmp_path}", f"--workdir={tmp_path / 'r'}"]
    assert main(command) == 2
    assert "DeepSpeed's checkpoints are torch files: pip install torch" in capsys.readouterr().err


needs_deepspeed = pytest.mark.skipif(
    not importlib.util.find_spec("deepspeed"), reason="needs the extra [interop]"
)


def script(*options):
    # Another port than one that a test beside this one may have.
    environment = os.environ | {"MASTER_PORT": str(29600 + os.getpid() % 300)}
    subprocess.run([sys.executable, SCRIPT, *options], check=True, env=environment, timeout=600)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """What DeepSpeed's engine wrote, with a tokenizer beside it; and its golden file."""
    folder = tmp_path_factory.mktemp("deepspeed")
    script(f"--checkpoint={folder / 'checkpoint'}", f"--out={folder}")
    _bytes().save(folder / "checkpoint" / "tokenizer.json")
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


def saved(path, change):
    import torch

    content = torch.load(path, weights_only=False)
    torch.save(change(content), path)


MAIN = deepspeed.MAIN
EXPERT_FILE = "layer_1_expert_4_mp_rank_00_model_states.pt"
HOSTILE = {
    "payload": (
        lambda step: saved(step / MAIN, lambda x: x | {"more": Payload()}),
        f"{MAIN} calls posix.system, which no checkpoint needs; nothing of it was run",
    ),
    "payload of an expert": (
        lambda step: saved(step / EXPERT_FILE, lambda x: x | {"more": Payload()}),
        f"{EXPERT_FILE} calls posix.system",
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
    "lost": (lambda step: (step / EXPERT_FILE).unlink(), f" lacks {PREFIX}3.mlp.deepspeed_moe"),
    "no main file": (lambda step: (step / MAIN).unlink(), f"{MAIN} is missing"),
    "elsewhere": (
        lambda step: (step.parent / "latest").write_text("../other"),
        "names '../other', which isn't beside it",
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
