"""Causal self-attention within documents, and the KV cache of decoding."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from prmoe_jax.config import ModelConfig
from prmoe_jax.model.attention_kernels import attend, product, resolve_attention
from prmoe_jax.nn import remat
from prmoe_jax.nn.matmul import matmul
from prmoe_jax.nn.parameters import normal
from prmoe_jax.parallel.mesh import platform

TPU_ROWS = 8  # rows of a tile


class KVCache(NamedTuple):
    """KV cache of earlier tokens, in the layout that matrix products on CPUs read."""

    k_BxHxKxT: jax.Array
    v_BxHxTxK: jax.Array

    @classmethod
    def empty(cls, batch: int, heads: int, width: int, room: int, dtype) -> "KVCache":
        """An empty cache for `room` tokens."""
        shapes = (batch, heads, width, room), (batch, heads, room, width)
        return cls(*(jnp.zeros(shape, dtype) for shape in shapes))

    def extended(
        self, k_BxQxHxK: jax.Array, v_BxQxHxK: jax.Array, position_BxQ: jax.Array
    ) -> "KVCache":
        """The cache with more tokens at their positions; tokens past its end are dropped."""
        row_Bx1 = jnp.arange(len(position_BxQ))[:, None]
        if platform() != "tpu":
            return KVCache(
                self.k_BxHxKxT.at[row_Bx1, :, :, position_BxQ].set(k_BxQxHxK),
                self.v_BxHxTxK.at[row_Bx1, :, position_BxQ].set(v_BxQxHxK),
            )
        # Where heads are indexed as well, the compiler keeps the keys of each head together.
        row_Bx1x1, head_Hx1 = row_Bx1[..., None], jnp.arange(k_BxQxHxK.shape[2])[:, None]
        position_Bx1xQ = position_BxQ[:, None]
        k_BxHxQxK, v_BxHxQxK = k_BxQxHxK.swapaxes(1, 2), v_BxQxHxK.swapaxes(1, 2)
        return KVCache(
            self.k_BxHxKxT.at[row_Bx1x1, head_Hx1, :, position_Bx1xQ].set(k_BxHxQxK),
            self.v_BxHxTxK.at[row_Bx1x1, head_Hx1, position_Bx1xQ].set(v_BxHxQxK),
        )


def attend_to_cache(q_BxQxHxK, cache: KVCache, position_BxQ) -> jax.Array:
    """softmax(q kᵀ / √K) v over the keys up to each query's position; [B, Q, H, K].

    A TPU gets a single query as eight equal rows, which its matrix unit multiplies in the time of
    one. The products of one row would be sums on the vector unit, which take three times as long.
    """
    queries, width = q_BxQxHxK.shape[1::2]
    if queries == 1 and platform() == "tpu":
        q_BxQxHxK = jnp.repeat(q_BxQxHxK, TPU_ROWS, axis=1)
    score_BxHxQxT = product("BQHK,BHKT->BHQT", q_BxQxHxK, cache.k_BxHxKxT) * width**-0.5
    seen_BxQxT = jnp.arange(cache.k_BxHxKxT.shape[-1]) <= position_BxQ[..., None]
    score_BxHxQxT = jnp.where(seen_BxQxT[:, None], score_BxHxQxT, -jnp.inf)
    weight_BxHxQxT = jnp.exp(score_BxHxQxT - score_BxHxQxT.max(-1, keepdims=True))
    sum_BxQxHx1 = weight_BxHxQxT.sum(-1).swapaxes(1, 2)[..., None]
    weight_BxHxQxT = weight_BxHxQxT.astype(q_BxQxHxK.dtype)
    y_BxQxHxK = product("BHQT,BHTK->BQHK", weight_BxHxQxT, cache.v_BxHxTxK) / sum_BxQxHx1
    return y_BxQxHxK[:, :queries].astype(q_BxQxHxK.dtype)


class Attention(nnx.Module):
    """Multi-head attention with biases, as in GPT-2."""

    def __init__(self, model: ModelConfig, key: jax.Array):
        key_in, key_out = jax.random.split(key)
        width = model.d_model // model.heads
        std = model.init_std
        self.config = model
        self.w_qkv = normal(key_in, (model.d_model, 3, model.heads, width), std)
        self.b_qkv = nnx.Param(jnp.zeros((3, model.heads, width)))
        std_out = std / (2 * model.layers) ** 0.5
        self.w_out = normal(key_out, (model.heads, width, model.d_model), std_out)
        self.b_out = nnx.Param(jnp.zeros(model.d_model))

    def __call__(
        self,
        x_BxLxD: jax.Array,
        segments_BxL: jax.Array,
        cache: KVCache | None = None,
        position_BxL: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Returns the output [B, L, D] in x's dtype, and `cache` with these tokens.

        Args:
          x_BxLxD: normalised activations.
          segments_BxL: the document of each token, within which it attends; unused with a cache.
          cache: in decoding, the KV cache of earlier tokens.
          position_BxL: the tokens' positions in `cache`, in ascending order.
        """
        b_qkv, b_out = (p[...].astype(x_BxLxD.dtype) for p in (self.b_qkv, self.b_out))
        if cache is not None:
            qkv_BxLx3xHxK = matmul(x_BxLxD, self.w_qkv[...]) + b_qkv
            q, k, v = (qkv_BxLx3xHxK[:, :, i] for i in range(3))
            # Else XLA writes the new keys twice, once into a copy of the cache for the product.
            cache = jax.lax.optimization_barrier(cache.extended(k, v, position_BxL))
            y_BxLxHxK = attend_to_cache(q, cache, position_BxL)
            return matmul(y_BxLxHxK, self.w_out[...], axes=2) + b_out, cache
        w_qkv = self.w_qkv[...]
        q, k, v = (remat.save_matmul(matmul(x_BxLxD, w_qkv[:, i]) + b_qkv[i]) for i in range(3))
        implementation = resolve_attention(self.config, platform())
        y_BxLxHxK = attend(q, k, v, segments_BxL, implementation)
        return matmul(y_BxLxHxK, self.w_out[...], axes=2) + b_out, None
