"""The experts of a layer: E MLPs that share one array for each parameter."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from prmoe_jax.moe import kernels
from prmoe_jax.nn import remat
from prmoe_jax.nn.mlp import MLP, gelu
from prmoe_jax.nn.quantized import to_dtype


class Experts(nnx.Module):
    """E MLPs of equal shape, with independent initial weights.

    If `tied`, all of them start as the MLP that `MLP.drawn` makes from the same key.
    """

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
        """The same without b_out; devices that split hidden units sum up these results."""
        w_in, b_in, w_out, _ = self._weights(x_ExRxD.dtype)
        with jax.named_scope("experts"):
            pre_ExRxF = remat.save_matmul(kernels.batched_matmul(x_ExRxD, w_in) + b_in[:, None])
            return kernels.batched_matmul(gelu(pre_ExRxF), w_out)

    def unrolled(self, x_XxExRxD: jax.Array) -> jax.Array:
        """Applies expert e to x[:, e]; same shape and dtype.

        For a device with few experts: rows stay where an exchange put them, and every product is
        that of a dense MLP.
        """
        with jax.named_scope("experts"):
            return kernels.unrolled(x_XxExRxD, tuple(self._weights(x_XxExRxD.dtype)))

    def ragged(
        self, x_RxD: jax.Array, rows_E: jax.Array, expert_R: jax.Array, last_bias: bool = True
    ) -> jax.Array:
        """Applies the experts to rows sorted by expert, `rows_E[e]` rows for expert e.

        Rows with `expert_R` = E belong to no expert; their output is 0. Without the last bias,
        devices that split hidden units sum up their results.
        """
        w_in, b_in, w_out, _ = self._weights(x_RxD.dtype)
        served_Rx1 = (expert_R < len(rows_E))[:, None]

        def grouped(x_R, w_E):
            # Rows of no run may hold anything, here and in the derivative. Masks on both sides
            # ensure that these are never read.
            y_R = jax.lax.ragged_dot(jnp.where(served_Rx1, x_R, 0), w_E, rows_E)
            return jnp.where(served_Rx1, y_R, 0)

        with jax.named_scope("experts"):
            b_in_RxF = b_in.at[expert_R].get(mode="fill", fill_value=0)
            h_RxF = gelu(remat.save_matmul(grouped(x_RxD, w_in) + b_in_RxF))
            y_RxD = grouped(h_RxF, w_out)
        return y_RxD + self.last_bias(expert_R, y_RxD.dtype) if last_bias else y_RxD

    def block_loop(
        self, x_RxD: jax.Array, rows_E: jax.Array, expert_R: jax.Array, last_bias: bool = True
    ) -> jax.Array:
        """The same as `ragged`, multiplying a block of rows at a time."""
        block = kernels.block_rows(len(x_RxD), len(rows_E))
        w_in, b_in, w_out, b_out = self._weights(x_RxD.dtype)
        if not last_bias:
            b_out = jnp.zeros_like(w_out[:, 0])
        return kernels.block_loop(block, x_RxD, rows_E, (w_in, b_in, w_out, b_out))

    def alone(
        self, x_RxD: jax.Array, rows_E: jax.Array, expert_R: jax.Array, last_bias: bool = True
    ) -> jax.Array:
        """As `ragged` for a device's only expert, but the output for rows of no expert is anything.

        Such rows must be 0 in x and in the gradient of the output.
        """
        del rows_E
        y_RxD = self.without_last_bias(x_RxD[None])[0]
        return y_RxD + self.b_out[...].astype(y_RxD.dtype) if last_bias else y_RxD

    def last_bias(self, expert_R: jax.Array, dtype) -> jax.Array:
        """The last bias for rows of these experts, [R, D]; 0 for rows of no expert."""
        return self.b_out[...].astype(dtype).at[expert_R].get(mode="fill", fill_value=0)

    def per_token(self, x_RxD: jax.Array, expert_R: jax.Array) -> jax.Array:
        """Applies expert expert_R[r] to row r and reads no other weights; for few rows."""
        return _row_by_row(lambda e, x_1xD: self.expert(e)(x_1xD), x_RxD, expert_R)

    def expert(self, e) -> MLP:
        """Expert e as an MLP."""
        weights = self.w_in[...], self.b_in[...], self.w_out[...], self.b_out[...]
        return MLP(*jax.tree.map(lambda w: w[e], weights))

    def _weights(self, dtype):
        return (to_dtype(p[...], dtype) for p in (self.w_in, self.b_in, self.w_out, self.b_out))


class UnstackedExperts(nnx.Module):
    """Experts with separate arrays and without derivatives, for decoding on CPUs.

    XLA would copy an expert's part of a shared array on one core, and multiply by the copy. It
    reads a separate array in place, on all cores, but must compile an MLP for each expert.
    """

    def __init__(self, experts: Experts):
        self.count = experts.count
        self.each = nnx.List([experts.expert(e) for e in range(experts.count)])

    def block_loop(self, x_RxD: jax.Array, rows_E: jax.Array, expert_R: jax.Array) -> jax.Array:
        """As `Experts.block_loop`."""
        block = kernels.block_rows(len(x_RxD), self.count)
        blocks_E = -(-rows_E // block)
        ends_E, starts_E = jnp.cumsum(blocks_E), jnp.cumsum(rows_E) - rows_E
        x_QxD = jnp.pad(x_RxD, ((0, block), (0, 0)))

        def multiply(i, y_QxD):
            e = jnp.searchsorted(ends_E, i, side="right")
            place = starts_E[e] + (i - ends_E[e] + blocks_E[e]) * block
            y = self._apply(e, kernels.slice_rows(x_QxD, place, block))
            return jax.lax.dynamic_update_slice_in_dim(y_QxD, y, place, 0)

        with jax.named_scope("experts"):
            # A run's last block reaches into the next run, which is written later.
            y_QxD = jax.lax.fori_loop(0, ends_E[-1], multiply, jnp.zeros_like(x_QxD))
        served_Rx1 = (jnp.arange(len(x_RxD)) < rows_E.sum())[:, None]
        return jnp.where(served_Rx1, y_QxD[: len(x_RxD)], 0)

    def per_token(self, x_RxD: jax.Array, expert_R: jax.Array) -> jax.Array:
        """As `Experts.per_token`."""
        return _row_by_row(self._apply, x_RxD, expert_R)

    def _apply(self, e: jax.Array, x_RxD: jax.Array) -> jax.Array:
        return jax.lax.switch(e, [partial(_traced_once, mlp) for mlp in self.each], x_RxD)


def _row_by_row(apply, x_RxD: jax.Array, expert_R: jax.Array) -> jax.Array:
    """Calls `apply(e, x)` for each row and its expert, one after the other."""

    def row(inputs):
        x_D, e = inputs
        return apply(e, x_D[None])[0]

    with jax.named_scope("experts"):
        return jax.lax.map(row, (x_RxD, expert_R))


@jax.jit
def _traced_once(mlp: MLP, x_RxD: jax.Array) -> jax.Array:
    return mlp(x_RxD)
