"""Matrix products with few rows, with weights in float32 and in fewer bits."""

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
