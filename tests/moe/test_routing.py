"""Routing: tables worked out by hand, and a token-by-token oracle of DeepSpeed's rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prmoe_jax.config.routers import capacity
from prmoe_jax.config.schema import MoeConfig
from prmoe_jax.moe.routing import route as decide
from tests.support.quick import jit

DEFAULT = MoeConfig()
route = jit(decide, static_argnames=("moe", "top_k", "slots", "normalize"))


def oracle(logits_SxE, valid_S, top_k, slots, overflow, training):
    """One group, one choice after the other, in float64."""
    tokens, experts = logits_SxE.shape
    probs = np.exp(logits_SxE - logits_SxE.max(1, keepdims=True))
    probs /= probs.sum(1, keepdims=True)
    ranked = np.argsort(-logits_SxE, axis=1, kind="stable")
    by_choice = [(s, k) for k in range(top_k) for s in range(tokens)]
    order = by_choice if training and top_k == 2 else sorted(by_choice)
    kept, slot, weight = (np.zeros((tokens, top_k)) for _ in range(3))
    asked = [[(s, k) for s, k in order if valid_S[s] and ranked[s, k] == e] for e in range(experts)]
    for expert, choices in enumerate(asked):
        survivors = choices
        if overflow == "probability":
            survivors = sorted(choices, key=lambda c: -probs[c[0], expert])
        survivors = set(survivors[:slots])
        for i, (s, k) in enumerate(c for c in choices if c in survivors):
            kept[s, k], slot[s, k], weight[s, k] = 1, i, probs[s, expert]
    if top_k > 1:
        weight /= np.maximum(weight.sum(1, keepdims=True), np.finfo(np.float32).eps)
    count = max(valid_S.sum(), 1)
    mean_prob = probs[valid_S].sum(0) / count
    counted = ranked[valid_S, :1] if top_k == 2 else ranked[valid_S, :top_k]
    mean_choice = np.bincount(counted.ravel(), minlength=experts) / max(counted.size, 1)
    aux_loss = experts * (mean_prob * mean_choice).sum()
    return ranked[:, :top_k], slot, kept, weight, aux_loss, [len(choices) for choices in asked]


@pytest.mark.parametrize("overflow", ["position", "probability"])
@pytest.mark.parametrize(
    ("top_k", "training"),  # with another number than 2, training has the same order
    [(1, False), (2, False), (2, True), (3, False), (5, True)],
)
@pytest.mark.parametrize("slots", [1, 3, 23])
def test_equals_the_oracle_at_prime_shapes(top_k, slots, overflow, training):
    rng = np.random.default_rng(slots)
    logits = rng.normal(size=(3, 23, 5)).astype(np.float32)
    valid = rng.random((3, 23)) < 0.8
    valid[2] = False  # a group that is all padding
    moe = MoeConfig(overflow=overflow)
    keys_G = jax.random.split(jax.random.key(0), 3) if training else None
    routing, metrics = route(logits, valid, moe, top_k=top_k, slots=slots, keys_G=keys_G)
    aux_loss, assigned, dropped_S, unserved = 0, np.zeros(5), np.zeros(23), 0
    for g in range(3):
        expert, slot, kept, weight, aux, filled = oracle(
            logits[g], valid[g], top_k, slots, overflow, training
        )
        np.testing.assert_array_equal(routing.kept_GxSxK[g], kept)
        where = kept.astype(bool)
        np.testing.assert_array_equal(np.asarray(routing.expert_GxSxK[g])[where], expert[where])
        np.testing.assert_array_equal(np.asarray(routing.slot_GxSxK[g])[where], slot[where])
        np.testing.assert_allclose(routing.weight_GxSxK[g], weight, rtol=1e-5, atol=1e-7)
        aux_loss, assigned = aux_loss + aux, assigned + filled
        dropped_S += valid[g] * top_k - kept.sum(1)
        unserved += (valid[g] & ~where.any(1)).sum()
    np.testing.assert_allclose(metrics.aux_loss, aux_loss, rtol=1e-6)
    np.testing.assert_array_equal(metrics.assigned_E, assigned)
    np.testing.assert_array_equal(metrics.dropped_S, dropped_S)
    np.testing.assert_array_equal(metrics.choices_S, valid.sum(0) * top_k)
    assert metrics.dropped_E.sum() == dropped_S.sum()
    assert metrics.unserved == unserved
    assert metrics.tokens == valid.sum()
    assert metrics.groups == 2
    log_z = np.log(np.exp(logits).sum(-1))
    np.testing.assert_allclose(metrics.z_loss, (log_z**2)[valid].sum(), rtol=1e-5)
    probs = np.exp(logits - log_z[..., None])
    np.testing.assert_allclose(metrics.entropy, -(probs * np.log(probs))[valid].sum(), rtol=1e-5)


def test_expert_choice_equals_its_oracle():
    """Each expert takes its C most probable tokens; padding is never taken."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 13, 3)).astype(np.float32)
    valid = np.ones((2, 13), bool)
    valid[0, ::5] = False
    valid[1, 1:] = False  # fewer tokens than slots
    routing, metrics = route(logits, valid, MoeConfig(router="expert_choice"), top_k=1, slots=2)
    probs = np.asarray(jax.nn.softmax(logits))
    taken = np.zeros((2, 13, 3), bool)
    for g in range(2):
        for e in range(3):
            best = sorted(np.flatnonzero(valid[g]), key=lambda s: -probs[g, s, e])[:2]
            taken[g, best, e] = True
            np.testing.assert_array_equal(
                np.asarray(routing.slot_GxSxK)[g, best, e], np.arange(len(best))
            )
    np.testing.assert_array_equal(routing.kept_GxSxK, taken)
    np.testing.assert_allclose(routing.weight_GxSxK, probs * taken, rtol=1e-6)
    np.testing.assert_array_equal(metrics.assigned_E, taken.sum((0, 1)))
    left_out = valid & ~taken.any(-1)
    assert left_out.any()
    np.testing.assert_array_equal(metrics.dropped_S, left_out.sum(0))
    np.testing.assert_array_equal(metrics.choices_S, valid.sum(0))
    assert metrics.unserved == left_out.sum()


def test_top1_by_hand():
    """Five tokens, two experts, two slots: expert 0 is asked for by 0, 1, 3 and 4."""
    logits = jnp.log(jnp.array([[[9.0, 1], [8, 2], [3, 7], [6, 4], [9, 1]]]))
    valid = jnp.array([[True, False, True, True, True]])  # token 1 is padding
    routing, metrics = route(logits, valid, DEFAULT, top_k=1, slots=2)
    assert routing.expert_GxSxK[0, :, 0].tolist() == [0, 0, 1, 0, 0]
    assert routing.kept_GxSxK[0, :, 0].tolist() == [True, False, True, True, False]
    assert [int(routing.slot_GxSxK[0, s, 0]) for s in (0, 2, 3)] == [0, 0, 1]
    np.testing.assert_allclose(routing.weight_GxSxK[0, :, 0], [0.9, 0, 0.7, 0.6, 0], rtol=1e-6)
    # mean probability (2.7, 1.3)/4, first choices (3, 1)/4
    np.testing.assert_allclose(metrics.aux_loss, 2 * (0.675 * 0.75 + 0.325 * 0.25), rtol=1e-6)
    assert metrics.assigned_E.tolist() == [3, 1]
    assert metrics.dropped_E.tolist() == [1, 0]


def test_top2_by_hand():
    """In training all first choices precede all second ones; a lone survivor has weight 1."""
    logits = jnp.log(jnp.array([[[5.0, 4, 1], [3, 6, 1], [6, 1, 3]]]))
    keys, valid = jax.random.split(jax.random.key(0), 1), jnp.ones((1, 3), bool)
    routing, metrics = route(logits, valid, DEFAULT, top_k=2, slots=2, keys_G=keys)
    assert routing.expert_GxSxK[0].tolist() == [[0, 1], [1, 0], [0, 2]]
    # Expert 0: tokens 0, 2 first, then token 1's second choice overflows.
    assert routing.kept_GxSxK[0].tolist() == [[True, True], [True, False], [True, True]]
    assert routing.slot_GxSxK[0, [0, 0, 1, 2, 2], [0, 1, 0, 0, 1]].tolist() == [0, 1, 0, 1, 0]
    expected = [[5 / 9, 4 / 9], [1, 0], [6 / 9, 3 / 9]]
    np.testing.assert_allclose(routing.weight_GxSxK[0], expected, rtol=1e-6)
    assert metrics.dropped_E.tolist() == [1, 0, 0]
    # In evaluation tokens come in order: it is token 2's first choice that finds expert 0 full.
    routing, _ = route(logits, valid, DEFAULT, top_k=2, slots=2)
    assert routing.kept_GxSxK[0].tolist() == [[True, True], [True, True], [False, True]]


def test_sigmoid_scores_by_hand():
    """Scores, not shares, are weights; a bias counts in the choice alone; shares are balanced."""
    scores = np.array([[[0.8, 0.6, 0.2], [0.3, 0.5, 0.4]]], np.float32)
    logits, valid = np.log(scores / (1 - scores)), jnp.ones((1, 2), bool)
    moe = MoeConfig(scores="sigmoid", routed_scale=2.5)

    def weights(top_k, **given):
        routing, metrics = route(logits, valid, moe, top_k=top_k, slots=2, **given)
        return np.asarray(routing.expert_GxSxK[0]), np.asarray(routing.weight_GxSxK[0]), metrics

    expert, weight, metrics = weights(2)
    assert expert.tolist() == [[0, 1], [1, 2]]
    expected = 2.5 * np.array([[8 / 14, 6 / 14], [5 / 9, 4 / 9]])
    np.testing.assert_allclose(weight, expected, rtol=1e-5)
    # Shares of the scores' sum; for two experts a token's first choice counts.
    shares = np.array([[0.8, 0.6, 0.2], [0.3, 0.5, 0.4]]) / np.array([[1.6], [1.2]])
    expected = 3 * (shares.mean(0) * [0.5, 0.5, 0]).sum()
    np.testing.assert_allclose(metrics.aux_loss, expected, rtol=1e-5)
    bias_E = jnp.array([-0.7, 0.0, 0.5])
    expert, weight, _ = weights(1, bias_E=bias_E)
    assert expert.tolist() == [[2], [2]]
    np.testing.assert_allclose(weight, 2.5 * np.array([[0.2], [0.4]]), rtol=1e-5)


def test_small_scores_are_weighed_as_large_ones():
    """Far from 0 a sigmoid is an exponential: its shares don't change when all logits fall."""
    logits = np.array([[[2.0, 1.6, -3.0], [-1.0, -1.2, -0.9]]], np.float32)
    moe, valid = MoeConfig(scores="sigmoid"), jnp.array([[True, True]])

    def weighed(logits):
        routing, _ = decide(logits, valid, moe, top_k=2, slots=2)
        return routing.weight_GxSxK

    def both(shift):
        slope = jax.grad(lambda x: (weighed(x) * jnp.array([1.0, -1.0])).sum())
        return weighed(logits + shift), slope(logits + shift)

    weight, slope = both(-20.0)
    e = np.exp([0.4, 0.1])  # the first token's two best, and the second's, apart
    expected = np.stack([e / (1 + e), 1 / (1 + e)], -1)
    np.testing.assert_allclose(weight[0], expected, rtol=1e-4)
    assert np.abs(slope).max() > 0.1
    for shift in (-50.0, -1000.0):
        for ours, like in zip(both(shift), (weight, slope), strict=True):
            np.testing.assert_allclose(ours, like, rtol=1e-3, atol=1e-5)
    # None is kept: an expert has one slot, and the first token has taken it.
    routing, _ = route(logits[:, :1].repeat(2, 1), valid, moe, top_k=2, slots=1)
    assert routing.weight_GxSxK[0, 1].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("top_k", "normalize", "expected"),
    [
        (1, None, [0.5]),
        (1, True, [1.0]),
        (1, False, [0.5]),
        (2, None, [0.625, 0.375]),
        (2, False, [0.5, 0.3]),
        (3, True, [0.5, 0.3, 0.2]),
    ],
)
def test_weights_are_normalized_by_hand(top_k, normalize, expected):
    logits, valid = jnp.log(jnp.array([[[0.2, 0.5, 0.3]]])), jnp.ones((1, 1), bool)
    routing, _ = route(logits, valid, DEFAULT, top_k=top_k, slots=1, normalize=normalize)
    np.testing.assert_allclose(routing.weight_GxSxK[0, 0], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("tokens", "experts", "factor", "top_k", "minimum", "slots"),
    [
        (100, 4, 1.2, 1, 4, 31),  # 30.000002 in float32
        (128, 8, 1.0, 1, 4, 16),
        (128, 8, 1.0, 2, 4, 32),
        (16, 8, 1.0, 1, 4, 4),  # the minimum
        (2, 8, 1.0, 1, 4, 2),  # never more than there are tokens
        (100, 4, float("inf"), 1, 4, 100),
        (7, 3, 1.0, 1, 0, 3),
    ],
)
def test_capacity(tokens, experts, factor, top_k, minimum, slots):
    assert capacity(tokens, experts, factor, top_k, minimum) == slots


def test_random_token_selection():
    """A random subset of exactly C survives, in token order, each token as often as any other."""
    tokens, slots, draws = 11, 4, 2000
    logits = jnp.tile(jnp.array([2.0, 0.0]), (draws, tokens, 1))
    keys = jax.random.split(jax.random.key(0), draws)
    routing, metrics = route(
        logits,
        jnp.ones((draws, tokens), bool),
        MoeConfig(overflow="random"),
        top_k=1,
        slots=slots,
        keys_G=keys,
    )
    kept = np.asarray(routing.kept_GxSxK[..., 0])
    assert (kept.sum(1) == slots).all()
    for slot_S, kept_S in zip(np.asarray(routing.slot_GxSxK[..., 0]), kept, strict=True):
        assert slot_S[kept_S].tolist() == list(range(slots))
    standard_error = np.sqrt(slots / tokens * (1 - slots / tokens) / draws)
    assert np.abs(kept.mean(0) - slots / tokens).max() < 5 * standard_error
    assert metrics.dropped_E.tolist() == [draws * (tokens - slots), 0]


def test_random_token_selection_changes_nothing_without_overflow():
    logits = jax.random.normal(jax.random.key(1), (2, 13, 3))
    valid = jnp.ones((2, 13), bool)
    keys = jax.random.split(jax.random.key(2), 2)
    plain, _ = route(logits, valid, DEFAULT, top_k=1, slots=13)
    moe = MoeConfig(overflow="random")
    random, _ = route(logits, valid, moe, top_k=1, slots=13, keys_G=keys)
    jax.tree.map(np.testing.assert_array_equal, plain, random)


def test_second_expert_sampling():
    """The second expert is drawn in proportion to its probability, and is never the first."""
    draws = 4000
    logits = jnp.tile(jnp.log(jnp.array([0.6, 0.3, 0.1])), (draws, 1, 1))
    keys = jax.random.split(jax.random.key(0), draws)
    valid = jnp.ones((draws, 1), bool)
    moe = MoeConfig(second_expert_sampling=True)
    routing, _ = route(logits, valid, moe, top_k=2, slots=1, keys_G=keys)
    first, second = np.asarray(routing.expert_GxSxK[:, 0]).T
    assert (first == 0).all()
    assert set(second.tolist()) == {1, 2}
    assert abs((second == 1).mean() - 0.75) < 5 * np.sqrt(0.75 * 0.25 / draws)


def test_rsample():
    """The expert is drawn in proportion to its probability; its weight and the loss are not."""
    draws = 4000
    probs = np.array([0.6, 0.3, 0.1])
    logits = jnp.tile(jnp.log(probs), (draws, 1, 1))
    valid = jnp.ones((draws, 1), bool)
    moe = MoeConfig(noise="rsample")
    keys = jax.random.split(jax.random.key(0), draws)
    routing, metrics = route(logits, valid, moe, top_k=1, slots=1, keys_G=keys)
    expert = np.asarray(routing.expert_GxSxK[:, 0, 0])
    share = np.bincount(expert, minlength=3) / draws
    assert (np.abs(share - probs) < 5 * np.sqrt(probs * (1 - probs) / draws)).all()
    np.testing.assert_allclose(routing.weight_GxSxK[:, 0, 0], probs[expert], rtol=1e-6)
    np.testing.assert_allclose(metrics.aux_loss, 3 * draws * (probs * share).sum(), rtol=1e-5)
    evaluation, _ = route(logits, valid, moe, top_k=1, slots=1)
    assert not evaluation.expert_GxSxK.any()


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_bias_changes_the_choice_and_nothing_else(top_k):
    """As if the scores were probability + bias; weights and losses use the probability."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(1, 11, 5)), jnp.float32)
    bias = jnp.asarray(rng.normal(size=5) * 0.3, jnp.float32)
    valid = jnp.ones((1, 11), bool)
    routing, metrics = route(logits, valid, DEFAULT, top_k=top_k, slots=11, bias_E=bias)
    probs = jax.nn.softmax(logits)
    expected = np.argsort(-(probs + bias), axis=-1)[..., :top_k]
    np.testing.assert_array_equal(routing.expert_GxSxK, expected)
    weight = np.take_along_axis(np.asarray(probs), expected, -1)
    if top_k > 1:
        weight /= weight.sum(-1, keepdims=True)
    np.testing.assert_allclose(routing.weight_GxSxK, weight, rtol=1e-5)
    plain, plain_metrics = route(logits, valid, DEFAULT, top_k=top_k, slots=11)
    assert (plain.expert_GxSxK != routing.expert_GxSxK).any()
    assert metrics.z_loss == plain_metrics.z_loss


def test_gradient_reaches_the_router_through_weights_and_auxiliary_loss():
    logits = jax.random.normal(jax.random.key(1), (1, 7, 3))
    valid = jnp.ones((1, 7), bool)

    def weights(logits):
        routing, _ = decide(logits, valid, DEFAULT, top_k=1, slots=7)
        return routing.weight_GxSxK.sum()

    def auxiliary(logits):
        return decide(logits, valid, DEFAULT, top_k=1, slots=7)[1].aux_loss

    probs = jax.nn.softmax(logits)
    chosen = jax.nn.one_hot(logits.argmax(-1), 3)
    top = (probs * chosen).sum(-1, keepdims=True)
    np.testing.assert_allclose(jit(jax.grad(weights))(logits), top * (chosen - probs), atol=1e-6)
    share = chosen.mean(1, keepdims=True)
    by_hand = 3 / 7 * probs * (share - (probs * share).sum(-1, keepdims=True))
    np.testing.assert_allclose(jit(jax.grad(auxiliary))(logits), by_hand, atol=1e-6)
