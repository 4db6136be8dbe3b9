"""Converts our parameters to another library's tensors, and back, by one table for each library.

A table gives the name and the layout of their tensor for each of our parameters:

    "attention.w_q": ("self_attn.q_proj.weight", "HK D"),

A layout has one word for each dimension of their tensor. The letters of a word are our dimensions,
which that dimension merges: our w_q is "DHK" (see `nn.parameters.PARAMETERS`), and their tensor has
H·K rows and D columns. If a layout lacks one of our dimensions, they have one tensor for each index
of it. {} in their name is then an expert's number, or 'q', 'k' or 'v'. If a layout has a 2 and our
parameter doesn't, their tensor holds two of our parameters, and a third entry says whether this one
is the first (0) or the second (1):

    "experts.w_gate": ("mlp.experts.gate_up_proj", "E D F2", 0),
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

    parameters: dict[str, tuple]  # by our name, without 'layers.3.'
    layer: str  # prefix of the names of a layer's tensors; {} is the layer's number
    prefix: str = ""  # prefix of all names
    # Parts of the names of tensors where a head's dimensions 2i and 2i + 1 rotate together; ours
    # are i and K/2 + i.
    alternating: tuple[str, ...] = ()


class Piece(NamedTuple):
    """What one of their tensors and one of our parameters have in common."""

    name: str
    index: tuple  # the part's index in our array
    dims: dict[str, int]  # the part's dimensions in our order, and their sizes
    layout: str
    number: int = 0  # the part's index in dimensions of their tensor that it doesn't have

    @property
    def whole(self) -> bool:
        """Whether the part fills their tensor."""
        return math.prod(self.shape) == math.prod(self.dims.values())

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of their tensor."""
        return tuple(math.prod(map(self._size, word)) for word in self.layout.split())

    def to_theirs(self, part: np.ndarray) -> np.ndarray:
        """Our part, which fills their tensor, in their layout; a view where NumPy has one."""
        ours = list(self.dims)
        order = [ours.index(letter) for letter in self.layout if letter in ours]
        return part.reshape(list(self.dims.values())).transpose(order).reshape(self.shape)

    def in_theirs(self, tensor: np.ndarray) -> np.ndarray:
        """A view of our part, in our layout, within their contiguous tensor."""
        letters = self.layout.replace(" ", "")
        tensor = tensor.reshape([self._size(letter) for letter in letters])
        shared = [letter for letter in letters if letter in self.dims]
        index = tuple(slice(None) if letter in shared else self.number for letter in letters)
        return tensor[index].transpose([shared.index(letter) for letter in self.dims])

    def _size(self, letter: str) -> int:
        return self.dims[letter] if letter in self.dims else int(letter)


def pieces(table: Table, name: str, shape: tuple[int, ...]) -> list[Piece]:
    """Their tensors that make up one of our parameters, named as in `layer_shapes`."""
    prefix, own_name = table.prefix, name
    if name.startswith("layers."):
        _, layer, own_name = name.split(".", 2)
        prefix += table.layer.format(layer)
    theirs, layout, *number = table.parameters[own_name]
    dims = dict(zip(declaration(own_name).dims, shape, strict=True))
    spread = [letter for letter in dims if letter not in layout]
    if not spread:
        found = [Piece(prefix + theirs, (), dims, layout, *number)]
    else:
        (letter,) = spread
        before = (slice(None),) * list(dims).index(letter)
        labels = LETTERS.get(letter, range(dims.pop(letter)))
        found = [
            Piece(prefix + theirs.format(label), (*before, number), dims, layout)
            for number, label in enumerate(labels)
        ]
    pairs = [any(part in piece.name for part in table.alternating) for piece in found]
    return [
        _alternating(piece) if pair else piece for piece, pair in zip(found, pairs, strict=True)
    ]


def _alternating(piece: Piece) -> Piece:
    """The piece with K as two halves of P dimensions, which alternate in their tensor."""
    dims = {}
    for letter, size in piece.dims.items():
        dims |= {"2": 2, "P": size // 2} if letter == "K" else {letter: size}
    return piece._replace(dims=dims, layout=piece.layout.replace("K", "P2"))


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
            part = piece.in_theirs(read(piece.name))
            array[piece.index] = part.reshape(array[piece.index].shape)
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
    tensors: dict[str, np.ndarray] = {}
    for name, array in unstack_layers(model, leaves).items():
        for piece in pieces(table, name, array.shape):
            part = array[piece.index]
            if piece.whole:
                tensors[piece.name] = piece.to_theirs(part)
            else:
                theirs = tensors.setdefault(piece.name, np.empty(piece.shape, part.dtype))
                piece.in_theirs(theirs)[...] = part
    return tensors


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
