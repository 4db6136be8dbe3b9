"""Routing: from router scores to a decision (who goes where, in which slot, with what weight).

Semantics are DeepSpeed's (`sharded_moe.py`, top1gating and top2gating), in float32, with two
changes: tokens compete within a routing group that the model fixes, and masked tokens take no
capacity and count in no statistic.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Routing(NamedTuple):
    """Where each of a token's K choices goes; a choice that isn't kept has weight 0."""

    expert_GxSxK: jax.Array  # int32
    slot_GxSxK: jax.Array  # int32, place in the expert's buffer of C tokens
    kept_GxSxK: jax.Array  # bool
    weight_GxSxK: jax.Array  # float32


class RouterMetrics(NamedTuple):
    """One MoE layer's statistics as sums over its tokens, so that portions of a batch add up."""

    aux_loss: jax.Array  # summed over routing groups
    groups: jax.Array  # routing groups that hold a token
    tokens: jax.Array  # tokens that are not masked
    entropy: jax.Array  # of the router's distribution, in nats, summed over tokens
    assigned_E: jax.Array  # choices of each expert before capacity
    dropped_E: jax.Array  # of these, choices lost to capacity
    coefficient: jax.Array  # weight of the experts' branch against the residual's, summed


def capacity(tokens: int, experts: int, capacity_factor: float, top_k: int, minimum: int) -> int:
    """Slots of an expert for a group of `tokens`: max(ceil(S/E · factor · k), minimum).

    In float32, as DeepSpeed computes it (100 tokens, 4 experts, factor 1.2 make 31), and never
    more than S, since a token chooses an expert at most once. An infinite factor gives S.
    """
    if math.isinf(capacity_factor):
        return tokens
    slots = math.ceil(np.float32(tokens / experts) * np.float32(capacity_factor * top_k))
    return min(max(slots, minimum), tokens)


def route(
    logits_GxSxE: jax.Array,
    valid_GxS: jax.Array,
    *,
    top_k: int,
    slots: int,
    random_selection_keys_G: jax.Array | None = None,
    sampling_keys_G: jax.Array | None = None,
) -> tuple[Routing, RouterMetrics]:
    """Chooses each token's experts and places it in their buffers.

    Top 1 weighs by the raw probability; top 2 renormalises over the choices that were kept.
    Within a group all first choices precede all second choices, each in token order; an
    expert keeps the first `slots`. With `random_selection_keys_G` (top 1) it keeps a random
    subset instead (Random Token Selection), still placed in token order. With
    `sampling_keys_G` (top 2) Gumbel noise is added before the second expert is chosen.

    Args:
      logits_GxSxE: float32 router scores.
      valid_GxS: False for padding, which is routed nowhere.
      top_k: 1 or 2.
      slots: capacity C of an expert.
      random_selection_keys_G: one key a group, training only.
      sampling_keys_G: one key a group, training only.
    """
    groups, tokens, experts = logits_GxSxE.shape
    probs_GxSxE = jax.nn.softmax(logits_GxSxE)
    valid_GxSx1 = valid_GxS[..., None]

    first_GxS = jnp.argmax(logits_GxSxE, axis=-1)
    first_GxSxE = jax.nn.one_hot(first_GxS, experts, dtype=jnp.int32) * valid_GxSx1
    chosen = [first_GxS]
    if top_k == 2:
        others_GxSxE = logits_GxSxE
        if sampling_keys_G is not None:
            draw = lambda key: jax.random.gumbel(key, (tokens, experts))  # noqa: E731
            others_GxSxE = others_GxSxE + jax.vmap(draw)(sampling_keys_G)
        chosen.append(jnp.argmax(jnp.where(first_GxSxE > 0, -jnp.inf, others_GxSxE), axis=-1))

    # Choices in order of precedence: K-major, so that first choices come before second ones.
    expert_GxKS = jnp.concatenate(chosen, axis=1)
    valid_GxKS = jnp.tile(valid_GxS, (1, top_k))
    onehot_GxKSxE = jax.nn.one_hot(expert_GxKS, experts, dtype=jnp.int32) * valid_GxKS[..., None]

    def place(onehot_GxKSxE):
        """How many earlier choices went to the same expert; -1 where there is no choice."""
        return (jnp.cumsum(onehot_GxKSxE, axis=1) * onehot_GxKSxE).sum(-1) - 1

    if random_selection_keys_G is None:
        slot_GxKS = place(onehot_GxKSxE)
        kept_GxKS = valid_GxKS & (slot_GxKS < slots)
    else:
        order_GxS = jax.vmap(lambda key: jax.random.permutation(key, tokens))(
            random_selection_keys_G
        )
        shuffled_GxSxE = jnp.take_along_axis(onehot_GxKSxE, order_GxS[..., None], axis=1)
        rank_GxS = jnp.take_along_axis(place(shuffled_GxSxE), jnp.argsort(order_GxS), axis=1)
        kept_GxKS = valid_GxKS & (rank_GxS < slots)
        slot_GxKS = place(onehot_GxKSxE * kept_GxKS[..., None])

    def by_token(x_GxKS):
        return x_GxKS.reshape(groups, top_k, tokens).swapaxes(1, 2)

    expert_GxSxK, kept_GxSxK = by_token(expert_GxKS), by_token(kept_GxKS)
    weight_GxSxK = jnp.take_along_axis(probs_GxSxE, expert_GxSxK, axis=-1) * kept_GxSxK
    if top_k == 2:
        total_GxSx1 = weight_GxSxK.sum(-1, keepdims=True)
        weight_GxSxK /= jnp.maximum(total_GxSx1, jnp.finfo(jnp.float32).eps)
    routing = Routing(expert_GxSxK, by_token(slot_GxKS), kept_GxSxK, weight_GxSxK)

    # Auxiliary loss E · Σ mean(probability) · mean(first choice), before capacity.
    count_G = valid_GxS.sum(-1)
    per_token_Gx1 = 1.0 / jnp.maximum(count_G, 1)[:, None]
    mean_prob_GxE = (probs_GxSxE * valid_GxSx1).sum(1) * per_token_Gx1
    mean_first_GxE = first_GxSxE.sum(1) * per_token_Gx1
    log_probs_GxSxE = jax.nn.log_softmax(logits_GxSxE)
    metrics = RouterMetrics(
        aux_loss=experts * (mean_prob_GxE * mean_first_GxE).sum(),
        groups=(count_G > 0).sum(),
        tokens=count_G.sum(),
        entropy=-(probs_GxSxE * log_probs_GxSxE * valid_GxSx1).sum(),
        assigned_E=onehot_GxKSxE.sum((0, 1)),
        dropped_E=(onehot_GxKSxE * ~kept_GxKS[..., None]).sum((0, 1)),
        coefficient=jnp.zeros(()),
    )
    return routing, metrics
