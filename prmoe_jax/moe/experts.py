"""The experts of a layer: E MLPs, stacked in one array for each parameter.

Axes: R rows of all experts, sorted by expert; in ExRxD, R rows of each expert.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from prmoe_jax.moe import kernels
from prmoe_jax.moe.kernels import Kernel
from prmoe_jax.nn.mlp import MLP, MLPShape, MLPWeights
from prmoe_jax.nn.quantized import to_dtype


class Experts(nnx.Module):
    """The weights of E MLPs of equal shape.

    They are initialised independently or, if `tied`, all as `MLP.drawn` does with the same key.
    """

    def __init__(self, count: int, shape: MLPShape, key: jax.Array, tied: bool = False):
        self.count = count
        drawn = 1 if tied else count
        key_in, key_out = jax.random.split(key)

        def matrices(key: jax.Array, rows: int, columns: int, std: float) -> nnx.Param:
            w = std * jax.random.normal(key, (drawn, rows, columns))
            return nnx.Param(jnp.tile(w, (count // drawn, 1, 1)))

        d_model, d_ff, std, std_out, gated, biases, gate_bias, clamped = shape
        self.clamped = clamped
        self.w_in = matrices(key_in, d_model, d_ff, std)
        self.b_in = nnx.Param(jnp.zeros((count, d_ff))) if biases else None
        self.w_out = matrices(key_out, d_ff, d_model, std_out)
        self.b_out = nnx.Param(jnp.zeros((count, d_model))) if biases else None
        key_gate = jax.random.fold_in(key_in, 1)
        self.w_gate = matrices(key_gate, d_model, d_ff, std) if gated else None
        self.b_gate = nnx.Param(jnp.zeros((count, d_ff))) if gate_bias else None

    @property
    def here(self) -> int:
        """The number of experts on this device."""
        return jax.tree.leaves(self.w_out[...])[0].shape[0]

    def __call__(self, x_ExRxD: jax.Array) -> jax.Array:
        """Applies expert e to x[e]; same shape and dtype."""
        return kernels.batched(self.weights(x_ExRxD.dtype), x_ExRxD)

    def weights(self, dtype) -> MLPWeights:
        """All experts' weights in a compute dtype, with E as the first axis."""

        def cast(p):
            return None if p is None else to_dtype(p[...], dtype)

        return MLPWeights(
            w_in_DxF=cast(self.w_in),
            w_out_FxD=cast(self.w_out),
            b_in_F=cast(self.b_in),
            b_out_D=cast(self.b_out),
            w_gate_DxF=cast(self.w_gate),
            b_gate_F=cast(self.b_gate),
            clamped=self.clamped,
        )

    def expert(self, e) -> MLP:
        """Expert e as an MLP."""

        def own(p):
            return None if p is None else jax.tree.map(lambda w: w[e], p[...])

        inner, outer = (own(self.w_in), own(self.b_in)), (own(self.w_out), own(self.b_out))
        return MLP(*inner, *outer, own(self.w_gate), own(self.b_gate), self.clamped)

    def apply(self, e: jax.Array, x_RxD: jax.Array) -> jax.Array:
        """Applies expert e to all rows, and reads no other weights."""
        return self.expert(e)(x_RxD)


class UnstackedExperts(nnx.Module):
    """Experts with separate arrays and without derivatives, for decoding on CPUs.

    XLA would copy an expert's part of a stacked array on one core, and multiply by the copy. It
    reads separate arrays in place, on all cores, but must compile an MLP for each expert.
    """

    def __init__(self, experts: Experts):
        self.count = experts.count
        self.each = nnx.List([experts.expert(e) for e in range(experts.count)])

    def apply(self, e: jax.Array, x_RxD: jax.Array) -> jax.Array:
        """As `Experts.apply`."""
        return jax.lax.switch(e, [partial(_traced_once, mlp) for mlp in self.each], x_RxD)


@jax.jit
def _traced_once(mlp: MLP, x_RxD: jax.Array) -> jax.Array:
    return mlp(x_RxD)


class Local(NamedTuple):
    """Applies a layer's experts where one device holds all of them.

    `exchange.ExpertParallel` has the same methods, for a mesh that splits them.
    """

    experts: Experts | UnstackedExperts

    @property
    def count(self) -> int:  # type: ignore[override]
        """The number of experts of the layer."""
        return self.experts.count

    def batched(self, x_ExRxD: jax.Array) -> jax.Array:
        """Applies expert e to x[e]; same shape and dtype."""
        return self.experts(x_ExRxD)

    def grouped(
        self, kernel: Kernel, x_RxD: jax.Array, rows_E: jax.Array, expert_R: jax.Array
    ) -> tuple[jax.Array, jax.Array | int]:
        """Applies the experts to rows sorted by expert.

        Args:
          kernel: multiplies rows by weights.
          x_RxD, rows_E, expert_R: as for a `kernels.Kernel`.

        Returns:
          The results, [R, D], and the rounds of the dropless exchange, here 0.
        """
        if isinstance(self.experts, UnstackedExperts):
            return kernels.loop_over_blocks(self.experts.apply, x_RxD, rows_E), 0
        return kernel(self.experts.weights(x_RxD.dtype), x_RxD, rows_E, expert_R), 0

    def are_few(self, tokens: int, top_k: int) -> bool:
        """Whether `of_few` reads fewer weights than the other methods."""
        return tokens * top_k <= self.count

    def of_few(self, x_NxD: jax.Array, expert_NxK: jax.Array, weight_NxK: jax.Array) -> jax.Array:
        """The weighted sum of each token's experts, [N, D], one choice after the other.

        Decoding has few tokens and is bound by reading weights; this reads the chosen experts'
        weights only.
        """
        x_RxD = jnp.repeat(x_NxD, expert_NxK.shape[1], axis=0)
        y_RxD = _row_by_row(self.experts.apply, x_RxD, expert_NxK.reshape(-1))
        y_NxKxD = y_RxD.reshape(*expert_NxK.shape, -1)
        # The sum is computed in float32, as in `dispatch`.
        return jnp.einsum("NKD,NK->ND", y_NxKxD, weight_NxK).astype(x_NxD.dtype)


def _row_by_row(apply: Callable, x_RxD: jax.Array, expert_R: jax.Array) -> jax.Array:
    """Calls `apply(e, x)` for each row and its expert, one after the other."""

    def row(inputs):
        x_D, e = inputs
        return apply(e, x_D[None])[0]

    with jax.named_scope("experts"):
        return jax.lax.map(row, (x_RxD, expert_R))
