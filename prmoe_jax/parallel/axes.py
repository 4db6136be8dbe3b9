"""The axes of the device mesh, and what each splits; `mesh.py` chooses their sizes.

Each axis with the parameters that it splits, outermost first; devices of the innermost axis are
neighbours:

  data      none: its devices are replicas
  fsdp      parameters outside the experts (ZeRO-3)
  fsdp_experts
            all parameters (ZeRO-3); only if `mesh.fsdp_experts` is set
  expert_N  experts, over several axes; expert_0 is the innermost. A layer uses only the inner axes
            whose product divides its number of experts
  slice     the hidden units of every expert (expert tensor parallelism)
  tensor    attention heads, hidden units and vocabulary

All axes but `tensor` split the batch. FSDP splits parameters outside the experts over all axes
except `data`, `tensor` and the axes across slices. `sharding._most_axes` leaves out one more axis
in some meshes.

The devices may form several slices of a pod (`mesh.slices`; unrelated to the axis `slice`), which
only the data-centre network links. The outermost axes then cross slices:

  data_across      none: replicas in different slices, a part of `mesh.data`
  expert_across_N  experts; only with `execution.exchange=hierarchical`

All other axes stay inside a slice. Unless experts cross slices, the data-centre network carries
only sums of gradients and of statistics.
"""

import math

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec


def platform() -> str:
    """The platform that code is traced for: the current mesh's, or else JAX's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def batch_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """The axes that split a batch."""
    return tuple(name for name in mesh.axis_names if name != "tensor")


def expert_axes(mesh: Mesh | AbstractMesh, experts: int) -> tuple[str, ...]:
    """The axes over which a layer's experts are spread, outermost first."""
    axes = [name for name in mesh.axis_names if name.startswith("expert")]
    while experts % math.prod(mesh.shape[name] for name in axes):
        del axes[0]
    return tuple(axes)


def splits_experts(mesh: Mesh | AbstractMesh) -> bool:
    """Whether a layer's experts, or parts of them, are on several devices after FSDP's gather."""
    alike = "data_across", "data", "fsdp", "fsdp_experts"
    replicas = [size for name, size in mesh.shape.items() if name in alike]
    return math.prod(replicas) < mesh.size


def crosses_slices(axis: str) -> bool:
    """Whether an axis of the mesh crosses slices."""
    return "_across" in axis


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """The indices, in ascending order, of the batch rows that this process's devices hold."""
    places = _rows(mesh).addressable_devices_indices_map((batch_size,))
    return sorted({row for (part,) in places.values() for row in range(batch_size)[part]})


def split_batch(batch, mesh: Mesh, batch_size: int):
    """Makes global arrays of `batch_size` rows; each process gives its `local_rows`."""

    def place(x):
        x = np.asarray(x)
        shape = batch_size, *x.shape[1:]
        return jax.make_array_from_process_local_data(_rows(mesh), x, shape)

    return jax.tree.map(place, batch)


def _rows(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(batch_axes(mesh)))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding with the whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())
