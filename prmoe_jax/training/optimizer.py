"""AdamW or Muon with a schedule in tokens; `nn/parameters.py` declares which applies where."""

import math

import jax
import jax.numpy as jnp
import optax

from prmoe_jax.config.schema import Config
from prmoe_jax.nn.parameters import declaration, map_named
from prmoe_jax.training.muon import muon

# Least bytes per parameter: its float32 value, and two moments with AdamW or one with Muon.
# (Muon leaves embeddings and vectors to AdamW, so that a model needs more.)
STATE_BYTES = {"adamw": 12, "muon": 8}


def decay_mask(params):
    """A tree of bools: True for parameters to which weight decay applies.

    Raises:
      KeyError: a parameter is not declared.
    """
    return map_named(lambda name, _: declaration(name).decays, params)


def learning_rate(config: Config):
    """A function from an update's 0-based step to its learning rate.

    After a linear warm-up, the rate falls to the minimum along a cosine (`cosine`), or linearly
    after a constant part (`wsd`). The schedule is in tokens: those seen at a step's end count.
    """
    settings = config.optimizer
    warmup = settings.warmup_tokens / config.tokens_per_step
    end = settings.decay_tokens / config.tokens_per_step or config.total_steps
    high, low = settings.learning_rate, settings.min_learning_rate

    def rate(step: jax.Array) -> jax.Array:
        seen = step + 1.0
        rising = high * seen / max(warmup, 1.0)
        if settings.schedule == "wsd":
            length = config.decay_end - config.decay_start
            progress = jnp.clip((seen - config.decay_start) / length, 0.0, 1.0)
            falling = high * (1 - progress) + low * progress  # exactly `high` at progress 0
        else:
            progress = jnp.clip((seen - warmup) / max(end - warmup, 1.0), 0.0, 1.0)
            falling = low + 0.5 * (high - low) * (1 + jnp.cos(jnp.pi * progress))
        # Without the barrier, XLA would recompute this number for every parameter.
        return jax.lax.optimization_barrier(jnp.where(seen < warmup, rising, falling))

    return rate


def optimizers(params):
    """A tree of names: "muon" for the layers' weight matrices, "adamw" for other parameters."""
    return map_named(lambda name, _: "muon" if declaration(name).is_matrix else "adamw", params)


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Clips by the norm of the whole gradient, then applies AdamW, or Muon to weight matrices."""
    settings = config.optimizer
    rate = learning_rate(config)
    optimizer = optax.adamw(
        rate,
        b1=settings.b1,
        b2=settings.b2,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        mask=decay_mask,
    )
    if settings.kind == "muon":
        matrices = optax.chain(
            muon(settings.momentum),
            optax.add_decayed_weights(settings.weight_decay),
            optax.scale_by_learning_rate(rate),
        )
        optimizer = optax.partition({"muon": matrices, "adamw": optimizer}, optimizers)
    if math.isinf(settings.clip_norm):
        return optimizer
    return optax.chain(optax.clip_by_global_norm(settings.clip_norm), optimizer)
