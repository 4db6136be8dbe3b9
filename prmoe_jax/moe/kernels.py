"""The experts' matrix products, with hand-written derivatives and loops where XLA's are slow.

A `Kernel` applies all experts of a device to rows that are sorted by expert.

Axes: R rows, E experts of this device, X sending devices, P blocks of Q rows, N = P·Q slots.
Outside `Blocks`, Q is the rows or slots of one expert, or R and the padding (loops).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from prmoe_jax.nn import remat
from prmoe_jax.nn.matmul import dot, sum_over_rows
from prmoe_jax.nn.mlp import Hidden, MLPWeights, activate, add_bias

# On CPUs, the products of at most this many experts are compiled separately (measured on Zen 5).
UNROLLED_ON_CPUS = 8

# A function of the experts' weights, rows [R, D] sorted by expert, the number of rows of each
# expert [E], and the expert of each row [R]; returns [R, D]. Rows at the end may belong to no
# expert: the last argument has E for them, and their output is 0.
Kernel = Callable[[MLPWeights, jax.Array, jax.Array, jax.Array], jax.Array]


def hidden(multiply: Callable, weights: MLPWeights, bias: Callable = lambda b: b) -> Hidden:
    """Hidden units before the activation.

    `multiply(w)` is the rows' product with w, and `bias(b)` is b as it is added to the product.
    """

    def part(w, b):
        return remat.save_matmul(add_bias(multiply(w), bias(b)))

    x_F, gate_F = part(weights.w_in_DxF, weights.b_in_F), None
    if weights.w_gate_DxF is not None:
        gate_F = part(weights.w_gate_DxF, weights.b_gate_F)
    return Hidden(x_F, gate_F, weights.clamped)


def batched(weights: MLPWeights, x_ExRxD: jax.Array) -> jax.Array:
    """Applies expert e to x[e], [E, R, D]."""

    def bias(b_ExF):
        return None if b_ExF is None else b_ExF[:, None]

    with jax.named_scope("experts"):
        kept = hidden(partial(batched_matmul, x_ExRxD), weights, bias)
        y_ExRxD = batched_matmul(activate(kept), weights.w_out_FxD)
    return add_bias(y_ExRxD, bias(weights.b_out_D))


def unrolled(weights: MLPWeights, x_XxExRxD: jax.Array) -> jax.Array:
    """Applies expert e to x[:, e], for a device with few experts.

    Rows keep the layout that the exchange gave them, and each expert compiles as a dense MLP.
    """
    with jax.named_scope("experts"):
        return _unrolled(x_XxExRxD, weights)


def of_all(weights: MLPWeights, x_NxD: jax.Array, weight_NxE: jax.Array) -> jax.Array:
    """The weighted sum of all experts' outputs for every row, [N, D].

    It is for few rows, whose cost is reading the experts' weights.
    """
    experts = weight_NxE.shape[1]
    y_ExNxD = batched(weights, jnp.broadcast_to(x_NxD, (experts, *x_NxD.shape)))
    return jnp.einsum("END,NE->ND", y_ExNxD, weight_NxE).astype(x_NxD.dtype)


def ragged(weights: MLPWeights, x_RxD, rows_E, expert_R) -> jax.Array:
    """A `Kernel` by XLA's grouped matrix product, which is fast on TPUs."""
    served_Rx1 = (expert_R < len(rows_E))[:, None]

    def grouped(x_R, w_E):
        # The grouped product leaves rows of no expert undefined, in the derivative as well. The
        # masks before and after it ensure that these are never read.
        x_R = jnp.where(served_Rx1, x_R, 0)
        y_R = jax.lax.ragged_dot(x_R.astype(w_E.dtype), w_E, rows_E).astype(x_R.dtype)
        return jnp.where(served_Rx1, y_R, 0)

    with jax.named_scope("experts"):
        kept = hidden(partial(grouped, x_RxD), weights, lambda b: biases_of(b, expert_R))
        y_RxD = grouped(activate(kept), weights.w_out_FxD)
    return add_bias(y_RxD, biases_of(weights.b_out_D, expert_R))


def single(weights: MLPWeights, x_RxD, rows_1, expert_R) -> jax.Array:
    """A `Kernel` for a device's only expert, except that the output of rows of no expert isn't 0.

    Such rows must be 0 in x and in the gradient of the output. A grouped product of one group would
    be slow on TPUs and GPUs.
    """
    del rows_1, expert_R
    return batched(weights, x_RxD[None])[0]


def biases_of(b_ExF: jax.Array | None, expert_R: jax.Array) -> jax.Array | None:
    """The bias of each row's expert, [R, F], 0 for rows of no expert; None without biases.

    The gradient is a matrix product, which sums in float32 and in a fixed order. The gradient of
    indexing would sum thousands of rows in the bias's dtype.
    """
    if b_ExF is None:
        return None
    chosen_RxE = jax.nn.one_hot(expert_R, len(b_ExF), dtype=b_ExF.dtype)
    return jnp.matmul(chosen_RxE, b_ExF, precision="highest")


@jax.custom_vjp
def batched_matmul(x_ExRxD: jax.Array, w_ExDxF: jax.Array) -> jax.Array:
    """x @ w, with a faster gradient for experts of few rows on CPUs.

    Its cost there is memory traffic for the weights and their gradients. Transposing the small
    activations lets the products read and write weights and gradients in storage order.
    """
    return dot(x_ExRxD, w_ExDxF)


def _batched_matmul_backward(residuals, dy_ExRxF):
    x_ExRxD, w_ExDxF = residuals

    def plain(x_ExRxD, w_ExDxF, dy_ExRxF):
        return dot(dy_ExRxF, w_ExDxF.mT), dot(x_ExRxD.mT, dy_ExRxF)

    def turned(x_ExRxD, w_ExDxF, dy_ExRxF):
        # The barriers keep XLA from fusing the transposition into the product.
        barrier = jax.lax.optimization_barrier
        dx_ExDxR = barrier(jnp.einsum("EDF,ERF->EDR", w_ExDxF, dy_ExRxF))
        return dx_ExDxR.mT, barrier(x_ExRxD.mT) @ dy_ExRxF

    if dy_ExRxF.dtype != w_ExDxF.dtype:
        by_expert = jax.vmap(partial(sum_over_rows, dtype=w_ExDxF.dtype))
        dw_ExDxF = by_expert(x_ExRxD, dy_ExRxF).astype(w_ExDxF.dtype)
        return dot(dy_ExRxF, w_ExDxF.mT), dw_ExDxF
    rows, width_out = dy_ExRxF.shape[1:]
    few = 16 * rows <= width_out
    on_cpu = turned if few else plain
    return jax.lax.platform_dependent(x_ExRxD, w_ExDxF, dy_ExRxF, cpu=on_cpu, default=plain)


batched_matmul.defvjp(lambda x, w: (dot(x, w), (x.astype(w.dtype), w)), _batched_matmul_backward)


def _join(parts: list[jax.Array], axis: int) -> jax.Array:
    """Like `jnp.stack`, in a form that XLA fuses into the products that compute the parts."""
    shape = list(parts[0].shape)
    shape.insert(axis, len(parts))
    whole = alike(jax.lax.empty(tuple(shape), parts[0].dtype), parts[0])  # zeros cost a write
    for i, part in enumerate(parts):
        whole = jax.lax.dynamic_update_index_in_dim(whole, part, i, axis)
    return whole


def alike(fresh: jax.Array, x: jax.Array) -> jax.Array:
    """Marks a new array as varying over the same mesh axes as x, inside shard_map."""
    axes = tuple(jax.typeof(x).manual_axis_type.varying)
    return jax.lax.pcast(fresh, axes, to="varying") if axes else fresh


def _gradients(weights: MLPWeights, x_RxD, kept: Hidden, dy_RxD, dtype=None):
    """Gradients of an MLP's rows, and of its weights in `dtype` (default: the rows' dtype)."""
    multiply = partial(sum_over_rows, dtype=weights.w_in_DxF.dtype, result=dtype)

    def summed(bias, dy):
        return None if bias is None else dy.sum(0, dtype=dtype)

    h_RxF, through_activation = jax.vjp(activate, kept)  # recomputes h, fused into the product
    (d,) = through_activation(dot(dy_RxD, weights.w_out_FxD.T))
    dx_RxD, dw_gate, db_gate = dot(d.x_F, weights.w_in_DxF.T), None, None
    if weights.w_gate_DxF is not None:
        dx_RxD += dot(d.gate_F, weights.w_gate_DxF.T)
        dw_gate, db_gate = multiply(x_RxD, d.gate_F), summed(weights.b_gate_F, d.gate_F)
    return dx_RxD, MLPWeights(
        w_in_DxF=multiply(x_RxD, d.x_F),
        w_out_FxD=multiply(h_RxF, dy_RxD),
        b_in_F=summed(weights.b_in_F, d.x_F),
        b_out_D=summed(weights.b_out_D, dy_RxD),
        w_gate_DxF=dw_gate,
        b_gate_F=db_gate,
        clamped=weights.clamped,
    )


@jax.custom_vjp
def _unrolled(x_XxExRxD, weights: MLPWeights):
    return _unrolled_forward(x_XxExRxD, weights)[0]


def _unrolled_forward(x_XxExRxD, weights):
    devices, experts, rows, width = x_XxExRxD.shape
    outputs, saved = [], []
    for e in range(experts):
        own = jax.tree.map(lambda w: w[e], weights)  # noqa: B023
        x_QxD = x_XxExRxD[:, e].reshape(-1, width)
        kept = hidden(partial(dot, x_QxD), own)
        # The bias is added after the reshape: else XLA doesn't fuse the write into the result.
        y_QxD = dot(activate(kept), own.w_out_FxD)
        outputs.append(add_bias(y_QxD.reshape(devices, rows, width), own.b_out_D))
        saved.append((x_QxD, kept))
    return _join(outputs, 1), (saved, weights)


def _unrolled_backward(residuals, dy_XxExRxD):
    saved, weights = residuals
    devices, _, rows, width = dy_XxExRxD.shape
    inputs, gradients = [], []
    for e, (x_QxD, kept) in enumerate(saved):
        own = jax.tree.map(lambda w: w[e], weights)  # noqa: B023
        dx_QxD, gradient = _gradients(own, x_QxD, kept, dy_XxExRxD[:, e].reshape(-1, width))
        gradients.append(gradient)
        inputs.append(dx_QxD.reshape(devices, rows, width))
    joined = jax.tree.map(lambda *parts: _join(list(parts), 0), *gradients)
    return _join(inputs, 1), jax.tree.map(lambda dw, w: dw.astype(w.dtype), joined, weights)


_unrolled.defvjp(_unrolled_forward, _unrolled_backward)


class Blocks(NamedTuple):
    """Rows sorted by expert in P blocks of Q rows, each block for one expert.

    An expert's last block is padded with empty slots. Blocks after the last expert's are empty.
    """

    expert_P: jax.Array
    row_N: jax.Array  # the row in each of the N = P·Q slots; R in an empty slot
    place_R: jax.Array  # the slot of each row; N for a row in no block

    @classmethod
    def of(cls, rows_E: jax.Array, expert_R: jax.Array) -> "Blocks":
        """The blocks for these rows; arguments as for a `Kernel`."""
        experts, rows = len(rows_E), len(expert_R)
        # Blocks of at most a quarter of the mean rows per expert: padding adds about an eighth.
        block = min(1024, max(16, 1 << max(1, rows // (4 * experts)).bit_length() - 1))
        count = (rows + experts * (block - 1)) // block
        blocks_E = -(-rows_E // block)
        first_E = (jnp.cumsum(blocks_E) - blocks_E) * block
        place_R = first_E.at[expert_R].get(mode="clip") + _index_in_run(rows_E, expert_R)
        place_R = jnp.where(expert_R < experts, place_R, count * block)
        ends_E, blocks_P = jnp.cumsum(blocks_E), jnp.arange(count)
        expert_P = jnp.searchsorted(ends_E, blocks_P, side="right", method="compare_all")
        expert_P = jnp.minimum(expert_P, experts - 1)
        return cls(expert_P, _inverse(place_R, count * block), place_R)

    @classmethod
    def of_slots(cls, slots: int, rows_E: jax.Array, expert_R: jax.Array) -> "Blocks":
        """One block for each expert, with its first rows; its other rows have no place."""
        experts = len(rows_E)
        index_R = _index_in_run(rows_E, expert_R)
        held_R = (expert_R < experts) & (index_R < slots)
        place_R = jnp.where(held_R, expert_R * slots + index_R, experts * slots)
        return cls(jnp.arange(experts), _inverse(place_R, experts * slots), place_R)

    def filled(self, x_RxD: jax.Array) -> jax.Array:
        """The rows in their blocks, [P, Q, D]; 0 in empty slots."""
        x_NxD = _move_rows(x_RxD, self.row_N, self.place_R)
        return x_NxD.reshape(len(self.expert_P), -1, x_RxD.shape[-1])

    def emptied(self, x_PxQxD: jax.Array) -> jax.Array:
        """The rows sorted by expert again, [R, D]; 0 for rows in no block."""
        return _move_rows(x_PxQxD.reshape(-1, x_PxQxD.shape[-1]), self.place_R, self.row_N)

    def matmul(self, x_PxQxD: jax.Array, w_ExDxF: jax.Array) -> jax.Array:
        """The product of each block with the weights of its expert, [P, Q, F]."""
        return _block_matmul(x_PxQxD, w_ExDxF, self.expert_P)

    def biases(self, b_ExF: jax.Array | None) -> jax.Array | None:
        """The bias of each block's expert, [P, 1, F]."""
        return None if b_ExF is None else biases_of(b_ExF, self.expert_P)[:, None]


def _index_in_run(rows_E: jax.Array, expert_R: jax.Array) -> jax.Array:
    """Each row's index among the rows of its expert, if rows are sorted by expert."""
    starts_E = jnp.cumsum(rows_E) - rows_E
    return jnp.arange(len(expert_R)) - starts_E.at[expert_R].get(mode="clip")


def _inverse(place_R: jax.Array, slots: int) -> jax.Array:
    """The row in each slot, R in an empty one."""
    rows = len(place_R)
    return jnp.full(slots, rows).at[place_R].set(jnp.arange(rows), mode="drop")


def padded(weights: MLPWeights, x_RxD, rows_E, expert_R) -> jax.Array:
    """A `Kernel` for GPUs: pads each expert's rows to whole blocks and multiplies all at once."""
    blocks = Blocks.of(rows_E, expert_R)
    with jax.named_scope("experts"):
        multiply = partial(blocks.matmul, blocks.filled(x_RxD))
        kept = hidden(multiply, weights, blocks.biases)
        y_PxQxD = blocks.matmul(activate(kept), weights.w_out_FxD)
        return blocks.emptied(add_bias(y_PxQxD, blocks.biases(weights.b_out_D)))


@jax.custom_vjp
def _move_rows(x_RxD: jax.Array, from_N: jax.Array, to_R: jax.Array) -> jax.Array:
    """x[from], 0 at an index past the end; its derivative gathers by `to`, the inverse map."""
    return jnp.take(x_RxD, from_N, axis=0, mode="fill", fill_value=0)


_move_rows.defvjp(
    lambda x, there, back: (_move_rows(x, there, back), (there, back)),
    lambda maps, dy: (_move_rows(dy, *maps[::-1]), None, None),
)


@jax.custom_vjp
def _block_matmul(x_PxQxD: jax.Array, w_ExDxF: jax.Array, expert_P: jax.Array) -> jax.Array:
    """x[p] @ w[expert[p]], which copies the weights for each block."""
    return dot(x_PxQxD, w_ExDxF[expert_P])


def _block_matmul_backward(saved, dy_PxQxF):
    x_PxQxD, w_ExDxF, expert_P = saved
    narrow = dy_PxQxF.astype(w_ExDxF.dtype)
    dw_PxDxF = jnp.matmul(x_PxQxD.mT, narrow, preferred_element_type=dy_PxQxF.dtype)
    # This product sums in float32 and in a fixed order; a scatter on GPUs adds in any order.
    chosen_ExP = jax.nn.one_hot(expert_P, len(w_ExDxF), dtype=dw_PxDxF.dtype, axis=0)
    dw_ExDxF = jnp.tensordot(chosen_ExP, dw_PxDxF, 1, precision="highest")
    return dot(dy_PxQxF, w_ExDxF[expert_P].mT), dw_ExDxF.astype(w_ExDxF.dtype), None


_block_matmul.defvjp(
    lambda x, w, expert: (_block_matmul(x, w, expert), (x.astype(w.dtype), w, expert)),
    _block_matmul_backward,
)


@jax.custom_vjp
def blocked(weights: MLPWeights, x_RxD, rows_E, expert_R) -> jax.Array:
    """A `Kernel` for CPUs: slots as with a capacity, and a loop over blocks of the rows beyond.

    An expert's slots hold an even share of the rows, and two standard deviations of evenly drawn
    loads. The products of slots run as fast as those with a capacity.
    """
    return _blocked_forward(weights, x_RxD, rows_E, expert_R)[0]


def _blocked_forward(weights, x_RxD, rows_E, expert_R):
    share = len(x_RxD) / len(rows_E)
    slots = min(len(x_RxD), 16 * math.ceil((share + 2 * share**0.5) / 16))
    blocks = Blocks.of_slots(slots, rows_E, expert_R)

    def multiply(weights, x_ExQxD):
        if len(rows_E) <= UNROLLED_ON_CPUS:
            return unrolled(weights, x_ExQxD[None])[0]
        return batched(weights, x_ExQxD)

    y_ExQxD, through_slots = jax.vjp(multiply, weights, blocks.filled(x_RxD))
    y_RxD = blocks.emptied(y_ExQxD)
    y_RxD = loop_over_blocks(partial(_apply, weights), x_RxD, rows_E, y_RxD, slots)
    return y_RxD, (x_RxD, weights, rows_E, blocks, through_slots)


def _apply(weights: MLPWeights, e, x_RxD) -> jax.Array:
    """Expert e's output."""
    own = jax.tree.map(lambda w: w[e], weights)
    return add_bias(dot(activate(hidden(partial(dot, x_RxD), own)), own.w_out_FxD), own.b_out_D)


def _blocked_backward(saved, dy_RxD):
    x_RxD, weights, rows_E, blocks, through_slots = saved
    dweights, dx_ExQxD = through_slots(blocks.filled(dy_RxD))
    slots = dx_ExQxD.shape[1]
    block = _block_rows(len(x_RxD), len(rows_E))
    dx_RxD = blocks.emptied(dx_ExQxD)
    x_QxD, dy_QxD, dx_QxD = (_lengthened(a, block) for a in (x_RxD, dy_RxD, dx_RxD))

    def step(carry, e, start, rows):
        dx_QxD, sums = carry
        own = jax.tree.map(lambda w: w[e], weights)
        x = slice_rows(x_QxD, start, block)
        dy = first_rows(slice_rows(dy_QxD, start, block), rows)
        dx, gradient = _gradients(own, x, hidden(partial(dot, x), own), dy, jnp.float32)
        sums = jax.tree.map(lambda total, part: total.at[e].add(part), sums, gradient)
        return _write_rows(dx_QxD, dx, start, rows), sums

    # Sums are float32: else every addition would be rounded to the compute dtype.
    sums = jax.tree.map(lambda dw: dw.astype(jnp.float32), dweights)
    dx_QxD, sums = _over_blocks(step, (dx_QxD, sums), block, rows_E, slots)
    # Cast after the loop: on CPUs, XLA writes bfloat16 slowly.
    gradients = jax.tree.map(lambda total, w: total.astype(w.dtype), sums, weights)
    return gradients, dx_QxD[: len(x_RxD)], None, None


blocked.defvjp(_blocked_forward, _blocked_backward)


def loop_over_blocks(
    apply: Callable, x_RxD: jax.Array, rows_E: jax.Array, y_RxD=None, skipped: int = 0
) -> jax.Array:
    """Like a `Kernel`, in one loop over the blocks of all experts' rows; it has no derivative.

    Args:
      apply: applies expert e to rows, `apply(e, x_RxD)`.
      x_RxD, rows_E: as for a `Kernel`.
      y_RxD: the results of rows that the loop leaves out; by default 0.
      skipped: how many rows of each expert, its first ones, the loop leaves out.
    """
    y_RxD = jnp.zeros_like(x_RxD) if y_RxD is None else y_RxD
    block = _block_rows(len(x_RxD), len(rows_E))
    x_QxD, y_QxD = _lengthened(x_RxD, block), _lengthened(y_RxD, block)

    def step(y_QxD, e, start, rows):
        return _write_rows(y_QxD, apply(e, slice_rows(x_QxD, start, block)), start, rows)

    return _over_blocks(step, y_QxD, block, rows_E, skipped)[: len(x_RxD)]


def _over_blocks(step: Callable, carry, block: int, rows_E, skipped: int):
    """Calls `step(carry, e, start, rows)` for the blocks of each expert's rows after `skipped`."""
    rest_E = jnp.maximum(rows_E - skipped, 0)
    blocks_E = -(-rest_E // block)
    ends_E, starts_E = jnp.cumsum(blocks_E), jnp.cumsum(rows_E) - rest_E

    def body(i, carry):
        e = jnp.searchsorted(ends_E, i, side="right")
        done = (i - ends_E[e] + blocks_E[e]) * block
        return step(carry, e, starts_E[e] + done, rest_E[e] - done)

    with jax.named_scope("experts"):
        return jax.lax.fori_loop(0, ends_E[-1], body, carry)


def _block_rows(rows: int, experts: int) -> int:
    """Rows of a block in the loops for CPUs: about the mean per expert, from 16 to 256."""
    return min(256, max(16, 1 << (rows // experts - 1).bit_length()))


def _lengthened(x_RxD: jax.Array, block: int) -> jax.Array:
    """x with room for the last block's empty rows."""
    return jnp.pad(x_RxD, ((0, block), (0, 0)))


def slice_rows(x_RxD, start, rows: int):
    return jax.lax.dynamic_slice_in_dim(x_RxD, start, rows)


def _write_rows(x_RxD, block_QxD, start, rows) -> jax.Array:
    """x with the block's first `rows` rows from `start` on."""
    old_QxD = slice_rows(x_RxD, start, len(block_QxD))
    block_QxD = jnp.where((jnp.arange(len(block_QxD)) < rows)[:, None], block_QxD, old_QxD)
    return jax.lax.dynamic_update_slice_in_dim(x_RxD, block_QxD, start, 0)


def first_rows(x_RxD: jax.Array, count: jax.Array) -> jax.Array:
    """x with zeros after its first `count` rows."""
    return jnp.where((jnp.arange(len(x_RxD)) < count)[:, None], x_RxD, 0)
