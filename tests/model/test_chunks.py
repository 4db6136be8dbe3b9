"""Losses in chunks: value and gradients are those of all logits at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prmoe_jax.model import chunks
from prmoe_jax.model.batch import Batch
from prmoe_jax.model.loss import cross_entropy, forward
from prmoe_jax.model.transformer import Unembedding, init_model
from tests.support.batches import make_batch
from tests.support.configs import settings
from tests.support.quick import jit

ROWS, LENGTH, WIDTH, VOCABULARY = 3, 29, 7, 61


class Table:
    """Stands in for a model, of which the loss asks only the output matrix."""

    def __init__(self, table_VxD):
        self.table_VxD = table_VxD

    def unembedding(self, dtype):
        return Unembedding(self.table_VxD.astype(dtype))


def tokens():
    rng = np.random.default_rng(0)
    ids, targets = rng.integers(0, VOCABULARY, (2, ROWS, LENGTH)).astype(np.int32)
    mask = rng.random((ROWS, LENGTH)) < 0.8
    x_BxLxD, table_VxD = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((ROWS, LENGTH, WIDTH), (VOCABULARY, WIDTH))
    )
    return x_BxLxD, table_VxD, Batch(ids, targets, mask, np.ones_like(ids))


def at_once(x_BxLxD, table_VxD, batch, z_weight):
    """The loss by all logits, with derivatives by JAX."""
    logits_BxLxV = x_BxLxD @ table_VxD.T
    log_z_BxL = jax.nn.logsumexp(logits_BxLxV, -1)
    target_BxL = jnp.take_along_axis(logits_BxLxV, batch.targets_BxL[..., None], -1)[..., 0]
    return ((log_z_BxL - target_BxL + z_weight * log_z_BxL**2) * batch.mask_BxL).sum()


# One chunk; ten tokens of a row, which don't divide 29; one token of a row.
@pytest.mark.parametrize("chunk", [999, 30, 1])
@pytest.mark.parametrize("z_weight", [0.0, 0.3])
def test_loss_and_gradients_equal_those_of_all_logits(chunk, z_weight, monkeypatch):
    monkeypatch.setattr(chunks, "CPU_CHUNK", chunk)
    x_BxLxD, table_VxD, batch = tokens()

    def ours(x_BxLxD, table_VxD):
        return cross_entropy(z_weight)(Table(table_VxD), x_BxLxD, batch)["loss"] / 7

    def expected(x_BxLxD, table_VxD):
        return at_once(x_BxLxD, table_VxD, batch, z_weight) / 7

    ours, expected = (
        jit(jax.value_and_grad(f, (0, 1)))(x_BxLxD, table_VxD) for f in (ours, expected)
    )
    np.testing.assert_allclose(ours[0], expected[0], rtol=1e-6)
    for a, b in zip(ours[1], expected[1], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6 * np.abs(b).max())


def test_evaluation_measures_the_same_without_gradients(monkeypatch):
    monkeypatch.setattr(chunks, "CPU_CHUNK", 30)
    x_BxLxD, table_VxD, batch = tokens()
    found = cross_entropy(0.3)(Table(table_VxD), x_BxLxD, batch)
    expected = at_once(x_BxLxD, table_VxD, batch, 0.3)
    np.testing.assert_allclose(found["loss"], expected, rtol=1e-6)
    np.testing.assert_allclose(found["lm_loss"] + 0.3 * found["z_loss"], expected, rtol=1e-6)


@pytest.mark.parametrize("field", ["lm_loss", "z_loss"])
def test_a_measurement_cannot_be_differentiated(field):
    """Its gradient would be 0 without a word."""
    model = init_model(settings("2 layers"))
    with pytest.raises(TypeError, match="differentiate the `loss` of Sums"):
        jax.grad(lambda model: getattr(forward(model, make_batch()), field))(model)


def test_no_array_holds_all_logits():
    """Forward and backward; float32 [B, L, V] would be one of 87 rows."""
    x_BxLxD, table_VxD, batch = tokens()

    def loss(x_BxLxD, table_VxD):
        return cross_entropy()(Table(table_VxD), x_BxLxD, batch)["loss"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CPU_CHUNK", 30)
        program = jit(jax.grad(loss, (0, 1))).lower(x_BxLxD, table_VxD).compile().as_text()
    assert f"[3,10,{VOCABULARY}]" in program or f"[30,{VOCABULARY}]" in program
    for rows in (f"[{ROWS},{LENGTH},", f"[{ROWS},{LENGTH + 1},", f"[{ROWS * LENGTH},"):
        assert f"{rows}{VOCABULARY}]" not in program
