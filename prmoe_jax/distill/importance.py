"""How much each expert of a MoE matters, and what it costs to remove some of a layer.

All is measured on the first batches of training text, on one device.
"""

import itertools
import math
from collections.abc import Mapping
from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np

from prmoe_jax.config.schema import Config, ModelConfig, group_rows
from prmoe_jax.data.pipeline import Data, train_iterator
from prmoe_jax.distill.loss import TeacherOutput
from prmoe_jax.distill.predictions import agreement
from prmoe_jax.model.layerwise import moe_inputs, with_fewer_experts
from prmoe_jax.model.layout import unstack_layers
from prmoe_jax.model.loss import forward
from prmoe_jax.model.transformer import Transformer
from prmoe_jax.nn.parameters import named_leaves
from prmoe_jax.parallel.microbatches import add_up

# The most tokens of a microbatch and, for a run without drops, of a window.
MICROBATCH_TOKENS = 4096


def measure(config: Config, model: Transformer, data: Data, batches: int) -> dict[str, dict]:
    """The importance of every expert on the first batches of training text, on one device.

    Sums and means are over the tokens of an expert, which has the output f and the gate g for each:
    load is the expert's share of its layer's choices, activation Σ g‖f‖, ean Σ ‖f‖, reap the mean
    of g‖f‖ (arXiv 2510.13999), man the mean of ‖f‖, and msan that of ‖f‖² (arXiv 2606.15716). loss
    is (Σ parameter · gradient)², to first order the squared change of the loss without the expert.

    Returns:
      For each kind, the importance of every MoE layer's experts, [E], by layer number.
    """
    layers = [i for i, experts in enumerate(config.model.schedule.experts) if experts]
    microbatches = _microbatches(config, data.train.length)

    @jax.jit
    def found(model, batch):
        tokens = jnp.maximum(batch.mask_BxL.sum(), 1)

        def microbatch_sums(microbatch):
            def loss(model):
                sums = forward(model, microbatch, execution=config.execution)
                return sums.loss / tokens, sums.routers

            gradient, routers = jax.grad(loss, has_aux=True)(model)
            return {
                "load": {i: r.assigned_E for i, r in zip(layers, routers, strict=True)},
                "experts": {
                    number: moe.expert_sums(x_BxLxD, microbatch.segments_BxL > 0)
                    for number, moe, x_BxLxD in moe_inputs(
                        model, microbatch.tokens_BxL, microbatch.segments_BxL
                    )
                },
                "loss": _first_order(config.model, model, gradient),
            }

        sums = add_up(microbatch_sums, batch, microbatches, group_rows(config))
        return sums | {"loss": jax.tree.map(jnp.square, sums["loss"])}

    parts = (jax.device_get(found(model, batch)) for batch in _batches(config, data, batches))
    total = reduce(partial(jax.tree.map, np.add), parts)
    kinds = {
        "activation": lambda sums: sums.added_norm,
        "ean": lambda sums: sums.norm,
        "reap": lambda sums: sums.added_norm / np.maximum(sums.tokens, 1),
        "man": lambda sums: sums.norm / np.maximum(sums.tokens, 1),
        "msan": lambda sums: sums.norm_square / np.maximum(sums.tokens, 1),
    }
    return {
        "load": {i: load_E / max(load_E.sum(), 1) for i, load_E in total["load"].items()},
        "loss": total["loss"],
    } | {kind: {i: of(sums) for i, sums in total["experts"].items()} for kind, of in kinds.items()}


def prices(
    config: Config,
    model: Transformer,
    data: Data,
    order: Mapping[int, np.ndarray],
    step: int,
    least: int,
) -> dict[int, np.ndarray]:
    """What it costs to remove the last experts of one layer, in nats a token.

    It is the mean KL divergence of the model without them from the whole model, on one batch. The
    experts that stay have the capacity of the whole layer.

    Args:
      config, model, data: as for `measure`.
      order: the experts of each MoE layer, by the layer's number, the most important one first.
      step: the number of experts that are removed together.
      least: the number of experts that each layer keeps at least.

    Returns:
      For each MoE layer, entry n is the price if n steps fewer stay than fit into the layer. It is
      infinite if too few stay.
    """
    microbatches = _microbatches(config, data.train.length)

    @jax.jit
    def divergence(model, batch, has):
        def microbatch_sums(microbatch):
            text = microbatch.tokens_BxL, microbatch.segments_BxL
            whole_BxLxD, _ = model(*text, execution=config.execution)
            fewer_BxLxD = with_fewer_experts(model, *text, has)
            unembedding = model.unembedding(whole_BxLxD.dtype)
            whole = TeacherOutput(whole_BxLxD, unembedding)
            return agreement(fewer_BxLxD, unembedding, whole, microbatch)

        sums = add_up(microbatch_sums, batch, microbatches, group_rows(config))
        return sums.kl / sums.tokens

    (batch,) = _batches(config, data, 1)

    def price(layer: int, kept: int) -> float:
        if kept < least:
            return math.inf
        if kept == len(order[layer]):
            return 0.0  # computed in two ways, the whole model may differ by rounding
        has = {i: np.ones(len(expert_E), bool) for i, expert_E in order.items()}
        has[layer][order[layer][kept:]] = False
        return float(divergence(model, batch, has))

    return {
        layer: np.array([price(layer, n * step) for n in range(len(expert_E) // step, -1, -1)])
        for layer, expert_E in order.items()
    }


def _batches(config: Config, data: Data, number: int):
    iterator = train_iterator(data.train, config.train.batch_size, config.seed)
    return (batch._replace(teacher_top_k=None) for batch in itertools.islice(iterator, number))


def _microbatches(config: Config, length: int) -> int:
    """The fewest microbatches, from `train.accumulate` on, of at most `MICROBATCH_TOKENS` each.

    If none are small enough, they are as small as routing groups allow.
    """
    together = group_rows(config)
    most = config.train.batch_size // together
    for microbatches in range(config.train.accumulate, most):
        rows, rest = divmod(most, microbatches)
        if not rest and rows * together * length <= MICROBATCH_TOKENS:
            return microbatches
    return most


def _first_order(
    config: ModelConfig, model: Transformer, gradient: Transformer
) -> dict[int, jax.Array]:
    """Σ weight · gradient over each expert's output weights, [E], for each MoE layer.

    An expert's output is linear in these weights, so this is the derivative of the loss by a factor
    on that output.
    """
    slopes = named_leaves(gradient)
    products = {
        name: (leaf * slopes[name]).sum(tuple(range(2, leaf.ndim)))  # [N, E]
        for name, leaf in named_leaves(model).items()
        if name.endswith(("experts.w_out", "experts.b_out"))
    }
    changes: dict[int, jax.Array] = {}
    for name, change_E in unstack_layers(config, products).items():
        number = int(name.split(".")[1])
        changes[number] = changes.get(number, 0) + change_E
    return changes
