"""Matrix products with weights: of few rows, in fewer bits, and their derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prmoe_jax.nn.matmul import matmul, scores
from prmoe_jax.nn.quantized import QuantizedWeight, quantize


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_products_of_few_rows(kind, monkeypatch):
    """By parts, by slices and at once, they are the held weights'; those near the given."""
    monkeypatch.setattr("prmoe_jax.nn.matmul.LARGEST", 100)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(20, 3, 4)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(3, 4, 2, 5)), jnp.float32)

    def hold(w, summed):
        return w if kind == "float32" else quantize(w, kind, summed)

    def wide(held):
        return held.dequantize(jnp.float32) if isinstance(held, QuantizedWeight) else held

    held = hold(w, (-4, -3))
    error = {
        "float32": 0,
        "bfloat16": jnp.abs(w) / 256,
        "int8": jnp.abs(w).max((0, 1)) / 254 * 1.001,
    }[kind]
    assert (jnp.abs(wide(held) - w) <= error).all()
    table = hold(jnp.asarray(rng.normal(size=(14, 12)), jnp.float32), (-1,))
    for rows in (1, 16, 20):
        expected = np.einsum("rab,abcd->rcd", x[:rows], wide(held))
        np.testing.assert_allclose(matmul(x[:rows], held, axes=2), expected, rtol=1e-5, atol=1e-5)
        flat = x[:rows].reshape(rows, 12)
        expected = flat @ wide(table).T
        np.testing.assert_allclose(scores(flat, table), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("x_shape", "w_shape", "axes"),
    [
        ((3, 7, 5), (5, 11), 1),  # the weight is wider than deep
        ((3, 7, 11), (11, 5), 1),  # deeper than wide
        ((3, 7, 5), (5, 2, 3), 1),  # two axes of outputs
        ((3, 7, 2, 3), (2, 3, 5), 2),  # two axes to sum over
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_derivatives_equal_those_of_tensordot(x_shape, w_shape, axes, dtype):
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in (x_shape, w_shape))
    x = x.astype(dtype)

    def gradients(product):
        def loss(x, w):
            return jnp.sin(product(x, w).astype(jnp.float32)).sum()

        return jax.jit(jax.grad(loss, (0, 1)))(x, w)

    ours = gradients(lambda x, w: matmul(x, w, axes))
    expected = gradients(lambda x, w: jnp.tensordot(x, w.astype(dtype), axes))
    tolerance = 1e-6 if dtype == "float32" else 0.01
    for got, wanted in zip(ours, expected, strict=True):
        assert got.dtype == wanted.dtype
        got, wanted = (np.asarray(value, np.float32) for value in (got, wanted))
        np.testing.assert_allclose(got, wanted, atol=tolerance * np.abs(wanted).max())


def test_int8_in_bfloat16_rounds_once():
    """A rounded scale would make all of a channel's weights too large or too small by 0.2 %."""
    w_DxF = jax.random.normal(jax.random.key(0), (4096, 64))
    held_DxF = quantize(w_DxF, "int8", (-2,)).dequantize(jnp.bfloat16).astype(jnp.float32)
    gain_F = (held_DxF * w_DxF).sum(0) / jnp.square(w_DxF).sum(0)
    np.testing.assert_allclose(gain_F, 1, atol=1e-3)
