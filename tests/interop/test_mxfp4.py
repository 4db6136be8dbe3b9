"""Weights in MXFP4, as gpt-oss is released: by hand, as transformers, and in a model."""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from prmoe_jax.cli import main
from prmoe_jax.interop.hugging_face import write_hugging_face
from prmoe_jax.interop.tensors import unpacked
from prmoe_jax.model.transformer import init_model
from prmoe_jax.nn.parameters import named_leaves
from prmoe_jax.run.restore import restore_run
from tests.support.configs import settings
from tests.support.extras import needs_extra
from tests.support.lines import only_line
from tests.support.tokenizers import byte_tokenizer


def test_numbers_by_hand():
    """Two rows of one group: all 16 codes twice, and single codes with other scales."""
    blocks_1x2x1x16 = np.zeros((1, 2, 1, 16), np.uint8)
    blocks_1x2x1x16[0, 0, 0] = [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 2
    blocks_1x2x1x16[0, 1, 0, 15] = 0xA3  # 1.5, then -1
    w_1x32x2 = unpacked(blocks_1x2x1x16, np.array([[[127], [129]]], np.uint8))
    codes = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    np.testing.assert_array_equal(w_1x32x2[0, :, 0], [*codes, *np.negative(codes)] * 2)
    np.testing.assert_array_equal(w_1x32x2[0, :, 1], [0] * 30 + [6, -4])
    smallest = unpacked(blocks_1x2x1x16, np.zeros((1, 2, 1), np.uint8))
    assert smallest[0, 1, 0] == 2.0**-128
    assert np.isnan(unpacked(blocks_1x2x1x16, np.full((1, 2, 1), 255, np.uint8))).all()


def packed(shape_ExDxF, seed):
    """Random blocks and scales of weights [E, D, F]."""
    rng, (e, d, f) = np.random.default_rng(seed), shape_ExDxF
    blocks_ExFxGx16 = rng.integers(0, 256, (e, f, d // 32, 16), np.uint8)
    return blocks_ExFxGx16, rng.integers(118, 124, (e, f, d // 32), np.uint8)


@needs_extra("interop", "transformers")
def test_numbers_are_those_of_transformers():
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks_ExFxGx16, scales_ExFxG = packed((3, 96, 7), 0)
    theirs = convert_moe_packed_tensors(
        torch.tensor(blocks_ExFxGx16), torch.tensor(scales_ExFxG), dtype=torch.float32
    )
    np.testing.assert_array_equal(unpacked(blocks_ExFxGx16, scales_ExFxG), theirs.numpy())


@pytest.fixture
def source(tmp_path):
    """A folder with a small gpt-oss, whose experts' weights are in MXFP4; and these weights."""
    sizes = {"d_model": 64, "d_ff": 32, "heads": 4, "kv_heads": 2, "vocab_size": 290}
    config = settings("2 layers, every 1, E=3, top 2", model={"family": "gpt_oss"} | sizes)
    leaves = jax.tree.map(np.asarray, named_leaves(init_model(config)))
    folder = tmp_path / "released"
    folder.mkdir()
    write_hugging_face(config, "gpt_oss", leaves, byte_tokenizer(), {}, folder)
    tensors, weights = load_file(folder / "model.safetensors"), {}
    for seed, name in enumerate(n for n in list(tensors) if n.endswith(("up_proj", "down_proj"))):
        blocks, scales = packed(tensors.pop(name).shape, seed)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        weights[name] = unpacked(blocks, scales)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder, weights


def imported(folder, workdir):
    return main(["import", "--kind=hf", f"--source={folder}", f"--workdir={workdir}"])


def test_a_model_in_and_out_again(source, tmp_path):
    """Gates and inputs are every second column; an export has the same numbers unpacked."""
    folder, weights = source
    run, out = tmp_path / "run", tmp_path / "out"
    assert imported(folder, run) == 0
    leaves = named_leaves(restore_run(run)[2])
    for layer in range(2):
        both_ExDx2F = weights[f"model.layers.{layer}.mlp.experts.gate_up_proj"]
        for number, name in enumerate(("w_gate", "w_in")):
            ours = leaves[f"stages.0.blocks.0.mlp.experts.{name}"][layer]
            np.testing.assert_array_equal(ours, both_ExDx2F[..., number::2])
    assert main(["export", "--kind=hf", f"--workdir={run}", f"--out={out}"]) == 0
    written = load_file(out / "model.safetensors")
    for name, array in weights.items():
        np.testing.assert_array_equal(written[name].astype(np.float32), array)


NAME = "model.layers.1.mlp.experts.down_proj"
DAMAGES = {
    "no scales": (lambda t: t.pop(f"{NAME}_scales"), "they are (3, 64, 1, 16) and ()"),
    "other scales": (
        lambda t: t.update({f"{NAME}_scales": t[f"{NAME}_scales"][:, 1:]}),
        "they are (3, 64, 1, 16) and (3, 63, 1)",
    ),
    "no groups": (
        lambda t: t.update({f"{NAME}_blocks": t[f"{NAME}_blocks"].reshape(-1)}),
        f"'{NAME}' is no weight in MXFP4, whose blocks have the shape of its scales and 16 bytes",
    ),
    "no blocks": (lambda t: t.pop(f"{NAME}_blocks"), f"lacks {NAME}"),
    "numbers, not bytes": (
        lambda t: t.update({f"{NAME}_scales": t[f"{NAME}_scales"].astype(np.float32)}),
        f"'{NAME}_scales' holds F32; weights are U8",
    ),
    "NaN": (
        lambda t: t.update({f"{NAME}_scales": np.full_like(t[f"{NAME}_scales"], 255)}),
        f"'{NAME}_blocks' holds NaN, infinity or numbers too large for float32",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_no_mxfp4(damage, source, tmp_path, capsys):
    change, message = DAMAGES[damage]
    folder, _ = source
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(
        {n: np.ascontiguousarray(x) for n, x in tensors.items()}, folder / "model.safetensors"
    )
    assert imported(folder, tmp_path / "run") == 2
    assert message in only_line(capsys.readouterr().err)
    assert not (tmp_path / "run").exists()
