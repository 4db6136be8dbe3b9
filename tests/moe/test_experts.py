"""Experts in one array, or in an array each: row by row, and block by block."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prmoe_jax.moe import kernels
from prmoe_jax.moe.experts import Experts, Local, UnstackedExperts
from prmoe_jax.nn.mlp import MLPShape
from tests.support.quick import jit


def test_chosen_experts_are_the_experts():
    """Row by row as in their own batch; weights of others are never read: they may be NaN."""
    experts = Experts(5, MLPShape(6, 8, 0.3, 0.3), jax.random.key(0))
    x_RxD = jax.random.normal(jax.random.key(1), (4, 6))
    expert_R = jnp.array([3, 0, 3, 1])
    expected = experts(jnp.broadcast_to(x_RxD, (5, 4, 6)))[expert_R, jnp.arange(4)]
    for name in ("w_in", "w_out"):
        weight = getattr(experts, name)
        weight[...] = weight[...].at[jnp.array([2, 4])].set(jnp.nan)
    for held in (experts, UnstackedExperts(experts)):
        y_RxD = jit(Local(held).of_few)(x_RxD, expert_R[:, None], jnp.ones((4, 1)))
        np.testing.assert_allclose(y_RxD, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [(0, 37, 2, 0, 20), (59, 0, 0, 0, 0), (0, 0, 0, 0, 0)])
def test_separate_experts_by_blocks(rows):
    """What one array's are: runs longer than a block, empty ones, and rows of none, which are 0."""
    experts = Experts(5, MLPShape(6, 8, 0.3, 0.3), jax.random.key(0))
    experts.b_out[...] = jax.random.normal(jax.random.key(2), (5, 6))
    expert_R = jnp.repeat(jnp.arange(6), jnp.array([*rows, 61 - sum(rows)]))
    x_RxD = jax.random.normal(jax.random.key(1), (61, 6))
    each_ExRxD = experts(jnp.broadcast_to(x_RxD, (5, 61, 6)))
    expected = jnp.where((expert_R < 5)[:, None], each_ExRxD[expert_R % 5, jnp.arange(61)], 0)
    for held in (experts, UnstackedExperts(experts)):
        apply = partial(Local(held).grouped, kernels.blocked)
        y_RxD, _ = jit(apply)(x_RxD, jnp.array(rows), expert_R)
        np.testing.assert_allclose(y_RxD, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel", [kernels.ragged, kernels.padded, kernels.blocked])
def test_gradients_of_biases_are_summed_in_float32(kernel):
    """In bfloat16, whose sums of ones end at 256: of nearly all rows, and of one."""
    experts = Experts(3, MLPShape(6, 8, 0.3, 0.3), jax.random.key(0))
    rows = (1, 4093, 2)
    expert_R = jnp.repeat(jnp.arange(3), jnp.array(rows), total_repeat_length=4096)
    x_RxD = jax.random.normal(jax.random.key(1), (4096, 6))

    def total(experts, x_RxD):
        y_RxD = kernel(experts.weights(x_RxD.dtype), x_RxD, jnp.array(rows), expert_R)
        return y_RxD.astype(jnp.float32).sum()

    gradient = jit(jax.grad(total))
    exact, rounded = (gradient(experts, x_RxD.astype(t)) for t in ("float32", "bfloat16"))
    np.testing.assert_allclose(exact.b_out[...], np.repeat([rows], 6, 0).T, rtol=1e-6)
    for name in ("b_in", "b_out"):
        ours, expected = (getattr(g, name)[...] for g in (rounded, exact))
        assert np.abs(ours - expected).max() < 0.01 * np.abs(expected).max()


def _each_in_slots(weights, x_RxD, rows_E, expert_R, apply):
    """Rows sorted by expert through a function of rows [E, R, D], with a slot for every row."""
    own_ExR = expert_R == jnp.arange(len(rows_E))[:, None]
    y_ExRxD = apply(weights, jnp.where(own_ExR[..., None], x_RxD, 0))
    return jnp.where(own_ExR[..., None], y_ExRxD, 0).sum(0)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kernel", ["ragged", "padded", "blocked", "batched", "unrolled"])
def test_bfloat16_weights_of_float32_rows(kernel, gated):
    """Every kernel is near float32, and its results and the rows' gradients are float32."""
    experts = Experts(3, MLPShape(6, 8, 0.3, 0.3, gated), jax.random.key(0))
    rows = jnp.array((5, 30, 2))
    expert_R = jnp.repeat(jnp.arange(4), jnp.array((5, 30, 2, 4)), total_repeat_length=41)
    x_RxD, dy_RxD = jax.random.normal(jax.random.key(1), (2, 41, 6))

    def apply(weights, x_RxD):
        if kernel == "batched":
            return _each_in_slots(weights, x_RxD, rows, expert_R, kernels.batched)
        if kernel == "unrolled":
            unrolled = lambda w, x: kernels.unrolled(w, x[None])[0]  # noqa: E731
            return _each_in_slots(weights, x_RxD, rows, expert_R, unrolled)
        return getattr(kernels, kernel)(weights, x_RxD, rows, expert_R)

    @jit
    def with_gradients(*arguments):
        y_RxD, pull = jax.vjp(apply, *arguments)
        return y_RxD, *pull(dy_RxD)

    def results(dtype):
        y_RxD, dweights, dx_RxD = with_gradients(experts.weights(dtype), x_RxD)
        assert y_RxD.dtype == dx_RxD.dtype == jnp.float32
        assert {dw.dtype for dw in jax.tree.leaves(dweights)} == {jnp.dtype(dtype)}
        return y_RxD, dx_RxD, dweights

    both = (jax.tree.leaves(results(dtype)) for dtype in ("bfloat16", "float32"))
    for ours, exact in zip(*both, strict=True):
        error = np.linalg.norm(ours.astype(jnp.float32) - exact) / np.linalg.norm(exact)
        assert 0 < error < 0.02


def test_gradients_of_biases_of_equally_many_rows_are_summed_in_float32():
    """The same of 32,768 rows for each expert, as a capacity has them."""
    experts = Experts(2, MLPShape(6, 8, 0.3, 0.3), jax.random.key(0))
    x_ExRxD = jax.random.normal(jax.random.key(1), (2, 32768, 6))
    gradient = jit(jax.grad(lambda experts, x: experts(x).astype(jnp.float32).sum()))
    exact, rounded = (gradient(experts, x_ExRxD.astype(t)) for t in ("float32", "bfloat16"))
    np.testing.assert_allclose(rounded.b_out[...], 32768.0)
    ours, expected = rounded.b_in[...], exact.b_in[...]
    assert np.abs(ours - expected).max() < 0.01 * np.abs(expected).max()
