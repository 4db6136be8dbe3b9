"""The declaration of every parameter, and the names of parameters in a tree.

A parameter's entry in `PARAMETERS` decides its sharding, optimizer, weight decay, compute dtype and
quantization, and how students and upcycled models get it.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
from flax import nnx


@dataclasses.dataclass(frozen=True)
class Parameter:
    """The declaration of a parameter, inside a layer (without the stacked axis) or outside."""

    # One letter per dimension: V vocabulary, L positions, D model width, H heads, J heads of keys
    # and values if they are fewer, K width of a head, F hidden units, E experts. Digits are sizes.
    dims: str
    # How the mesh splits each dimension:
    #   T  over `tensor`
    #   S  over the axes of FSDP (see parallel/axes.py) that divide the dimension
    #   A  over `tensor` and the axes of FSDP
    #   E  over as many expert axes as the number of experts allows
    #   X  over `fsdp_experts`
    #   F  over `slice` and `tensor`
    #   -  not split
    split: str
    decays: bool = False  # has weight decay
    cast: bool = False  # `transformer.cast` casts it to the compute dtype
    contracted: str = ""  # dimensions that its product sums over; "" can't be quantized
    only_moe: bool = False  # not in dense layers, so that upcycling initialises it

    @property
    def is_matrix(self) -> bool:
        """Whether it holds a layer's weight matrices, which Muon can update."""
        return self.cast and bool(self.contracted)


# The keys are the last one or two parts of names in `named_leaves`. Weight decay can't follow from
# the number of dimensions: stacked over layers, a bias has two and an expert's bias three.
PARAMETERS = {
    "tokens": Parameter("VD", "TS", decays=True, contracted="D"),
    "positions": Parameter("LD", "-S", decays=True),
    "output": Parameter("VD", "TS", decays=True, contracted="D"),
    "attention.w_qkv": Parameter("D3HK", "S-T-", decays=True, cast=True, contracted="D"),
    "attention.b_qkv": Parameter("3HK", "-T-", cast=True),
    "attention.w_q": Parameter("DHK", "ST-", decays=True, cast=True, contracted="D"),
    "attention.b_q": Parameter("HK", "T-", cast=True),
    "attention.w_kv": Parameter("D2JK", "S-T-", decays=True, cast=True, contracted="D"),
    "attention.b_kv": Parameter("2JK", "-T-", cast=True),
    "q_norm.scale": Parameter("K", "-"),
    "k_norm.scale": Parameter("K", "-"),
    "q_norm.by_head": Parameter("HK", "T-"),
    "k_norm.by_head": Parameter("JK", "T-"),
    "attention.sinks": Parameter("H", "T"),
    "attention.w_out": Parameter("HKD", "T-S", decays=True, cast=True, contracted="HK"),
    "attention.b_out": Parameter("D", "-", cast=True),
    "mlp.w_in": Parameter("DF", "ST", decays=True, cast=True, contracted="D"),
    "mlp.w_gate": Parameter("DF", "ST", decays=True, cast=True, contracted="D"),
    "mlp.b_in": Parameter("F", "T", cast=True),
    "mlp.b_gate": Parameter("F", "T", cast=True),
    "mlp.w_out": Parameter("FD", "A-", decays=True, cast=True, contracted="F"),
    "mlp.b_out": Parameter("D", "-", cast=True),
    "experts.w_in": Parameter("EDF", "EXF", decays=True, cast=True, contracted="D"),
    "experts.w_gate": Parameter("EDF", "EXF", decays=True, cast=True, contracted="D"),
    "experts.b_in": Parameter("EF", "EF", cast=True),
    "experts.b_gate": Parameter("EF", "EF", cast=True),
    "experts.w_out": Parameter("EFD", "EFX", decays=True, cast=True, contracted="F"),
    "experts.b_out": Parameter("ED", "E-", cast=True),
    "each.w_in": Parameter("DF", "-F", decays=True, cast=True, contracted="D"),  # one expert
    "each.w_gate": Parameter("DF", "-F", decays=True, cast=True, contracted="D"),
    "each.b_in": Parameter("F", "F", cast=True),
    "each.b_gate": Parameter("F", "F", cast=True),
    "each.w_out": Parameter("FD", "F-", decays=True, cast=True, contracted="F"),
    "each.b_out": Parameter("D", "-", cast=True),
    "w_router": Parameter("DE", "--", decays=True, only_moe=True),
    "b_router": Parameter("E", "-", only_moe=True),  # trained
    "bias_router": Parameter("E", "-", only_moe=True),  # moved by the load
    "w_mix": Parameter("D2", "--", decays=True, only_moe=True),
    "b_mix": Parameter("2", "-", only_moe=True),
    "w_shared": Parameter("D", "-", decays=True, only_moe=True),
    "scale": Parameter("D", "-"),
    "shift": Parameter("D", "-"),
    "count": Parameter("", ""),  # optimizer state
    "step": Parameter("", ""),
}


def declaration(name: str) -> Parameter:
    """The declaration of a parameter by its name in `named_leaves`.

    Raises:
      KeyError: the parameter is not declared.
    """
    parts = [part for part in name.split(".") if not part.isdigit()]
    for end in (".".join(parts[-2:]), parts[-1]):
        if end in PARAMETERS:
            return PARAMETERS[end]
    raise KeyError(f"PARAMETERS in nn/parameters.py declares no {name}")


def named_leaves(tree) -> dict[str, jax.Array]:
    """Maps names such as 'stages.0.blocks.1.mlp.w_router' to leaves, in flattening order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = {_name(path): leaf for path, leaf in leaves}
    assert len(names) == len(leaves), "two leaves share a name"
    return names


def map_named(function: Callable, tree):
    """Maps each leaf of a tree to `function(name, leaf)`; names are those of `named_leaves`."""
    return jax.tree.map_with_path(lambda path, leaf: function(_name(path), leaf), tree)


def from_named(named: Mapping[str, jax.Array], like):
    """A tree like `like`, whose leaves are taken from `named` by name."""
    return map_named(lambda name, _: named[name], like)


def _name(path) -> str:
    parts = (jax.tree_util.keystr((key,), simple=True) for key in path)
    # An nnx.Param keeps its array under 'value'; names leave this out.
    return ".".join(part for part in parts if part != "value")


def normal(key: jax.Array, shape: tuple[int, ...], std: float) -> nnx.Param:
    """A float32 parameter drawn from N(0, std²)."""
    return nnx.Param(std * jax.random.normal(key, shape))
