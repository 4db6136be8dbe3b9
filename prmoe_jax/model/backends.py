"""Checks and logs which kernels of attention, dispatch and exchange a run will use."""

import logging

from jax.sharding import Mesh

from prmoe_jax.config.schema import Config
from prmoe_jax.model.attention_kernels import cudnn_refusal, resolve_attention
from prmoe_jax.model.transformer import resolve_remat
from prmoe_jax.moe import dispatch, exchange
from prmoe_jax.nn.precision import resolve_products
from prmoe_jax.parallel.axes import splits_experts

log = logging.getLogger(__name__)


def check_backends(config: Config, platform: str, mesh: Mesh) -> None:
    """Checks the settings that name kernels, and logs what each 'auto' resolves to.

    The layers resolve 'auto' in the same way when they are traced, for the mesh then in use.
    """
    execution = config.execution
    attention = resolve_attention(execution.attention, config.model, platform)
    found = platform, execution.attention, config.model.dtype, attention
    if found == ("gpu", "auto", "bfloat16", "xla"):
        log.info("cuDNN's attention cannot run this model (%s)", cudnn_refusal(config.model))
    used = dict.fromkeys(
        dispatch.resolve(execution.dispatch, platform, dropless) for dropless in (False, True)
    )
    backend = "/".join(used)  # with a capacity / dropless
    kept, _ = resolve_remat(execution.remat, config.model.layers, platform)
    log.info("attention: %s, MoE dispatch: %s, remat: %s (%s)", attention, backend, kept, platform)
    if platform == "cpu" and config.model.dtype == "bfloat16":
        products = resolve_products(execution.cpu_products)
        lacks = products == "float32" and execution.cpu_products == "auto"
        why = ": no AVX512-BF16 or AMX was found" if lacks else ""
        log.info("products in training: of %s (execution.cpu_products)%s", products, why)
    if mesh.size > 1:
        sizes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
        way = exchange.resolve(execution.exchange, mesh) if splits_experts(mesh) else "none"
        log.info("mesh: %s; exchange between experts: %s", sizes, way)
    if not config.causal:
        log.warning(
            "this router is not causal in evaluation: later tokens change earlier predictions, so "
            "the loss is not that of a language model (moe.router, moe.overflow)"
        )
