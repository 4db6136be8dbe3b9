"""Computes a batch portion by portion to save memory, as in gradient accumulation."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def add_up(
    measure: Callable[[Any], Any],
    batch: Any,
    portions: int,
    rows_together: int,
    place: Callable[[Any], Any] = lambda sums: sums,
) -> Any:
    """Adds up `measure(portion)` over the portions of a batch, computed one after the other.

    Every portion takes rows from all over the batch, so that no device is idle.

    Args:
      measure: maps a portion of the batch to sums over its rows, a pytree of arrays.
      batch: a pytree of arrays [B, …].
      portions: the number of portions; with 1, `measure` is called once, on the whole batch.
      rows_together: the number of neighbouring rows that stay together, see `config.group_rows`.
        B is a multiple of portions · rows_together.
      place: constrains the sums to their partition of the mesh.
    """
    if portions == 1:
        return measure(batch)

    def cut(x_BxL):
        """[B, …] to [portions, B/portions, …]."""
        dims = x_BxL.shape[1:]
        x = x_BxL.reshape(-1, portions, rows_together, *dims).swapaxes(0, 1)
        return x.reshape(portions, -1, *dims)

    def add(sums, portion):
        return jax.tree.map(jnp.add, sums, measure(portion)), None

    parts = jax.tree.map(cut, batch)
    shapes = jax.eval_shape(measure, jax.tree.map(lambda x: x[0], parts))
    zeros = place(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))
    return jax.lax.scan(add, zeros, parts)[0]
