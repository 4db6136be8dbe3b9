"""Chooses the kernels of attention, dispatch and exchange for this platform and mesh."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from prmoe_jax.config import Config, ModelConfig
from prmoe_jax.errors import UserError
from prmoe_jax.model.attention import LENGTH_MULTIPLE, attend
from prmoe_jax.moe import dispatch

log = logging.getLogger(__name__)


def resolve_backends(config: Config, platform: str, mesh: Mesh | None = None) -> Config:
    """Replaces every 'auto' by the choice for this platform and mesh, and logs it.

    Raises:
      UserError: this platform or mesh cannot run a kernel or backend that the config names.
    """
    attention = resolve_attention(config.model, platform)
    axes = {} if mesh is None else {name: n for name, n in mesh.shape.items() if n > 1}
    spread = axes.keys() - {"data", "fsdp"} != set()
    backend = dispatch.resolve(config.moe.dispatch, platform, spread)
    exchange = config.moe.exchange
    if exchange == "auto":
        exchange = "coordinated" if "tensor" in axes else "flat"
    log.info("attention: %s, MoE dispatch: %s (%s)", attention, backend, platform)
    if axes:
        text = ", ".join(f"{name} {size}" for name, size in axes.items())
        log.info("mesh: %s; exchange between experts: %s", text, exchange if spread else "none")
    if not config.causal:
        log.warning(
            "this router is not causal in evaluation: later tokens change earlier predictions, so "
            "the loss is not that of a language model (moe.router, moe.overflow)"
        )
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, attention=attention),
        moe=dataclasses.replace(config.moe, dispatch=backend, exchange=exchange),
    )


def resolve_attention(model: ModelConfig, platform: str) -> str:
    """Resolves `model.attention` to an implementation; 'auto' chooses by platform and shape.

    Raises:
      UserError: the named implementation cannot run on this platform or at these sizes.
    """
    splash_fits = model.length % LENGTH_MULTIPLE["splash"] == 0
    if model.attention == "auto":
        if platform == "tpu" and splash_fits:
            return "splash"
        if platform == "gpu" and model.dtype == "bfloat16":
            refusal = _cudnn_refusal(model)
            if not refusal:
                return "cudnn"
            log.info("cuDNN's attention cannot run this model (%s)", refusal)
        return "xla"
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
    if model.attention == "cudnn" and (refusal := _cudnn_refusal(model)):
        raise UserError(
            f"model.attention=cudnn cannot run model.length={model.length} with heads of "
            f"{model.d_model // model.heads} (model.d_model / model.heads): {refusal}; use auto"
        )
    return model.attention


def _cudnn_refusal(model: ModelConfig) -> str:
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
