"""The MoE layer: backends agree with the einsum oracle, the residual mix, groups, keys."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prmoe_jax.config import ModelConfig, MoeConfig
from prmoe_jax.moe.dispatch import BACKENDS
from prmoe_jax.moe.experts import Experts
from prmoe_jax.moe.layer import MoE
from prmoe_jax.moe.routing import route

MODEL = ModelConfig(
    d_model=7, d_ff=11, heads=1, layers=2, placement="every 2", experts=(3,), init_std=0.5
)
MOE = MoeConfig(dispatch="gather", min_capacity=1)


def layer(model=MODEL, moe=MOE, experts=3):
    return MoE(experts, model, moe, jax.random.key(0))


def inputs(batch=5, length=13):
    x_BxLxD = jax.random.normal(jax.random.key(1), (batch, length, 7))
    valid_BxL = jax.random.bernoulli(jax.random.key(2), 0.9, (batch, length))
    return x_BxLxD, valid_BxL


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("slots", [2, 13])
@pytest.mark.parametrize("backend", ["gather", "ragged"])
def test_backends_equal_the_oracle(backend, slots, top_k):
    """Outputs and every gradient, with padding and overflow, at prime shapes."""
    experts = Experts(3, 7, 11, 0.5, 0.5, jax.random.key(0))
    x_GxSxD, valid_GxS = inputs()
    w_DxE = jax.random.normal(jax.random.key(3), (7, 3))
    target_GxSxD = jax.random.normal(jax.random.key(4), x_GxSxD.shape)

    def run(backend):
        def output(x_GxSxD, w_DxE, experts):
            routing, _ = route(x_GxSxD @ w_DxE, valid_GxS, MOE, top_k=top_k, slots=slots)
            y_GxSxD = BACKENDS[backend](x_GxSxD, routing, experts, slots)
            return (y_GxSxD * target_GxSxD).sum(), y_GxSxD

        return jax.jit(jax.value_and_grad(output, argnums=(0, 1, 2), has_aux=True))(
            x_GxSxD, w_DxE, experts
        )

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        run(backend),
        run("einsum"),
    )


def test_experts_by_hand():
    """Token by token: weight · (W_out gelu(W_in x + b_in) + b_out), biases included."""
    moe = layer()
    moe.experts.b_in[...] = jax.random.normal(jax.random.key(5), (3, 11))
    moe.experts.b_out[...] = jax.random.normal(jax.random.key(6), (3, 7))
    x_BxLxD, valid_BxL = inputs(2, 5)
    y_BxLxD, _ = moe(x_BxLxD, valid_BxL, float("inf"))
    for b in range(2):
        for t in range(5):
            probs = jax.nn.softmax(x_BxLxD[b, t] @ moe.w_router[...])
            e = int(probs.argmax())
            hidden = x_BxLxD[b, t] @ moe.experts.w_in[...][e] + moe.experts.b_in[...][e]
            hidden = jax.nn.gelu(hidden, approximate=True)
            y_D = probs[e] * (hidden @ moe.experts.w_out[...][e] + moe.experts.b_out[...][e])
            np.testing.assert_allclose(y_BxLxD[b, t], y_D * valid_BxL[b, t], rtol=1e-4, atol=1e-5)


def test_residual_mixes_and_serves_dropped_tokens():
    model = dataclasses.replace(MODEL, residual=True)
    moe, plain = layer(model), layer(MODEL)
    plain.w_router, plain.experts = moe.w_router, moe.experts
    x_BxLxD, valid_BxL = inputs()
    y_BxLxD, metrics = moe(x_BxLxD, valid_BxL, 0.5)
    branch_BxLxD, _ = plain(x_BxLxD, valid_BxL, 0.5)
    mix_BxLx2 = jax.nn.softmax(x_BxLxD @ moe.w_mix[...] + moe.b_mix[...])
    expected = branch_BxLxD * mix_BxLx2[..., :1] + moe.mlp(x_BxLxD) * mix_BxLx2[..., 1:]
    np.testing.assert_allclose(y_BxLxD, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        metrics.coefficient, (mix_BxLx2[..., 0] * valid_BxL).sum(), rtol=1e-5
    )
    dropped = np.asarray((branch_BxLxD == 0).all(-1))
    assert metrics.dropped_E.sum() > 0
    assert dropped.any()
    assert (np.abs(np.asarray(y_BxLxD))[dropped].max(-1) > 0).all()


@pytest.mark.parametrize("group_size", [4, 12, 24])
def test_groups_compete_among_themselves_only(group_size):
    """A group's output is the same alone as beside others, for parts and multiples of a row."""
    moe = layer(moe=dataclasses.replace(MOE, group_size=group_size))
    x_BxLxD, valid_BxL = inputs(4, 12)
    y_BxLxD, metrics = moe(x_BxLxD, valid_BxL, 1.0)
    alone = layer(moe=dataclasses.replace(MOE, group_size=0))
    x_GxSxD = x_BxLxD.reshape(-1, group_size, 7)
    valid_GxS = valid_BxL.reshape(-1, group_size)
    dropped = 0
    for g in range(len(x_GxSxD)):
        y_1xSxD, m = alone(x_GxSxD[g : g + 1], valid_GxS[g : g + 1], 1.0)
        np.testing.assert_allclose(
            y_BxLxD.reshape(-1, group_size, 7)[g], y_1xSxD[0], rtol=1e-5, atol=1e-6
        )
        dropped += m.dropped_E.sum()
    assert metrics.dropped_E.sum() == dropped > 0


@pytest.mark.parametrize("group_size", [4, 0, 24])
def test_randomness_follows_the_rows_keys(group_size):
    """Random selection depends on the keys of the group's first row, not on the other rows."""
    settings = {"group_size": group_size, "overflow": "random"}
    moe = layer(moe=dataclasses.replace(MOE, **settings))
    x_BxLxD, valid_BxL = inputs(4, 12)
    keys_B = jax.random.split(jax.random.key(7), 4)
    y_BxLxD, _ = moe(x_BxLxD, valid_BxL, 0.5, keys_B)
    y_last, _ = moe(x_BxLxD[2:], valid_BxL[2:], 0.5, keys_B[2:])
    np.testing.assert_allclose(y_BxLxD[2:], y_last, rtol=1e-5, atol=1e-6)
    y_other, _ = moe(x_BxLxD, valid_BxL, 0.5, jax.random.split(jax.random.key(8), 4))
    assert np.abs(y_BxLxD - y_other).max() > 1e-3
    y_evaluation, _ = moe(x_BxLxD, valid_BxL, 0.5)
    y_again, _ = moe(x_BxLxD, valid_BxL, 0.5)
    np.testing.assert_array_equal(y_evaluation, y_again)


def test_initialisation():
    """Weights N(0, σ), outputs σ/√(2·layers), experts all different, biases 0."""
    model = dataclasses.replace(MODEL, d_model=64, d_ff=128, layers=8, init_std=0.02, residual=True)
    moe = MoE(4, model, MOE, jax.random.key(0))
    for mlp in (moe.experts, moe.mlp):
        np.testing.assert_allclose(mlp.w_in[...].std(), 0.02, rtol=0.05)
        np.testing.assert_allclose(mlp.w_out[...].std(), 0.02 / 4, rtol=0.05)
        assert not mlp.b_in[...].any()
        assert not mlp.b_out[...].any()
    assert np.abs(moe.experts.w_in[...][0] - moe.experts.w_in[...][1]).max() > 0.02
    bound = 64**-0.5
    for w in (moe.w_router, moe.w_mix, moe.b_mix):
        assert np.abs(w[...]).max() <= bound
    assert np.abs(moe.w_router[...]).max() > 0.9 * bound


def test_router_is_float32_under_bfloat16():
    """Rounding the activations moves the scores by bfloat16's error, the products by none."""
    moe = layer()
    x_BxLxD, valid_BxL = inputs()
    low_BxLxD = x_BxLxD.astype(jnp.bfloat16)
    y_BxLxD, metrics = moe(low_BxLxD, valid_BxL, float("inf"))
    _, exact = moe(low_BxLxD.astype(jnp.float32), valid_BxL, float("inf"))
    assert y_BxLxD.dtype == jnp.bfloat16
    np.testing.assert_array_equal(metrics.assigned_E, exact.assigned_E)
    np.testing.assert_array_equal(metrics.entropy, exact.entropy)
