"""The MoE layer: backends agree with the einsum oracle, the residual mix, groups, keys."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prmoe_jax.config.schema import ModelConfig, MoeConfig
from prmoe_jax.moe import dispatch, kernels
from prmoe_jax.moe.dispatch import BACKENDS, through_experts
from prmoe_jax.moe.experts import Experts, Local
from prmoe_jax.moe.layer import MoE
from prmoe_jax.moe.routing import route
from prmoe_jax.nn.mlp import MLPShape
from tests.support.quick import jit, routed

MODEL = ModelConfig(
    d_model=7, d_ff=11, heads=1, layers=2, placement="every 2", experts=(3,), init_std=0.5
)
MOE = MoeConfig(min_capacity=1)


def layer(model=MODEL, moe=MOE, experts=3):
    return MoE(experts, model, moe, jax.random.key(0))


def inputs(batch=5, length=13):
    x_BxLxD = jax.random.normal(jax.random.key(1), (batch, length, 7))
    valid_BxL = jax.random.bernoulli(jax.random.key(2), 0.9, (batch, length))
    return x_BxLxD, valid_BxL


# Groups, tokens of one, experts, choices, capacity; how much the router prefers expert 0.
SITUATIONS = {
    "prime sizes": (3, 23, 5, 2, 7, 0),
    "top 3": (3, 23, 5, 3, 11, 0),
    "one hot expert": (2, 19, 3, 1, 19, 50),
    "one hot expert overflows": (2, 19, 3, 2, 4, 50),
    "empty experts": (1, 5, 31, 1, 3, 0),
    "fewer tokens than experts": (3, 2, 7, 2, 2, 0),
    "one token": (1, 1, 2, 1, 1, 0),
    "capacity 1": (2, 17, 3, 1, 1, 0),
    "no token": (2, 11, 3, 1, 5, 0),
}


@pytest.mark.parametrize(
    ("situation", "dtype", "form"),
    [
        *itertools.product(SITUATIONS, [jnp.float32], ["biases"]),
        ("prime sizes", jnp.bfloat16, "biases"),
        ("prime sizes", jnp.float32, "gate"),
        ("prime sizes", jnp.float32, "both"),
    ],
)
def test_backends_equal_the_oracle(situation, dtype, form):
    """Outputs and every gradient of every backend, padding included, with a gate or biases.

    With both, the gate is clamped, and some hidden units are beyond the limits.
    """
    groups, tokens, experts_count, top_k, slots, preference = SITUATIONS[situation]
    shape = MLPShape(7, 11, 0.5, 0.5, form != "biases", biases=form != "gate")
    if form == "both":
        shape = shape._replace(std=3.0, gate_bias=True, clamped=True)
    experts = Experts(experts_count, shape, jax.random.key(0))
    for i, bias in enumerate((experts.b_in, experts.b_out, experts.b_gate)):
        if bias is not None:
            bias[...] = jax.random.normal(jax.random.key(10 + i), bias.shape)
    x_GxSxD = jax.random.normal(jax.random.key(1), (groups, tokens, 7), dtype)
    share = 0.0 if situation == "no token" else 0.8
    valid_GxS = jax.random.bernoulli(jax.random.key(2), share, (groups, tokens))
    w_DxE = jax.random.normal(jax.random.key(3), (7, experts_count))
    target_GxSxD = jax.random.normal(jax.random.key(4), x_GxSxD.shape)

    def run(backend):
        def output(x_GxSxD, w_DxE, experts):
            logits_GxSxE = x_GxSxD.astype(jnp.float32) @ w_DxE
            logits_GxSxE = logits_GxSxE.at[..., 0].add(preference)
            routing, _ = route(logits_GxSxE, valid_GxS, MOE, top_k=top_k, slots=slots)
            y_GxSxD, _ = through_experts(backend, x_GxSxD, routing, Local(experts), slots)
            return (y_GxSxD * target_GxSxD).sum(), y_GxSxD

        gradient = jit(jax.grad(output, argnums=(0, 1, 2), has_aux=True))
        return gradient(x_GxSxD, w_DxE, experts)

    oracle = run("einsum")
    if situation == "no token":
        assert not any(np.asarray(leaf, np.float32).any() for leaf in jax.tree.leaves(oracle))
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2

    def close(ours, oracle):
        ours, oracle = np.asarray(ours, np.float32), np.asarray(oracle, np.float32)
        scale = max(1.0, np.abs(oracle).max())  # sums of many terms cancel
        np.testing.assert_allclose(ours / scale, oracle / scale, atol=tolerance)

    for backend in BACKENDS.keys() - {"einsum"}:
        jax.tree.map(close, run(backend), oracle)


@pytest.mark.parametrize("sizes", [(16, 7, 11, 5), (300, 5, 3, 2)])
def test_blocks_of_rows_are_runs(sizes):
    """Runs shorter than a block, longer than one, empty, and rows that belong to no expert."""
    rows, d_model, d_ff, count = sizes
    experts = Experts(count, MLPShape(d_model, d_ff, 0.5, 0.5), jax.random.key(0))
    experts.b_out[...] = jax.random.normal(jax.random.key(1), experts.b_out.shape)
    rows_E = jnp.array([rows // 2, 0, 3, 1, 2][:count] if count > 2 else [1, rows - 20])
    expert_R = jnp.repeat(jnp.arange(count + 1), jnp.append(rows_E, rows - rows_E.sum()))
    x_RxD = jax.random.normal(jax.random.key(2), (rows, d_model))
    served_Rx1 = (expert_R < count)[:, None]

    def loss(experts, x_RxD, apply):
        y_RxD = apply(experts.weights(x_RxD.dtype), x_RxD, rows_E, expert_R)
        return (jnp.where(served_Rx1, y_RxD, 0) ** 2).sum()

    def row_by_row(weights, x_RxD, rows_E, expert_R):
        own = jax.tree.map(lambda w: w[jnp.minimum(expert_R, count - 1)], weights)
        h_RxF = jnp.einsum("RD,RDF->RF", x_RxD, own.w_in_DxF) + own.b_in_F
        h_RxF = jax.nn.gelu(h_RxF, approximate=True)
        return jnp.einsum("RF,RFD->RD", h_RxF, own.w_out_FxD) + own.b_out_D

    gradient = jit(jax.value_and_grad(loss, argnums=(0, 1)), static_argnums=2)
    for apply in (kernels.blocked, kernels.ragged, kernels.padded):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
            gradient(experts, x_RxD, apply),
            gradient(experts, x_RxD, row_by_row),
        )


@pytest.mark.parametrize("residual", [False, True])
def test_what_reaches_the_experts_and_the_stream(residual):
    """The weights of kept choices, and the norm of what the experts add; padding counts nowhere."""
    moe = layer(dataclasses.replace(MODEL, top_k=2, residual=residual))
    x_BxLxD, valid_BxL = inputs(2, 13)
    moe.moe = dataclasses.replace(moe.moe, eval_capacity_factor=0.5)
    y_BxLxD, metrics = moe(x_BxLxD, valid_BxL)
    weight_BxL = moe.decide(x_BxLxD, valid_BxL).weight_GxSxK.sum(-1)
    assert 0 < metrics.unserved < valid_BxL.sum() and not weight_BxL[~valid_BxL].any()
    np.testing.assert_allclose(metrics.weight, weight_BxL.sum(), rtol=1e-6)
    np.testing.assert_allclose(metrics.weight_square, (weight_BxL**2).sum(), rtol=1e-6)
    without = jax.tree.map(lambda x: x, moe)
    without.experts = jax.tree.map(jnp.zeros_like, moe.experts)
    added_BxLxD = y_BxLxD - without(x_BxLxD, valid_BxL)[0]
    squares_BxL = (added_BxLxD**2).sum(-1)
    np.testing.assert_allclose(metrics.added_square, squares_BxL[valid_BxL].sum(), rtol=1e-4)


@pytest.mark.parametrize(("factor", "taken"), [(1.5, 7), (0.5, 3)])  # of 13 tokens
@pytest.mark.parametrize("backend", BACKENDS)
def test_expert_choice_by_hand(backend, factor, taken):
    """A token's output is the sum over the experts that took it, by any backend."""
    moe = layer(moe=dataclasses.replace(MOE, router="expert_choice"))
    x_BxLxD, valid_BxL = inputs(2, 13)
    y_BxLxD, metrics = routed(moe, x_BxLxD, valid_BxL, factor, dispatch=backend)
    probs_BxLxE = jax.nn.softmax(x_BxLxD @ moe.w_router[...])
    x_ExRxD = jnp.broadcast_to(x_BxLxD.reshape(-1, 7), (3, 26, 7))
    everything_ExBxLxD = moe.experts(x_ExRxD).reshape(3, 2, 13, 7)
    expected_BxLxD = np.zeros_like(y_BxLxD)
    for b in range(2):
        for e in range(3):
            tokens = np.flatnonzero(valid_BxL[b])
            for t in sorted(tokens, key=lambda t: -probs_BxLxE[b, t, e])[:taken]:
                expected_BxLxD[b, t] += probs_BxLxE[b, t, e] * everything_ExBxLxD[e, b, t]
    np.testing.assert_allclose(y_BxLxD, expected_BxLxD, rtol=1e-4, atol=1e-5)
    assert metrics.assigned_E.tolist() == [2 * taken] * 3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_experts_that_choose_tokens_hold_the_rows_of_their_slots(dtype):
    """Values and gradients are those of the oracle, and not every pair of both is in memory."""
    groups, tokens, width, count, slots = 3, 64, 48, 32, 3
    experts = Experts(count, MLPShape(width, 5, 0.5, 0.5), jax.random.key(0))
    x_GxSxD = jax.random.normal(jax.random.key(1), (groups, tokens, width), dtype)
    w_DxE = jax.random.normal(jax.random.key(2), (width, count))
    valid_GxS = jnp.arange(groups * tokens).reshape(groups, tokens) % 7 > 0
    moe = dataclasses.replace(MOE, router="expert_choice")

    def step(backend):
        def loss(x_GxSxD, w_DxE, experts):
            logits_GxSxE = x_GxSxD.astype(jnp.float32) @ w_DxE
            routing, _ = route(logits_GxSxE, valid_GxS, moe, top_k=1, slots=slots)
            y_GxSxD, _ = through_experts(backend, x_GxSxD, routing, Local(experts), slots)
            return (y_GxSxD.astype(jnp.float32) ** 2).sum(), y_GxSxD

        gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
        return gradient.lower(x_GxSxD, w_DxE, experts).compile()

    ours, oracle = step("gather"), step("einsum")

    def close(ours, oracle):
        ours, oracle = np.asarray(ours, np.float32), np.asarray(oracle, np.float32)
        tolerance = 1e-5 if dtype == jnp.float32 else 3e-2
        np.testing.assert_allclose(ours, oracle, atol=tolerance * np.abs(oracle).max())

    inputs = x_GxSxD, w_DxE, experts
    jax.tree.map(close, ours(*inputs), oracle(*inputs))
    pairs = count * x_GxSxD.nbytes
    assert ours.memory_analysis().temp_size_in_bytes < pairs


@pytest.mark.parametrize("apply", [kernels.ragged, kernels.padded])
def test_rows_of_no_run_are_never_read(apply):
    """A device may leave them as they were in memory: no NaN of theirs comes out, nor back."""
    experts = Experts(2, MLPShape(3, 5, 0.5, 0.5), jax.random.key(0))
    rows_E, expert_R = jnp.array([3, 2]), jnp.array([0, 0, 0, 1, 1, 2, 2])
    x_RxD = jax.random.normal(jax.random.key(1), (7, 3)).at[5:].set(jnp.nan)

    def loss(experts, x_RxD):
        y_RxD = apply(experts.weights(x_RxD.dtype), x_RxD, rows_E, expert_R)
        return (y_RxD**2).sum(), y_RxD

    gradient, y_RxD = jax.grad(loss, argnums=(0, 1), has_aux=True)(experts, x_RxD)
    assert not y_RxD[5:].any()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((y_RxD, gradient)))
    assert not gradient[1][5:].any()


def test_dropless_and_capacity_may_have_backends_of_their_own():
    dropless = {"cpu": "blocked", "tpu": "ragged", "gpu": "padded", "cuda": "padded"}
    for platform, name in dropless.items():
        assert dispatch.resolve("auto", platform, dropless=True) == name
        assert dispatch.resolve("auto", platform, dropless=False) == "gather"
        assert dispatch.resolve("einsum", platform, dropless=True) == "einsum"


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_experts_of_few_rows_and_of_many_have_the_same_gradients(rows):
    """On CPUs rows go another way if they are at most a sixteenth of the units that come out."""
    experts = Experts(3, MLPShape(32, 48, 0.1, 0.1), jax.random.key(0))
    experts.b_in[...] = jax.random.normal(jax.random.key(1), experts.b_in.shape)
    x_ExRxD = jax.random.normal(jax.random.key(2), (3, rows, 32))
    weight_ExRxD = jax.random.normal(jax.random.key(3), x_ExRxD.shape)

    def plain(experts, x_ExRxD):
        h_ExRxF = jnp.einsum("ERD,EDF->ERF", x_ExRxD, experts.w_in[...])
        h_ExRxF = jax.nn.gelu(h_ExRxF + experts.b_in[...][:, None], approximate=True)
        return jnp.einsum("ERF,EFD->ERD", h_ExRxF, experts.w_out[...]) + experts.b_out[...][:, None]

    def gradient(apply):
        loss = lambda experts, x: (apply(experts, x) * weight_ExRxD).sum()  # noqa: E731
        return jax.value_and_grad(loss, argnums=(0, 1))

    ours = gradient(Experts.__call__)
    another_way = "optimization_barrier" in str(jax.make_jaxpr(ours)(experts, x_ExRxD))
    assert another_way == (16 * rows <= 48)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        jit(ours)(experts, x_ExRxD),
        jit(gradient(plain))(experts, x_ExRxD),
    )


def test_experts_by_hand():
    """Token by token: weight · (W_out gelu(W_in x + b_in) + b_out), biases included."""
    moe = layer()
    moe.experts.b_in[...] = jax.random.normal(jax.random.key(5), (3, 11))
    moe.experts.b_out[...] = jax.random.normal(jax.random.key(6), (3, 7))
    x_BxLxD, valid_BxL = inputs(2, 5)
    y_BxLxD, _ = routed(moe, x_BxLxD, valid_BxL, float("inf"))
    for b in range(2):
        for t in range(5):
            probs = jax.nn.softmax(x_BxLxD[b, t] @ moe.w_router[...])
            e = int(probs.argmax())
            hidden = x_BxLxD[b, t] @ moe.experts.w_in[...][e] + moe.experts.b_in[...][e]
            hidden = jax.nn.gelu(hidden, approximate=True)
            y_D = probs[e] * (hidden @ moe.experts.w_out[...][e] + moe.experts.b_out[...][e])
            np.testing.assert_allclose(y_BxLxD[b, t], y_D * valid_BxL[b, t], rtol=1e-4, atol=1e-5)


def test_clamped_experts_and_the_routers_biases_by_hand():
    """The formula of gpt-oss, token by token in NumPy, with biases of every map."""
    model = dataclasses.replace(MODEL, activation="clamped_swiglu", biases="every", init_std=4.0)
    moe = layer(model)
    rng = np.random.default_rng(0)
    held = moe.b_router, moe.experts.b_in, moe.experts.b_gate, moe.experts.b_out
    for parameter in held:
        parameter[...] = jnp.asarray(rng.normal(size=parameter.shape), jnp.float32)
    x_BxLxD, valid_BxL = inputs(2, 5)
    y_BxLxD, _ = routed(moe, x_BxLxD, valid_BxL, float("inf"))
    names = "w_in", "b_in", "w_gate", "b_gate", "w_out", "b_out"
    weights = {name: np.asarray(getattr(moe.experts, name)[...], np.float64) for name in names}
    clamped = 0
    for b in range(2):
        for t in range(5):
            x_D = np.asarray(x_BxLxD[b, t], np.float64)
            logits_E = x_D @ np.asarray(moe.w_router[...]) + np.asarray(moe.b_router[...])
            e = int(logits_E.argmax())
            w = {name: x[e] for name, x in weights.items()}
            gate_F, up_F = x_D @ w["w_gate"] + w["b_gate"], x_D @ w["w_in"] + w["b_in"]
            clamped += (gate_F > 7).sum() + (abs(up_F) > 7).sum()
            gate_F, up_F = np.minimum(gate_F, 7), np.clip(up_F, -7, 7)
            hidden_F = gate_F / (1 + np.exp(-1.702 * gate_F)) * (up_F + 1)
            probability = np.exp(logits_E[e]) / np.exp(logits_E).sum()
            y_D = probability * (hidden_F @ w["w_out"] + w["b_out"]) * valid_BxL[b, t]
            np.testing.assert_allclose(y_BxLxD[b, t], y_D, rtol=1e-4, atol=1e-4)
    assert clamped > 10


@pytest.mark.parametrize("kind", ["learned", "sum", "half", "sigmoid"])
def test_residual_mixes_and_serves_dropped_tokens(kind):
    """The mix by hand, and its weight apart for tokens that an expert kept and for the others."""
    model = dataclasses.replace(MODEL, residual=True, residual_mix=kind)
    moe, plain = layer(model), layer(MODEL)
    plain.w_router, plain.experts = moe.w_router, moe.experts
    x_BxLxD, valid_BxL = inputs()
    y_BxLxD, metrics = routed(moe, x_BxLxD, valid_BxL, 0.5)
    branch_BxLxD, _ = routed(plain, x_BxLxD, valid_BxL, 0.5)
    if kind == "learned":
        mix_BxLx2 = jax.nn.softmax(x_BxLxD @ moe.w_mix[...] + moe.b_mix[...])
    elif kind == "sigmoid":
        shared_BxL = 1 / (1 + jnp.exp(-(x_BxLxD * moe.w_shared[...]).sum(-1)))
        mix_BxLx2 = jnp.stack([jnp.ones((5, 13)), shared_BxL], -1)
    else:
        assert moe.w_mix is moe.b_mix is None
        mix_BxLx2 = jnp.full((5, 13, 2), {"sum": 1.0, "half": 0.5}[kind])
    expected = branch_BxLxD * mix_BxLx2[..., :1] + moe.mlp(x_BxLxD) * mix_BxLx2[..., 1:]
    np.testing.assert_allclose(y_BxLxD, expected, rtol=1e-5, atol=1e-6)
    dropped = np.asarray((branch_BxLxD == 0).all(-1))
    weight = mix_BxLx2[..., 0]
    np.testing.assert_allclose(metrics.coefficient, (weight * valid_BxL).sum(), rtol=1e-5)
    np.testing.assert_allclose(
        metrics.coefficient_unserved, (weight * (valid_BxL & dropped)).sum(), rtol=1e-5
    )
    assert metrics.unserved == (valid_BxL & dropped).sum() > 0
    assert metrics.dropped_E.sum() > 0
    assert (np.abs(np.asarray(y_BxLxD))[dropped].max(-1) > 0).all()


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_language_model_trains_the_router(top_k):
    """Without any auxiliary loss: through the gate, at k = 1 as well, by finite differences."""
    dropless = dataclasses.replace(MOE, eval_capacity_factor=float("inf"))
    moe = layer(dataclasses.replace(MODEL, top_k=top_k), moe=dropless)
    x_BxLxD, valid_BxL = inputs()
    target_BxLxD = jax.random.normal(jax.random.key(4), x_BxLxD.shape)

    def loss(moe):
        return (moe(x_BxLxD, valid_BxL)[0] * target_BxLxD).sum()

    gradient = jit(jax.grad(loss))(moe).w_router[...]
    direction = jax.random.normal(jax.random.key(5), gradient.shape)
    w_router, values = moe.w_router[...], []
    for step in (1e-3, -1e-3):
        moe.w_router[...] = w_router + step * direction
        values.append(jit(loss)(moe))
    slope = (values[0] - values[1]) / 2e-3
    assert abs(slope) > 0.1
    np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=0.02)


def test_jitter_moves_the_router_alone():
    """In training its scores change by a percent or so; evaluation and the experts don't."""
    moe = layer(moe=dataclasses.replace(MOE, noise="jitter"))
    x_BxLxD, valid_BxL = inputs()
    keys_B = jax.random.split(jax.random.key(0), 5)
    still, _ = routed(moe, x_BxLxD, valid_BxL, float("inf"))
    jittered, _ = routed(moe, x_BxLxD, valid_BxL, float("inf"), keys_B)
    again, _ = routed(moe, x_BxLxD, valid_BxL, float("inf"), keys_B)
    np.testing.assert_array_equal(jittered, again)
    ratio = (jittered / still)[valid_BxL]  # of the gates' weights, where the expert is the same
    same = np.asarray(ratio.std(-1) < 1e-3)
    assert same.mean() > 0.9
    assert 1e-4 < np.abs(ratio[same] - 1).max() < 0.05


@pytest.mark.parametrize("group_size", [4, 12, 24])
def test_groups_compete_among_themselves_only(group_size):
    """A group's output is the same alone as beside others, for parts and multiples of a row."""
    moe = layer(moe=dataclasses.replace(MOE, group_size=group_size))
    x_BxLxD, valid_BxL = inputs(4, 12)
    y_BxLxD, metrics = routed(moe, x_BxLxD, valid_BxL, 1.0)
    alone = layer(moe=dataclasses.replace(MOE, group_size=0))
    x_GxSxD = x_BxLxD.reshape(-1, group_size, 7)
    valid_GxS = valid_BxL.reshape(-1, group_size)
    dropped = 0
    for g in range(len(x_GxSxD)):
        y_1xSxD, m = routed(alone, x_GxSxD[g : g + 1], valid_GxS[g : g + 1], 1.0)
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
    y_BxLxD, _ = routed(moe, x_BxLxD, valid_BxL, 0.5, keys_B)
    y_last, _ = routed(moe, x_BxLxD[2:], valid_BxL[2:], 0.5, keys_B[2:])
    np.testing.assert_allclose(y_BxLxD[2:], y_last, rtol=1e-5, atol=1e-6)
    y_other, _ = routed(moe, x_BxLxD, valid_BxL, 0.5, jax.random.split(jax.random.key(8), 4))
    assert np.abs(y_BxLxD - y_other).max() > 1e-3
    y_evaluation, _ = routed(moe, x_BxLxD, valid_BxL, 0.5)
    y_again, _ = routed(moe, x_BxLxD, valid_BxL, 0.5)
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


def test_tied_experts_start_as_copies_of_the_residual_mlp():
    model = dataclasses.replace(MODEL, residual=True)
    moe = layer(model, dataclasses.replace(MOE, expert_init="tied"))
    for name in ("w_in", "b_in", "w_out", "b_out"):
        for e in range(3):
            np.testing.assert_array_equal(
                getattr(moe.experts, name)[...][e], getattr(moe.mlp, name)[...]
            )


def test_router_is_float32_under_bfloat16():
    """Rounding the activations moves the scores by bfloat16's error, the products by none."""
    moe = layer()
    x_BxLxD, valid_BxL = inputs()
    low_BxLxD = x_BxLxD.astype(jnp.bfloat16)
    y_BxLxD, metrics = routed(moe, low_BxLxD, valid_BxL, float("inf"))
    _, exact = routed(moe, low_BxLxD.astype(jnp.float32), valid_BxL, float("inf"))
    assert y_BxLxD.dtype == jnp.bfloat16
    np.testing.assert_array_equal(metrics.assigned_E, exact.assigned_E)
    np.testing.assert_array_equal(metrics.entropy, exact.entropy)
