"""Weights as inference stores them, often in fewer bits than it computes with."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InferenceWeight:
    """A weight in float32, in bfloat16, or in int8 with a scale for each output.

    The contracted axes, which its product sums over, come last: CPUs then multiply few rows faster.
    """

    values: jax.Array
    scales: jax.Array | None  # float32, of size 1 along the contracted axes
    contracted: tuple[int, ...] = dataclasses.field(metadata={"static": True})  # original axes

    def __getitem__(self, everything) -> "InferenceWeight":
        """Lets `w[...]` work as on an nnx.Param."""
        return self

    def dequantize(self, dtype) -> jax.Array:
        """The weight in a floating-point dtype, with its axes in their original order."""
        if self.scales is None:
            wide = self.values.astype(dtype)
        else:  # in float32: rounding a scale would shift a whole channel
            wide = (self.values.astype(jnp.float32) * self.scales).astype(dtype)
        return jnp.moveaxis(wide, range(-len(self.contracted), 0), self.contracted)


def quantize(w: jax.Array, kind: str, contracted: tuple[int, ...]) -> InferenceWeight:
    """Stores a weight for inference.

    Args:
      w: the weight, float32.
      kind: 'float32', 'bfloat16' or 'int8'.
      contracted: the axes that its product sums over, counted from the end (negative numbers).
    """
    last = tuple(range(-len(contracted), 0))
    w = jnp.moveaxis(w, contracted, last)
    if kind != "int8":
        return InferenceWeight(w.astype(kind), None, contracted)
    scales = jnp.maximum(jnp.abs(w).max(last, keepdims=True), 1e-30) / 127
    return InferenceWeight(jnp.round(w / scales).astype(jnp.int8), scales, contracted)


def narrowed(tree, dtype):
    """Casts the weights in a tree to a dtype, except those of fewer bits and quantized ones."""

    def is_quantized(w) -> bool:
        return isinstance(w, InferenceWeight)

    return jax.tree.map(
        lambda w: w if is_quantized(w) else to_dtype(w, dtype), tree, is_leaf=is_quantized
    )


def to_dtype(w: jax.Array | InferenceWeight, dtype) -> jax.Array:
    """Casts or dequantizes a weight to a dtype; one of fewer bits stays as it is."""
    if isinstance(w, InferenceWeight):
        return w.dequantize(dtype)
    return w.astype(min(w.dtype, jnp.dtype(dtype), key=lambda dtype: dtype.itemsize))
