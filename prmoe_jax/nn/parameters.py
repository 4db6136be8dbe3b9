"""Names for the leaves of a pytree, the same in checkpoints, rules and error messages."""

import jax
from flax import nnx


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
