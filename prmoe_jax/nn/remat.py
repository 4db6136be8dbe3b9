"""Rematerialisation: marks the values of the forward pass to keep for the backward pass."""

import jax
from jax.ad_checkpoint import checkpoint_name

EXCHANGED = "exchanged"  # received from other devices
PRODUCT = "product"  # result of a matrix product or an attention kernel

_named = jax.checkpoint_policies.save_only_these_names
# `execution.remat` -> the values that are kept; all others are recomputed.
POLICIES = {"dots": _named(PRODUCT, EXCHANGED), "full": _named(EXCHANGED)}


def save_matmul(x: jax.Array) -> jax.Array:
    """Marks a matrix product to keep. Add its bias first, so that the addition isn't recomputed."""
    return checkpoint_name(x, PRODUCT)


def save_collective(x):
    """Marks values received from other devices to keep, so that no exchange is repeated."""
    return checkpoint_name(x, EXCHANGED)
