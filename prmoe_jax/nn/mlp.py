"""The two-layer feed-forward network."""

import jax
import jax.numpy as jnp
from flax import nnx

from prmoe_jax.nn import remat
from prmoe_jax.nn.matmul import matmul


def gelu(x: jax.Array) -> jax.Array:
    """GELU by its tanh approximation, as in GPT-2."""
    return jax.nn.gelu(x, approximate=True)


class MLP(nnx.Module):
    """W_out · gelu_tanh(W_in x + b_in) + b_out."""

    def __init__(self, w_in: jax.Array, b_in: jax.Array, w_out: jax.Array, b_out: jax.Array):
        self.w_in, self.b_in = nnx.Param(w_in), nnx.Param(b_in)
        self.w_out, self.b_out = nnx.Param(w_out), nnx.Param(b_out)

    @classmethod
    def drawn(cls, d_model: int, d_ff: int, std: float, std_out: float, key: jax.Array) -> "MLP":
        """Draws w_in from N(0, std²) and w_out from N(0, std_out²); biases are 0."""
        key_in, key_out = jax.random.split(key)
        w_in = std * jax.random.normal(key_in, (d_model, d_ff))
        w_out = std_out * jax.random.normal(key_out, (d_ff, d_model))
        return cls(w_in, jnp.zeros(d_ff), w_out, jnp.zeros(d_model))

    def __call__(self, x_D: jax.Array) -> jax.Array:
        """Maps [..., D] to [..., D] in x's dtype."""
        b_in, b_out = (p[...].astype(x_D.dtype) for p in (self.b_in, self.b_out))
        h_F = gelu(remat.save_matmul(matmul(x_D, self.w_in[...]) + b_in))
        return matmul(h_F, self.w_out[...]) + b_out
