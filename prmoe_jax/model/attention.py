"""Causal self-attention within documents, and the KV cache of decoding.

N: query heads per key head, or projections in one weight. R: queries that share a key head. F: the
pairs of a head's dimensions that rotate, K/2 at most.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from prmoe_jax.config.schema import AUTO, ExecutionConfig, ModelConfig
from prmoe_jax.model.attention_kernels import attend, product, resolve_attention
from prmoe_jax.nn import remat
from prmoe_jax.nn.matmul import matmul
from prmoe_jax.nn.mlp import add_bias
from prmoe_jax.nn.norms import HeadsRMSNorm, RMSNorm
from prmoe_jax.nn.parameters import normal
from prmoe_jax.nn.quantized import to_dtype
from prmoe_jax.parallel.axes import platform

TPU_ROWS = 8  # rows of a tile


class KVCache(NamedTuple):
    """Keys and values of earlier tokens, in the order that CPU matmuls read them."""

    k_BxHxKxT: jax.Array
    v_BxHxTxK: jax.Array

    @classmethod
    def empty(cls, batch: int, heads: int, width: int, room: int, dtype) -> "KVCache":
        """An empty cache with a maximum length of `room` tokens."""
        shapes = (batch, heads, width, room), (batch, heads, room, width)
        return cls(*(jnp.zeros(shape, dtype) for shape in shapes))

    def extended(self, k_BxQxHxK, v_BxQxHxK, position_BxQ: jax.Array) -> "KVCache":
        """The cache with more tokens at their positions; tokens past its end are dropped."""
        row_Bx1 = jnp.arange(len(position_BxQ))[:, None]
        if platform() != "tpu":
            return KVCache(
                self.k_BxHxKxT.at[row_Bx1, :, :, position_BxQ].set(k_BxQxHxK),
                self.v_BxHxTxK.at[row_Bx1, :, position_BxQ].set(v_BxQxHxK),
            )
        # Indexing heads as well makes the compiler keep the keys of each head together. Heads come
        # first, as in the product that the new keys and values come from: it needs no copy.
        head_Hx1x1 = jnp.arange(k_BxQxHxK.shape[2])[:, None, None]
        k_HxBxQxK, v_HxBxQxK = (jnp.moveaxis(x, 2, 0) for x in (k_BxQxHxK, v_BxQxHxK))
        return KVCache(
            self.k_BxHxKxT.at[row_Bx1, head_Hx1x1, :, position_BxQ].set(k_HxBxQxK),
            self.v_BxHxTxK.at[row_Bx1, head_Hx1x1, position_BxQ].set(v_HxBxQxK),
        )


def attend_to_cache(
    q_BxQxHxK, cache: KVCache, position_BxQ, window: int = 0, sinks_H: jax.Array | None = None
) -> jax.Array:
    """softmax(q kᵀ / √K) v over the keys up to each query's position; [B, Q, H, K].

    With J key heads, fewer than H, the N = H / J query heads of a key head are rows of one product.
    With a window, a query attends only to that many keys, its own included. Sinks are one more
    score of each query, whose value is 0.

    On TPUs, a single query is repeated to at least eight rows, which the matrix unit multiplies in
    the time of one. A single row would go to the vector unit, which takes three times as long.
    """
    batch, queries, heads, width = q_BxQxHxK.shape
    key_heads = cache.k_BxHxKxT.shape[1]
    rows = queries * (heads // key_heads)
    q_BxRxJxK = q_BxQxHxK
    if key_heads < heads:
        q_BxQxJxNxK = q_BxQxHxK.reshape(batch, queries, key_heads, -1, width)
        q_BxRxJxK = q_BxQxJxNxK.swapaxes(2, 3).reshape(batch, rows, key_heads, width)
        if queries > 1:  # one position broadcasts to all rows
            position_BxQ = jnp.repeat(position_BxQ, heads // key_heads, axis=1)
    copies = -(-TPU_ROWS // rows) if queries == 1 and platform() == "tpu" else 1
    if copies > 1:
        q_BxRxJxK = jnp.repeat(q_BxRxJxK, copies, axis=1)
    score_BxJxRxT = product("BRJK,BJKT->BJRT", q_BxRxJxK, cache.k_BxHxKxT) * width**-0.5
    place_T = jnp.arange(cache.k_BxHxKxT.shape[-1])
    seen_BxRxT = place_T <= position_BxQ[..., None]
    if window:
        seen_BxRxT &= place_T > position_BxQ[..., None] - window
    score_BxJxRxT = jnp.where(seen_BxRxT[:, None], score_BxJxRxT, -jnp.inf)
    highest_BxJxRx1 = score_BxJxRxT.max(-1, keepdims=True)
    if sinks_H is not None:
        sinks_JxR = jnp.tile(sinks_H.reshape(key_heads, -1), (1, queries))
        sinks_JxRx1 = jnp.repeat(sinks_JxR, copies, axis=1)[..., None]
        highest_BxJxRx1 = jnp.maximum(highest_BxJxRx1, sinks_JxRx1)
    weight_BxJxRxT = jnp.exp(score_BxJxRxT - highest_BxJxRx1)
    sum_BxJxR = weight_BxJxRxT.sum(-1)
    if sinks_H is not None:
        sum_BxJxR += jnp.exp(sinks_JxRx1 - highest_BxJxRx1)[..., 0]
    sum_BxRxJx1 = sum_BxJxR.swapaxes(1, 2)[..., None]
    weight_BxJxRxT = weight_BxJxRxT.astype(q_BxQxHxK.dtype)
    y_BxRxJxK = product("BJRT,BJTK->BRJK", weight_BxJxRxT, cache.v_BxHxTxK) / sum_BxRxJx1
    y_BxRxJxK = y_BxRxJxK[:, ::copies].astype(q_BxQxHxK.dtype)
    if key_heads < heads:
        y_BxRxJxK = y_BxRxJxK.reshape(batch, queries, -1, key_heads, width).swapaxes(2, 3)
    return y_BxRxJxK.reshape(q_BxQxHxK.shape)


def rotary_frequencies(model: ModelConfig) -> jax.Array:
    """The frequencies [F] of rotary positions, in radians per position.

    `model.rope_scaling` divides a frequency by its factor if fewer than `low` periods fit into the
    original length, and keeps it if more than `high` fit. Llama 3.1 (arXiv 2407.21783) interpolates
    between both by the number of periods, YaRN by the index of the pair.
    """
    pairs = model.rotary_width // 2
    turns_F = model.rope_theta ** (-jnp.arange(pairs, dtype=jnp.float32) / pairs)
    if not model.rope_scaling:
        return turns_F
    factor, low, high, length = model.rope_scaling
    if model.rope_type == "yarn":
        kept_F = _yarn_kept(model)
    else:
        waves_F = length * turns_F / (2 * jnp.pi)  # periods in the original length
        kept_F = jnp.clip((waves_F - low) / (high - low), 0, 1)
    return turns_F * (kept_F + (1 - kept_F) / factor)


def _yarn_kept(model: ModelConfig) -> jax.Array:
    """The share [F] of each frequency that YaRN keeps (arXiv 2309.00071, section 3.2).

    It is 1 up to the pair of which `high` periods fit into the original length, 0 from the pair of
    which `low` fit, and linear in the index between both.
    """
    _, low, high, length = model.rope_scaling
    pairs, width = model.rotary_width // 2, model.rotary_width
    first, last = (
        pairs * math.log(length / (2 * math.pi * periods)) / math.log(model.rope_theta)
        for periods in (high, low)
    )
    if model.rope_truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)  # as transformers, not `pairs - 1`
    return 1 - jnp.clip((jnp.arange(pairs) - first) / (last - first or 1e-3), 0, 1)


def rotate(
    x_BxLxHxK: jax.Array, position_BxL: jax.Array, turns_F: jax.Array, scale: float = 1.0
) -> jax.Array:
    """Rotates pairs of a head's dimensions by angles that grow with the position (RoFormer).

    Dimensions i and F + i are a pair, and multiplied by `scale`. Dimensions from 2F on, if there
    are any, stay as they are.
    """
    pairs = len(turns_F)
    angle_BxLx1xF = (position_BxL[..., None].astype(jnp.float32) * turns_F)[:, :, None]
    cos, sin = jnp.cos(angle_BxLx1xF) * scale, jnp.sin(angle_BxLx1xF) * scale
    splits = pairs, 2 * pairs
    first, second, rest = jnp.split(x_BxLxHxK.astype(jnp.float32), splits, axis=-1)
    turned = first * cos - second * sin, second * cos + first * sin, rest
    return jnp.concatenate(turned, -1).astype(x_BxLxHxK.dtype)


class Attention(nnx.Module):
    """Multi-head or grouped-query attention, as the config says, with a layer's window."""

    def __init__(self, model: ModelConfig, window: int, key: jax.Array):
        key_in, key_out = jax.random.split(key)
        std = model.init_std
        heads, key_heads, width = model.heads, model.key_heads, model.head_width
        self.config, self.window = model, window

        def maps(number: int, *shape: int) -> tuple[nnx.Param | None, nnx.Param | None]:
            """The weight of one or several projections, and their bias or None."""
            key = jax.random.fold_in(key_in, number) if grouped else key_in
            weight = normal(key, (model.d_model, *shape), std)
            return weight, None if model.biases == "none" else nnx.Param(jnp.zeros(shape))

        # One weight for queries, keys and values; with fewer key heads, queries have their own.
        grouped = key_heads < heads
        none: tuple[nnx.Param | None, nnx.Param | None] = None, None
        self.w_qkv, self.b_qkv = none if grouped else maps(0, 3, heads, width)
        self.w_q, self.b_q = maps(0, heads, width) if grouped else none
        self.w_kv, self.b_kv = maps(1, 2, key_heads, width) if grouped else none
        self.q_norm, self.k_norm = (_qk_norm(model, number) for number in (heads, key_heads))
        sinks = model.attention_sinks == "learned"
        self.sinks = nnx.Param(jnp.zeros(heads)) if sinks else None
        self.w_out = normal(key_out, (heads, width, model.d_model), model.output_std)
        biased = model.biases in ("all", "every")
        self.b_out = nnx.Param(jnp.zeros(model.d_model)) if biased else None

    def __call__(
        self,
        x_BxLxD: jax.Array,
        segments_BxL: jax.Array,
        cache: KVCache | None = None,
        position_BxL: jax.Array | None = None,
        execution: ExecutionConfig = AUTO,
    ) -> tuple[jax.Array, KVCache | None]:
        """Returns the output [B, L, D] in x's dtype, and `cache` with these tokens.

        Args:
          x_BxLxD: normalised activations.
          segments_BxL: the document of each token, within which it attends; unused with a cache.
          cache: in decoding, the KV cache of earlier tokens.
          position_BxL: the tokens' positions in their document, ascending; with a cache, they are
            also the tokens' indices in it.
        """
        q, k, v = self._project(x_BxLxD, decoding=cache is not None)
        sinks_H = None if self.sinks is None else self.sinks[...]
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if clip := self.config.clip_qkv:
            q, k, v = (jnp.clip(x, -clip, clip) for x in (q, k, v))
        if self.config.positions == "rotary":
            turns_F, scale = rotary_frequencies(self.config), self.config.rotary_scale
            q, k = (rotate(x, position_BxL, turns_F, scale) for x in (q, k))
        if cache is not None:
            # Without the barrier, XLA also writes the new keys into a copy of the cache.
            cache = jax.lax.optimization_barrier(cache.extended(k, v, position_BxL))
            y = attend_to_cache(q, cache, position_BxL, self.window, sinks_H)
        else:
            implementation = resolve_attention(execution.attention, self.config, platform())
            # Between products, activations may have more bits than weights (`nn/precision.py`).
            q, k, v = (to_dtype(x, self.w_out[...].dtype) for x in (q, k, v))
            y = attend(q, k, v, segments_BxL, implementation, self.window, sinks_H)
            y = y.astype(x_BxLxD.dtype)
        return add_bias(matmul(y, self.w_out[...], axes=2), self.b_out), cache

    def _project(self, x_BxLxD: jax.Array, decoding: bool) -> list[jax.Array]:
        """Queries [B, L, H, K], keys and values."""
        if self.w_qkv is not None:
            return _parts(x_BxLxD, self.w_qkv, self.b_qkv, decoding)
        q = remat.save_matmul(add_bias(matmul(x_BxLxD, self.w_q[...]), self.b_q))
        return [q, *_parts(x_BxLxD, self.w_kv, self.b_kv, decoding)]


def _qk_norm(model: ModelConfig, heads: int) -> RMSNorm | HeadsRMSNorm | None:
    """The norm of queries or keys, by `model.qk_norm`."""
    eps, width = model.norm_eps, model.head_width
    if model.qk_norm == "none":
        return None
    return RMSNorm(width, eps) if model.qk_norm == "head" else HeadsRMSNorm(heads, width, eps)


def _parts(x_BxLxD, w_DxNxHxK, b_NxHxK, decoding: bool) -> list[jax.Array]:
    """Applies the N projections of one weight to x; in decoding, with a single product."""
    w_DxNxHxK = w_DxNxHxK[...]
    if decoding:
        y_BxLxNxHxK = add_bias(matmul(x_BxLxD, w_DxNxHxK), b_NxHxK)
        return [y_BxLxNxHxK[:, :, i] for i in range(y_BxLxNxHxK.shape[2])]
    products = (matmul(x_BxLxD, w_DxNxHxK[:, i]) for i in range(w_DxNxHxK.shape[1]))
    biases = [None] * w_DxNxHxK.shape[1] if b_NxHxK is None else b_NxHxK[...]
    return [remat.save_matmul(add_bias(y, b)) for y, b in zip(products, biases, strict=True)]
