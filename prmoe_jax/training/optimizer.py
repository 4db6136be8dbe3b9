"""AdamW with a token-based schedule and a weight-decay rule that names every parameter."""

import math

import jax
import jax.numpy as jnp
import optax

from prmoe_jax.config import Config
from prmoe_jax.nn.parameters import named_leaves

# By the last part of a parameter's name; the number of dimensions says nothing, since
# stacked layers give a bias two and an expert's bias three.
WEIGHT_DECAY = {
    "tokens": True,
    "positions": True,
    "w_qkv": True,
    "w_in": True,
    "w_out": True,
    "w_router": True,
    "w_mix": True,
    "b_qkv": False,
    "b_in": False,
    "b_out": False,
    "b_mix": False,
    "bias_router": False,
    "scale": False,
    "shift": False,
}


def decay_mask(params):
    """True where weight decay applies.

    Raises:
      KeyError: a parameter that `WEIGHT_DECAY` doesn't name.
    """
    decisions = [WEIGHT_DECAY[name.rsplit(".", 1)[-1]] for name in named_leaves(params)]
    return jax.tree.unflatten(jax.tree.structure(params), decisions)


def learning_rate(config: Config):
    """The rate of an update by its 0-based step: linear warm-up, then cosine to the minimum.

    A step is measured by the tokens seen at its end, as 375 M tokens of warm-up are.
    """
    settings = config.optimizer
    warmup = settings.warmup_tokens / config.tokens_per_step
    end = settings.decay_tokens / config.tokens_per_step or config.total_steps
    high, low = settings.learning_rate, settings.min_learning_rate

    def rate(step: jax.Array) -> jax.Array:
        seen = step + 1.0
        rising = high * seen / max(warmup, 1.0)
        progress = jnp.clip((seen - warmup) / max(end - warmup, 1.0), 0.0, 1.0)
        falling = low + 0.5 * (high - low) * (1 + jnp.cos(jnp.pi * progress))
        # One number: a compiler would work it out anew in the update of every parameter.
        return jax.lax.optimization_barrier(jnp.where(seen < warmup, rising, falling))

    return rate


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Clip by the whole gradient's norm, then AdamW."""
    settings = config.optimizer
    adamw = optax.adamw(
        learning_rate(config),
        b1=settings.b1,
        b2=settings.b2,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        mask=decay_mask,
    )
    if math.isinf(settings.clip_norm):
        return adamw
    return optax.chain(optax.clip_by_global_norm(settings.clip_norm), adamw)
