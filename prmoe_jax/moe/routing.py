"""Routing turns router scores into a decision: each token's experts, slots and weights.

The semantics are DeepSpeed's (`sharded_moe.py`: top1gating, top2gating, topkgating), in float32,
with three changes. Tokens compete within a routing group, whose size is part of the model. Masked
tokens take no capacity and count in no statistic. Evaluation is deterministic, and causal except
with expert choice or `overflow=probability`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from prmoe_jax.config.schema import MoeConfig


class Routing(NamedTuple):
    """Where each of a token's K choices goes; a dropped choice has weight 0."""

    expert_GxSxK: jax.Array  # int32
    slot_GxSxK: jax.Array  # int32, position in the expert's buffer of C tokens
    kept_GxSxK: jax.Array  # bool
    weight_GxSxK: jax.Array  # float32


class RouterMetrics(NamedTuple):
    """Statistics of an MoE layer, as sums that add up over microbatches."""

    aux_loss: jax.Array  # summed over routing groups
    z_loss: jax.Array  # log(Σ exp(logits))², summed over tokens
    groups: jax.Array  # routing groups that hold a token
    tokens: jax.Array  # tokens that are not masked
    unserved: jax.Array  # tokens that no expert kept
    entropy: jax.Array  # of the router's distribution, in nats, summed over tokens
    weight: jax.Array  # sum of the weights of a token's experts, summed over tokens
    weight_square: jax.Array  # the square of this sum, summed over tokens
    assigned_E: jax.Array  # choices of each expert before capacity
    dropped_E: jax.Array  # choices of each expert that exceeded its capacity
    # In the next two, expert choice counts a token as one choice, dropped if no expert took it.
    choices_S: jax.Array  # choices by the token's position in its group
    dropped_S: jax.Array  # dropped choices by the token's position in its group
    coefficient: jax.Array  # mixing weight of the experts' output, summed over tokens
    coefficient_unserved: jax.Array  # the same, summed over `unserved` tokens
    rounds: jax.Array  # rounds of the dropless exchange, times tokens
    # Squared norms, summed over tokens: of what the experts add to the residual stream, and of the
    # stream that they add it to.
    added_square: jax.Array
    stream_square: jax.Array
    prob_E: jax.Array | None = None  # probabilities, summed over tokens; only with `balance=batch`


def route(
    logits_GxSxE: jax.Array,
    valid_GxS: jax.Array,
    moe: MoeConfig,
    *,
    top_k: int,
    slots: int,
    normalize: bool | None = None,
    bias_E: jax.Array | None = None,
    keys_G: jax.Array | None = None,
) -> tuple[Routing, RouterMetrics]:
    """Routes tokens by `moe.router` and its options, and measures the decision.

    Args:
      logits_GxSxE: float32 router scores.
      valid_GxS: False for padding, which is not routed.
      moe: the rules.
      top_k: experts per token; with expert choice, their mean at capacity factor 1.
      slots: capacity C of an expert.
      normalize: whether the weights of a token's kept experts are divided by their sum; by default
        if `top_k` is above 1.
      bias_E: added to the probabilities that choose experts, but not to the weights.
      keys_G: one key per group switches training's randomness on; None for evaluation.

    Returns:
      The decision, in arrays [G, S, K], and its statistics. K is `top_k`, or with expert choice the
      number of experts E.
    """
    probs_GxSxE = jax.nn.softmax(logits_GxSxE)
    if moe.scores == "sigmoid":
        probs_GxSxE = jax.nn.sigmoid(logits_GxSxE)
        # A softmax of these logarithms divides each score by the sum of all scores.
        logits_GxSxE = jax.nn.log_sigmoid(logits_GxSxE)
    normalize = top_k > 1 if normalize is None else normalize
    rules = Rules(moe, top_k, slots, normalize, bias_E, keys_G)
    return DECIDE[moe.router](logits_GxSxE, probs_GxSxE, valid_GxS, rules)


class Rules(NamedTuple):
    """The inputs of a router other than the scores."""

    moe: MoeConfig
    top_k: int
    slots: int
    normalize: bool
    bias_E: jax.Array | None
    keys_G: jax.Array | None


def _tokens_choose(
    logits_GxSxE, probs_GxSxE, valid_GxS, rules: Rules
) -> tuple[Routing, RouterMetrics]:
    """Each token chooses its top k experts, which keep as many tokens as they have slots."""
    moe, top_k, slots, normalize, bias_E, keys_G = rules
    keys = {}
    if keys_G is not None:
        names = "rsample", "second", "random"
        split_GxN = jax.vmap(lambda key: jax.random.split(key, len(names)))(keys_G)
        keys = {name: split_GxN[:, i] for i, name in enumerate(names)}
    expert_GxSxK = _choose(logits_GxSxE, probs_GxSxE, moe, top_k, bias_E, keys)
    experts = logits_GxSxE.shape[-1]
    choice_GxSxKxE = jax.nn.one_hot(expert_GxSxK, experts) * valid_GxS[..., None, None]
    prob_GxSxK = (probs_GxSxE[:, :, None] * choice_GxSxKxE).sum(-1)

    priority_GxSxK = None
    if moe.overflow == "probability":
        priority_GxSxK = prob_GxSxK
    elif moe.overflow == "random" and keys:
        draw = lambda key: jax.random.uniform(key, prob_GxSxK.shape[1:])  # noqa: E731
        priority_GxSxK = jax.vmap(draw)(keys["random"])
    # In GShard's order, a later token's first choice precedes an earlier token's second choice.
    firsts_first = top_k == 2 and keys_G is not None
    slot_GxSxK, kept_GxSxK = assign(choice_GxSxKxE, slots, priority_GxSxK, firsts_first)

    weight_GxSxK = prob_GxSxK * kept_GxSxK
    if normalize:  # after dropping, so that a single kept choice has weight 1
        if moe.scores == "sigmoid":
            # From logarithms: all of a token's scores may underflow in float32.
            log_GxSxK = (logits_GxSxE[:, :, None] * choice_GxSxKxE).sum(-1)
            weight_GxSxK = jax.nn.softmax(log_GxSxK, where=kept_GxSxK)
        else:
            total_GxSx1 = weight_GxSxK.sum(-1, keepdims=True)
            weight_GxSxK /= jnp.maximum(total_GxSx1, jnp.finfo(jnp.float32).eps)
    if moe.routed_scale != 1:
        weight_GxSxK *= moe.routed_scale
    routing = Routing(expert_GxSxK, slot_GxSxK, kept_GxSxK, weight_GxSxK)
    metrics = _measure(routing, choice_GxSxKxE, logits_GxSxE, valid_GxS)
    if moe.balance == "batch":
        share_GxSxE = jax.nn.softmax(logits_GxSxE) * valid_GxS[..., None]
        metrics = metrics._replace(prob_E=share_GxSxE.sum((0, 1)))
    return routing, metrics


def assign(
    choice_GxSxKxE: jax.Array,
    slots: int,
    priority_GxSxK: jax.Array | None = None,
    firsts_first: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Assigns the slots of the experts' buffers; returns slot and kept, both [G, S, K].

    Choices are in the order of the tokens and, for a token, in the order of its choices. An expert
    keeps the `slots` choices of highest priority or, without priorities, the first ones. The slots
    of kept choices are numbered in this order, not by priority.

    Args:
      choice_GxSxKxE: 1 at the chosen expert, all 0 for padding.
      slots: capacity C of an expert.
      priority_GxSxK: the highest are kept; ties go to the earlier choice.
      firsts_first: changes the order: all first choices precede all second ones.
    """
    groups, tokens, top_k, _ = choice_GxSxKxE.shape

    def in_order(x_GxSxK):  # to [G, R, …]
        x = x_GxSxK.swapaxes(1, 2) if firsts_first else x_GxSxK
        return x.reshape(groups, tokens * top_k, *x.shape[3:])

    def by_token(x_GxR):
        if firsts_first:
            return x_GxR.reshape(groups, top_k, tokens).swapaxes(1, 2)
        return x_GxR.reshape(groups, tokens, top_k)

    choice_GxRxE = in_order(choice_GxSxKxE.astype(jnp.int32))
    rank_GxR = _rank(choice_GxRxE)
    if slots >= tokens:
        # A token chooses an expert at most once, so that none is full. XLA removes the ranks if
        # nothing reads the slots.
        slot_GxR, kept_GxR = rank_GxR, choice_GxRxE.any(-1)
    elif priority_GxSxK is None:
        slot_GxR, kept_GxR = rank_GxR, (rank_GxR >= 0) & (rank_GxR < slots)
    else:
        order_GxR = jnp.argsort(-in_order(priority_GxSxK), axis=1)
        sorted_GxRxE = jnp.take_along_axis(choice_GxRxE, order_GxR[..., None], axis=1)
        rank_GxR = jnp.take_along_axis(_rank(sorted_GxRxE), jnp.argsort(order_GxR), axis=1)
        kept_GxR = (rank_GxR >= 0) & (rank_GxR < slots)
        slot_GxR = _rank(choice_GxRxE * kept_GxR[..., None])
    return by_token(slot_GxR), by_token(kept_GxR)


def _rank(choice_GxRxE: jax.Array) -> jax.Array:
    """The number of earlier choices of the same expert; -1 for no choice."""
    return (jnp.cumsum(choice_GxRxE, axis=1) * choice_GxRxE).sum(-1) - 1


def _choose(logits_GxSxE, probs_GxSxE, moe: MoeConfig, top_k: int, bias_E, keys) -> jax.Array:
    """The experts of each token, best first: int32 [G, S, K]."""

    def noise(name):
        draw = lambda key: jax.random.gumbel(key, logits_GxSxE.shape[1:])  # noqa: E731
        return jax.vmap(draw)(keys[name])

    score_GxSxE = logits_GxSxE if bias_E is None else probs_GxSxE + bias_E
    if moe.noise == "rsample" and keys:
        score_GxSxE = score_GxSxE + noise("rsample")
    if top_k > 2:
        return jax.lax.top_k(score_GxSxE, top_k)[1]
    first_GxS = jnp.argmax(score_GxSxE, axis=-1)
    if top_k == 1:
        return first_GxS[..., None]
    if moe.second_expert_sampling and keys:
        score_GxSxE = score_GxSxE + noise("second")
    is_first_GxSxE = jax.nn.one_hot(first_GxS, logits_GxSxE.shape[-1], dtype=bool)
    second_GxS = jnp.argmax(jnp.where(is_first_GxSxE, -jnp.inf, score_GxSxE), axis=-1)
    return jnp.stack([first_GxS, second_GxS], axis=-1)


def _experts_choose(
    logits_GxSxE, probs_GxSxE, valid_GxS, rules: Rules
) -> tuple[Routing, RouterMetrics]:
    """Each expert takes the C tokens of highest probability (Zhou et al., arXiv 2202.09368).

    In the result each token has E choices, one for each expert; a choice is kept if the expert took
    the token.
    """
    groups, tokens, experts = probs_GxSxE.shape
    wanted_GxExS = jnp.where(valid_GxS[..., None], probs_GxSxE, -1).swapaxes(1, 2)
    token_GxExC = jax.lax.top_k(wanted_GxExS, rules.slots)[1]
    group, expert = jnp.arange(groups)[:, None, None], jnp.arange(experts)[:, None]
    slot_GxSxE = jnp.full((groups, tokens, experts), -1, jnp.int32)
    slot_GxSxE = slot_GxSxE.at[group, token_GxExC, expert].set(jnp.arange(rules.slots))
    kept_GxSxE = (slot_GxSxE >= 0) & valid_GxS[..., None]
    expert_GxSxE = jnp.broadcast_to(jnp.arange(experts), kept_GxSxE.shape)
    routing = Routing(expert_GxSxE, slot_GxSxE, kept_GxSxE, probs_GxSxE * kept_GxSxE)
    return routing, _measure_expert_choice(routing, logits_GxSxE, valid_GxS)


# The function of each router in `config.routers.ROUTERS`. Its arguments are the logits and the
# scores, both [G, S, E], a mask of the tokens that are not padding [G, S], and the rules.
DECIDE = {"token_choice": _tokens_choose, "expert_choice": _experts_choose}


def _measure(routing: Routing, choice_GxSxKxE, logits_GxSxE, valid_GxS) -> RouterMetrics:
    """Returns the statistics, with the auxiliary loss E · Σ mean(probability) · mean(choices)/k.

    The loss is taken before capacity. For k = 2 it counts only first choices, as GShard does, and
    does not divide by k.
    """
    top_k, experts = choice_GxSxKxE.shape[2:]
    lost_GxSxK = valid_GxS[..., None] & ~routing.kept_GxSxK
    counted_GxSxE = choice_GxSxKxE[:, :, 0] if top_k == 2 else choice_GxSxKxE.sum(2) / top_k
    probs_GxSxE = jax.nn.softmax(logits_GxSxE)
    per_token_Gx1 = 1.0 / jnp.maximum(valid_GxS.sum(-1), 1)[:, None]
    mean_prob_GxE = (probs_GxSxE * valid_GxS[..., None]).sum(1) * per_token_Gx1
    mean_choice_GxE = counted_GxSxE.sum(1) * per_token_Gx1
    return _metrics(
        routing,
        logits_GxSxE,
        valid_GxS,
        aux_loss=experts * (mean_prob_GxE * mean_choice_GxE).sum(),
        assigned_E=choice_GxSxKxE.sum((0, 1, 2)).astype(jnp.int32),
        dropped_E=(choice_GxSxKxE * lost_GxSxK[..., None]).sum((0, 1, 2)).astype(jnp.int32),
        choices_S=valid_GxS.sum(0) * top_k,
        dropped_S=lost_GxSxK.sum((0, 2)),
    )


def _measure_expert_choice(routing: Routing, logits_GxSxE, valid_GxS) -> RouterMetrics:
    """Returns the statistics of expert choice: the load is even, but tokens may be left out."""
    lost_GxS = valid_GxS & ~routing.kept_GxSxK.any(-1)
    return _metrics(
        routing,
        logits_GxSxE,
        valid_GxS,
        aux_loss=jnp.zeros(()),
        assigned_E=routing.kept_GxSxK.sum((0, 1)),
        dropped_E=jnp.zeros(logits_GxSxE.shape[-1], jnp.int32),
        choices_S=valid_GxS.sum(0),
        dropped_S=lost_GxS.sum(0),
    )


def _metrics(routing: Routing, logits_GxSxE, valid_GxS, **decision) -> RouterMetrics:
    """Adds the statistics of the scores to those of the decision."""
    log_z_GxS = jax.nn.logsumexp(logits_GxSxE, axis=-1)
    log_probs_GxSxE = logits_GxSxE - log_z_GxS[..., None]
    entropy_GxS = -(jnp.exp(log_probs_GxSxE) * log_probs_GxSxE).sum(-1)
    weight_GxS = routing.weight_GxSxK.sum(-1)  # 0 for padding
    return RouterMetrics(
        z_loss=(jnp.square(log_z_GxS) * valid_GxS).sum(),
        groups=valid_GxS.any(-1).sum(),
        tokens=valid_GxS.sum(),
        unserved=(valid_GxS & ~routing.kept_GxSxK.any(-1)).sum(),
        entropy=(entropy_GxS * valid_GxS).sum(),
        weight=weight_GxS.sum(),
        weight_square=jnp.square(weight_GxS).sum(),
        coefficient=jnp.zeros(()),
        coefficient_unserved=jnp.zeros(()),
        rounds=jnp.zeros((), jnp.int32),
        added_square=jnp.zeros(()),
        stream_square=jnp.zeros(()),
        **decision,
    )
