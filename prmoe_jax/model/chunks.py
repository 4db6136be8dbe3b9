"""Losses from final activations, in chunks of tokens, so that few logits exist at a time.

The forward pass of a chunk also computes its gradients, so that logits are computed only once and
never kept. This is exact: the loss is a sum over tokens, so the backward pass only has to multiply
the gradients by one number. C: chunks.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec

from prmoe_jax.parallel.axes import batch_axes, platform

# Tokens of a chunk: of each sequence, and on CPUs of all sequences together. There, the logits of a
# chunk then stay in the processor's cache.
CHUNK, CPU_CHUNK = 256, 256

# Maps (x_BxTxD, unembedding, inputs of the chunk, inputs of all chunks) to sums over tokens.
ChunkMeasure = Callable[[jax.Array, Any, Any, Any], tuple[jax.Array, ...]]


def chunk_length(batch: int, length: int) -> int:
    """Tokens of each sequence in a chunk."""
    if platform() == "cpu":
        return min(length, max(1, CPU_CHUNK // batch))
    return min(length, CHUNK)


def cut(x_BxL: jax.Array, chunk: int) -> jax.Array:
    """Cuts [B, L, …] into [chunks, B, T, …]; the last chunk is padded with zeros."""
    x = jnp.pad(x_BxL, [(0, 0), (0, -x_BxL.shape[1] % chunk)] + [(0, 0)] * (x_BxL.ndim - 2))
    return x.reshape(x.shape[0], -1, chunk, *x.shape[2:]).swapaxes(0, 1)


def each_token(function: Callable, *arrays_BxL: jax.Array) -> Any:
    """Applies a function to chunks of tokens, [B, T, …]; joins its results for each token."""
    batch, length = arrays_BxL[0].shape[:2]
    parts = tuple(cut(x_BxL, chunk_length(batch, length)) for x_BxL in arrays_BxL)
    found_CxBxT = jax.lax.map(lambda part: function(*part), parts)
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(batch, -1)[:, :length], found_CxBxT)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def weighted_sums(
    measure: ChunkMeasure,
    x_BxLxD: jax.Array,
    unembedding: Any,
    inputs: Any,
    shared: Any,
    weights: tuple,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Adds up a measure over chunks of tokens.

    Args:
      measure: see `ChunkMeasure`.
      x_BxLxD: final activations.
      unembedding: a pytree, the map to logits.
      inputs: a pytree of arrays [B, L, …] that are cut like x; masks must exclude the padding.
      shared: a pytree of arrays that every chunk gets whole.
      weights: the weight of each sum in the loss.

    Returns:
      The loss, which can be differentiated by x and the unembedding, and the sums, which can't.

    Raises:
      TypeError: a sum is differentiated.
    """

    def on_device(x_BxLxD, unembedding, inputs, shared):
        def add(sums, part):
            return jax.tree.map(jnp.add, sums, measure(part[0], unembedding, part[1], shared)), None

        zeros = (jnp.zeros(()),) * len(weights)
        return jax.lax.scan(add, zeros, _chunks(x_BxLxD, inputs))[0], ()

    sums = _on_each_device(on_device, x_BxLxD, unembedding, inputs, shared)[0]
    return _weighted(sums, weights), sums


def _forward(measure: ChunkMeasure, *arguments):
    x_BxLxD, unembedding, inputs, shared, weights = jax.tree.map(lambda a: a.value, arguments)

    def on_device(x_BxLxD, unembedding, inputs, shared_and_weights):
        shared, weights = shared_and_weights

        def loss(x_BxTxD, unembedding, part):
            sums = measure(x_BxTxD, unembedding, part, shared)
            return _weighted(sums, weights), sums

        def add(carry, part):
            gradient = jax.value_and_grad(loss, (0, 1), has_aux=True)
            (_, sums), (dx_BxTxD, found) = gradient(part[0], unembedding, part[1])
            return jax.tree.map(jnp.add, carry, (sums, found)), dx_BxTxD

        no_gradient = jax.tree.map(lambda x: jnp.zeros(x.shape), unembedding)  # float32
        zeros = (jnp.zeros(()),) * len(weights), no_gradient
        carry, dx_CxBxTxD = jax.lax.scan(add, zeros, _chunks(x_BxLxD, inputs))
        sums, dunembedding = carry
        batch, length, width = x_BxLxD.shape
        dx_BxLxD = dx_CxBxTxD.swapaxes(0, 1).reshape(batch, -1, width)[:, :length]
        dunembedding = jax.tree.map(lambda d, x: d.astype(x.dtype), dunembedding, unembedding)
        return (sums, dunembedding), dx_BxLxD

    added, dx_BxLxD = _on_each_device(on_device, x_BxLxD, unembedding, inputs, (shared, weights))
    sums, dunembedding = added
    return (_weighted(sums, weights), sums), (dx_BxLxD, dunembedding)


def _backward(measure: ChunkMeasure, gradients, cotangents):
    dloss, dsums = cotangents
    if not all(isinstance(d, SymbolicZero) for d in dsums):
        raise TypeError("differentiate the `loss` of Sums; its other fields are measurements")
    return *(jax.tree.map(lambda d: (d * dloss).astype(d.dtype), gradients)), None, None, None


weighted_sums.defvjp(_forward, _backward, symbolic_zeros=True)


def _weighted(sums, weights) -> jax.Array:
    return sum((weight * value for weight, value in zip(weights, sums, strict=True)), jnp.zeros(()))


def _chunks(x_BxLxD: jax.Array, inputs):
    chunk = chunk_length(*x_BxLxD.shape[:2])
    return jax.tree.map(partial(cut, chunk=chunk), (x_BxLxD, inputs))


def _on_each_device(function: Callable, x_BxLxD, unembedding, inputs, shared):
    """Calls a function on each device with its own rows of the batch.

    It returns a pytree of sums over tokens, which are then added up over devices, once and not in
    every chunk, and a pytree of arrays by row. `tensor` may still split the vocabulary.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function(x_BxLxD, unembedding, inputs, shared)

    def local(*arguments):
        sums, by_row = function(*arguments)
        return jax.tree.map(lambda x: x[None], sums), by_row

    axes = batch_axes(mesh)
    rows, whole = PartitionSpec(axes), PartitionSpec()
    sums, by_row = jax.shard_map(
        local,
        in_specs=(rows, whole, rows, whole),
        out_specs=(rows, rows),
        axis_names=set(axes),
        check_vma=False,
    )(x_BxLxD, unembedding, inputs, shared)
    return jax.tree.map(lambda x: x.sum(0), sums), by_row
