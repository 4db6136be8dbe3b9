"""The feed-forward networks: one MLP, and E of them as one array each (the experts)."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from prmoe_jax.nn import remat
from prmoe_jax.nn.mlp import MLP, gelu
from prmoe_jax.nn.quantized import to_dtype


class Experts(nnx.Module):
    """E MLPs of equal shape, drawn independently or (tied) all as the `MLP` of the same key."""

    def __init__(
        self,
        count: int,
        d_model: int,
        d_ff: int,
        std: float,
        std_out: float,
        key: jax.Array,
        tied: bool = False,
    ):
        self.count = count
        drawn = 1 if tied else count
        key_in, key_out = jax.random.split(key)
        w_in = std * jax.random.normal(key_in, (drawn, d_model, d_ff))
        w_out = std_out * jax.random.normal(key_out, (drawn, d_ff, d_model))
        self.w_in = nnx.Param(jnp.tile(w_in, (count // drawn, 1, 1)))
        self.b_in = nnx.Param(jnp.zeros((count, d_ff)))
        self.w_out = nnx.Param(jnp.tile(w_out, (count // drawn, 1, 1)))
        self.b_out = nnx.Param(jnp.zeros((count, d_model)))

    def __call__(self, x_ExRxD: jax.Array) -> jax.Array:
        """Applies expert e to x[e]; same shape and dtype."""
        return self.without_last_bias(x_ExRxD) + self.b_out[...].astype(x_ExRxD.dtype)[:, None]

    def without_last_bias(self, x_ExRxD: jax.Array) -> jax.Array:
        """The same but for b_out: where hidden units are split, these are the terms of a sum."""
        w_in, b_in, w_out, _ = self._weights(x_ExRxD.dtype)
        with jax.named_scope("experts"):
            pre_ExRxF = remat.save_matmul(_product(x_ExRxD, w_in) + b_in[:, None])
            return _product(gelu(pre_ExRxF), w_out)

    def unrolled(self, x_XxExRxD: jax.Array) -> jax.Array:
        """Applies expert e to x[:, e]; same shape and dtype.

        Rows stay where an exchange put them and every product is as plain as a dense MLP's: for a
        device that holds few experts.
        """
        with jax.named_scope("experts"):
            return _unrolled(x_XxExRxD, tuple(self._weights(x_XxExRxD.dtype)))

    def ragged(self, x_RxD: jax.Array, rows_E: jax.Array, expert_R: jax.Array) -> jax.Array:
        """Applies the experts to rows sorted by expert, `rows_E[e]` rows for expert e.

        Rows of `expert_R` past the last expert belong to none; their output is 0.
        """
        w_in, b_in, w_out, b_out = self._weights(x_RxD.dtype)
        served_Rx1 = (expert_R < self.count)[:, None]

        def grouped(x_R, w_E):
            # A device may leave the rows of no run as they were in memory, here and in the
            # derivative: masked on both sides, neither is ever read.
            y_R = jax.lax.ragged_dot(jnp.where(served_Rx1, x_R, 0), w_E, rows_E)
            return jnp.where(served_Rx1, y_R, 0)

        def bias(b_E):
            return b_E.at[expert_R].get(mode="fill", fill_value=0)

        h_RxF = gelu(grouped(x_RxD, w_in) + bias(b_in))
        return grouped(h_RxF, w_out) + bias(b_out)

    def blocked(self, x_RxD: jax.Array, rows_E: jax.Array, expert_R: jax.Array) -> jax.Array:
        """The same as `ragged`, multiplying a block of rows at a time."""
        block = _block(len(x_RxD), self.count)
        return _blocked(block, x_RxD, rows_E, tuple(self._weights(x_RxD.dtype)))

    def chosen(self, x_RxD: jax.Array, expert_R: jax.Array) -> jax.Array:
        """Applies expert expert_R[r] to row r, reading no other weights: for few rows."""
        return _row_by_row(lambda e, x_1xD: self.alone(e)(x_1xD), x_RxD, expert_R)

    def alone(self, e) -> MLP:
        """One of the experts."""
        weights = self.w_in[...], self.b_in[...], self.w_out[...], self.b_out[...]
        return MLP(*jax.tree.map(lambda w: w[e], weights))

    def _weights(self, dtype):
        return (to_dtype(p[...], dtype) for p in (self.w_in, self.b_in, self.w_out, self.b_out))


class UnstackedExperts(nnx.Module):
    """The same with arrays of its own for each expert, and without derivatives: as a CPU decodes.

    XLA would copy an expert's part of an array, on one core, and multiply by the copy; an array it
    reads where it is, on all cores. In return it compiles an MLP for each expert.
    """

    def __init__(self, experts: Experts):
        self.count = experts.count
        self.each = nnx.List([experts.alone(e) for e in range(experts.count)])

    def blocked(self, x_RxD: jax.Array, rows_E: jax.Array, expert_R: jax.Array) -> jax.Array:
        """As `Experts.blocked`."""
        block = _block(len(x_RxD), self.count)
        blocks_E = -(-rows_E // block)
        ends_E, starts_E = jnp.cumsum(blocks_E), jnp.cumsum(rows_E) - rows_E
        x_QxD = jnp.pad(x_RxD, ((0, block), (0, 0)))

        def multiply(i, y_QxD):
            e = jnp.searchsorted(ends_E, i, side="right")
            place = starts_E[e] + (i - ends_E[e] + blocks_E[e]) * block
            y = self._apply(e, _slice(x_QxD, place, block))
            return jax.lax.dynamic_update_slice_in_dim(y_QxD, y, place, 0)

        with jax.named_scope("experts"):
            # A run's last block reaches into the next run, which is written later.
            y_QxD = jax.lax.fori_loop(0, ends_E[-1], multiply, jnp.zeros_like(x_QxD))
        served_Rx1 = (jnp.arange(len(x_RxD)) < rows_E.sum())[:, None]
        return jnp.where(served_Rx1, y_QxD[: len(x_RxD)], 0)

    def chosen(self, x_RxD: jax.Array, expert_R: jax.Array) -> jax.Array:
        """As `Experts.chosen`."""
        return _row_by_row(self._apply, x_RxD, expert_R)

    def _apply(self, e: jax.Array, x_RxD: jax.Array) -> jax.Array:
        return jax.lax.switch(e, [partial(_traced_once, mlp) for mlp in self.each], x_RxD)


def _row_by_row(apply, x_RxD: jax.Array, expert_R: jax.Array) -> jax.Array:
    """`apply(e, x)` of each row and its expert, one after the other."""

    def row(inputs):
        x_D, e = inputs
        return apply(e, x_D[None])[0]

    with jax.named_scope("experts"):
        return jax.lax.map(row, (x_RxD, expert_R))


@jax.jit
def _traced_once(mlp: MLP, x_RxD: jax.Array) -> jax.Array:
    return mlp(x_RxD)


def _block(rows: int, experts: int) -> int:
    """Rows that are multiplied at a time, of a run for each expert."""
    return min(256, max(16, 1 << (rows // experts - 1).bit_length()))


@jax.custom_vjp
def _product(x_ExRxD: jax.Array, w_ExDxF: jax.Array) -> jax.Array:
    """x @ w. On CPUs the gradient is written for experts of few rows, as many experts have.

    What a CPU spends there is the reading of weights and the writing of their gradients, in the
    order that its product wants them in: with the rows turned, which are small, that is the order
    in which they lie.
    """
    return x_ExRxD @ w_ExDxF


def _product_backward(residuals, dy_ExRxF):
    x_ExRxD, w_ExDxF = residuals

    def plain(x_ExRxD, w_ExDxF, dy_ExRxF):
        return dy_ExRxF @ w_ExDxF.mT, x_ExRxD.mT @ dy_ExRxF

    def turned(x_ExRxD, w_ExDxF, dy_ExRxF):
        # The barriers keep XLA from folding the turn into the product.
        barrier = jax.lax.optimization_barrier
        dx_ExDxR = barrier(jnp.einsum("EDF,ERF->EDR", w_ExDxF, dy_ExRxF))
        return dx_ExDxR.mT, barrier(x_ExRxD.mT) @ dy_ExRxF

    rows, width_out = dy_ExRxF.shape[1:]
    few = 4 * rows <= width_out
    on_cpu = turned if few else plain
    return jax.lax.platform_dependent(x_ExRxD, w_ExDxF, dy_ExRxF, cpu=on_cpu, default=plain)


_product.defvjp(lambda x, w: (x @ w, (x, w)), _product_backward)


def _join(parts: list[jax.Array], axis: int) -> jax.Array:
    """`jnp.stack`, in a form that XLA fuses into the products that make the parts."""
    shape = list(parts[0].shape)
    shape.insert(axis, len(parts))
    whole = _alike(jax.lax.empty(tuple(shape), parts[0].dtype), parts[0])  # zeros would be written
    for i, part in enumerate(parts):
        whole = jax.lax.dynamic_update_index_in_dim(whole, part, i, axis)
    return whole


def _alike(fresh: jax.Array, x: jax.Array) -> jax.Array:
    """A new array that may differ from device to device wherever x may, inside shard_map."""
    axes = tuple(jax.typeof(x).manual_axis_type.varying)
    return jax.lax.pcast(fresh, axes, to="varying") if axes else fresh


@jax.custom_vjp
def _unrolled(x_XxExRxD, weights):
    return _unrolled_forward(x_XxExRxD, weights)[0]


def _unrolled_forward(x_XxExRxD, weights):
    devices, experts, rows, width = x_XxExRxD.shape
    outputs, saved = [], []
    for e in range(experts):
        w_in, b_in, w_out, b_out = (w[e] for w in weights)
        x_QxD = x_XxExRxD[:, e].reshape(-1, width)
        pre_QxF = remat.save_matmul(x_QxD @ w_in + b_in)
        # The bias after the reshape, or the write into the result isn't fused.
        outputs.append((gelu(pre_QxF) @ w_out).reshape(devices, rows, width) + b_out)
        saved.append((x_QxD, pre_QxF))
    return _join(outputs, 1), (saved, weights)


def _unrolled_backward(residuals, dy_XxExRxD):
    saved, weights = residuals
    devices, _, rows, width = dy_XxExRxD.shape
    inputs, gradients = [], []
    for e, (x_QxD, pre_QxF) in enumerate(saved):
        w_in, _, w_out, _ = (w[e] for w in weights)
        dy_QxD = dy_XxExRxD[:, e].reshape(-1, width)
        h_QxF, through_gelu = jax.vjp(gelu, pre_QxF)  # h again, in the product that needs it
        (dpre_QxF,) = through_gelu(dy_QxD @ w_out.T)
        gradients.append((x_QxD.T @ dpre_QxF, dpre_QxF.sum(0), h_QxF.T @ dy_QxD, dy_QxD.sum(0)))
        inputs.append((dpre_QxF @ w_in.T).reshape(devices, rows, width))
    return _join(inputs, 1), tuple(_join(list(p), 0) for p in zip(*gradients, strict=True))


_unrolled.defvjp(_unrolled_forward, _unrolled_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocked(block: int, x_RxD, rows_E, weights):
    """Experts' MLPs over sorted rows: a loop over experts, in it one over blocks of its run."""
    return _blocked_forward(block, x_RxD, rows_E, weights)[0]


def _slice(x_RxD, start, rows: int):
    return jax.lax.dynamic_slice_in_dim(x_RxD, start, rows)


def _blocked_forward(block: int, x_RxD, rows_E, weights):
    # A run's last block reaches into the next run, which is written later, or past the end.
    x_QxD = jnp.pad(x_RxD, ((0, block), (0, 0)))
    write = jax.lax.dynamic_update_slice_in_dim

    def expert(carry, inputs):
        start, rows, (w_in, b_in, w_out, b_out) = inputs

        def multiply(i, carry):
            pre_QxF, y_QxD = carry
            place = start + i * block
            pre = _slice(x_QxD, place, block) @ w_in + b_in
            y = gelu(pre) @ w_out + b_out
            return write(pre_QxF, pre, place, 0), write(y_QxD, y, place, 0)

        return jax.lax.fori_loop(0, -(-rows // block), multiply, carry), None

    d_ff = weights[0].shape[-1]
    hidden_QxF = _alike(jnp.zeros((len(x_QxD), d_ff), x_RxD.dtype), x_RxD)
    empty = hidden_QxF, jnp.zeros_like(x_QxD)
    starts_E = jnp.cumsum(rows_E) - rows_E
    (pre_QxF, y_QxD), _ = jax.lax.scan(expert, empty, (starts_E, rows_E, weights))
    served_Rx1 = (jnp.arange(len(x_RxD)) < rows_E.sum())[:, None]
    return jnp.where(served_Rx1, y_QxD[: len(x_RxD)], 0), (x_QxD, pre_QxF, rows_E, weights)


def _blocked_backward(block: int, saved, dy_RxD):
    x_QxD, pre_QxF, rows_E, weights = saved
    dy_QxD = jnp.pad(dy_RxD, ((0, block), (0, 0)))

    def expert(dx_QxD, inputs):
        start, rows, (w_in, b_in, w_out, b_out) = inputs

        def multiply(i, carry):
            dx_QxD, (dw_in, db_in, dw_out, db_out) = carry
            place = start + i * block
            x, dy = _slice(x_QxD, place, block), _slice(dy_QxD, place, block)
            dy = jnp.where((jnp.arange(block) < rows - i * block)[:, None], dy, 0)
            h, through_gelu = jax.vjp(gelu, _slice(pre_QxF, place, block))
            (dpre,) = through_gelu(dy @ w_out.T)
            dx_QxD = jax.lax.dynamic_update_slice_in_dim(dx_QxD, dpre @ w_in.T, place, 0)
            dot = partial(jnp.matmul, preferred_element_type=jnp.float32)
            dw_in, db_in = dw_in + dot(x.T, dpre), db_in + dpre.sum(0, dtype=jnp.float32)
            dw_out, db_out = dw_out + dot(h.T, dy), db_out + dy.sum(0, dtype=jnp.float32)
            return dx_QxD, (dw_in, db_in, dw_out, db_out)

        # In float32: many blocks add up, and each would be rounded.
        zeros = jax.tree.map(
            lambda w: _alike(jnp.zeros(w.shape), dy_QxD), (w_in, b_in, w_out, b_out)
        )
        dx_QxD, sums = jax.lax.fori_loop(0, -(-rows // block), multiply, (dx_QxD, zeros))
        return dx_QxD, jax.tree.map(lambda total: total.astype(x_QxD.dtype), sums)

    starts_E = jnp.cumsum(rows_E) - rows_E
    dx_QxD, gradients = jax.lax.scan(expert, jnp.zeros_like(x_QxD), (starts_E, rows_E, weights))
    return dx_QxD[: len(dy_RxD)], None, gradients


_blocked.defvjp(_blocked_forward, _blocked_backward)
