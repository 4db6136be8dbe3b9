"""Our parameters layer by layer, as other libraries name theirs, and stacked by stage again."""

import numpy as np

from prmoe_jax.config import ModelConfig


def places(model: ModelConfig) -> list[tuple[int, int, int]]:
    """Of each layer: stage, block of its cell, repeat."""
    return [
        (s, block, repeat)
        for s, stage in enumerate(model.schedule.stages())
        for repeat in range(stage.repeats)
        for block in range(len(stage.cell))
    ]


def by_layer(model: ModelConfig, leaves: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """'stages.0.blocks.1.mlp.w_in' [N, …] as 'layers.3.mlp.w_in' […]; other names stay."""
    layer_of = {place: layer for layer, place in enumerate(places(model))}
    named = {}
    for name, leaf in leaves.items():
        if not name.startswith("stages."):
            named[name] = leaf
            continue
        _, stage, _, block, rest = name.split(".", 4)
        for repeat, part in enumerate(leaf):
            named[f"layers.{layer_of[int(stage), int(block), repeat]}.{rest}"] = part
    return named


def by_stage(model: ModelConfig, named: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What `by_layer` took apart, whole again."""
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
        leaves[name] = np.stack([array for _, array in sorted(numbered, key=lambda p: p[0])])
    return leaves
