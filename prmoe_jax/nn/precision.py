"""The dtypes of a forward pass: of the factors of matrix products, and of all between products.

On TPUs and GPUs both are `model.dtype`. CPUs are slow at elementwise work in bfloat16, so there all
between products is float32. For `model.dtype=bfloat16`, products in training then have bfloat16
factors and float32 results, as in a TPU's matrix unit.
"""

import functools
import pathlib
from typing import NamedTuple

import jax.numpy as jnp

from prmoe_jax.config.schema import ExecutionConfig


class Precision(NamedTuple):
    """The dtypes of a forward pass."""

    factors: jnp.dtype  # of products with weights and in attention
    activations: jnp.dtype

    @classmethod
    def of(
        cls, dtype: str, execution: ExecutionConfig, platform: str, training: bool
    ) -> "Precision":
        """The dtypes for a `model.dtype` on a platform."""
        if platform != "cpu":
            return cls(jnp.dtype(dtype), jnp.dtype(dtype))
        if not training or resolve_products(execution.cpu_products) == "float32":
            dtype = "float32"
        return cls(jnp.dtype(dtype), jnp.dtype("float32"))


def resolve_products(name: str) -> str:
    """Resolves `execution.cpu_products` on this machine."""
    if name != "auto":
        return name
    return "bfloat16" if multiplies_bfloat16() else "float32"


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether Linux says that this CPU has instructions for products of bfloat16."""
    try:
        words = pathlib.Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(words)
