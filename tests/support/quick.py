"""jit for tests, which compile much and run little; op by op a model compiles even more."""

import dataclasses
import functools

import jax

from prmoe_jax.config.schema import ExecutionConfig
from prmoe_jax.model.layerwise import dropless

jit = functools.partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)


@jit
def forward(model, tokens_BxL, segments_BxL):
    """A model's final activations [B, L, D] and logits [B, L, V]; nothing is dropped."""
    x_BxLxD, _ = dropless(model)(tokens_BxL, segments_BxL)
    return x_BxLxD, model.logits(x_BxLxD)


@functools.partial(jit, static_argnums=3, static_argnames="dispatch")
def routed(moe, x_BxLxD, valid_BxL, capacity_factor, keys_B=None, dispatch="gather"):
    """A MoE layer's output and metrics at a capacity factor."""
    moe = jax.tree.map(lambda x: x, moe)  # a copy
    factors = {"capacity_factor": capacity_factor, "eval_capacity_factor": capacity_factor}
    moe.moe = dataclasses.replace(moe.moe, **factors)
    return moe(x_BxLxD, valid_BxL, keys_B, execution=ExecutionConfig(dispatch=dispatch))
