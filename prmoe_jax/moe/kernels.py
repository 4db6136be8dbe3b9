"""The experts' matrix products, with hand-written derivatives and loops where XLA's are slow.

A `Kernel` applies all experts of a device to rows that are sorted by expert.

Axes: R rows, E experts of this device, X sending devices, P blocks of Q rows, N = P·Q slots.
Outside `Blocks`, Q is the rows of one expert (`_unrolled`), or R and the padding (loops).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from prmoe_jax.nn import remat
from prmoe_jax.nn.matmul import dot, sum_over_rows
from prmoe_jax.nn.mlp import Hidden, MLPWeights, activate, add_bias

# A function of the experts' weights, rows [R, D] sorted by expert, the number of rows of each
# expert [E], and the expert of each row [R]; returns [R, D]. Rows at the end may belong to no
# expert: the last argument has E for them, and their output is 0.
Kernel = Callable[[MLPWeights, jax.Array, jax.Array, jax.Array], jax.Array]


def hidden(multiply: Callable, weights: MLPWeights) -> Hidden:
    """Hidden units before the activation; `multiply(w)` is the rows' product with w."""
    x_F = remat.save_matmul(add_bias(multiply(weights.w_in_DxF), weights.b_in_F))
    if weights.w_gate_DxF is None:
        return Hidden(x_F)
    return Hidden(x_F, remat.save_matmul(multiply(weights.w_gate_DxF)))


def batched(weights: MLPWeights, x_ExRxD: jax.Array) -> jax.Array:
    """Applies expert e to x[e], [E, R, D]."""
    b_in_Ex1xF = None if weights.b_in_F is None else weights.b_in_F[:, None]
    with jax.named_scope("experts"):
        multiply = partial(batched_matmul, x_ExRxD)
        kept = hidden(multiply, weights._replace(b_in_F=b_in_Ex1xF))
        y_ExRxD = batched_matmul(activate(kept), weights.w_out_FxD)
    return y_ExRxD if weights.b_out_D is None else add_bias(y_ExRxD, weights.b_out_D[:, None])


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
        b_in_RxF = biases_of(weights.b_in_F, expert_R)
        kept = hidden(partial(grouped, x_RxD), weights._replace(b_in_F=b_in_RxF))
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


def block_rows(rows: int, experts: int) -> int:
    """Rows of a block in the loops for CPUs: about the mean per expert, from 16 to 256."""
    return min(256, max(16, 1 << (rows // experts - 1).bit_length()))


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
    h_RxF, through_activation = jax.vjp(activate, kept)  # recomputes h, fused into the product
    (d,) = through_activation(dot(dy_RxD, weights.w_out_FxD.T))
    dx_RxD, dw_gate = dot(d.x_F, weights.w_in_DxF.T), None
    if weights.w_gate_DxF is not None:
        dx_RxD += dot(d.gate_F, weights.w_gate_DxF.T)
        dw_gate = multiply(x_RxD, d.gate_F)

    def summed(bias, dy):
        return None if bias is None else dy.sum(0, dtype=dtype)

    return dx_RxD, MLPWeights(
        w_in_DxF=multiply(x_RxD, d.x_F),
        w_out_FxD=multiply(h_RxF, dy_RxD),
        b_in_F=summed(weights.b_in_F, d.x_F),
        b_out_D=summed(weights.b_out_D, dy_RxD),
        w_gate_DxF=dw_gate,
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
    place_R: jax.Array  # the slot of each row; N for a row of no expert

    @classmethod
    def of(cls, rows_E: jax.Array, expert_R: jax.Array) -> "Blocks":
        """The blocks for these rows; arguments as for a `Kernel`."""
        experts, rows = len(rows_E), len(expert_R)
        # Blocks of at most a quarter of the mean rows per expert: padding adds about an eighth.
        block = min(1024, max(16, 1 << max(1, rows // (4 * experts)).bit_length() - 1))
        count = (rows + experts * (block - 1)) // block
        blocks_E = -(-rows_E // block)
        shift_E = (jnp.cumsum(blocks_E) - blocks_E) * block - (jnp.cumsum(rows_E) - rows_E)
        place_R = jnp.arange(rows) + shift_E.at[expert_R].get(mode="clip")
        place_R = jnp.where(expert_R < experts, place_R, count * block)
        row_N = jnp.full(count * block, rows).at[place_R].set(jnp.arange(rows), mode="drop")
        ends_E, blocks_P = jnp.cumsum(blocks_E), jnp.arange(count)
        expert_P = jnp.searchsorted(ends_E, blocks_P, side="right", method="compare_all")
        return cls(jnp.minimum(expert_P, experts - 1), row_N, place_R)

    def filled(self, x_RxD: jax.Array) -> jax.Array:
        """The rows in their blocks, [P, Q, D]; 0 in empty slots."""
        x_NxD = _move_rows(x_RxD, self.row_N, self.place_R)
        return x_NxD.reshape(len(self.expert_P), -1, x_RxD.shape[-1])

    def emptied(self, x_PxQxD: jax.Array) -> jax.Array:
        """The rows sorted by expert again, [R, D]; 0 for rows of no expert."""
        return _move_rows(x_PxQxD.reshape(-1, x_PxQxD.shape[-1]), self.place_R, self.row_N)

    def matmul(self, x_PxQxD: jax.Array, w_ExDxF: jax.Array) -> jax.Array:
        """The product of each block with the weights of its expert, [P, Q, F]."""
        return _block_matmul(x_PxQxD, w_ExDxF, self.expert_P)

    def biases(self, b_ExF: jax.Array | None) -> jax.Array | None:
        """The bias of each block's expert, [P, 1, F]."""
        return None if b_ExF is None else biases_of(b_ExF, self.expert_P)[:, None]


def padded(weights: MLPWeights, x_RxD, rows_E, expert_R) -> jax.Array:
    """A `Kernel` for GPUs: pads each expert's rows to whole blocks and multiplies all at once."""
    blocks = Blocks.of(rows_E, expert_R)
    with jax.named_scope("experts"):
        b_in_Px1xF = blocks.biases(weights.b_in_F)
        multiply = partial(blocks.matmul, blocks.filled(x_RxD))
        kept = hidden(multiply, weights._replace(b_in_F=b_in_Px1xF))
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


def blocked(weights: MLPWeights, x_RxD, rows_E, expert_R) -> jax.Array:
    """A `Kernel` for CPUs: a loop over experts, and in it a loop over blocks of their rows."""
    del expert_R
    return _block_loop(block_rows(len(x_RxD), len(rows_E)), x_RxD, rows_E, weights)


def loop_over_blocks(apply: Callable, x_RxD: jax.Array, rows_E: jax.Array) -> jax.Array:
    """Like a `Kernel`, in one loop over the blocks of all experts' rows; it has no derivative.

    Args:
      apply: applies expert e to rows, `apply(e, x_RxD)`.
      x_RxD, rows_E: as for a `Kernel`.
    """
    block = block_rows(len(x_RxD), len(rows_E))
    blocks_E = -(-rows_E // block)
    ends_E, starts_E = jnp.cumsum(blocks_E), jnp.cumsum(rows_E) - rows_E
    x_QxD = jnp.pad(x_RxD, ((0, block), (0, 0)))

    def multiply(i, y_QxD):
        e = jnp.searchsorted(ends_E, i, side="right")
        start = starts_E[e] + (i - ends_E[e] + blocks_E[e]) * block
        y = apply(e, slice_rows(x_QxD, start, block))
        return jax.lax.dynamic_update_slice_in_dim(y_QxD, y, start, 0)

    with jax.named_scope("experts"):
        # An expert's last block spills into the next expert's rows, which are written later.
        y_QxD = jax.lax.fori_loop(0, ends_E[-1], multiply, jnp.zeros_like(x_QxD))
    return first_rows(y_QxD[: len(x_RxD)], rows_E.sum())


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _block_loop(block: int, x_RxD, rows_E, weights: MLPWeights):
    return _block_loop_forward(block, x_RxD, rows_E, weights)[0]


def slice_rows(x_RxD, start, rows: int):
    return jax.lax.dynamic_slice_in_dim(x_RxD, start, rows)


def first_rows(x_RxD: jax.Array, count: jax.Array) -> jax.Array:
    """x with zeros after its first `count` rows."""
    return jnp.where((jnp.arange(len(x_RxD)) < count)[:, None], x_RxD, 0)


def _block_loop_forward(block: int, x_RxD, rows_E, weights):
    # An expert's last block spills into the next expert's rows, written later, or the padding.
    x_QxD = jnp.pad(x_RxD, ((0, block), (0, 0)))
    write = jax.lax.dynamic_update_slice_in_dim

    def expert(carry, inputs):
        start, rows, own = inputs

        def multiply(i, carry):
            kept, y_QxD = carry
            place = start + i * block
            fresh = hidden(partial(dot, slice_rows(x_QxD, place, block)), own)
            y = add_bias(dot(activate(fresh), own.w_out_FxD), own.b_out_D)
            kept = jax.tree.map(lambda whole, part: write(whole, part, place, 0), kept, fresh)
            return kept, write(y_QxD, y, place, 0)

        return jax.lax.fori_loop(0, -(-rows // block), multiply, carry), None

    d_ff = weights.w_in_DxF.shape[-1]
    empty_QxF = alike(jnp.zeros((len(x_QxD), d_ff), x_RxD.dtype), x_RxD)
    empty = Hidden(empty_QxF, None if weights.w_gate_DxF is None else empty_QxF)
    starts_E = jnp.cumsum(rows_E) - rows_E
    runs = starts_E, rows_E, weights
    (kept, y_QxD), _ = jax.lax.scan(expert, (empty, jnp.zeros_like(x_QxD)), runs)
    return first_rows(y_QxD[: len(x_RxD)], rows_E.sum()), (x_QxD, kept, rows_E, weights)


def _block_loop_backward(block: int, saved, dy_RxD):
    x_QxD, kept, rows_E, weights = saved
    dy_QxD = jnp.pad(dy_RxD, ((0, block), (0, 0)))

    def expert(dx_QxD, inputs):
        start, rows, own = inputs

        def multiply(i, carry):
            dx_QxD, sums = carry
            place = start + i * block
            x, dy = slice_rows(x_QxD, place, block), slice_rows(dy_QxD, place, block)
            dy = jnp.where((jnp.arange(block) < rows - i * block)[:, None], dy, 0)
            hidden = jax.tree.map(lambda whole: slice_rows(whole, place, block), kept)
            # Sums are float32: else every addition would be rounded to the compute dtype.
            dx, gradient = _gradients(own, x, hidden, dy, jnp.float32)
            dx_QxD = jax.lax.dynamic_update_slice_in_dim(dx_QxD, dx, place, 0)
            return dx_QxD, jax.tree.map(jnp.add, sums, gradient)

        zeros = jax.tree.map(lambda w: alike(jnp.zeros(w.shape), dy_QxD), own)
        return jax.lax.fori_loop(0, -(-rows // block), multiply, (dx_QxD, zeros))

    starts_E = jnp.cumsum(rows_E) - rows_E
    dx_QxD, sums = jax.lax.scan(expert, jnp.zeros_like(x_QxD), (starts_E, rows_E, weights))
    # Cast after the loop: on CPUs, XLA writes bfloat16 slowly.
    gradients = jax.tree.map(lambda total, w: total.astype(w.dtype), sums, weights)
    return dx_QxD[: len(dy_RxD)], None, gradients


_block_loop.defvjp(_block_loop_forward, _block_loop_backward)
