"""Builds a model from another model's parameters, and checks what both must share.

A student cut from its teacher, a pruned run and an upcycled run are built in this way: layer by
layer, and by the dimensions that `PARAMETERS` declares.
"""

from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp

from prmoe_jax.config.schema import ModelConfig
from prmoe_jax.errors import UserError
from prmoe_jax.model.layout import layer_names
from prmoe_jax.model.transformer import Transformer
from prmoe_jax.nn.parameters import map_named

# Settings whose 0 stands for another setting -> the property with the size that results.
OPEN_SIZES = {
    "kv_heads": "key_heads",
    "head_dim": "head_width",
    "expert_d_ff": "expert_width",
    "residual_d_ff": "residual_width",
}


def size(model: ModelConfig, name: str) -> int:
    """A size of a model by its setting's name, where 0 is resolved."""
    return getattr(model, OPEN_SIZES.get(name, name))


def compared(
    model: ModelConfig, source: ModelConfig, sizes: Iterable[str] = ()
) -> dict[str, tuple]:
    """The values of two models' settings that must be equal, so that parameters mean the same.

    `sizes` names more of them. Routing is left out: `validation.check_same_routing` compares it.
    """
    pairs = {name: (size(model, name), size(source, name)) for name in sizes}
    pairs |= model.differences(source)
    pairs.pop("normalize_top_k", None)
    mixed = pairs.pop("residual_mix", None)
    if any(model.schedule.experts) and any(source.schedule.experts):
        pairs["residual"] = model.residual, source.residual
        if mixed and model.residual:
            pairs["residual_mix"] = mixed
    return pairs


def check_equal(pairs: Mapping[str, tuple], whose: str, fix: str) -> None:
    """Raises UserError for the first setting of `compared` whose values differ."""
    for name, (ours, theirs) in pairs.items():
        if ours != theirs:
            raise UserError(f"model.{name}={ours}, {whose} has {theirs}; {fix}")


def build(like: Transformer, part: Callable[[str], jax.Array]) -> Transformer:
    """A model with the structure of `like`, which may hold shapes instead of arrays.

    `part` returns the parameter with a name of `unstack_layers`: layers are not stacked.
    """

    def leaf(name, _):
        layers = layer_names(like.config, name)
        return jnp.stack([part(layer) for layer in layers]) if layers else part(name)

    return map_named(leaf, like)


def take(x: jax.Array, dims: str, kept: Mapping[str, jax.Array]) -> jax.Array:
    """The part of a parameter, with the dimensions `dims`, at some indices by a dimension's letter.

    The indices of experts' hidden units may be [E, F]: each expert that `x` holds has its own.
    """
    # From the last dimension on, so that hidden units are taken before experts are removed.
    for axis, letter in reversed(list(enumerate(dims))):
        index = kept.get(letter)
        if index is not None and index.ndim == 1:
            x = jnp.take(x, index, axis)
        elif index is not None:
            sizes = dict(zip("EF", index.shape, strict=True))
            x = jnp.take_along_axis(x, index.reshape([sizes.get(d, 1) for d in dims]), axis)
    return x
