"""Normalisation, computed in float32."""

import jax
import jax.numpy as jnp
from flax import nnx


class LayerNorm(nnx.Module):
    """Normalises to mean 0 and variance 1, then scales and shifts."""

    def __init__(self, width: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width))
        self.shift = nnx.Param(jnp.zeros(width))

    def __call__(self, x_D: jax.Array) -> jax.Array:
        """Maps [..., D] to [..., D] in x's dtype."""
        with jax.named_scope("norm"):
            x32_D = x_D.astype(jnp.float32)
            centred_D = x32_D - x32_D.mean(-1, keepdims=True)
            variance = jnp.square(centred_D).mean(-1, keepdims=True)
            y_D = centred_D * jax.lax.rsqrt(variance + self.eps)
            return (y_D * self.scale[...] + self.shift[...]).astype(x_D.dtype)


class RMSNorm(nnx.Module):
    """Normalises to a mean square of 1, then scales (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width))

    def __call__(self, x_D: jax.Array) -> jax.Array:
        """Maps [..., D] to [..., D] in x's dtype."""
        with jax.named_scope("norm"):
            return _rms(x_D, self.scale[...], self.eps, -1)


class HeadsRMSNorm(nnx.Module):
    """RMSNorm over all heads together, as for queries and keys in OLMoE."""

    def __init__(self, heads: int, width: int, eps: float):
        self.eps = eps
        self.by_head = nnx.Param(jnp.ones((heads, width)))

    def __call__(self, x_HxK: jax.Array) -> jax.Array:
        """Maps [..., H, K] to [..., H, K] in x's dtype."""
        with jax.named_scope("norm"):
            return _rms(x_HxK, self.by_head[...], self.eps, (-2, -1))


def _rms(x: jax.Array, scale: jax.Array, eps: float, axes) -> jax.Array:
    x32 = x.astype(jnp.float32)
    square = jnp.square(x32).mean(axes, keepdims=True)
    return (x32 * jax.lax.rsqrt(square + eps) * scale).astype(x.dtype)


def norm(kind: str, width: int, eps: float) -> LayerNorm | RMSNorm:
    """A norm of activations, by the value of `model.norm`."""
    return RMSNorm(width, eps) if kind == "rmsnorm" else LayerNorm(width, eps)
