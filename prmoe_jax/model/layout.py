"""Converts between layers one by one and layers stacked by stage, as a model holds them."""

from collections.abc import Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from prmoe_jax.config.schema import Config, ModelConfig
from prmoe_jax.model.transformer import init_model
from prmoe_jax.nn.parameters import named_leaves

Array = TypeVar("Array", jax.Array, np.ndarray)


def places(model: ModelConfig) -> list[tuple[int, int, int]]:
    """The (stage, block in the cell, repeat) of each layer, first to last."""
    return [
        (s, block, repeat)
        for s, stage in enumerate(model.schedule.stages())
        for repeat in range(stage.repeats)
        for block in range(len(stage.cell))
    ]


def unstack_layers(model: ModelConfig, leaves: Mapping[str, Array]) -> dict[str, Array]:
    """Replaces each array that is stacked over the N repeats of a stage by one array per layer.

    An array such as 'stages.0.blocks.1.mlp.w_in' of shape [N, …] becomes N arrays without the first
    dimension, such as 'layers.3.mlp.w_in'. Arrays outside the stages keep their names and shapes.
    """
    layer_of = {place: layer for layer, place in enumerate(places(model))}
    named = {}
    for name, leaf in leaves.items():
        if not name.startswith("stages."):
            named[name] = leaf
            continue
        _, stage, _, block, rest = name.split(".", 4)
        for repeat in range(len(leaf)):
            layer = layer_of[int(stage), int(block), repeat]
            named[f"layers.{layer}.{rest}"] = leaf[repeat]
    return named


def stack_layers(model: ModelConfig, named: Mapping[str, Array]) -> dict[str, Array]:
    """The inverse of `unstack_layers`."""
    at, leaves = places(model), {}
    parts: dict[str, list] = {}
    for name, array in named.items():
        if not name.startswith("layers."):
            leaves[name] = array
            continue
        _, layer, rest = name.split(".", 2)
        stage, block, repeat = at[int(layer)]
        parts.setdefault(f"stages.{stage}.blocks.{block}.{rest}", []).append((repeat, array))
    for name, numbered in parts.items():
        arrays = [array for _, array in sorted(numbered, key=lambda part: part[0])]
        leaves[name] = (jnp if isinstance(arrays[0], jax.Array) else np).stack(arrays)
    return leaves


def of_layer(named: Mapping[str, Array], layer: int) -> dict[str, Array]:
    """One layer's arrays from the result of `unstack_layers`, by the rest of their names."""
    prefix = f"layers.{layer}."
    return {n.removeprefix(prefix): x for n, x in named.items() if n.startswith(prefix)}


def layer_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's parameters by the names of `unstack_layers`; none is allocated."""
    shapes = named_leaves(jax.eval_shape(lambda: init_model(config)))
    whole = {name: np.broadcast_to(np.float32(0), leaf.shape) for name, leaf in shapes.items()}
    return {name: array.shape for name, array in unstack_layers(config.model, whole).items()}
