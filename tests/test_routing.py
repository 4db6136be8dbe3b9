"""Routing: tables worked out by hand, and a token-by-token oracle of DeepSpeed's rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prmoe_jax.moe.routing import capacity, route


def oracle(logits_SxE, valid_S, top_k, slots):
    """One group, one token after the other, in float64."""
    tokens, experts = logits_SxE.shape
    probs = np.exp(logits_SxE - logits_SxE.max(1, keepdims=True))
    probs /= probs.sum(1, keepdims=True)
    ranked = np.argsort(-logits_SxE, axis=1, kind="stable")
    filled = [0] * experts
    kept, slot, weight = (np.zeros((tokens, top_k)) for _ in range(3))
    for k in range(top_k):
        for s in range(tokens):
            if valid_S[s]:
                expert = ranked[s, k]
                slot[s, k], kept[s, k] = filled[expert], filled[expert] < slots
                weight[s, k] = probs[s, expert] * kept[s, k]
                filled[expert] += 1
    if top_k == 2:
        weight /= np.maximum(weight.sum(1, keepdims=True), np.finfo(np.float32).eps)
    count = max(valid_S.sum(), 1)
    mean_prob = probs[valid_S].sum(0) / count
    mean_first = np.bincount(ranked[valid_S, 0], minlength=experts) / count
    return ranked[:, :top_k], slot, kept, weight, experts * (mean_prob * mean_first).sum(), filled


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("slots", [1, 3, 23])
def test_equals_the_oracle_at_prime_shapes(top_k, slots):
    rng = np.random.default_rng(slots)
    logits = rng.normal(size=(3, 23, 5)).astype(np.float32)
    valid = rng.random((3, 23)) < 0.8
    valid[2] = False  # a group that is all padding
    routing, metrics = jax.jit(route, static_argnames=("top_k", "slots"))(
        logits, valid, top_k=top_k, slots=slots
    )
    aux_loss, assigned, dropped = 0, np.zeros(5), 0
    for g in range(3):
        expert, slot, kept, weight, aux, filled = oracle(logits[g], valid[g], top_k, slots)
        np.testing.assert_array_equal(routing.kept_GxSxK[g], kept)
        where = kept.astype(bool)
        np.testing.assert_array_equal(np.asarray(routing.expert_GxSxK[g])[where], expert[where])
        np.testing.assert_array_equal(np.asarray(routing.slot_GxSxK[g])[where], slot[where])
        np.testing.assert_allclose(routing.weight_GxSxK[g], weight, rtol=1e-6, atol=1e-7)
        aux_loss, assigned = aux_loss + aux, assigned + filled
        dropped += valid[g].sum() * top_k - kept.sum()
    np.testing.assert_allclose(metrics.aux_loss, aux_loss, rtol=1e-6)
    np.testing.assert_array_equal(metrics.assigned_E, assigned)
    assert metrics.dropped_E.sum() == dropped
    assert metrics.tokens == valid.sum()
    assert metrics.groups == 2


def test_top1_by_hand():
    """Five tokens, two experts, two slots: expert 0 is asked for by 0, 1, 3 and 4."""
    logits = jnp.log(jnp.array([[[9.0, 1], [8, 2], [3, 7], [6, 4], [9, 1]]]))
    valid = jnp.array([[True, False, True, True, True]])  # token 1 is padding
    routing, metrics = route(logits, valid, top_k=1, slots=2)
    assert routing.expert_GxSxK[0, :, 0].tolist() == [0, 0, 1, 0, 0]
    assert routing.kept_GxSxK[0, :, 0].tolist() == [True, False, True, True, False]
    assert [int(routing.slot_GxSxK[0, s, 0]) for s in (0, 2, 3)] == [0, 0, 1]
    np.testing.assert_allclose(routing.weight_GxSxK[0, :, 0], [0.9, 0, 0.7, 0.6, 0], rtol=1e-6)
    # mean probability (2.7, 1.3)/4, first choices (3, 1)/4
    np.testing.assert_allclose(metrics.aux_loss, 2 * (0.675 * 0.75 + 0.325 * 0.25), rtol=1e-6)
    assert metrics.assigned_E.tolist() == [3, 1]
    assert metrics.dropped_E.tolist() == [1, 0]


def test_top2_by_hand():
    """All first choices precede all second ones; a lone survivor has weight 1."""
    logits = jnp.log(jnp.array([[[5.0, 4, 1], [3, 6, 1], [6, 1, 3]]]))
    routing, metrics = route(logits, jnp.ones((1, 3), bool), top_k=2, slots=2)
    assert routing.expert_GxSxK[0].tolist() == [[0, 1], [1, 0], [0, 2]]
    # Expert 0: tokens 0, 2 first, then token 1's second choice overflows.
    assert routing.kept_GxSxK[0].tolist() == [[True, True], [True, False], [True, True]]
    assert routing.slot_GxSxK[0, [0, 0, 1, 2, 2], [0, 1, 0, 0, 1]].tolist() == [0, 1, 0, 1, 0]
    expected = [[5 / 9, 4 / 9], [1, 0], [6 / 9, 3 / 9]]
    np.testing.assert_allclose(routing.weight_GxSxK[0], expected, rtol=1e-6)
    assert metrics.dropped_E.tolist() == [1, 0, 0]


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
        top_k=1,
        slots=slots,
        random_selection_keys_G=keys,
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
    plain, _ = route(logits, valid, top_k=1, slots=13)
    random, _ = route(logits, valid, top_k=1, slots=13, random_selection_keys_G=keys)
    jax.tree.map(np.testing.assert_array_equal, plain, random)


def test_second_expert_sampling():
    """The second expert is drawn in proportion to its probability, and is never the first."""
    draws = 4000
    logits = jnp.tile(jnp.log(jnp.array([0.6, 0.3, 0.1])), (draws, 1, 1))
    keys = jax.random.split(jax.random.key(0), draws)
    valid = jnp.ones((draws, 1), bool)
    routing, _ = route(logits, valid, top_k=2, slots=1, sampling_keys_G=keys)
    first, second = np.asarray(routing.expert_GxSxK[:, 0]).T
    assert (first == 0).all()
    assert set(second.tolist()) == {1, 2}
    assert abs((second == 1).mean() - 0.75) < 5 * np.sqrt(0.75 * 0.25 / draws)


def test_gradient_reaches_the_router_through_weights_and_auxiliary_loss():
    logits = jax.random.normal(jax.random.key(1), (1, 7, 3))
    valid = jnp.ones((1, 7), bool)

    def weights(logits):
        return route(logits, valid, top_k=1, slots=7)[0].weight_GxSxK.sum()

    def auxiliary(logits):
        return route(logits, valid, top_k=1, slots=7)[1].aux_loss

    probs = jax.nn.softmax(logits)
    chosen = jax.nn.one_hot(logits.argmax(-1), 3)
    top = (probs * chosen).sum(-1, keepdims=True)
    np.testing.assert_allclose(jax.grad(weights)(logits), top * (chosen - probs), atol=1e-6)
    share = chosen.mean(1, keepdims=True)
    by_hand = 3 / 7 * probs * (share - (probs * share).sum(-1, keepdims=True))
    np.testing.assert_allclose(jax.grad(auxiliary)(logits), by_hand, atol=1e-6)
