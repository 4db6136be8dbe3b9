"""AdamW or Muon with a schedule in tokens; `nn/parameters.py` declares which applies where.

Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon) updates each layer's weight
matrices by orthogonalised momentum. Its updates are scaled as in Moonlight (arXiv 2502.16982,
section 2.2), so that AdamW's learning rate and weight decay suit them. N, M: rows, columns.
"""

import math
import re

import jax
import jax.numpy as jnp
import optax

from prmoe_jax.config.schema import Config
from prmoe_jax.errors import UserError
from prmoe_jax.model.transformer import Transformer
from prmoe_jax.nn.parameters import declaration, map_named, named_leaves
from prmoe_jax.parallel import sharding

# Least bytes per parameter: its float32 value, and two moments with AdamW or one with Muon.
# (Muon leaves embeddings and vectors to AdamW, so that a model needs more.)
STATE_BYTES = {"adamw": 12, "muon": 8}
# Steps and coefficients of Muon's iteration, and the root mean square of AdamW's updates (measured
# in Moonlight, section 2.2).
STEPS, COEFFICIENTS, RMS = 5, (3.4445, -4.7750, 2.0315), 0.2


def least_state_bytes(config: Config) -> int:
    """Least bytes per parameter of a training state; a frozen parameter is its value alone."""
    return 4 if config.optimizer.trainable else STATE_BYTES[config.optimizer.kind]


def trained(config: Config, model: Transformer) -> Transformer:
    """The parameters that train; the others are None, which is no leaf of a tree.

    Raises:
      UserError: `optimizer.trainable` matches no parameter.
    """
    pattern = config.optimizer.trainable
    part = map_named(lambda name, leaf: leaf if re.search(pattern, name) else None, model)
    if not jax.tree.leaves(part):
        names = list(named_leaves(model))
        raise UserError(
            f"optimizer.trainable={pattern} is found in the name of no parameter; some names are "
            + ", ".join(names[:: len(names) // 5])
        )
    return part


def with_frozen(part: Transformer, model: Transformer) -> Transformer:
    """The whole model: the parameters of `part`, from `trained`, and otherwise those of `model`."""

    def chosen(new, old):
        return old if new is None else new

    return jax.tree.map(chosen, part, model, is_leaf=lambda leaf: leaf is None)


def decay_mask(params):
    """A tree of bools: True for parameters to which weight decay applies."""
    return map_named(lambda name, _: declaration(name).decays, params)


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
        muon = optax.chain(
            optax.trace(settings.momentum, nesterov=True),
            optax.stateless(lambda updates, _: orthogonalize(updates)),
        )
        matrices = optax.chain(
            muon,
            optax.add_decayed_weights(settings.weight_decay),
            optax.scale_by_learning_rate(rate),
        )
        optimizer = optax.partition({"muon": matrices, "adamw": optimizer}, optimizers)
    if settings.router_rate != 1:
        slower = optax.stateless(lambda updates, _: _scaled_routers(updates, settings.router_rate))
        optimizer = optax.chain(optimizer, slower)
    if math.isinf(settings.clip_norm):
        return optimizer
    return optax.chain(optax.clip_by_global_norm(settings.clip_norm), optimizer)


def _scaled_routers(updates: optax.Updates, factor: float) -> optax.Updates:
    def scaled(name: str, x: jax.Array) -> jax.Array:
        return factor * x if name.split(".")[-1] in ("w_router", "b_router") else x

    return map_named(scaled, updates)


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


def orthogonalize(updates: optax.Updates) -> optax.Updates:
    """Replaces every matrix U S Vᵀ by about U Vᵀ, scaled to a root mean square of about `RMS`.

    Queries, keys and values have one matrix each, with the heads side by side, and each expert has
    matrices of its own. A device computes whole matrices (`sharding.constrain_matrices`).
    `updates` is a tree of the layers' weight matrices, without other parameters.
    """
    return sharding.constrain(map_named(_orthogonal, updates))


def _orthogonal(name: str, x: jax.Array) -> jax.Array:
    layers, x = len(x), sharding.pad_layers(name, x)
    declared = declaration(name)
    stacked = x.ndim - len(declared.dims)
    kinds: dict[str, list[int]] = {"batch": list(range(stacked)), "rows": [], "columns": []}
    for axis, dim in enumerate(declared.dims, stacked):
        of = "rows" if dim in declared.contracted else "columns"
        kinds["batch" if dim == "E" or dim.isdigit() else of].append(axis)
    order = [axis for axes in kinds.values() for axis in axes]
    moved = x.transpose(order)
    rows, columns = (math.prod(x.shape[axis] for axis in kinds[of]) for of in ("rows", "columns"))
    batch = moved.shape[: len(kinds["batch"])]
    matrices = sharding.constrain_matrices(name, moved.reshape(*batch, rows, columns))
    scale = RMS * math.sqrt(max(rows, columns))
    done = scale * _newton_schulz(matrices)
    back = sorted(range(x.ndim), key=order.__getitem__)
    # The parameter's own partition does not split layers, so the padding is cut off locally.
    return sharding.constrain_leaf(name, done.reshape(moved.shape).transpose(back))[:layers]


def _newton_schulz(x_NxM: jax.Array) -> jax.Array:
    """U S' Vᵀ of each matrix U S Vᵀ, with S' between about 0.7 and 1.2."""
    wide = x_NxM.shape[-2] <= x_NxM.shape[-1]
    x = x_NxM if wide else x_NxM.mT
    x /= jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-8
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x if wide else x.mT
