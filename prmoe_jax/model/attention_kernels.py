"""Attention kernels, and the choice among them by platform and shape.

Q and T: the queries of a block, and the keys that it reads.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)
from jax.sharding import PartitionSpec

from prmoe_jax.config.schema import ModelConfig
from prmoe_jax.errors import UserError
from prmoe_jax.nn import remat
from prmoe_jax.parallel.axes import batch_axes

# An einsum with a float32 result, whatever the operands' dtype.
product = partial(jnp.einsum, preferred_element_type=jnp.float32)

# Kernels that need a sequence length divisible by this number.
LENGTH_MULTIPLE = {"splash": 128, "cudnn": 2}


def attend(
    q_BxLxHxK,
    k_BxLxHxK,
    v_BxLxHxK,
    segments_BxL,
    implementation: str,
    window: int = 0,
    sinks_H: jax.Array | None = None,
) -> jax.Array:
    """softmax(q kᵀ / √K) v over each token and the earlier ones of its segment; [B, L, H, K].

    Keys and values may have J heads, fewer than H, each for H / J neighbouring heads of queries.
    With a window, a token attends to at most that many tokens, itself included. Sinks are one more
    score of each query, whose value is 0 (StreamingLLM, arXiv 2309.17453, section 3.3); cuDNN has
    none.

    Any L is allowed: sequences are padded at the end where the kernel needs it. No token attends to
    the padding.
    """
    length = segments_BxL.shape[1]
    padding = -length % LENGTH_MULTIPLE.get(implementation, 1)
    if padding:
        q, k, v, segments = (
            jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
            for x in (q_BxLxHxK, k_BxLxHxK, v_BxLxHxK, segments_BxL)
        )
        return attend(q, k, v, segments, implementation, window, sinks_H)[:, :length]
    if implementation in ("splash", "blocks"):
        sharing = q_BxLxHxK.shape[2] // k_BxLxHxK.shape[2]
        if sharing > 1:
            k_BxLxHxK, v_BxLxHxK = (jnp.repeat(x, sharing, 2) for x in (k_BxLxHxK, v_BxLxHxK))
        kernel = splash if implementation == "splash" else blocks
        return kernel(q_BxLxHxK, k_BxLxHxK, v_BxLxHxK, segments_BxL, window, sinks_H)
    same_Bx1xLxL = (segments_BxL[:, :, None] == segments_BxL[:, None, :])[:, None]
    if sinks_H is not None:
        return _with_sinks(q_BxLxHxK, k_BxLxHxK, v_BxLxHxK, same_Bx1xLxL, window, sinks_H)
    return jax.nn.dot_product_attention(  # type: ignore[call-overload]
        q_BxLxHxK,
        k_BxLxHxK,
        v_BxLxHxK,
        mask=same_Bx1xLxL,
        is_causal=True,
        local_window_size=(window - 1, 0) if window else None,
        implementation=implementation,
    )


def _with_sinks(q_BxLxHxK, k_BxLxHxK, v_BxLxHxK, same_Bx1xLxL, window: int, sinks_H) -> jax.Array:
    """XLA's attention to one more key and value of 0, whose scores are the sinks."""
    length = same_Bx1xLxL.shape[-1]
    before_LxL = jnp.arange(length)[:, None] - jnp.arange(length)
    seen_LxL = (before_LxL >= 0) & (before_LxL < (window or length))
    seen_Bx1xLxT = jnp.pad(same_Bx1xLxL & seen_LxL, [(0, 0)] * 3 + [(0, 1)], constant_values=True)
    k_BxTxHxK, v_BxTxHxK = (
        jnp.pad(x, [(0, 0), (0, 1), (0, 0), (0, 0)]) for x in (k_BxLxHxK, v_BxLxHxK)
    )
    sinks_1xHx1xT = jnp.pad(sinks_H[None, :, None, None], [(0, 0)] * 3 + [(length, 0)])
    return jax.nn.dot_product_attention(
        q_BxLxHxK, k_BxTxHxK, v_BxTxHxK, sinks_1xHx1xT, seen_Bx1xLxT, implementation="xla"
    )


def blocks(
    q_BxLxHxK, k_BxLxHxK, v_BxLxHxK, segments_BxL, window: int = 0, sinks_H=None
) -> jax.Array:
    """Causal attention by blocks of queries, for CPUs: a block reads only the keys up to its end.

    With a window, it also skips the keys before its first query's window. No scores are kept: the
    backward pass recomputes them by block, as in FlashAttention (arXiv 2205.14135).
    """
    heads_first = (x.swapaxes(1, 2) for x in (q_BxLxHxK, k_BxLxHxK, v_BxLxHxK))
    return _blocks(window, *heads_first, segments_BxL, sinks_H).swapaxes(1, 2)


def _query_blocks(length: int, window: int) -> list[tuple[slice, slice]]:
    """The queries of each block and the keys that they read; at most 16 blocks."""
    size = max(64, -(-length // 16))
    found = []
    for start in range(0, length, size):
        end = min(start + size, length)
        first = max(0, start + 1 - window) if window else 0
        found.append((slice(start, end), slice(first, end)))
    return found


def _scores(q_BxHxLxK, k_BxHxLxK, segments_BxL, rows: slice, keys: slice, window: int):
    """Scores [B, H, Q, T] of a block's queries with its keys, -inf where masked."""
    score_BxHxQxT = product("BHQK,BHTK->BHQT", q_BxHxLxK[:, :, rows], k_BxHxLxK[:, :, keys])
    seen_BxQxT = segments_BxL[:, rows, None] == segments_BxL[:, None, keys]
    query_Qx1 = jnp.arange(rows.start, rows.stop)[:, None]
    key_T = jnp.arange(keys.start, keys.stop)
    seen_BxQxT &= query_Qx1 >= key_T
    if window:
        seen_BxQxT &= query_Qx1 - key_T < window
    scale = q_BxHxLxK.shape[-1] ** -0.5
    return jnp.where(seen_BxQxT[:, None], score_BxHxQxT * scale, -jnp.inf)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocks(window: int, q_BxHxLxK, k_BxHxLxK, v_BxHxLxK, segments_BxL, sinks_H):
    return _blocks_forward(window, q_BxHxLxK, k_BxHxLxK, v_BxHxLxK, segments_BxL, sinks_H)[0]


def _blocks_forward(window: int, q_BxHxLxK, k_BxHxLxK, v_BxHxLxK, segments_BxL, sinks_H):
    outputs, log_sums = [], []
    for rows, keys in _query_blocks(q_BxHxLxK.shape[2], window):
        score_BxHxQxT = _scores(q_BxHxLxK, k_BxHxLxK, segments_BxL, rows, keys, window)
        highest_BxHxQx1 = score_BxHxQxT.max(-1, keepdims=True)
        if sinks_H is not None:
            highest_BxHxQx1 = jnp.maximum(highest_BxHxQx1, sinks_H[:, None, None])
        weight_BxHxQxT = jnp.exp(score_BxHxQxT - highest_BxHxQx1)
        sum_BxHxQx1 = weight_BxHxQxT.sum(-1, keepdims=True)
        if sinks_H is not None:
            sum_BxHxQx1 += jnp.exp(sinks_H[:, None, None] - highest_BxHxQx1)
        weight_BxHxQxT = weight_BxHxQxT.astype(v_BxHxLxK.dtype)
        y_BxHxQxK = product("BHQT,BHTK->BHQK", weight_BxHxQxT, v_BxHxLxK[:, :, keys])
        outputs.append((y_BxHxQxK / sum_BxHxQx1).astype(v_BxHxLxK.dtype))
        log_sums.append(highest_BxHxQx1 + jnp.log(sum_BxHxQx1))
    y_BxHxLxK = remat.save_matmul(jnp.concatenate(outputs, 2))
    log_sum_BxHxLx1 = remat.save_matmul(jnp.concatenate(log_sums, 2))
    given = q_BxHxLxK, k_BxHxLxK, v_BxHxLxK, segments_BxL, sinks_H
    return y_BxHxLxK, (*given, y_BxHxLxK, log_sum_BxHxLx1)


def _blocks_backward(window: int, kept, dy_BxHxLxK):
    q_BxHxLxK, k_BxHxLxK, v_BxHxLxK, segments_BxL, sinks_H, y_BxHxLxK, log_sum_BxHxLx1 = kept
    scale = q_BxHxLxK.shape[-1] ** -0.5
    dtype = q_BxHxLxK.dtype
    mean_BxHxLx1 = product("BHLK,BHLK->BHL", y_BxHxLxK, dy_BxHxLxK)[..., None]
    # Transposed once here, so that no product has to transpose its large scores. Without the
    # barriers, XLA would move the transposes into the products, and refuse some in bfloat16.
    barrier = jax.lax.optimization_barrier
    q_BxHxKxL, dy_BxHxKxL = barrier((q_BxHxLxK.mT, dy_BxHxLxK.mT))
    dq, dk_BxHxKxL, dv_BxHxKxL = [], jnp.zeros(q_BxHxKxL.shape), jnp.zeros(q_BxHxKxL.shape)
    for rows, keys in _query_blocks(q_BxHxLxK.shape[2], window):
        score_BxHxQxT = _scores(q_BxHxLxK, k_BxHxLxK, segments_BxL, rows, keys, window)
        weight_BxHxQxT = jnp.exp(score_BxHxQxT - log_sum_BxHxLx1[:, :, rows])
        dy_BxHxQxK = dy_BxHxLxK[:, :, rows]
        dweight_BxHxQxT = product("BHQK,BHTK->BHQT", dy_BxHxQxK, v_BxHxLxK[:, :, keys])
        dscore_BxHxQxT = weight_BxHxQxT * (dweight_BxHxQxT - mean_BxHxLx1[:, :, rows]) * scale
        weight_BxHxQxT, dscore_BxHxQxT = weight_BxHxQxT.astype(dtype), dscore_BxHxQxT.astype(dtype)
        dq.append(product("BHQT,BHTK->BHQK", dscore_BxHxQxT, k_BxHxLxK[:, :, keys]))
        dk_BxHxKxT = product("BHKQ,BHQT->BHKT", q_BxHxKxL[..., rows], dscore_BxHxQxT)
        dv_BxHxKxT = product("BHKQ,BHQT->BHKT", dy_BxHxKxL[..., rows], weight_BxHxQxT)
        dk_BxHxKxL = dk_BxHxKxL.at[..., keys].add(dk_BxHxKxT)
        dv_BxHxKxL = dv_BxHxKxL.at[..., keys].add(dv_BxHxKxT)
    dk_BxHxKxL, dv_BxHxKxL = barrier((dk_BxHxKxL, dv_BxHxKxL))
    gradients = jnp.concatenate(dq, 2), dk_BxHxKxL.mT, dv_BxHxKxL.mT
    dsinks_H = None
    if sinks_H is not None:
        weight_BxHxLx1 = jnp.exp(sinks_H[:, None, None] - log_sum_BxHxLx1)
        dsinks_H = -(weight_BxHxLx1 * mean_BxHxLx1).sum((0, 2, 3))
    return *(x.astype(dtype) for x in gradients), None, dsinks_H


_blocks.defvjp(_blocks_forward, _blocks_backward)


def splash(
    q_BxLxHxK, k_BxLxHxK, v_BxLxHxK, segments_BxL, window=0, sinks_H=None, interpret=False
) -> jax.Array:
    """JAX's Splash kernel for TPUs; each device computes its own part of the batch and heads.

    The length must be a multiple of 128.
    """
    mesh = jax.sharding.get_abstract_mesh()
    _, length, heads, width = q_BxLxHxK.shape
    if not mesh.empty:
        heads //= mesh.shape["tensor"]
    block = next(size for size in (512, 256, 128) if length % size == 0)
    mask: splash_attention_mask.Mask = splash_attention_mask.CausalMask((length, length))
    if window:
        mask = splash_attention_mask.LocalMask((length, length), (window - 1, 0), offset=0)
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * heads),
        block_sizes=splash_attention_kernel.BlockSizes(*(block,) * 8),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
        residual_checkpoint_name=remat.PRODUCT,
    )

    def sequence(q_LxHxK, k_LxHxK, v_LxHxK, segments_L, sinks_H):
        heads_first = (x.swapaxes(0, 1) for x in (q_LxHxK * width**-0.5, k_LxHxK, v_LxHxK))
        ids = splash_attention_kernel.SegmentIds(segments_L, segments_L)
        return kernel(*heads_first, segment_ids=ids, sinks=sinks_H).swapaxes(0, 1)

    batched = jax.vmap(sequence, (0, 0, 0, 0, None))
    if not mesh.empty:
        # XLA can't partition a kernel, so shard_map does.
        rows = PartitionSpec(batch_axes(mesh))
        heads = PartitionSpec(batch_axes(mesh), None, "tensor")
        batched = jax.shard_map(
            batched,
            in_specs=(heads, heads, heads, rows, PartitionSpec("tensor")),
            out_specs=heads,
            check_vma=False,
        )
    return batched(q_BxLxHxK, k_BxLxHxK, v_BxLxHxK, segments_BxL, sinks_H)


def resolve_attention(name: str, model: ModelConfig, platform: str) -> str:
    """Resolves `execution.attention` to an implementation; 'auto' chooses by platform and shape."""
    splash_fits = model.length % LENGTH_MULTIPLE["splash"] == 0
    if name == "auto":
        if platform == "tpu" and splash_fits:
            return "splash"
        if platform == "gpu" and model.dtype == "bfloat16" and not cudnn_refusal(model):
            return "cudnn"
        return "blocks" if platform == "cpu" else "xla"
    needed = {"splash": "tpu", "cudnn": "gpu"}.get(name, platform)
    if needed != platform:
        raise UserError(
            f"execution.attention={name} needs a {needed}, this is a {platform}; use auto"
        )
    if name == "splash" and not splash_fits:
        raise UserError(
            f"execution.attention=splash needs model.length={model.length} divisible by 128; use "
            f"{-(-model.length // 128) * 128} or attention=xla"
        )
    if name == "cudnn" and (refusal := cudnn_refusal(model)):
        raise UserError(
            f"execution.attention=cudnn cannot run model.length={model.length} with heads of "
            f"{model.head_width}: {refusal}; use auto"
        )
    return name


def cudnn_refusal(model: ModelConfig) -> str:
    """Returns why cuDNN's attention cannot train this model here, or '' if it can.

    JAX checks shapes and dtypes when it traces the kernel, so tracing the gradient is enough.
    """
    if model.attention_sinks != "none":
        return "it has no attention sinks"
    shape = 1, model.length, model.heads, model.head_width
    q_BxLxHxK = jax.ShapeDtypeStruct(shape, model.dtype)
    k_BxLxJxK = jax.ShapeDtypeStruct((*shape[:2], model.key_heads, shape[3]), model.dtype)
    segments_BxL = jax.ShapeDtypeStruct(shape[:2], jnp.int32)

    def total(q_BxLxHxK, k_BxLxJxK, segments_BxL):
        given = q_BxLxHxK, k_BxLxJxK, k_BxLxJxK, segments_BxL
        return attend(*given, "cudnn", model.sliding_window).astype(jnp.float32).sum()

    try:
        jax.eval_shape(jax.grad(total), q_BxLxHxK, k_BxLxJxK, segments_BxL)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        return " ".join(str(error).split()).rstrip(".")
    capability = getattr(jax.local_devices()[0], "compute_capability", "8.0")
    if float(capability) < 8:
        return f"it needs compute capability 8.0, this GPU has {capability}"
    return ""
