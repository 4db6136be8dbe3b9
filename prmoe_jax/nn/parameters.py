"""Every parameter's declaration, and the names by which it is found.

Sharding, weight decay, the dtype of the arithmetic, quantization, students and upcycling follow
from one entry of `PARAMETERS`.
"""

import dataclasses

import jax
from flax import nnx


@dataclasses.dataclass(frozen=True)
class Parameter:
    """What is to be known of a parameter of one layer, or of none."""

    # A letter a dimension: V vocabulary, L positions, D model width, H heads, K width of a head,
    # F hidden units, E experts; digits are sizes.
    dims: str
    # How the mesh splits each dimension:
    #   T  over `tensor`
    #   S  over what FSDP uses, the axes that split the batch but `data`
    #   A  over both of them
    #   E  over as many expert axes as the number of experts allows
    #   F  over `slice` and `tensor`
    #   -  whole
    split: str
    decays: bool = False  # under weight decay
    cast: bool = False  # enters the arithmetic in the dtype of the compute, else in float32
    contracted: str = ""  # of a weight that can be quantized, the dimensions its product sums over
    only_moe: bool = False  # no dense layer has it, so that upcycling starts it anew


# By the end of the parameter's name in `named_leaves`. The number of dimensions says nothing of
# weight decay: stacked layers give a bias two and an expert's bias three.
PARAMETERS = {
    "tokens": Parameter("VD", "TS", decays=True, contracted="D"),
    "positions": Parameter("LD", "-S", decays=True),
    "attention.w_qkv": Parameter("D3HK", "S-T-", decays=True, cast=True, contracted="D"),
    "attention.b_qkv": Parameter("3HK", "-T-", cast=True),
    "attention.w_out": Parameter("HKD", "T-S", decays=True, cast=True, contracted="HK"),
    "attention.b_out": Parameter("D", "-", cast=True),
    "mlp.w_in": Parameter("DF", "ST", decays=True, cast=True, contracted="D"),
    "mlp.b_in": Parameter("F", "T", cast=True),
    "mlp.w_out": Parameter("FD", "A-", decays=True, cast=True, contracted="F"),
    "mlp.b_out": Parameter("D", "-", cast=True),
    "experts.w_in": Parameter("EDF", "E-F", decays=True, cast=True, contracted="D"),
    "experts.b_in": Parameter("EF", "EF", cast=True),
    "experts.w_out": Parameter("EFD", "EF-", decays=True, cast=True, contracted="F"),
    "experts.b_out": Parameter("ED", "E-", cast=True),
    "each.w_in": Parameter("DF", "-F", decays=True, cast=True, contracted="D"),  # one expert alone
    "each.b_in": Parameter("F", "F", cast=True),
    "each.w_out": Parameter("FD", "F-", decays=True, cast=True, contracted="F"),
    "each.b_out": Parameter("D", "-", cast=True),
    "w_router": Parameter("DE", "--", decays=True, only_moe=True),
    "bias_router": Parameter("E", "-", only_moe=True),
    "w_mix": Parameter("D2", "--", decays=True, only_moe=True),
    "b_mix": Parameter("2", "-", only_moe=True),
    "scale": Parameter("D", "-"),
    "shift": Parameter("D", "-"),
    "count": Parameter("", ""),  # the optimizer's
    "step": Parameter("", ""),
}


def declaration(name: str) -> Parameter:
    """The declaration of a parameter of this name, as `named_leaves` gives it.

    Raises:
      KeyError: there is none.
    """
    parts = [part for part in name.split(".") if not part.isdigit()]
    for end in (".".join(parts[-2:]), parts[-1]):
        if end in PARAMETERS:
            return PARAMETERS[end]
    raise KeyError(f"PARAMETERS in nn/parameters.py declares no {name}")


def named_leaves(tree) -> dict[str, jax.Array]:
    """Maps 'stages.0.blocks.1.mlp.w_router' and the like to the leaf, in flattening order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = {_name(path): leaf for path, leaf in leaves}
    assert len(names) == len(leaves), "two leaves share a name"
    return names


def _name(path) -> str:
    parts = (jax.tree_util.keystr((key,), simple=True) for key in path)
    # An nnx.Param keeps its array under 'value', which says nothing.
    return ".".join(part for part in parts if part != "value")


def normal(key: jax.Array, shape: tuple[int, ...], std: float) -> nnx.Param:
    """A float32 parameter drawn from N(0, std²)."""
    return nnx.Param(std * jax.random.normal(key, shape))
