"""The feed-forward networks: one MLP, and E of them as one array each (the experts)."""

import jax
import jax.numpy as jnp
from flax import nnx


def normal(key: jax.Array, shape: tuple[int, ...], std: float) -> nnx.Param:
    """A float32 parameter drawn from N(0, std²)."""
    return nnx.Param(std * jax.random.normal(key, shape))


class MLP(nnx.Module):
    """W_out · gelu_tanh(W_in x + b_in) + b_out."""

    def __init__(self, d_model: int, d_ff: int, std: float, std_out: float, key: jax.Array):
        key_in, key_out = jax.random.split(key)
        self.w_in = normal(key_in, (d_model, d_ff), std)
        self.b_in = nnx.Param(jnp.zeros(d_ff))
        self.w_out = normal(key_out, (d_ff, d_model), std_out)
        self.b_out = nnx.Param(jnp.zeros(d_model))

    def __call__(self, x_D: jax.Array) -> jax.Array:
        """Maps [..., D] to [..., D] in x's dtype."""
        w_in, b_in, w_out, b_out = (
            p[...].astype(x_D.dtype) for p in (self.w_in, self.b_in, self.w_out, self.b_out)
        )
        return jax.nn.gelu(x_D @ w_in + b_in, approximate=True) @ w_out + b_out


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

    def __call__(self, x_ExGxCxD: jax.Array) -> jax.Array:
        """Applies expert e to x[e]; same shape and dtype."""
        experts, groups, slots, width = x_ExGxCxD.shape
        w_in, b_in, w_out, b_out = self._weights(x_ExGxCxD.dtype)
        x_ExRxD = x_ExGxCxD.reshape(experts, groups * slots, width)
        h_ExRxF = jax.nn.gelu(x_ExRxD @ w_in + b_in[:, None], approximate=True)
        y_ExRxD = h_ExRxF @ w_out + b_out[:, None]
        return y_ExRxD.reshape(x_ExGxCxD.shape)

    def ragged(self, x_RxD: jax.Array, rows_E: jax.Array, expert_R: jax.Array) -> jax.Array:
        """Applies the experts to rows sorted by expert, `rows_E[e]` rows for expert e.

        Rows of `expert_R` past the last expert belong to none; their output is meaningless.
        """
        w_in, b_in, w_out, b_out = self._weights(x_RxD.dtype)
        h_RxF = jax.lax.ragged_dot(x_RxD, w_in, rows_E) + b_in[expert_R]
        h_RxF = jax.nn.gelu(h_RxF, approximate=True)
        return jax.lax.ragged_dot(h_RxF, w_out, rows_E) + b_out[expert_R]

    def _weights(self, dtype):
        return (p[...].astype(dtype) for p in (self.w_in, self.b_in, self.w_out, self.b_out))
