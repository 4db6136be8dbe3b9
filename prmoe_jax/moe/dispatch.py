"""Dispatch backends bring tokens to their experts and results back, all by one interface.

Each takes the tokens [G, S, D], the routing, the experts and their slots C per group, and returns
the weighted sum of the experts' outputs [G, S, D], with the rounds of exchange that this took where
runs of rows reach experts on other devices (0 otherwise). `einsum` is the readable oracle; the
others must equal it.
"""

import operator
from collections.abc import Callable
from functools import partial, reduce

import jax
import jax.numpy as jnp

from prmoe_jax.moe.exchange import ExpertParallel
from prmoe_jax.moe.experts import Experts
from prmoe_jax.moe.routing import Routing

Output = tuple[jax.Array, jax.Array | int]
Dispatch = Callable[[jax.Array, Routing, Experts, int], Output]


def einsum(x_GxSxD: jax.Array, routing: Routing, experts: Experts, slots: int) -> Output:
    """One-hot products as in GShard, at a cost of S·E·C·D."""
    groups, _, width = x_GxSxD.shape
    expert_GxSxKxE = jax.nn.one_hot(routing.expert_GxSxK, experts.count)
    slot_GxSxKxC = jax.nn.one_hot(routing.slot_GxSxK, slots)
    dispatch_GxSxExC = jnp.einsum(
        "GSKE,GSKC,GSK->GSEC", expert_GxSxKxE, slot_GxSxKxC, routing.kept_GxSxK.astype(jnp.float32)
    ).astype(x_GxSxD.dtype)
    combine_GxSxExC = jnp.einsum(
        "GSKE,GSKC,GSK->GSEC", expert_GxSxKxE, slot_GxSxKxC, routing.weight_GxSxK
    ).astype(x_GxSxD.dtype)
    x_ExGxCxD = jnp.einsum("GSEC,GSD->EGCD", dispatch_GxSxExC, x_GxSxD)
    y_ExRxD = experts(x_ExGxCxD.reshape(experts.count, groups * slots, width))
    y_ExGxCxD = y_ExRxD.reshape(x_ExGxCxD.shape)
    return jnp.einsum("GSEC,EGCD->GSD", combine_GxSxExC, y_ExGxCxD), 0


def gather(x_GxSxD: jax.Array, routing: Routing, experts: Experts, slots: int) -> Output:
    """Dense token-to-slot maps each way (paper, section 5.4); rows are copied, not multiplied."""
    groups, _, width = x_GxSxD.shape
    places = experts.count * groups * slots
    # A place is a row of all experts' buffers, flattened from [E, G, C]. A choice with slot c of
    # expert e in group g is at place (e·G + g)·C + c. A dropped choice has the number `places`,
    # which is past the end.
    group_Gx1x1 = jnp.arange(groups)[:, None, None]
    slot_GxSxK = (routing.expert_GxSxK * groups + group_Gx1x1) * slots + routing.slot_GxSxK
    place_GxSxK = jnp.where(routing.kept_GxSxK, slot_GxSxK, places)
    top_k = place_GxSxK.shape[-1]
    place_R = place_GxSxK.reshape(-1)
    choice_P = jnp.full(places, len(place_R), jnp.int32)
    choice_P = choice_P.at[place_R].set(jnp.arange(len(place_R)), mode="drop")

    x_NxD, token_P = x_GxSxD.reshape(-1, width), choice_P // top_k
    # Experts that choose tokens have a choice for each token, and most of these have no slot: there
    # only the rows of slots are held, and added up by XLA's scatter (on GPUs in any order).
    few_places = top_k == experts.count and 2 * places < len(place_R)
    if few_places:
        x_PxD = jnp.take(x_NxD, token_P, axis=0, mode="fill", fill_value=0)
    else:
        x_PxD = _take_rows(x_NxD, token_P, place_R.reshape(-1, top_k))
    y_PxD = experts(x_PxD.reshape(experts.count, groups * slots, width)).reshape(places, width)
    if not few_places:
        return _combine(y_PxD, routing.weight_GxSxK, place_R, choice_P), 0
    weight_P = jnp.take(routing.weight_GxSxK.reshape(-1), choice_P, mode="fill", fill_value=0)
    y_NxD = jnp.zeros(x_NxD.shape, jnp.float32)
    y_NxD = y_NxD.at[token_P].add(weight_P[:, None] * y_PxD, mode="drop")
    return y_NxD.astype(x_NxD.dtype).reshape(x_GxSxD.shape), 0


def per_token(
    x_GxSxD: jax.Array, routing: Routing, experts: Experts | ExpertParallel, slots: int
) -> Output:
    """For few tokens, as in decoding, which is bound by reading weights.

    On one device this applies the chosen expert to each row, reading no other weights, and is for
    no more choices than experts. Where experts are spread, see `ExpertParallel.everywhere`.
    """
    weight_GxSxK, top_k = routing.weight_GxSxK, routing.expert_GxSxK.shape[-1]
    x_NxD = x_GxSxD.reshape(-1, x_GxSxD.shape[-1])
    expert_NxK = routing.expert_GxSxK.reshape(-1, top_k)
    if isinstance(experts, ExpertParallel):
        y_NxD = experts.everywhere(x_NxD, expert_NxK, weight_GxSxK.reshape(-1, top_k))
        return y_NxD.reshape(x_GxSxD.shape), 0
    y_RxD = experts.per_token(jnp.repeat(x_NxD, top_k, axis=0), expert_NxK.reshape(-1))
    y_GxSxKxD = y_RxD.reshape(*weight_GxSxK.shape, -1)
    # In float32, as `_combine` adds them up.
    return jnp.einsum("GSKD,GSK->GSD", y_GxSxKxD, weight_GxSxK).astype(x_GxSxD.dtype), 0


def _by_runs(
    x_GxSxD, routing: Routing, experts: Experts | ExpertParallel, slots: int, form: str
) -> Output:
    """Sorts rows by expert, applies the method `form` of `Experts`, and sorts the results back.

    Runs need no buffer of fixed size: without a capacity, the cost follows the number of tokens.
    """
    top_k = routing.expert_GxSxK.shape[-1]
    # Dropped choices form a last run that belongs to no expert.
    expert_R = jnp.where(routing.kept_GxSxK, routing.expert_GxSxK, experts.count).reshape(-1)
    order_R = jnp.argsort(expert_R)
    place_R = jnp.argsort(order_R)
    sorted_R = expert_R[order_R]
    rows_E = jnp.bincount(expert_R, length=experts.count)

    x_NxD = x_GxSxD.reshape(-1, x_GxSxD.shape[-1])
    x_RxD = _take_rows(x_NxD, order_R // top_k, place_R.reshape(-1, top_k))
    if isinstance(experts, ExpertParallel):
        y_RxD, rounds = experts.in_rounds(form, x_RxD, rows_E, sorted_R)
    else:
        y_RxD, rounds = getattr(experts, form)(x_RxD, rows_E, sorted_R), 0
    return _combine(y_RxD, routing.weight_GxSxK, place_R, order_R), rounds


BACKENDS: dict[str, Dispatch] = {
    "einsum": einsum,
    "gather": gather,
    # On CPUs and on NVIDIA GPUs, XLA's grouped product multiplies every row by every expert.
    "ragged": partial(_by_runs, form="ragged"),
    "blocked": partial(_by_runs, form="block_loop"),  # loops over experts and blocks, for CPUs
    "padded": partial(_by_runs, form="padded"),  # one product of equal blocks, for GPUs
}


def resolve(name: str, platform: str) -> str:
    """Resolves 'auto' to 'A/B': A with a capacity, B where nothing is dropped."""
    if name != "auto":
        return name
    return "gather/" + {"cpu": "blocked", "tpu": "ragged"}.get(platform, "padded")


def backend(resolved: str, dropless: bool, few: bool = False) -> Dispatch:
    """The backend of a resolved name; `few` means few rows, as in decoding."""
    if few and dropless and "/" in resolved:
        return per_token
    return BACKENDS[resolved.split("/")[-1 if dropless else 0]]


# XLA's derivative of a gather is a scatter-add, the slow part of a sparse dispatch. Here both the
# forward and the backward pass gather, one by a map and the other by its inverse. An index past the
# end gives some row that is never read. This row need not be 0; only its gradient must be 0.


def _weighted_sum(x_KxNxD, weight_KxN):
    """The sum of K arrays by a weight for each row, [N, D], added up in float32.

    They are added one after the other: a TPU's compiler makes slow code of a reduction over them,
    and has to move rows if they are [N, K, D].
    """
    terms = [w[:, None] * x for x, w in zip(x_KxNxD, weight_KxN.astype(jnp.float32), strict=True)]
    return reduce(operator.add, terms).astype(x_KxNxD.dtype)


def _take_choices(x_PxD, index_NxK):
    """x at each choice of each token, [K, N, D]; an index past the end gives an arbitrary row."""
    top_k = index_NxK.shape[1]
    x_RxD = jnp.take(x_PxD, index_NxK.T.reshape(-1), axis=0, mode="clip")
    return x_RxD.reshape(top_k, -1, x_PxD.shape[1])


@jax.custom_vjp
def _take_rows(x_NxD, index_P, inverse_NxK):
    """x[index], [P, D]; an index past the end gives an arbitrary row.

    inverse[n] lists the rows of the result that x[n] is copied to; the derivative sums over them.
    """
    return jnp.take(x_NxD, index_P, axis=0, mode="clip")


def _take_rows_backward(inverse_NxK, dy_PxD):
    is_copy_NxK = inverse_NxK < len(dy_PxD)
    return _weighted_sum(_take_choices(dy_PxD, inverse_NxK), is_copy_NxK.T), None, None


_take_rows.defvjp(
    lambda x, index, inverse: (_take_rows(x, index, inverse), inverse), _take_rows_backward
)


@jax.custom_vjp
def _combine(y_PxD, weight_GxSxK, place_R, choice_P):
    """Sums each token's choices, read from their places in y, by their weights: [G, S, D].

    place_R has the row of y for each of the R choices, and choice_P has the choice for each row of
    y. A dropped choice has weight 0. An empty slot has R in choice_P, a number past the end.
    """
    return _combine_forward(y_PxD, weight_GxSxK, place_R, choice_P)[0]


def _combine_forward(y_PxD, weight_GxSxK, place_R, choice_P):
    weight_NxK = weight_GxSxK.reshape(-1, weight_GxSxK.shape[-1])
    y_KxNxD = _take_choices(y_PxD, place_R.reshape(weight_NxK.shape))
    combined_NxD = _weighted_sum(y_KxNxD, weight_NxK.T)
    return combined_NxD.reshape(*weight_GxSxK.shape[:2], -1), (y_KxNxD, weight_GxSxK, choice_P)


def _combine_backward(residuals, dy_GxSxD):
    y_KxNxD, weight_GxSxK, choice_P = residuals
    dy_NxD = dy_GxSxD.reshape(-1, dy_GxSxD.shape[-1])
    # The weight of each slot; it is 0 in empty slots, and no other mask is needed.
    weight_R = weight_GxSxK.reshape(-1).astype(dy_NxD.dtype)
    weight_P = jnp.take(weight_R, choice_P, mode="fill", fill_value=0)
    dy_PxD = jnp.take(dy_NxD, choice_P // len(y_KxNxD), axis=0, mode="clip")
    dweight_KxN = (y_KxNxD.astype(jnp.float32) * dy_NxD).sum(-1)
    return dy_PxD * weight_P[:, None], dweight_KxN.T.reshape(weight_GxSxK.shape), None, None


_combine.defvjp(_combine_forward, _combine_backward)
