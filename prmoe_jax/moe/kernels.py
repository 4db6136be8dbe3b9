"""The experts' matrix products, with derivatives and loops by hand where XLA's are slow."""

from functools import partial

import jax
import jax.numpy as jnp

from prmoe_jax.nn import remat
from prmoe_jax.nn.mlp import gelu


def block_rows(rows: int, experts: int) -> int:
    """Rows that are multiplied at a time: about an expert's mean number, from 16 to 256."""
    return min(256, max(16, 1 << (rows // experts - 1).bit_length()))


@jax.custom_vjp
def batched_matmul(x_ExRxD: jax.Array, w_ExDxF: jax.Array) -> jax.Array:
    """x @ w, with a gradient for CPUs and experts of few rows.

    There the cost is memory traffic for the weights and their gradients. Transposing the small
    activations lets the products read and write weights and gradients in storage order.
    """
    return x_ExRxD @ w_ExDxF


def _batched_matmul_backward(residuals, dy_ExRxF):
    x_ExRxD, w_ExDxF = residuals

    def plain(x_ExRxD, w_ExDxF, dy_ExRxF):
        return dy_ExRxF @ w_ExDxF.mT, x_ExRxD.mT @ dy_ExRxF

    def turned(x_ExRxD, w_ExDxF, dy_ExRxF):
        # The barriers keep XLA from fusing the transposition into the product.
        barrier = jax.lax.optimization_barrier
        dx_ExDxR = barrier(jnp.einsum("EDF,ERF->EDR", w_ExDxF, dy_ExRxF))
        return dx_ExDxR.mT, barrier(x_ExRxD.mT) @ dy_ExRxF

    rows, width_out = dy_ExRxF.shape[1:]
    few = 16 * rows <= width_out
    on_cpu = turned if few else plain
    return jax.lax.platform_dependent(x_ExRxD, w_ExDxF, dy_ExRxF, cpu=on_cpu, default=plain)


batched_matmul.defvjp(lambda x, w: (x @ w, (x, w)), _batched_matmul_backward)


def _join(parts: list[jax.Array], axis: int) -> jax.Array:
    """Stacks like `jnp.stack`, in a form that XLA fuses into the products that make the parts."""
    shape = list(parts[0].shape)
    shape.insert(axis, len(parts))
    whole = _alike(jax.lax.empty(tuple(shape), parts[0].dtype), parts[0])  # zeros would be written
    for i, part in enumerate(parts):
        whole = jax.lax.dynamic_update_index_in_dim(whole, part, i, axis)
    return whole


def _alike(fresh: jax.Array, x: jax.Array) -> jax.Array:
    """Marks a new array as varying over the axes over which x varies, inside shard_map."""
    axes = tuple(jax.typeof(x).manual_axis_type.varying)
    return jax.lax.pcast(fresh, axes, to="varying") if axes else fresh


@jax.custom_vjp
def unrolled(x_XxExRxD, weights):
    """Applies expert e to x[:, e]; each expert's products are compiled separately."""
    return _unrolled_forward(x_XxExRxD, weights)[0]


def _unrolled_forward(x_XxExRxD, weights):
    devices, experts, rows, width = x_XxExRxD.shape
    outputs, saved = [], []
    for e in range(experts):
        w_in, b_in, w_out, b_out = (w[e] for w in weights)
        x_QxD = x_XxExRxD[:, e].reshape(-1, width)
        pre_QxF = remat.save_matmul(x_QxD @ w_in + b_in)
        # The bias is added after the reshape; else the write into the result isn't fused.
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
        h_QxF, through_gelu = jax.vjp(gelu, pre_QxF)  # computes h again, fused into the product
        (dpre_QxF,) = through_gelu(dy_QxD @ w_out.T)
        gradients.append((x_QxD.T @ dpre_QxF, dpre_QxF.sum(0), h_QxF.T @ dy_QxD, dy_QxD.sum(0)))
        inputs.append((dpre_QxF @ w_in.T).reshape(devices, rows, width))
    return _join(inputs, 1), tuple(_join(list(p), 0) for p in zip(*gradients, strict=True))


unrolled.defvjp(_unrolled_forward, _unrolled_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def block_loop(block: int, x_RxD, rows_E, weights):
    """Applies experts to sorted rows, in a loop over experts and one over blocks of their runs."""
    return _block_loop_forward(block, x_RxD, rows_E, weights)[0]


def slice_rows(x_RxD, start, rows: int):
    return jax.lax.dynamic_slice_in_dim(x_RxD, start, rows)


def _block_loop_forward(block: int, x_RxD, rows_E, weights):
    # A run's last block reaches into the next run, which is written later, or into the padding.
    x_QxD = jnp.pad(x_RxD, ((0, block), (0, 0)))
    write = jax.lax.dynamic_update_slice_in_dim

    def expert(carry, inputs):
        start, rows, (w_in, b_in, w_out, b_out) = inputs

        def multiply(i, carry):
            pre_QxF, y_QxD = carry
            place = start + i * block
            pre = slice_rows(x_QxD, place, block) @ w_in + b_in
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


def _block_loop_backward(block: int, saved, dy_RxD):
    x_QxD, pre_QxF, rows_E, weights = saved
    dy_QxD = jnp.pad(dy_RxD, ((0, block), (0, 0)))

    def expert(dx_QxD, inputs):
        start, rows, (w_in, b_in, w_out, b_out) = inputs

        def multiply(i, carry):
            dx_QxD, (dw_in, db_in, dw_out, db_out) = carry
            place = start + i * block
            x, dy = slice_rows(x_QxD, place, block), slice_rows(dy_QxD, place, block)
            dy = jnp.where((jnp.arange(block) < rows - i * block)[:, None], dy, 0)
            h, through_gelu = jax.vjp(gelu, slice_rows(pre_QxF, place, block))
            (dpre,) = through_gelu(dy @ w_out.T)
            dx_QxD = jax.lax.dynamic_update_slice_in_dim(dx_QxD, dpre @ w_in.T, place, 0)
            dot = partial(jnp.matmul, preferred_element_type=jnp.float32)
            dw_in, db_in = dw_in + dot(x.T, dpre), db_in + dpre.sum(0, dtype=jnp.float32)
            dw_out, db_out = dw_out + dot(h.T, dy), db_out + dy.sum(0, dtype=jnp.float32)
            return dx_QxD, (dw_in, db_in, dw_out, db_out)

        # The sums are float32: else each of many additions would be rounded to the compute dtype.
        zeros = jax.tree.map(
            lambda w: _alike(jnp.zeros(w.shape), dy_QxD), (w_in, b_in, w_out, b_out)
        )
        dx_QxD, sums = jax.lax.fori_loop(0, -(-rows // block), multiply, (dx_QxD, zeros))
        return dx_QxD, jax.tree.map(lambda total: total.astype(x_QxD.dtype), sums)

    starts_E = jnp.cumsum(rows_E) - rows_E
    dx_QxD, gradients = jax.lax.scan(expert, jnp.zeros_like(x_QxD), (starts_E, rows_E, weights))
    return dx_QxD[: len(dy_RxD)], None, gradients


block_loop.defvjp(_block_loop_forward, _block_loop_backward)
