"""Models that take their parameters from another model: what must match, and how they are made.

A student that starts as a part of its teacher, a pruned run and an upcycled one are built from the
other model's parameters, layer by layer and by the dimensions that `PARAMETERS` declares.
"""

from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp

from prmoe_jax.config.schema import ModelConfig
from prmoe_jax.errors import UserError
from prmoe_jax.model.layout import layer_names
from prmoe_jax.model.transformer import Transformer
from prmoe_jax.nn.parameters import map_named

# Settings that follow from others where they are 0, and what they amount to.
OPEN_SIZES = {
    "kv_heads": "key_heads",
    "head_dim": "head_width",
    "expert_d_ff": "expert_width",
    "residual_d_ff": "residual_width",
}


def size(model: ModelConfig, name: str) -> int:
    """A size of a model by its setting's name."""
    return getattr(model, OPEN_SIZES.get(name, name))


def compared(
    model: ModelConfig, source: ModelConfig, sizes: Iterable[str] = ()
) -> dict[str, tuple]:
    """The settings by which the same parameters may mean something else in two models.

    What routers do is left out: `check_same_routing` compares it.

    Args:
      model: one model.
      source: the other one.
      sizes: the sizes that they must share.

    Returns:
      The values of both by the setting's name.
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
    """A model like another one, or like its shapes; `part` gives each parameter by its name.

    Names are those of `unstack_layers`: the layers are asked for one by one.
    """

    def leaf(name, _):
        layers = layer_names(like.config, name)
        return jnp.stack([part(layer) for layer in layers]) if layers else part(name)

    return map_named(leaf, like)


def take(x: jax.Array, dims: str, kept: Mapping[str, jax.Array]) -> jax.Array:
    """The part of a parameter at some indices of its dimensions.

    Args:
      x: the parameter.
      dims: its dimensions, as in `PARAMETERS`.
      kept: indices by a dimension's letter. Those of experts' hidden units may be [E, F], for each
        of the parameter's experts its own.
    """
    # From the last dimension: hidden units are taken while all experts are there.
    for axis, letter in reversed(list(enumerate(dims))):
        index = kept.get(letter)
        if index is None:
            continue
        if index.ndim == 1:
            x = jnp.take(x, index, axis)
        else:
            sizes = dict(zip("EF", index.shape, strict=True))
            index = index.reshape([sizes.get(each, 1) for each in dims])
            x = jnp.take_along_axis(x, index, axis)
    return x
