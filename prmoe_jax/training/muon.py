"""Muon (Jordan et al., 2024): updates each layer's weight matrices by orthogonalised momentum.

https://kellerjordan.github.io/posts/muon. Updates are scaled as in Moonlight (arXiv 2502.16982,
section 2.2), so that AdamW's learning rate and weight decay suit them. N, M: rows, columns.
"""

import math

import jax
import jax.numpy as jnp
import optax

from prmoe_jax.nn.parameters import declaration, map_named
from prmoe_jax.parallel import sharding

STEPS = 5
COEFFICIENTS = 3.4445, -4.7750, 2.0315
RMS = 0.2  # the root mean square of AdamW's updates (measured in Moonlight, section 2.2)


def muon(momentum: float) -> optax.GradientTransformation:
    """Nesterov momentum, orthogonalised; the caller adds weight decay and learning rate.

    Args:
      momentum: the decay rate of the momentum.
    """
    orthogonalized = optax.stateless(lambda updates, _: orthogonalize(updates))
    return optax.chain(optax.trace(momentum, nesterov=True), orthogonalized)


def orthogonalize(updates: optax.Updates) -> optax.Updates:
    """Replaces every matrix U S Vᵀ by about U Vᵀ, scaled to a root mean square of about `RMS`.

    Queries, keys and values have one matrix each, with the heads side by side, and each expert has
    matrices of its own. A device computes whole matrices (`sharding.constrain_matrices`).

    Args:
      updates: a tree of the layers' weight matrices, without other parameters.
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
