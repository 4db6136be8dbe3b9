"""A model's layers one by one in evaluation: their routing, and what they are given."""

import dataclasses
import math
from collections.abc import Iterator, Mapping

import jax

from prmoe_jax.config.schema import AUTO
from prmoe_jax.model.transformer import Block, Transformer, cast
from prmoe_jax.moe.layer import MoE
from prmoe_jax.moe.routing import Routing
from prmoe_jax.nn.precision import Precision
from prmoe_jax.parallel.axes import platform


def unstacked_blocks(model: Transformer) -> list[Block]:
    """A model's layers as single blocks, first to last."""
    return [
        jax.tree.map(lambda x: x[n], block)  # noqa: B023
        for stage in model.stages
        for n in range(stage.repeats)
        for block in stage.blocks
    ]


def dropless(model: Transformer) -> Transformer:
    """A copy of the model, with the same arrays, that drops no token in evaluation.

    A sequence's result then does not depend on the rest of its batch.
    """
    model = jax.tree.map(lambda x: x, model)
    for stage in model.stages:
        for block in stage.blocks:
            if isinstance(block.mlp, MoE):
                moe = block.mlp.moe
                block.mlp.moe = dataclasses.replace(moe, eval_capacity_factor=math.inf)
    return model


def routing(
    model: Transformer, tokens_BxL: jax.Array, segments_BxL: jax.Array
) -> dict[int, Routing]:
    """The routing decision of each MoE layer in evaluation, by the layer's index.

    It is for analysis, on one device. The arrays of a `Routing` are [G, S, K]; a group is one
    sequence unless `moe.group_size` says otherwise.
    """
    return {
        number: moe.decide(x_BxLxD, segments_BxL > 0)
        for number, moe, x_BxLxD in moe_inputs(model, tokens_BxL, segments_BxL)
    }


def with_fewer_experts(
    model: Transformer,
    tokens_BxL: jax.Array,
    segments_BxL: jax.Array,
    has: Mapping[int, jax.Array],
) -> jax.Array:
    """The final activations [B, L, D] in evaluation without some experts, on one device.

    Args:
      tokens_BxL, segments_BxL: as for a call of the model.
      has: by a layer's index, False for the experts that it is computed without, [E].
    """
    precision = Precision.of(model.config.dtype, AUTO, platform(), training=False)
    x_BxLxD, position_BxL = model.embed(tokens_BxL, segments_BxL, precision.activations)
    for number, block in enumerate(unstacked_blocks(model)):
        block = cast(block, precision.factors)
        x_BxLxD, _, _ = block(
            x_BxLxD, segments_BxL, None, None, position_BxL, has_E=has.get(number)
        )
    return model.norm(x_BxLxD).astype(precision.factors)


def moe_inputs(
    model: Transformer, tokens_BxL, segments_BxL
) -> Iterator[tuple[int, MoE, jax.Array]]:
    """The index of each MoE layer, the layer, and its input in evaluation."""
    precision = Precision.of(model.config.dtype, AUTO, platform(), training=False)
    x_BxLxD, position_BxL = model.embed(tokens_BxL, segments_BxL, precision.activations)
    for number, block in enumerate(unstacked_blocks(model)):
        block = cast(block, precision.factors)
        if isinstance(block.mlp, MoE):
            normed_BxLxD = block.norm_attention(x_BxLxD)
            y_BxLxD, _ = block.attention(normed_BxLxD, segments_BxL, None, position_BxL)
            yield number, block.mlp, block.norm_mlp(x_BxLxD + y_BxLxD)
        x_BxLxD, _, _ = block(x_BxLxD, segments_BxL, None, None, position_BxL)
