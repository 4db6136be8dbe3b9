"""Relates a model's arrays, stacked over the repeats of each stage, to its single layers."""

import functools
from collections.abc import Mapping
from typing import TypeVar

import jax
import numpy as np

from prmoe_jax.config.schema import ModelConfig
from prmoe_jax.model.transformer import Transformer
from prmoe_jax.nn.parameters import named_leaves

Array = TypeVar("Array", jax.Array, np.ndarray)


@functools.lru_cache  # finding the stages of many layers is slow
def places(model: ModelConfig) -> list[tuple[int, int, int]]:
    """The (stage, block in the cell, repeat) of each layer, first to last."""
    return [
        (s, block, repeat)
        for s, stage in enumerate(model.stages)
        for repeat in range(stage.repeats)
        for block in range(len(stage.cell))
    ]


def layer_names(model: ModelConfig, name: str) -> list[str]:
    """The names of the layers' arrays that are stacked in an array of a model, in this order.

    With a cell of two layers, 'stages.0.blocks.1.mlp.w_in' stacks 'layers.1.mlp.w_in',
    'layers.3.mlp.w_in' and so on. For an array outside the stages, the list is empty.
    """
    if not name.startswith("stages."):
        return []
    _, stage, _, block, rest = name.split(".", 4)
    cell = int(stage), int(block)
    return [f"layers.{i}.{rest}" for i, (*at, _) in enumerate(places(model)) if tuple(at) == cell]


def unstack_layers(model: ModelConfig, leaves: Mapping[str, Array]) -> dict[str, Array]:
    """Replaces each stacked array by the arrays of its layers, named as in `layer_names`.

    Arrays outside the stages keep their names and shapes.
    """
    named: dict[str, Array] = {}
    for name, leaf in leaves.items():
        layers = layer_names(model, name)
        named |= {layer: leaf[n] for n, layer in enumerate(layers)} if layers else {name: leaf}
    return named


def layer_shapes(like: Transformer) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's parameters by the names of `unstack_layers`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, leaf in named_leaves(like).items():
        layers = layer_names(like.config, name)
        shapes |= dict.fromkeys(layers, leaf.shape[1:]) if layers else {name: leaf.shape}
    return shapes
