"""Our parameters in another library's layouts: by hand, and back to the last bit."""

import numpy as np
import pytest

from prmoe_jax.interop import deepspeed, families
from prmoe_jax.interop.mapping import Table, pieces
from prmoe_jax.nn.parameters import declaration

SIZES = {"V": 23, "L": 19, "D": 17, "H": 13, "J": 11, "K": 7, "F": 5, "E": 3, "2": 2, "3": 3}
TABLES = {
    "gpt2": families.GPT2,
    "deepspeed": deepspeed.TABLE,
    "llama": families.LLAMA,
    "qwen2_moe": families.QWEN2_MOE,
    "gpt_oss": families.GPT_OSS,
}


def numbered(name):
    """A parameter whose numbers tell their places."""
    shape = [SIZES[letter] for letter in declaration(name).dims]
    return np.arange(np.prod(shape)).reshape(shape)


def test_layouts_by_hand():
    w_Dx3xHxK, w_ExDxF = numbered("attention.w_qkv"), numbered("experts.w_in")
    table = Table({"attention.w_qkv": ("qkv", "H3K D")}, "layer {} ", "the ")
    (whole,) = pieces(table, "layers.4.attention.w_qkv", w_Dx3xHxK.shape)
    assert whole.name == "the layer 4 qkv" and whole.shape == (13 * 3 * 7, 17)
    assert whole.to_theirs(w_Dx3xHxK)[(5 * 3 + 2) * 7 + 4, 9] == w_Dx3xHxK[9, 2, 5, 4]

    table = Table({"attention.w_qkv": ("{}", "HK D"), "mlp.experts.w_in": ("{}", "F D")}, "")
    parts = pieces(table, "layers.4.attention.w_qkv", w_Dx3xHxK.shape)
    assert [part.name for part in parts] == ["q", "k", "v"]
    assert parts[1].to_theirs(w_Dx3xHxK[parts[1].index])[5 * 7 + 4, 9] == w_Dx3xHxK[9, 1, 5, 4]
    parts = pieces(table, "layers.4.mlp.experts.w_in", w_ExDxF.shape)
    assert [part.name for part in parts] == ["0", "1", "2"]
    np.testing.assert_array_equal(parts[2].to_theirs(w_ExDxF[parts[2].index]), w_ExDxF[2].T)


def test_two_parameters_in_one_tensor():
    """Every second number of the last dimension is the other's."""
    w_ExDxF = numbered("experts.w_in")
    table = Table({"mlp.experts.w_in": ("both", "E D F2", 1)}, "")
    (half,) = pieces(table, "layers.4.mlp.experts.w_in", w_ExDxF.shape)
    assert half.shape == (3, 17, 2 * 5) and not half.whole
    theirs = np.full(half.shape, -1)
    half.in_theirs(theirs)[...] = w_ExDxF
    np.testing.assert_array_equal(theirs[..., 1::2], w_ExDxF)
    assert (theirs[..., ::2] == -1).all()


@pytest.mark.parametrize("name", TABLES)
def test_every_parameter_there_and_back(name):
    for ours in TABLES[name].parameters:
        array = numbered(ours)
        back = np.full_like(array, -1)
        for piece in pieces(TABLES[name], ours, array.shape):
            if piece.whole:
                theirs = piece.to_theirs(array[piece.index])
            else:
                theirs = np.full(piece.shape, -1)
                piece.in_theirs(theirs)[...] = array[piece.index]
            assert theirs.shape == piece.shape
            back[piece.index] = piece.in_theirs(theirs)
        np.testing.assert_array_equal(back, array, err_msg=ours)
