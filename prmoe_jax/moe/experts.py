"""The experts of a layer: E MLPs that share one array for each parameter."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from prmoe_jax.moe import kernels
from prmoe_jax.nn.mlp import MLP, MLPWeights, activate, add_bias
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
        gated: bool = False,
        biases: bool = True,
    ):
        self.count = count
        drawn = 1 if tied else count
        key_in, key_out = jax.random.split(key)

        def matrices(key: jax.Array, rows: int, columns: int, std: float) -> nnx.Param:
            w = std * jax.random.normal(key, (drawn, rows, columns))
            return nnx.Param(jnp.tile(w, (count // drawn, 1, 1)))

        self.w_in = matrices(key_in, d_model, d_ff, std)
        self.b_in = nnx.Param(jnp.zeros((count, d_ff))) if biases else None
        self.w_out = matrices(key_out, d_ff, d_model, std_out)
        self.b_out = nnx.Param(jnp.zeros((count, d_model))) if biases else None
        key_gate = jax.random.fold_in(key_in, 1)
        self.w_gate = matrices(key_gate, d_model, d_ff, std) if gated else None

    @property
    def here(self) -> int:
        """The number of experts on this device, where a mesh spreads them."""
        return jax.tree.leaves(self.w_out[...])[0].shape[0]

    def __call__(self, x_ExRxD: jax.Array) -> jax.Array:
        """Applies expert e to x[e]; same shape and dtype."""
        return self.add_last_bias(self.without_last_bias(x_ExRxD))

    def add_last_bias(self, y_ExRxD: jax.Array) -> jax.Array:
        """Adds b_out, if these experts have one."""
        if self.b_out is None:
            return y_ExRxD
        return add_bias(y_ExRxD, self.b_out[...][:, None])

    def without_last_bias(self, x_ExRxD: jax.Array) -> jax.Array:
        """The same without b_out; devices that split hidden units sum up these results."""
        weights = self._weights(x_ExRxD.dtype)
        b_in_Ex1xF = None if weights.b_in_F is None else weights.b_in_F[:, None]
        with jax.named_scope("experts"):
            multiply = partial(kernels.batched_matmul, x_ExRxD)
            hidden = kernels.hidden(multiply, weights._replace(b_in_F=b_in_Ex1xF))
            return kernels.batched_matmul(activate(hidden), weights.w_out_FxD)

    def unrolled(self, x_XxExRxD: jax.Array) -> jax.Array:
        """Applies expert e to x[:, e]; same shape and dtype.

        For a device with few experts: rows stay where an exchange put them, and every product is
        that of a dense MLP.
        """
        with jax.named_scope("experts"):
            return kernels.unrolled(x_XxExRxD, self._weights(x_XxExRxD.dtype))

    def ragged(
        self, x_RxD: jax.Array, rows_E: jax.Array, expert_R: jax.Array, last_bias: bool = True
    ) -> jax.Array:
        """Applies the experts to rows sorted by expert, `rows_E[e]` rows for expert e.

        Rows with `expert_R` = E belong to no expert; their output is 0. Without the last bias,
        devices that split hidden units sum up their results.
        """
        weights = self._weights(x_RxD.dtype)
        served_Rx1 = (expert_R < len(rows_E))[:, None]

        def grouped(x_R, w_E):
            # Rows of no run may hold anything, here and in the derivative. Masks on both sides
            # ensure that these are never read.
            y_R = jax.lax.ragged_dot(jnp.where(served_Rx1, x_R, 0), w_E, rows_E)
            return jnp.where(served_Rx1, y_R, 0)

        with jax.named_scope("experts"):
            if weights.b_in_F is not None:
                weights = weights._replace(b_in_F=_biases(weights.b_in_F, expert_R))
            h_RxF = activate(kernels.hidden(partial(grouped, x_RxD), weights))
            y_RxD = grouped(h_RxF, weights.w_out_FxD)
        return add_bias(y_RxD, self.last_bias(expert_R, y_RxD.dtype) if last_bias else None)

    def block_loop(
        self, x_RxD: jax.Array, rows_E: jax.Array, expert_R: jax.Array, last_bias: bool = True
    ) -> jax.Array:
        """The same as `ragged`, multiplying a block of rows at a time."""
        block = kernels.block_rows(len(x_RxD), len(rows_E))
        weights = self._weights(x_RxD.dtype)
        if not last_bias:
            weights = weights._replace(b_out_D=None)
        return kernels.block_loop(block, x_RxD, rows_E, weights)

    def padded(
        self, x_RxD: jax.Array, rows_E: jax.Array, expert_R: jax.Array, last_bias: bool = True
    ) -> jax.Array:
        """The same as `ragged`, in one product of equal blocks, to which runs are padded."""
        weights, blocks = self._weights(x_RxD.dtype), kernels.Blocks.of(rows_E, expert_R)
        with jax.named_scope("experts"):
            if weights.b_in_F is not None:
                weights = weights._replace(b_in_F=blocks.biases(weights.b_in_F))
            hidden = kernels.hidden(partial(blocks.matmul, blocks.filled(x_RxD)), weights)
            y_PxQxD = blocks.matmul(activate(hidden), weights.w_out_FxD)
            if last_bias and weights.b_out_D is not None:
                y_PxQxD = add_bias(y_PxQxD, blocks.biases(weights.b_out_D))
            return blocks.emptied(y_PxQxD)

    def alone(
        self, x_RxD: jax.Array, rows_E: jax.Array, expert_R: jax.Array, last_bias: bool = True
    ) -> jax.Array:
        """As `ragged` for a device's only expert, but the output for rows of no expert is anything.

        Such rows must be 0 in x and in the gradient of the output.
        """
        del rows_E
        return (self if last_bias else self.without_last_bias)(x_RxD[None])[0]

    def weighted(self, x_NxD: jax.Array, weight_NxI: jax.Array, last_bias: jax.Array) -> jax.Array:
        """The sum of all experts' outputs for every row, by these weights.

        For few rows, where the cost is reading the weights. The last bias is added if `last_bias`,
        a bool, says so.
        """
        y_IxNxD = self.without_last_bias(jnp.broadcast_to(x_NxD, (self.here, *x_NxD.shape)))
        if self.b_out is not None:
            b_IxD = jnp.where(last_bias, self.b_out[...].astype(x_NxD.dtype), 0)
            y_IxNxD += b_IxD[:, None]
        return jnp.einsum("IND,NI->ND", y_IxNxD, weight_NxI).astype(x_NxD.dtype)

    def last_bias(self, expert_R: jax.Array, dtype) -> jax.Array | None:
        """The last bias for rows of these experts, [R, D]; 0 for rows of no expert."""
        if self.b_out is None:
            return None
        return _biases(self.b_out[...].astype(dtype), expert_R)

    def per_token(self, x_RxD: jax.Array, expert_R: jax.Array) -> jax.Array:
        """Applies expert expert_R[r] to row r and reads no other weights; for few rows."""
        return _row_by_row(lambda e, x_1xD: self.expert(e)(x_1xD), x_RxD, expert_R)

    def expert(self, e) -> MLP:
        """Expert e as an MLP."""
        held = self.w_in, self.b_in, self.w_out, self.b_out, self.w_gate
        weights = [None if p is None else p[...] for p in held]
        return MLP(*jax.tree.map(lambda w: w[e], weights))

    def _weights(self, dtype) -> MLPWeights:
        held = self.w_in, self.w_out, self.b_in, self.b_out, self.w_gate
        return MLPWeights(*(None if p is None else to_dtype(p[...], dtype) for p in held))


def _biases(b_ExF: jax.Array, expert_R: jax.Array) -> jax.Array:
    """The biases of these experts, [R, F]; 0 at a number that is none.

    The gradient is a product, which adds up in float32 and in a fixed order. That of an index would
    add up thousands of rows in the bias's dtype.
    """
    chosen_RxE = jax.nn.one_hot(expert_R, len(b_ExF), dtype=b_ExF.dtype)
    return jnp.matmul(chosen_RxE, b_ExF, precision="highest")


class OutputNorms:
    """Experts whose output is the norm of their output: expert `first + d` has it in column d of D.

    Combined by the router's weights, they measure what each of D experts adds to the tokens.
    """

    def __init__(self, experts: Experts, first: int):
        self._experts, self._first, self.count = experts, first, experts.count

    def __call__(self, x_ExRxD: jax.Array) -> jax.Array:
        """As `Experts.__call__`."""
        return self._in_columns(self._experts(x_ExRxD), jnp.arange(self.count)[:, None])

    def ragged(self, x_RxD: jax.Array, rows_E: jax.Array, expert_R: jax.Array) -> jax.Array:
        """As `Experts.ragged`."""
        return self._in_columns(self._experts.ragged(x_RxD, rows_E, expert_R), expert_R)

    def block_loop(self, x_RxD: jax.Array, rows_E: jax.Array, expert_R: jax.Array) -> jax.Array:
        """As `Experts.block_loop`."""
        return self._in_columns(self._experts.block_loop(x_RxD, rows_E, expert_R), expert_R)

    def padded(self, x_RxD: jax.Array, rows_E: jax.Array, expert_R: jax.Array) -> jax.Array:
        """As `Experts.padded`."""
        return self._in_columns(self._experts.padded(x_RxD, rows_E, expert_R), expert_R)

    def per_token(self, x_RxD: jax.Array, expert_R: jax.Array) -> jax.Array:
        """As `Experts.per_token`."""
        return self._in_columns(self._experts.per_token(x_RxD, expert_R), expert_R)

    def _in_columns(self, y_RxD: jax.Array, expert_R: jax.Array) -> jax.Array:
        norm_Rx1 = jnp.linalg.norm(y_RxD.astype(jnp.float32), axis=-1, keepdims=True)
        return norm_Rx1 * jax.nn.one_hot(expert_R - self._first, y_RxD.shape[-1])


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
        return kernels.first_rows(y_QxD[: len(x_RxD)], rows_E.sum())

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
