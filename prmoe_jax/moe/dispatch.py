"""Dispatch backends: bring tokens to their experts and the results back, one interface.

Each takes the tokens, the routing and the experts, and returns the weighted sum of the
experts' outputs. `einsum` is the readable oracle; the others must equal it.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from prmoe_jax.moe.experts import Experts
from prmoe_jax.moe.routing import Routing

Dispatch = Callable[[jax.Array, Routing, Experts, int], jax.Array]


def einsum(x_GxSxD: jax.Array, routing: Routing, experts: Experts, slots: int) -> jax.Array:
    """One-hot products, cost S·E·C·D: what GShard writes down."""
    expert_GxSxKxE = jax.nn.one_hot(routing.expert_GxSxK, experts.count)
    slot_GxSxKxC = jax.nn.one_hot(routing.slot_GxSxK, slots)
    dispatch_GxSxExC = jnp.einsum(
        "GSKE,GSKC,GSK->GSEC", expert_GxSxKxE, slot_GxSxKxC, routing.kept_GxSxK.astype(jnp.float32)
    ).astype(x_GxSxD.dtype)
    combine_GxSxExC = jnp.einsum(
        "GSKE,GSKC,GSK->GSEC", expert_GxSxKxE, slot_GxSxKxC, routing.weight_GxSxK
    ).astype(x_GxSxD.dtype)
    x_ExGxCxD = jnp.einsum("GSEC,GSD->EGCD", dispatch_GxSxExC, x_GxSxD)
    return jnp.einsum("GSEC,EGCD->GSD", combine_GxSxExC, experts(x_ExGxCxD))


def gather(x_GxSxD: jax.Array, routing: Routing, experts: Experts, slots: int) -> jax.Array:
    """A dense token-to-slot map each way (paper, section 5.4): rows are copied, not multiplied."""
    groups, tokens, width = x_GxSxD.shape
    places = experts.count * slots
    # Slot e·C+c of a group's buffer for each choice; `places`, past the end, for a dropped one.
    place_GxSxK = jnp.where(
        routing.kept_GxSxK, routing.expert_GxSxK * slots + routing.slot_GxSxK, places
    )
    choice_GxP = _invert(place_GxSxK.reshape(groups, -1), places)
    top_k = place_GxSxK.shape[-1]

    x_GxPxD = _take_rows(x_GxSxD, choice_GxP // top_k, place_GxSxK)
    x_ExGxCxD = x_GxPxD.reshape(groups, experts.count, slots, width).swapaxes(0, 1)
    y_GxPxD = experts(x_ExGxCxD).swapaxes(0, 1).reshape(groups, places, width)
    y_GxSKxD = _take_rows(y_GxPxD, place_GxSxK.reshape(groups, -1), choice_GxP[..., None])
    y_GxSxKxD = y_GxSKxD.reshape(groups, tokens, top_k, width)
    return jnp.einsum("GSKD,GSK->GSD", y_GxSxKxD, routing.weight_GxSxK.astype(x_GxSxD.dtype))


def ragged(x_GxSxD: jax.Array, routing: Routing, experts: Experts, slots: int) -> jax.Array:
    """Sorts the kept choices by expert; one grouped product over runs of unequal length."""
    return _by_runs(x_GxSxD, routing, experts, experts.ragged)


def blocked(x_GxSxD: jax.Array, routing: Routing, experts: Experts, slots: int) -> jax.Array:
    """As `ragged`, by loops over the experts and over blocks of a run: for CPUs.

    XLA's grouped product multiplies every row by every expert there.
    """
    return _by_runs(x_GxSxD, routing, experts, experts.blocked)


def _by_runs(x_GxSxD, routing: Routing, experts: Experts, apply) -> jax.Array:
    """Rows in the order of their experts, through `apply`, and back.

    No buffer limits a run, so that without a capacity the cost is that of the tokens there are.
    """
    top_k = routing.expert_GxSxK.shape[-1]
    # What isn't kept forms a last run that belongs to no expert.
    expert_R = jnp.where(routing.kept_GxSxK, routing.expert_GxSxK, experts.count).reshape(-1)
    order_R = jnp.argsort(expert_R)
    place_R = jnp.argsort(order_R)
    sorted_R = expert_R[order_R]
    rows_E = jnp.bincount(expert_R, length=experts.count)

    x_1xNxD = x_GxSxD.reshape(1, -1, x_GxSxD.shape[-1])
    x_1xRxD = _take_rows(x_1xNxD, order_R[None] // top_k, place_R.reshape(1, -1, top_k))
    y_RxD = apply(x_1xRxD[0], rows_E, sorted_R)
    y_1xRxD = _take_rows(y_RxD[None], place_R[None], order_R[None, :, None])
    y_GxSxKxD = y_1xRxD.reshape(*routing.expert_GxSxK.shape, -1)
    return jnp.einsum("GSKD,GSK->GSD", y_GxSxKxD, routing.weight_GxSxK.astype(x_GxSxD.dtype))


BACKENDS: dict[str, Dispatch] = {
    "einsum": einsum,
    "gather": gather,
    "ragged": ragged,
    "blocked": blocked,
}


def resolve(name: str, platform: str) -> str:
    """What 'auto' means: 'A/B', A where experts have a capacity, B where nothing is dropped."""
    if name != "auto":
        return name
    return "gather/blocked" if platform == "cpu" else "gather/ragged"


def backend(resolved: str, dropless: bool) -> Dispatch:
    """The backend of a resolved name."""
    return BACKENDS[resolved.split("/")[-1 if dropless else 0]]


def _invert(place_GxR: jax.Array, places: int) -> jax.Array:
    """For each of `places` the row r that has it, and R where none has."""
    groups, rows = place_GxR.shape
    group_Gx1 = jnp.arange(groups)[:, None]
    empty_GxP = jnp.full((groups, places), rows, jnp.int32)
    return empty_GxP.at[group_Gx1, place_GxR].set(jnp.arange(rows), mode="drop")


def _rows(x_GxNxD: jax.Array, index_GxM: jax.Array) -> jax.Array:
    """x[g, index[g, m]], and zeros where the index is past the end."""
    take = partial(jnp.take, axis=0, mode="fill", fill_value=0)
    return jax.vmap(take)(x_GxNxD, index_GxM)


@jax.custom_vjp
def _take_rows(x_GxNxD, index_GxM, inverse_GxNxJ):
    """`_rows`, with a gradient that gathers too: `inverse` lists the places each row went to.

    The derivative XLA would use, a scatter-add, is the slow part of a sparse dispatch.
    """
    return _rows(x_GxNxD, index_GxM)


def _take_rows_forward(x_GxNxD, index_GxM, inverse_GxNxJ):
    return _rows(x_GxNxD, index_GxM), inverse_GxNxJ


def _take_rows_backward(inverse_GxNxJ, dy_GxMxD):
    groups, rows, copies = inverse_GxNxJ.shape
    dx_GxNJxD = _rows(dy_GxMxD, inverse_GxNxJ.reshape(groups, -1))
    return dx_GxNJxD.reshape(groups, rows, copies, -1).sum(2), None, None


_take_rows.defvjp(_take_rows_forward, _take_rows_backward)
