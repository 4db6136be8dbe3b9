"""Matrix products with weights: of few rows, in fewer bits, and their derivatives."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prmoe_jax.nn.matmul import cpu_scores, matmul, scores
from prmoe_jax.nn.quantized import quantize
from tests.support.quick import jit


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_products_of_few_rows(kind, monkeypatch):
    """By parts, by slices and at once, they are the stored weights'; those are near the given."""
    monkeypatch.setattr("prmoe_jax.nn.matmul.LARGEST", 100)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(20, 3, 4)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(3, 4, 2, 5)), jnp.float32)

    def wide(stored):
        return stored.dequantize(jnp.float32)

    stored = quantize(w, kind, (-4, -3))
    error = {
        "float32": 0,
        "bfloat16": jnp.abs(w) / 256,
        "int8": jnp.abs(w).max((0, 1)) / 254 * 1.001,
    }[kind]
    assert (jnp.abs(wide(stored) - w) <= error).all()
    table = quantize(jnp.asarray(rng.normal(size=(14, 12)), jnp.float32), kind, (-1,))
    for rows in (1, 16, 20):
        expected = np.einsum("rab,abcd->rcd", x[:rows], wide(stored))
        np.testing.assert_allclose(matmul(x[:rows], stored, axes=2), expected, rtol=1e-5, atol=1e-5)
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


def _with_gradients(function, dy, *arguments):
    @jit
    def run(*arguments):
        y, pull = jax.vjp(function, *arguments)
        return y, pull(dy)

    return run(*arguments)


@pytest.mark.parametrize("axes", [1, 2])
def test_bfloat16_weights_of_float32_rows(axes):
    """Factors are rounded once, and sums are exact in float32, in all three products."""
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(37, *(3, 5)[:axes])), rng.normal(size=(*(3, 5)[:axes], 11))
    dy = rng.normal(size=(37, 11))
    x, w, dy = (jnp.asarray(a, jnp.float32) for a in (x, w, dy))
    y, (dx, dw) = _with_gradients(partial(matmul, axes=axes), dy, x, w.astype(jnp.bfloat16))
    wide = [np.asarray(a.astype(jnp.bfloat16), np.float64) for a in (x, w, dy)]
    x64, w64, dy64 = wide[0].reshape(37, -1), wide[1].reshape(-1, 11), wide[2]
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.float32, jnp.float32, jnp.bfloat16)
    np.testing.assert_allclose(y, x64 @ w64, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx.reshape(37, -1), dy64 @ w64.T, rtol=1e-5, atol=1e-5)
    dw = dw.reshape(-1, 11).astype(jnp.float32)
    np.testing.assert_allclose(dw, x64.T @ dy64, rtol=2**-7, atol=1e-4)


def test_cpu_scores_have_derivatives_of_rounded_factors():
    rng = np.random.default_rng(0)
    x, table, dy = (
        jnp.asarray(rng.normal(size=shape), jnp.float32).astype(jnp.bfloat16)
        for shape in ((37, 5), (11, 5), (37, 11))
    )
    y, (dx, dtable) = _with_gradients(cpu_scores, dy.astype(jnp.float32), x, table)
    x64, table64, dy64 = (np.asarray(a, np.float64) for a in (x, table, dy))
    np.testing.assert_allclose(y, x64 @ table64.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx.astype(jnp.float32), dy64 @ table64, rtol=2**-7, atol=1e-4)
    np.testing.assert_allclose(dtable.astype(jnp.float32), dy64.T @ x64, rtol=2**-7, atol=1e-4)


def test_int8_in_bfloat16_rounds_once():
    """A rounded scale would make all of a channel's weights too large or too small by 0.2 %."""
    w_DxF = jax.random.normal(jax.random.key(0), (4096, 64))
    held_DxF = quantize(w_DxF, "int8", (-2,)).dequantize(jnp.bfloat16).astype(jnp.float32)
    gain_F = (held_DxF * w_DxF).sum(0) / jnp.square(w_DxF).sum(0)
    np.testing.assert_allclose(gain_F, 1, atol=1e-3)
