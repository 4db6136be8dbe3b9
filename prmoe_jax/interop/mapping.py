"""Converts our parameters to another library's tensors, and back, by one table for each library.

A table gives the name and the layout of their tensor for each of our parameters:

    "attention.w_q": ("self_attn.q_proj.weight", "HK D"),

A layout has one word for each dimension of their tensor. The letters of a word are our dimensions,
which that dimension merges: our w_q is "DHK" (see `nn.parameters.PARAMETERS`), and their tensor has
H·K rows and D columns. If a layout lacks one of our dimensions, they have one tensor for each index
of it. {} in their name is then an expert's number, or 'q', 'k' or 'v'.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prmoe_jax.config.schema import Config, MeshConfig, ModelConfig
from prmoe_jax.interop.tensors import check_shapes
from prmoe_jax.model.layout import layer_names, layer_shapes, unstack_layers
from prmoe_jax.model.transformer import init_model
from prmoe_jax.nn.parameters import declaration, named_leaves
from prmoe_jax.parallel import sharding
from prmoe_jax.parallel.mesh import make_mesh

# For these dimensions, {} in a name is a letter instead of a number.
LETTERS = {"3": "qkv", "2": "kv"}


class Table(NamedTuple):
    """Another library's names and layouts."""

    parameters: dict[str, tuple[str, str]]  # by our name, without 'layers.3.'
    layer: str  # prefix of the names of a layer's tensors; {} is the layer's number
    prefix: str = ""  # prefix of all names


class Piece(NamedTuple):
    """One of their tensors; it holds one of our parameters, or a part of one."""

    name: str
    index: tuple  # the part's index in our array
    dims: dict[str, int]  # the part's dimensions in our order, and their sizes
    layout: str

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of their tensor."""
        words = self.layout.split()
        return tuple(math.prod(self.dims.get(letter, 1) for letter in word) for word in words)

    @property
    def order(self) -> list[int]:
        """Our dimensions' numbers in the order of their tensor."""
        ours = list(self.dims)
        return [ours.index(letter) for letter in self.layout if letter in ours]

    def to_theirs(self, part: np.ndarray) -> np.ndarray:
        """Our part in their layout."""
        return part.transpose(self.order).reshape(self.shape)

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """Their tensor in our layout."""
        sizes = list(self.dims.values())
        return tensor.reshape([sizes[i] for i in self.order]).transpose(np.argsort(self.order))


def pieces(table: Table, name: str, shape: tuple[int, ...]) -> list[Piece]:
    """Their tensors that make up one of our parameters, named as in `layer_shapes`."""
    prefix, own_name = table.prefix, name
    if name.startswith("layers."):
        _, layer, own_name = name.split(".", 2)
        prefix += table.layer.format(layer)
    theirs, layout = table.parameters[own_name]
    dims = dict(zip(declaration(own_name).dims, shape, strict=True))
    spread = [letter for letter in dims if letter not in layout]
    if not spread:
        return [Piece(prefix + theirs, (), dims, layout)]
    (letter,) = spread
    before = (slice(None),) * list(dims).index(letter)
    labels = LETTERS.get(letter, range(dims[letter]))
    del dims[letter]
    return [
        Piece(prefix + theirs.format(label), (*before, number), dims, layout)
        for number, label in enumerate(labels)
    ]


def read_parameters(
    config: Config,
    table: Table,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    source: Path,
) -> tuple[dict[str, jax.Array], str]:
    """Reads a model's parameters from another library's tensors onto all devices.

    The host holds one parameter of one layer at a time. `shapes` has all of their tensors, `read`
    reads one by its name, and `source` names the file or folder in messages.

    Returns:
      The parameters by our names, and a summary for the user.
    """
    model = jax.eval_shape(lambda: init_model(config))
    ours = layer_shapes(model)
    parts = {name: pieces(table, name, shape) for name, shape in ours.items()}
    wanted = {piece.name: piece.shape for several in parts.values() for piece in several}
    summary = check_shapes(shapes, wanted, source)

    def parameter(name: str) -> np.ndarray:
        array = np.empty(ours[name], np.float32)
        for piece in parts[name]:
            array[piece.index] = piece.to_ours(read(piece.name))
        return array

    layout = spread_over(config.model, jax.device_count())
    mesh = make_mesh(dataclasses.replace(config, mesh=layout))
    homes, leaves = named_leaves(sharding.shardings(model, mesh)), {}
    for name, leaf in named_leaves(model).items():
        if layers := layer_names(config.model, name):
            rows = [partial(parameter, layer) for layer in layers]
            leaves[name] = _stacked(leaf, homes[name], rows)
        else:
            leaves[name] = jax.device_put(parameter(name), homes[name])
    return leaves, summary


def their_tensors(
    model: ModelConfig, table: Table, leaves: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Converts a model's parameters to another library's tensors by name."""
    return {
        piece.name: piece.to_theirs(array[piece.index])
        for name, array in unstack_layers(model, leaves).items()
        for piece in pieces(table, name, array.shape)
    }


def spread_over(model: ModelConfig, devices: int) -> MeshConfig:
    """A mesh that splits one copy of a model over the devices, as far as its sizes allow."""
    experts = list(filter(None, model.schedule.experts))
    expert = math.gcd(devices, *experts) if experts else 1
    widths = model.d_ff, model.expert_width, model.residual_width
    parts = math.gcd(devices // expert, *widths) if experts else 1
    fsdp = devices // expert // parts
    return MeshConfig(data=1, fsdp=fsdp, expert=expert, expert_slice=parts)


def _stacked(leaf, home: jax.sharding.NamedSharding, reads: list[Callable]) -> jax.Array:
    """Reads an array onto a mesh row by row; the next row is read when a row has been copied."""
    whole = jax.jit(partial(jnp.zeros, leaf.shape, leaf.dtype), out_shardings=home)()
    row_home = jax.sharding.NamedSharding(home.mesh, jax.sharding.PartitionSpec(*home.spec[1:]))
    put = jax.jit(lambda x, row, n: x.at[n].set(row), donate_argnums=0, out_shardings=home)
    for n, read in enumerate(reads):
        whole = put(whole, jax.device_put(read(), row_home), n)
        whole.block_until_ready()
    return whole
