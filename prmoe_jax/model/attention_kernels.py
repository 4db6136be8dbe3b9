"""Attention's kernels, and the choice among them by platform and shape."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)
from jax.sharding import PartitionSpec

from prmoe_jax.config import ModelConfig
from prmoe_jax.errors import UserError
from prmoe_jax.nn import remat
from prmoe_jax.parallel.mesh import batch_axes

# An einsum in float32, whatever its factors are.
product = partial(jnp.einsum, preferred_element_type=jnp.float32)

# A kernel accepts only multiples of this length.
LENGTH_MULTIPLE = {"splash": 128, "cudnn": 2}


def attend(q_BxLxHxK, k_BxLxHxK, v_BxLxHxK, segments_BxL, implementation: str) -> jax.Array:
    """softmax(q kᵀ / √K) v over each token and the earlier ones of its segment; [B, L, H, K].

    L may be any length: if the kernel accepts multiples only, sequences are padded at the end, to
    which none of their tokens attends.
    """
    length = segments_BxL.shape[1]
    padding = -length % LENGTH_MULTIPLE.get(implementation, 1)
    if padding:
        q, k, v, segments = (
            jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
            for x in (q_BxLxHxK, k_BxLxHxK, v_BxLxHxK, segments_BxL)
        )
        return attend(q, k, v, segments, implementation)[:, :length]
    if implementation == "splash":
        return splash(q_BxLxHxK, k_BxLxHxK, v_BxLxHxK, segments_BxL)
    if implementation == "blocks":
        return blocks(q_BxLxHxK, k_BxLxHxK, v_BxLxHxK, segments_BxL)
    same_Bx1xLxL = (segments_BxL[:, :, None] == segments_BxL[:, None, :])[:, None]
    return jax.nn.dot_product_attention(
        q_BxLxHxK,
        k_BxLxHxK,
        v_BxLxHxK,
        mask=same_Bx1xLxL,
        is_causal=True,
        implementation=implementation,
    )


def blocks(q_BxLxHxK, k_BxLxHxK, v_BxLxHxK, segments_BxL) -> jax.Array:
    """A triangle of query blocks for CPUs: each block meets only the keys up to its end.

    Scores are never made for the upper half of the square of queries and keys, and never kept: the
    backward pass makes a block's scores again, as in FlashAttention (arXiv 2205.14135).
    """
    heads_first = (x.swapaxes(1, 2) for x in (q_BxLxHxK, k_BxLxHxK, v_BxLxHxK))
    return _blocks(*heads_first, segments_BxL).swapaxes(1, 2)


def _query_blocks(length: int) -> list[tuple[int, int]]:
    """First and last + 1 position of each block of queries, at most 16 blocks."""
    size = max(64, -(-length // 16))
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _scores(q_BxHxQxK, k_BxHxTxK, segments_BxL, start: int, end: int) -> jax.Array:
    """Scores of the queries from `start` to `end` with all keys before `end`, -inf where masked."""
    score_BxHxQxT = product("BHQK,BHTK->BHQT", q_BxHxQxK[:, :, start:end], k_BxHxTxK[:, :, :end])
    same_BxQxT = segments_BxL[:, start:end, None] == segments_BxL[:, None, :end]
    causal_QxT = jnp.arange(start, end)[:, None] >= jnp.arange(end)
    scale = q_BxHxQxK.shape[-1] ** -0.5
    return jnp.where((same_BxQxT & causal_QxT)[:, None], score_BxHxQxT * scale, -jnp.inf)


@jax.custom_vjp
def _blocks(q_BxHxLxK, k_BxHxLxK, v_BxHxLxK, segments_BxL):
    return _blocks_forward(q_BxHxLxK, k_BxHxLxK, v_BxHxLxK, segments_BxL)[0]


def _blocks_forward(q_BxHxLxK, k_BxHxLxK, v_BxHxLxK, segments_BxL):
    outputs, log_sums = [], []
    for start, end in _query_blocks(q_BxHxLxK.shape[2]):
        score_BxHxQxT = _scores(q_BxHxLxK, k_BxHxLxK, segments_BxL, start, end)
        highest_BxHxQx1 = score_BxHxQxT.max(-1, keepdims=True)
        weight_BxHxQxT = jnp.exp(score_BxHxQxT - highest_BxHxQx1)
        sum_BxHxQx1 = weight_BxHxQxT.sum(-1, keepdims=True)
        weight_BxHxQxT = weight_BxHxQxT.astype(v_BxHxLxK.dtype)
        y_BxHxQxK = product("BHQT,BHTK->BHQK", weight_BxHxQxT, v_BxHxLxK[:, :, :end])
        outputs.append((y_BxHxQxK / sum_BxHxQx1).astype(v_BxHxLxK.dtype))
        log_sums.append(highest_BxHxQx1 + jnp.log(sum_BxHxQx1))
    y_BxHxLxK = remat.save_matmul(jnp.concatenate(outputs, 2))
    log_sum_BxHxLx1 = remat.save_matmul(jnp.concatenate(log_sums, 2))
    return y_BxHxLxK, (q_BxHxLxK, k_BxHxLxK, v_BxHxLxK, segments_BxL, y_BxHxLxK, log_sum_BxHxLx1)


def _blocks_backward(kept, dy_BxHxLxK):
    q_BxHxLxK, k_BxHxLxK, v_BxHxLxK, segments_BxL, y_BxHxLxK, log_sum_BxHxLx1 = kept
    scale = q_BxHxLxK.shape[-1] ** -0.5
    dtype = q_BxHxLxK.dtype
    mean_BxHxLx1 = product("BHLK,BHLK->BHL", y_BxHxLxK, dy_BxHxLxK)[..., None]
    # Transposed once here, so that no product has to transpose its large scores. Without the
    # barriers, XLA would move the transpositions into the products, and refuse some in bfloat16.
    barrier = jax.lax.optimization_barrier
    q_BxHxKxL, dy_BxHxKxL = barrier((q_BxHxLxK.mT, dy_BxHxLxK.mT))
    dq, dk_BxHxKxL, dv_BxHxKxL = [], jnp.zeros(q_BxHxKxL.shape), jnp.zeros(q_BxHxKxL.shape)
    for start, end in _query_blocks(q_BxHxLxK.shape[2]):
        rows = slice(start, end)
        score_BxHxQxT = _scores(q_BxHxLxK, k_BxHxLxK, segments_BxL, start, end)
        weight_BxHxQxT = jnp.exp(score_BxHxQxT - log_sum_BxHxLx1[:, :, rows])
        dy_BxHxQxK = dy_BxHxLxK[:, :, rows]
        dweight_BxHxQxT = product("BHQK,BHTK->BHQT", dy_BxHxQxK, v_BxHxLxK[:, :, :end])
        dscore_BxHxQxT = weight_BxHxQxT * (dweight_BxHxQxT - mean_BxHxLx1[:, :, rows]) * scale
        weight_BxHxQxT, dscore_BxHxQxT = weight_BxHxQxT.astype(dtype), dscore_BxHxQxT.astype(dtype)
        dq.append(product("BHQT,BHTK->BHQK", dscore_BxHxQxT, k_BxHxLxK[:, :, :end]))
        dk_BxHxKxT = product("BHKQ,BHQT->BHKT", q_BxHxKxL[..., rows], dscore_BxHxQxT)
        dv_BxHxKxT = product("BHKQ,BHQT->BHKT", dy_BxHxKxL[..., rows], weight_BxHxQxT)
        dk_BxHxKxL = dk_BxHxKxL.at[..., :end].add(dk_BxHxKxT)
        dv_BxHxKxL = dv_BxHxKxL.at[..., :end].add(dv_BxHxKxT)
    dk_BxHxKxL, dv_BxHxKxL = barrier((dk_BxHxKxL, dv_BxHxKxL))
    gradients = jnp.concatenate(dq, 2), dk_BxHxKxL.mT, dv_BxHxKxL.mT
    return *(x.astype(dtype) for x in gradients), None


_blocks.defvjp(_blocks_forward, _blocks_backward)


def splash(q_BxLxHxK, k_BxLxHxK, v_BxLxHxK, segments_BxL, interpret: bool = False) -> jax.Array:
    """The TPU's blockwise kernel; each device attends over its own part of the batch and heads.

    The length must be a multiple of 128.
    """
    mesh = jax.sharding.get_abstract_mesh()
    _, length, heads, width = q_BxLxHxK.shape
    if not mesh.empty:
        heads //= mesh.shape["tensor"]
    block = next(size for size in (512, 256, 128) if length % size == 0)
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask(
            [splash_attention_mask.CausalMask((length, length))] * heads
        ),
        block_sizes=splash_attention_kernel.BlockSizes(*(block,) * 8),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
        residual_checkpoint_name=remat.PRODUCT,
    )

    def sequence(q_LxHxK, k_LxHxK, v_LxHxK, segments_L):
        heads_first = (x.swapaxes(0, 1) for x in (q_LxHxK * width**-0.5, k_LxHxK, v_LxHxK))
        ids = splash_attention_kernel.SegmentIds(segments_L, segments_L)
        return kernel(*heads_first, segment_ids=ids).swapaxes(0, 1)

    batched = jax.vmap(sequence)
    if not mesh.empty:
        # The partitioner can't split a kernel, so its partition is given explicitly.
        rows = PartitionSpec(batch_axes(mesh))
        heads = PartitionSpec(batch_axes(mesh), None, "tensor")
        batched = jax.shard_map(
            batched, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False
        )
    return batched(q_BxLxHxK, k_BxLxHxK, v_BxLxHxK, segments_BxL)


def resolve_attention(model: ModelConfig, platform: str) -> str:
    """Resolves `model.attention` to an implementation; 'auto' chooses by platform and shape.

    Raises:
      UserError: the named implementation cannot run on this platform or at these sizes.
    """
    splash_fits = model.length % LENGTH_MULTIPLE["splash"] == 0
    if model.attention == "auto":
        if platform == "tpu" and splash_fits:
            return "splash"
        if platform == "gpu" and model.dtype == "bfloat16" and not cudnn_refusal(model):
            return "cudnn"
        return "blocks" if platform == "cpu" else "xla"
    needed = {"splash": "tpu", "cudnn": "gpu"}.get(model.attention, platform)
    if needed != platform:
        raise UserError(
            f"model.attention={model.attention} needs a {needed}, this is a {platform}; use auto"
        )
    if model.attention == "splash" and not splash_fits:
        raise UserError(
            f"model.attention=splash needs model.length={model.length} divisible by 128; use "
            f"{-(-model.length // 128) * 128} or attention=xla"
        )
    if model.attention == "cudnn" and (refusal := cudnn_refusal(model)):
        raise UserError(
            f"model.attention=cudnn cannot run model.length={model.length} with heads of "
            f"{model.d_model // model.heads} (model.d_model / model.heads): {refusal}; use auto"
        )
    return model.attention


def cudnn_refusal(model: ModelConfig) -> str:
    """Returns why cuDNN's attention cannot train this model here, or '' if it can.

    JAX checks shapes and dtypes when it traces the kernel, so tracing the gradient is enough.
    """
    shape = 1, model.length, model.heads, model.d_model // model.heads
    q_BxLxHxK = jax.ShapeDtypeStruct(shape, model.dtype)
    segments_BxL = jax.ShapeDtypeStruct(shape[:2], jnp.int32)

    def total(q_BxLxHxK, segments_BxL):
        q = k = v = q_BxLxHxK
        return attend(q, k, v, segments_BxL, "cudnn").astype(jnp.float32).sum()

    try:
        jax.eval_shape(jax.grad(total), q_BxLxHxK, segments_BxL)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        return " ".join(str(error).split()).rstrip(".")
    capability = getattr(jax.local_devices()[0], "compute_capability", "8.0")
    if float(capability) < 8:
        return f"it needs compute capability 8.0, this GPU has {capability}"
    return ""
