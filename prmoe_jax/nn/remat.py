"""Rematerialisation: which values of the forward pass the backward pass finds kept, by name."""

import jax
from jax.ad_checkpoint import checkpoint_name

EXCHANGED = "exchanged"  # sent by other devices
PRODUCT = "product"  # made by a matrix product or an attention kernel

_named = jax.checkpoint_policies.save_only_these_names
# `model.remat` -> what is kept; everything else is computed again.
POLICIES = {"dots": _named(PRODUCT, EXCHANGED), "full": _named(EXCHANGED)}


def save_matmul(x: jax.Array) -> jax.Array:
    """Marks what a matrix product made, its bias added: keeping the sum spares an addition."""
    return checkpoint_name(x, PRODUCT)


def save_collective(x: jax.Array) -> jax.Array:
    """Marks what other devices sent, so that no exchange is repeated."""
    return checkpoint_name(x, EXCHANGED)
