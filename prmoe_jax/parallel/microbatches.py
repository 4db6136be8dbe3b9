"""Computes a batch microbatch by microbatch to save memory, as in gradient accumulation."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def add_up(
    measure: Callable[[Any], Any],
    batch: Any,
    microbatches: int,
    rows_together: int,
    place: Callable[[Any], Any] = lambda sums: sums,
) -> Any:
    """Adds up `measure(microbatch)` over the microbatches of a batch, computed one after the other.

    Every microbatch takes rows from the whole batch, so that every device has some of them.

    Args:
      measure: maps a microbatch to sums over its rows, a pytree of arrays.
      batch: a pytree of arrays [B, …]; B is a multiple of microbatches · rows_together.
      microbatches: their number.
      rows_together: the number of neighbouring rows that stay together, see `config.group_rows`.
      place: constrains the sums to their partition over the mesh.
    """
    if microbatches == 1:
        return measure(batch)

    def cut(x_BxL):
        """[B, …] to [microbatches, B/microbatches, …]."""
        dims = x_BxL.shape[1:]
        x = x_BxL.reshape(-1, microbatches, rows_together, *dims).swapaxes(0, 1)
        return x.reshape(microbatches, -1, *dims)

    def add(sums, microbatch):
        return jax.tree.map(jnp.add, sums, measure(microbatch)), None

    parts = jax.tree.map(cut, batch)
    shapes = jax.eval_shape(measure, jax.tree.map(lambda x: x[0], parts))
    zeros = place(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))
    return jax.lax.scan(add, zeros, parts)[0]
