"""The partition over the mesh of every parameter and its optimizer state."""

import math
from collections.abc import Callable
from functools import partial
from operator import itemgetter

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from prmoe_jax.nn.parameters import declaration, map_named
from prmoe_jax.nn.quantized import InferenceWeight
from prmoe_jax.parallel.axes import batch_axes, crosses_slices, expert_axes


def spec(
    name: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh, in_use: bool = False
) -> PartitionSpec:
    """The partition of a parameter, or of a leaf of the optimizer's state.

    Args:
      name: its name in `parameters.named_leaves`.
      shape: the shape of the whole array.
      mesh: from `mesh.make_mesh`.
      in_use: whether FSDP has all-gathered the array.

    Raises:
      KeyError: the name is not declared, or is declared with other dimensions.
    """
    weight = name.removesuffix(".values").removesuffix(".scales")
    declared = declaration(weight)
    roles, stacked = declared.split, len(shape) - len(declared.split)
    if stacked not in (0, 1):
        raise KeyError(f"{name} of shape {shape} is declared with dimensions {declared.dims}")
    if weight != name:  # quantized, with the contracted axes last
        contracted = [dim in declared.contracted for dim in declared.dims]
        roles = [role for _, role in sorted(zip(contracted, roles, strict=True), key=itemgetter(0))]

    def axes(role: str, size: int) -> tuple[str, ...]:
        if size == 1:  # a scale, along a contracted axis
            return ()
        names = {"T": ("tensor",), "F": ("slice", "tensor"), "A": ("tensor",)}.get(role, ())
        if role == "E":
            names = expert_axes(mesh, size)
        elif role == "X" and "fsdp_experts" in mesh.axis_names and not in_use:
            names = ("fsdp_experts",)
        elif role in "AS" and not in_use:
            parts = math.prod(mesh.shape[name] for name in names)
            names += _most_axes(mesh, size // parts)
        return tuple(name for name in names if mesh.shape[name] > 1)

    return PartitionSpec(*[None] * stacked, *map(axes, roles, shape[stacked:]))


def _most_axes(mesh: Mesh | AbstractMesh, size: int) -> tuple[str, ...]:
    """The axes over which FSDP splits a dimension: from the innermost on, all that divide it.

    If these are several, and fill a slice of the mesh, the smallest one is left out: over all chips
    of a 3-D torus, XLA would gather by an all-reduce of whole arrays, which moves twice the bytes.
    """
    inside = [name for name in mesh.axis_names if not crosses_slices(name) and mesh.shape[name] > 1]
    axes: list[str] = []
    for name in reversed(inside):
        if name not in ("data", "tensor") and size % mesh.shape[name] == 0:
            size //= mesh.shape[name]
            axes.insert(0, name)
    if len(axes) > 1 and axes == inside:
        axes.remove(min(axes, key=mesh.shape.__getitem__))
    return tuple(axes)


def specs(tree, mesh: Mesh | AbstractMesh, in_use: bool = False):
    """A tree with the partition of every leaf; leaves may be arrays or shapes."""
    return map_named(lambda name, leaf: spec(name, leaf.shape, mesh, in_use), tree)


def shardings(tree, mesh: Mesh, in_use: bool = False):
    """A tree with the sharding of every leaf."""
    return jax.tree.map(lambda parts: NamedSharding(mesh, parts), specs(tree, mesh, in_use))


def _constrain(tree, partition: Callable):
    mesh = jax.sharding.get_abstract_mesh()
    return tree if mesh.empty else jax.lax.with_sharding_constraint(tree, partition(mesh))


def constrain(tree):
    """Constrains a tree, such as gradients, to the partition of its parameters."""
    return _constrain(tree, partial(specs, tree))


def constrain_leaf(name: str, x: jax.Array) -> jax.Array:
    """Constrains an array to the partition of the parameter of that name."""
    return _constrain(x, partial(spec, name, x.shape))


def pad_layers(name: str, x: jax.Array) -> jax.Array:
    """Appends layers of zeros to a stacked parameter, [layers, …], split as before.

    Their number becomes a multiple of the devices that split them in `constrain_matrices`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    parts = math.prod(mesh.shape[axis] for axis in _matrix_axes(name, x.shape[:2], mesh)[0])
    widths = [(0, -len(x) % parts)] + [(0, 0)] * (x.ndim - 1)
    return constrain_leaf(name, jnp.pad(x, widths))


def constrain_matrices(name: str, x: jax.Array) -> jax.Array:
    """Splits a stacked parameter, [layers, …, rows, columns], into whole matrices, for Muon.

    Experts, the second dimension if there are any, are split as usual. Layers, after `pad_layers`,
    are split over the other axes of a slice except `data`.
    """
    return _constrain(x, lambda mesh: PartitionSpec(*_matrix_axes(name, x.shape, mesh)))


def _matrix_axes(name: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh):
    """The mesh axes for the layers of a stacked parameter, and for its experts if it has any."""
    experts = declaration(name).dims.startswith("E")
    split = expert_axes(mesh, shape[1]) if experts else ()
    inside = (axis for axis in mesh.axis_names if not crosses_slices(axis))
    layers = tuple(axis for axis in inside if axis not in ("data", *split))
    return (layers, split) if experts else (layers,)


def constrain_batch(x_BxLxD: jax.Array) -> jax.Array:
    """Constrains activations to the partition of the batch."""
    return _constrain(x_BxLxD, lambda mesh: PartitionSpec(batch_axes(mesh)))


def expert_replicas(experts: int) -> int:
    """The number of devices with the same part of a layer's experts, on the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1
    splitting = *expert_axes(mesh, experts), "fsdp_experts", "slice", "tensor"
    return mesh.size // math.prod(mesh.shape.get(name, 1) for name in splitting)


def all_gather_params(tree, apart: str = ""):
    """All-gathers parameters over FSDP's axes, right before they are used.

    Gradients are reduce-scattered at once, in the dtype of `tree`: float32 would move twice the
    bytes of bfloat16. Parameters of submodules named `apart` are not gathered.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree

    def whole(name: str, leaf: jax.Array) -> PartitionSpec:
        return spec(name, leaf.shape, mesh, in_use=apart not in name.split("."))

    return jax.tree.map(_gather, specs(tree, mesh), map_named(whole, tree), tree)


def all_gather_experts(tree, parts, dtype):
    """All-gathers experts over `fsdp_experts`; call it inside shard_map.

    Gradients are reduce-scattered before replicas sum them. Both travel in `dtype`. `tree` has the
    parameters on this device, and `parts` their partitions.
    """

    def gather(x: jax.Array, part: PartitionSpec) -> jax.Array:
        for dimension, axes in enumerate(part):
            if axes in ("fsdp_experts", ("fsdp_experts",)):
                x = jax.lax.all_gather(x.astype(dtype), axes, axis=dimension, tiled=True)
        return x

    return jax.tree.map(gather, tree, parts)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gather(parts: PartitionSpec, whole: PartitionSpec, w: jax.Array) -> jax.Array:
    return jax.lax.with_sharding_constraint(w, whole)


_gather.defvjp(
    lambda parts, whole, w: (_gather(parts, whole, w), None),
    lambda parts, whole, _, dw: (jax.lax.with_sharding_constraint(dw, parts),),
)


def embed(
    name: str, table_VxD: jax.Array | InferenceWeight, ids_BxL: jax.Array, in_use: bool = False
) -> jax.Array:
    """table[ids], [B, L, D] in the table's dtype; float32 for a quantized table.

    On a mesh each device looks up the ids of its part of the batch. The gradients are summed into
    each device's part of the table. `name` and `in_use` are as in `spec`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if isinstance(table_VxD, InferenceWeight):
        wide = embed(name, table_VxD.values, ids_BxL, in_use).astype(jnp.float32)
        scales = table_VxD.scales
        return wide if scales is None else wide * embed(name, scales, ids_BxL, in_use)
    if mesh.empty:
        return table_VxD[ids_BxL]
    parts = spec(name, table_VxD.shape, mesh, in_use)
    entries, width = parts
    split = (width,) if isinstance(width, str) else width or ()
    replicas = tuple(axis for axis in batch_axes(mesh) if axis not in split)

    def local(table_VxD, ids_BxL):
        if width:
            # With this cast, gradients are reduce-scattered before replicas sum them.
            table_VxD = jax.lax.pcast(table_VxD, replicas, to="varying")
            table_VxD = jax.lax.all_gather(table_VxD, width, axis=1, tiled=True)
        if not entries:
            return table_VxD[ids_BxL]
        ids_BxL -= jax.lax.axis_index(entries) * len(table_VxD)
        here_BxLx1 = ((ids_BxL >= 0) & (ids_BxL < len(table_VxD)))[..., None]
        return jax.lax.psum(jnp.where(here_BxLx1, table_VxD[ids_BxL], 0), entries)

    rows = PartitionSpec(batch_axes(mesh))
    return jax.shard_map(local, in_specs=(parts, rows), out_specs=rows)(table_VxD, ids_BxL)


def init_sharded(make: Callable, mesh: Mesh, *arguments):
    """`make(*arguments)`, a tree of random parameters; each device computes only its own part."""
    places = shardings(jax.eval_shape(make, *arguments), mesh)
    on_cpus = mesh.devices.flat[0].platform == "cpu"
    # LLVM's two highest levels need 7 times as long to compile a random draw to the same code.
    options = {"xla_backend_optimization_level": 1} if on_cpus else None
    return jax.jit(make, out_shardings=places, compiler_options=options)(*arguments)
