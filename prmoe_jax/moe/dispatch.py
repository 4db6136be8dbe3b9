"""Dispatch brings tokens to their experts, and combines the experts' outputs for each token.

A dispatcher holds the index maps of one routing decision. Its `dispatch` copies tokens [G, S, D]
into the experts' input rows; its `combine` sums each token's output rows, [G, S, D], by the
router's weights. `OneHot` is the readable oracle; the others must equal it.

Axes: N = G·S tokens, R = N·K choices (in ExRxD, an expert's G·C rows), P rows of all experts.
"""

import operator
from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp

from prmoe_jax.moe import kernels
from prmoe_jax.moe.exchange import ExpertParallel
from prmoe_jax.moe.experts import Local
from prmoe_jax.moe.kernels import Kernel
from prmoe_jax.moe.routing import Routing


class OneHot(NamedTuple):
    """One-hot products as in GShard, at a cost of G·S·E·C·D multiplications."""

    chosen_GxSxExC: jax.Array  # 1 where expert e holds the token in slot c
    weight_GxSxExC: jax.Array

    @classmethod
    def of(cls, routing: Routing, experts: int, slots: int) -> "OneHot":
        """The maps for experts with C slots for each group."""
        expert_GxSxKxE = jax.nn.one_hot(routing.expert_GxSxK, experts)
        slot_GxSxKxC = jax.nn.one_hot(routing.slot_GxSxK, slots)

        def spread(x_GxSxK):
            return jnp.einsum("GSKE,GSKC,GSK->GSEC", expert_GxSxKxE, slot_GxSxKxC, x_GxSxK)

        return cls(spread(routing.kept_GxSxK.astype(jnp.float32)), spread(routing.weight_GxSxK))

    def dispatch(self, x_GxSxD: jax.Array) -> jax.Array:
        """The rows of each expert, [E, G·C, D]."""
        chosen_GxSxExC = self.chosen_GxSxExC.astype(x_GxSxD.dtype)
        x_ExGxCxD = jnp.einsum("GSEC,GSD->EGCD", chosen_GxSxExC, x_GxSxD)
        return x_ExGxCxD.reshape(len(x_ExGxCxD), -1, x_GxSxD.shape[-1])

    def combine(self, y_ExRxD: jax.Array) -> jax.Array:
        """The weighted sum of each token's experts, [G, S, D]."""
        groups, _, experts, slots = self.weight_GxSxExC.shape
        y_ExGxCxD = y_ExRxD.reshape(experts, groups, slots, -1)
        weight_GxSxExC = self.weight_GxSxExC.astype(y_ExRxD.dtype)
        return jnp.einsum("GSEC,EGCD->GSD", weight_GxSxExC, y_ExGxCxD)


class Slots(NamedTuple):
    """Index maps from tokens to slots and back (paper, section 5.4); rows are gathered.

    The P rows are the slots of all experts, flattened from [E, G, C]: slot c of expert e in group g
    is row (e·G + g)·C + c. A dropped choice has row P, which is past the end.
    """

    routing: Routing
    experts: int
    row_R: jax.Array
    choice_P: jax.Array  # the choice in each row; R in an empty row

    @classmethod
    def of(cls, routing: Routing, experts: int, slots: int) -> "Slots":
        """The maps for experts with C slots for each group."""
        groups = len(routing.expert_GxSxK)
        rows = experts * groups * slots
        group_Gx1x1 = jnp.arange(groups)[:, None, None]
        slot_GxSxK = (routing.expert_GxSxK * groups + group_Gx1x1) * slots + routing.slot_GxSxK
        row_R = jnp.where(routing.kept_GxSxK, slot_GxSxK, rows).reshape(-1)
        choice_P = jnp.full(rows, len(row_R), jnp.int32)
        choice_P = choice_P.at[row_R].set(jnp.arange(len(row_R)), mode="drop")
        return cls(routing, experts, row_R, choice_P)

    @property
    def top_k(self) -> int:
        return self.routing.expert_GxSxK.shape[-1]

    @property
    def few_rows(self) -> bool:
        """Whether a token has K = E choices, as with expert choice, and most choices have no row.

        If so, only the P rows are gathered, and XLA's scatter sums them (on GPUs in any order).
        """
        return self.top_k == self.experts and 2 * len(self.choice_P) < len(self.row_R)

    def dispatch(self, x_GxSxD: jax.Array) -> jax.Array:
        """The rows of each expert, [E, G·C, D]."""
        x_NxD = x_GxSxD.reshape(-1, x_GxSxD.shape[-1])
        token_P = self.choice_P // self.top_k
        if self.few_rows:
            x_PxD = jnp.take(x_NxD, token_P, axis=0, mode="fill", fill_value=0)
        else:
            x_PxD = _take_rows(x_NxD, token_P, self.row_R.reshape(-1, self.top_k))
        return x_PxD.reshape(self.experts, -1, x_PxD.shape[-1])

    def combine(self, y_ExRxD: jax.Array) -> jax.Array:
        """The weighted sum of each token's experts, [G, S, D]."""
        weight_GxSxK = self.routing.weight_GxSxK
        y_PxD = y_ExRxD.reshape(-1, y_ExRxD.shape[-1])
        if not self.few_rows:
            return _combine(y_PxD, weight_GxSxK, self.row_R, self.choice_P)
        weight_P = jnp.take(weight_GxSxK.reshape(-1), self.choice_P, mode="fill", fill_value=0)
        y_NxD = jnp.zeros((len(self.row_R) // self.top_k, y_PxD.shape[1]), jnp.float32)
        y_NxD = y_NxD.at[self.choice_P // self.top_k].add(weight_P[:, None] * y_PxD, mode="drop")
        return y_NxD.astype(y_PxD.dtype).reshape(*weight_GxSxK.shape[:2], -1)


class Runs(NamedTuple):
    """Rows sorted by expert, without slots: the cost does not depend on the capacity.

    Each choice has a row (P = R). Rows of dropped choices come last and belong to no expert.
    """

    weight_GxSxK: jax.Array
    rows_E: jax.Array  # the number of rows of each expert
    expert_P: jax.Array  # the expert of each row; E for none
    choice_P: jax.Array
    row_R: jax.Array

    @classmethod
    def of(cls, routing: Routing, experts: int, slots: int) -> "Runs":
        """The maps for this number of experts."""
        del slots
        expert_R = jnp.where(routing.kept_GxSxK, routing.expert_GxSxK, experts).reshape(-1)
        choice_P = jnp.argsort(expert_R)
        row_R = jnp.argsort(choice_P)
        rows_E = jnp.bincount(expert_R, length=experts)
        return cls(routing.weight_GxSxK, rows_E, expert_R[choice_P], choice_P, row_R)

    def dispatch(self, x_GxSxD: jax.Array) -> jax.Array:
        """The rows, [R, D]."""
        top_k = self.weight_GxSxK.shape[-1]
        x_NxD = x_GxSxD.reshape(-1, x_GxSxD.shape[-1])
        return _take_rows(x_NxD, self.choice_P // top_k, self.row_R.reshape(-1, top_k))

    def combine(self, y_RxD: jax.Array) -> jax.Array:
        """The weighted sum of each token's experts, [G, S, D]."""
        return _combine(y_RxD, self.weight_GxSxK, self.row_R, self.choice_P)


# The dispatcher of each name, and a kernel if its rows are sorted by expert.
BACKENDS: dict[str, tuple[type[OneHot | Slots | Runs], Kernel | None]] = {
    "einsum": (OneHot, None),
    "gather": (Slots, None),
    # On CPUs and on NVIDIA GPUs, XLA's grouped product multiplies every row by every expert.
    "ragged": (Runs, kernels.ragged),
    "blocked": (Runs, kernels.blocked),
    "padded": (Runs, kernels.padded),
}


def resolve(name: str, platform: str, dropless: bool) -> str:
    """Resolves `execution.dispatch`; 'auto' depends on the platform if no token is dropped."""
    if name != "auto":
        return name
    if not dropless:
        return "gather"
    return {"cpu": "blocked", "tpu": "ragged"}.get(platform, "padded")


def through_experts(
    name: str,
    x_GxSxD: jax.Array,
    routing: Routing,
    experts: Local | ExpertParallel,
    slots: int,
    measure=None,
) -> tuple[jax.Array, jax.Array | int]:
    """Dispatches tokens, applies the experts, and combines their outputs.

    Args:
      name: one of `BACKENDS`.
      x_GxSxD: the tokens.
      routing: the decision.
      experts: the layer's experts.
      slots: capacity C of an expert for each group.
      measure: a function of the experts' output rows [.., D] and each row's expert. Its values are
        combined instead of the outputs.

    Returns:
      The tokens' outputs [G, S, D], and the rounds of the dropless exchange, 0 without it.
    """
    dispatcher, kernel = BACKENDS[name]
    maps = dispatcher.of(routing, experts.count, slots)
    rows = maps.dispatch(x_GxSxD)
    rounds: jax.Array | int = 0
    if isinstance(maps, Runs):
        expert = maps.expert_P
        y, rounds = experts.grouped(kernel, rows, maps.rows_E, expert)
    else:
        expert = jnp.arange(experts.count)[:, None]
        y = experts.batched(rows)
    return maps.combine(measure(y, expert) if measure else y), rounds


def few_through_experts(
    x_GxSxD: jax.Array, routing: Routing, experts: Local | ExpertParallel
) -> jax.Array:
    """As `through_experts`, without drops and faster for few tokens."""
    top_k = routing.expert_GxSxK.shape[-1]
    choices_NxK = (a.reshape(-1, top_k) for a in (routing.expert_GxSxK, routing.weight_GxSxK))
    y_NxD = experts.of_few(x_GxSxD.reshape(-1, x_GxSxD.shape[-1]), *choices_NxK)
    return y_NxD.reshape(x_GxSxD.shape)


# XLA's derivative of a gather is a scatter-add, the slow part of a sparse dispatch. Here both the
# forward and the backward pass gather, one by a map and the other by its inverse. An index past the
# end gives an arbitrary row. What it holds has no effect, but its gradient must be 0.


def _weighted_sum(x_KxNxD, weight_KxN):
    """The sum of K arrays, each row times its weight, [N, D]; computed in float32.

    The arrays are added one after the other. On TPUs a reduction over K is slow, and the layout
    [N, K, D] would require moving rows.
    """
    terms = [w[:, None] * x for x, w in zip(x_KxNxD, weight_KxN.astype(jnp.float32), strict=True)]
    return reduce(operator.add, terms).astype(x_KxNxD.dtype)


def _take_choices(x_PxD, index_NxK):
    """The row of each choice of each token, [K, N, D]; arbitrary at an index past the end."""
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
def _combine(y_PxD, weight_GxSxK, row_R, choice_P):
    """The weighted sum of each token's rows of y, [G, S, D].

    row_R is the row of y for each choice, and choice_P the choice for each row of y: R, which is
    past the end, for an empty row. A dropped choice has weight 0.
    """
    return _combine_forward(y_PxD, weight_GxSxK, row_R, choice_P)[0]


def _combine_forward(y_PxD, weight_GxSxK, row_R, choice_P):
    weight_NxK = weight_GxSxK.reshape(-1, weight_GxSxK.shape[-1])
    y_KxNxD = _take_choices(y_PxD, row_R.reshape(weight_NxK.shape))
    combined_NxD = _weighted_sum(y_KxNxD, weight_NxK.T)
    return combined_NxD.reshape(*weight_GxSxK.shape[:2], -1), (y_KxNxD, weight_GxSxK, choice_P)


def _combine_backward(residuals, dy_GxSxD):
    y_KxNxD, weight_GxSxK, choice_P = residuals
    dy_NxD = dy_GxSxD.reshape(-1, dy_GxSxD.shape[-1])
    # An empty row has weight 0 and so no gradient; no other mask is needed.
    weight_R = weight_GxSxK.reshape(-1).astype(dy_NxD.dtype)
    weight_P = jnp.take(weight_R, choice_P, mode="fill", fill_value=0)
    dy_PxD = jnp.take(dy_NxD, choice_P // len(y_KxNxD), axis=0, mode="clip")
    dweight_KxN = (y_KxNxD.astype(jnp.float32) * dy_NxD).sum(-1)
    return dy_PxD * weight_P[:, None], dweight_KxN.T.reshape(weight_GxSxK.shape), None, None


_combine.defvjp(_combine_forward, _combine_backward)
