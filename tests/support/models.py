"""Small models, and their parameters layer by layer."""

import numpy as np

from prmoe_jax.config import architecture
from prmoe_jax.config.loading import resolve
from prmoe_jax.model.transformer import init_model
from prmoe_jax.nn.parameters import named_leaves


def build(text, moe=(), **model):
    """A small random model whose tokens are bytes."""
    shape = {"vocab_size": 384, "length": 40, "d_model": 12, "heads": 2, "d_ff": 10}
    fields = architecture.parse_fields(text) | shape | {"dtype": "float32", "init_std": 0.3}
    moe = {"min_capacity": 1} | dict(moe) if fields["experts"] else {}
    values = {"model": fields | model, "moe": moe, "train": {"steps": 1}}
    return init_model(resolve(values))


def layers_of(model):
    """Each layer's parameters by name, first to last."""
    named = named_leaves(model)
    places = [
        (f"stages.{s}.blocks.{b}.", n)
        for s, stage in enumerate(model.config.stages)
        for n in range(stage.repeats)
        for b in range(len(stage.cell))
    ]
    return [
        {name.removeprefix(at): np.asarray(x[n]) for name, x in named.items() if at in name}
        for at, n in places
    ]
