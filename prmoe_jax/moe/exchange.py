"""Expert parallelism inside shard_map: rows go to their expert's device and come back.

The flat exchange is one all-to-all each way over all expert axes together. The hierarchical one
(the paper's hierarchical all-to-all) takes one axis after the other: devices of one host exchange
first, and hosts exchange larger pieces. The coordinated one (the paper's parallelism-coordinated
all-to-all) is for rows that are replicated over the L devices of `tensor`: each device exchanges
only its share, 1/L of the bytes, and an all-gather puts the shares together.

With a capacity, every device sends a buffer of equal size to every other one. Without a capacity,
rows travel in rounds (`rounds.py`), or, if they are few, to all devices (`of_few`).

Axes: X devices that exchange, I experts on each, B buffer rows, N tokens, P devices that split
the hidden units of the same experts.
"""

import dataclasses
import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from prmoe_jax.moe import kernels, rounds
from prmoe_jax.moe.experts import Experts
from prmoe_jax.moe.kernels import Kernel
from prmoe_jax.nn import remat
from prmoe_jax.nn.mlp import add_bias
from prmoe_jax.parallel.axes import crosses_slices

# At or below this many experts on a device, each expert's products are compiled separately.
FEW = 4
# Rows of the dropless exchange's smallest buffer; with fewer, reading weights dominates the time.
LEAST_ROWS = 128
# At or below this many tokens on all devices together, each device applies its experts to all
# tokens: on TPUs and GPUs, products of so few rows take hardly longer than reading the weights.
FEW_TOKENS = 256


def resolve(name: str, mesh: Mesh | AbstractMesh) -> str:
    """Resolves `execution.exchange`: 'auto' is coordinated if `tensor` is split, else flat."""
    if name != "auto":
        return name
    return "coordinated" if mesh.shape["tensor"] > 1 else "flat"


class ExpertParallel(NamedTuple):
    """Applies a layer's experts where a mesh splits them.

    It has the methods of `experts.Local`; each device calls them for its own rows.
    """

    experts: Experts  # this device's part
    axes: tuple[str, ...]  # mesh axes over which the experts are spread, outermost first
    exchange: str  # flat | hierarchical | coordinated
    buffer_factor: float  # rows of the dropless exchange's buffer, relative to the even share

    @property
    def count(self) -> int:  # type: ignore[override]
        """The number of experts of the layer."""
        return self.experts.count

    @property
    def coordinated(self) -> bool:
        """Whether each device of `tensor` exchanges only its share of the rows."""
        return self.exchange == "coordinated"

    def batched(self, x_ExRxD: jax.Array) -> jax.Array:
        """As `Local.batched`."""
        rows = x_ExRxD.shape[1]
        if self.coordinated:
            x_ExRxD = _own_rows(_pad_rows(x_ExRxD))
        devices = jax.lax.axis_size(self.axes)
        x_XxIxRxD = x_ExRxD.reshape(devices, -1, *x_ExRxD.shape[1:])
        y_XxIxRxD = self._exchange(self._apply(self._exchange(x_XxIxRxD)))
        y_ExRxD = y_XxIxRxD.reshape(x_ExRxD.shape)
        if self.coordinated:
            y_ExRxD = _all_rows(y_ExRxD)[:, :rows]
        return y_ExRxD

    def grouped(
        self, kernel: Kernel, x_RxD: jax.Array, rows_E: jax.Array, expert_R: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """As `Local.grouped`, in rounds of a bounded number of rows (see `rounds.py`)."""
        rows, width = x_RxD.shape
        if self.coordinated:
            # A device takes every L-th row, and thus its share of every expert's rows.
            parts, missing = jax.lax.axis_size("tensor"), -rows % jax.lax.axis_size("tensor")
            x_RxD = _own_rows(_pad_rows(x_RxD[None]).reshape(-1, parts, width))[:, 0]
            expert_R = jnp.pad(expert_R, (0, missing), constant_values=self.count)
            own_R = expert_R.reshape(-1, parts)[:, jax.lax.axis_index("tensor")]
            rows_E = (own_R[:, None] == jnp.arange(self.count)).sum(0)
        apply = partial(self._apply_grouped, kernel)
        for stage in self._stages(len(x_RxD)):
            apply = partial(rounds.serve, stage, apply)
        y_RxD, runs = apply(self.experts, x_RxD, rows_E)
        if self.coordinated:
            y_RxD = _all_rows(y_RxD[:, None]).reshape(-1, width)[:rows]
        return y_RxD, runs

    def are_few(self, tokens: int, top_k: int) -> bool:
        """As `Local.are_few`, for this number of tokens on each device."""
        del top_k
        return tokens * jax.lax.axis_size(self._senders()) <= FEW_TOKENS

    def of_few(self, x_NxD: jax.Array, expert_NxK: jax.Array, weight_NxK: jax.Array) -> jax.Array:
        """As `Local.of_few`: each device applies its experts to the tokens of all devices.

        The results are summed over the devices. No row counts are exchanged, and each weight is
        read once.
        """
        split, alike, _ = _splits(coordinated=False)
        if senders := self._senders():
            x_NxD, expert_NxK, weight_NxK = (
                jax.lax.all_gather(a, senders, tiled=True) for a in (x_NxD, expert_NxK, weight_NxK)
            )
        first = self.experts.here * jax.lax.axis_index(self.axes)
        chosen_NxKxI = (expert_NxK - first)[..., None] == jnp.arange(self.experts.here)
        weight_NxI = jnp.where(chosen_NxKxI, weight_NxK[..., None], 0).sum(1)
        weights = self.experts.weights(x_NxD.dtype)
        if weights.b_out_D is not None:  # only one of the devices that split an expert adds it
            leads = sum(jax.lax.axis_index(name) for name in split) == 0
            weights = dataclasses.replace(weights, b_out_D=jnp.where(leads, weights.b_out_D, 0))
        x_NxD, weight_NxI = mark_varying((x_NxD, weight_NxI), split)
        y_NxD = kernels.of_all(weights, x_NxD, weight_NxI)
        if senders:
            y_NxD = jax.lax.psum_scatter(y_NxD, senders, tiled=True)
        return jax.lax.psum(y_NxD, alike) if alike else y_NxD

    def _senders(self) -> tuple[str, ...]:
        """The axes of the devices that hold different tokens for this device's experts."""
        return (*self.axes, *_splits(coordinated=False)[2])

    def _stages(self, rows: int) -> list[rounds.Stage]:
        """The exchanges for this number of rows per device, in reverse order of execution."""
        names = [(name,) for name in self.axes] if self.exchange == "hierarchical" else [self.axes]
        wanted = max(LEAST_ROWS, math.ceil(self.buffer_factor * rows))
        stages, groups = [], 1
        for axes in filter(None, names):
            devices = jax.lax.axis_size(axes)
            piece = 0
            if lacks_ragged_exchange(axes):
                piece = piece_rows(rows, devices, self.buffer_factor)
            most = jax.lax.axis_size(self.axes) * rows
            buffer = piece * devices if piece else min(-(-wanted // 8) * 8, most)
            stages.append(rounds.Stage(axes, groups, buffer, piece))
            groups *= devices
        return stages

    def _apply_grouped(self, kernel: Kernel, experts: Experts, x_BxD, rows_I):
        """Applies this device's experts to received rows, which are sorted by expert."""
        split, alike, others = _splits(self.coordinated)
        index_B = jnp.arange(len(x_BxD))
        ends_I = jnp.cumsum(rows_I)
        expert_B = jnp.searchsorted(ends_I, index_B, side="right", method="compare_all")
        if kernel is not kernels.blocked and len(rows_I) == 1:
            kernel = kernels.single
        weights = experts.weights(x_BxD.dtype)
        if not split:
            return kernel(weights, x_BxD, rows_I, expert_B), jnp.int32(1)
        apply = partial(kernel, dataclasses.replace(weights, b_out_D=None))
        x_BxD = mark_varying(x_BxD, split)
        if others:
            gathered = (jax.lax.all_gather(a, others) for a in (x_BxD, rows_I, expert_B))
            y_PxBxD = jnp.stack([apply(*inputs) for inputs in zip(*gathered, strict=True)])
            y_BxD = jax.lax.psum_scatter(y_PxBxD, others)
        else:
            y_BxD = apply(x_BxD, rows_I, expert_B)
        if alike:
            y_BxD = jax.lax.psum(y_BxD, alike)
        return add_bias(y_BxD, kernels.biases_of(weights.b_out_D, expert_B)), jnp.int32(1)

    def _exchange(self, x_XxIxRxD: jax.Array) -> jax.Array:
        """Sends part x to device x, and receives part x from device x."""
        with jax.named_scope("exchange"):
            if self.exchange != "hierarchical":
                return remat.save_collective(jax.lax.all_to_all(x_XxIxRxD, self.axes, 0, 0))
            sizes = [jax.lax.axis_size(name) for name in self.axes]
            x = x_XxIxRxD.reshape(*sizes, *x_XxIxRxD.shape[1:])
            for i, name in reversed(list(enumerate(self.axes))):
                x = jax.lax.all_to_all(x, name, i, i)
            return remat.save_collective(x.reshape(x_XxIxRxD.shape))

    def _apply(self, x_XxIxRxD: jax.Array) -> jax.Array:
        """Applies this device's experts to the rows that all devices sent.

        Devices that split an expert's hidden units all-gather their rows and reduce-scatter the
        results. The exception is `tensor` without the coordinated exchange: its devices have the
        same rows and only sum the results.
        """
        devices, local, rows, width = x_XxIxRxD.shape
        split, alike, others = _splits(self.coordinated)
        weights = self.experts.weights(x_XxIxRxD.dtype)
        if not split and local <= FEW:
            return kernels.unrolled(weights, x_XxIxRxD)
        x_IxRxD = x_XxIxRxD.swapaxes(0, 1).reshape(local, -1, width)
        if others:
            x_IxRxD = jax.lax.all_gather(x_IxRxD, others, axis=1, tiled=True)
        # Each device has a part of the weights, so its gradient of the rows is a partial sum.
        y_IxRxD = kernels.batched(
            dataclasses.replace(weights, b_out_D=None), mark_varying(x_IxRxD, split)
        )
        if others:
            y_IxRxD = jax.lax.psum_scatter(y_IxRxD, others, scatter_dimension=1, tiled=True)
        if alike:
            y_IxRxD = jax.lax.psum(y_IxRxD, alike)
        if weights.b_out_D is not None:
            y_IxRxD = add_bias(y_IxRxD, weights.b_out_D[:, None])
        return y_IxRxD.reshape(local, devices, rows, width).swapaxes(0, 1)


def piece_rows(rows: int, devices: int, buffer_factor: float) -> int:
    """Rows per piece in an all-to-all of equal pieces, where each device sends `rows` rows in all.

    A piece holds `buffer_factor` times a pair's even share, and at least 5 standard deviations more
    than the share: with uniform random routing on 128 devices, one exchange in 700 exceeds it.
    """
    share = rows / devices
    wanted = max(LEAST_ROWS / devices, buffer_factor * share, share + 5 * math.sqrt(share) + 4)
    return min(rows, math.ceil(wanted))


def lacks_ragged_exchange(axes: tuple[str, ...]) -> bool:
    """Whether XLA has no ragged all-to-all for these axes: on TPU v5e and between pod slices."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    v5e = device is not None and device.device_kind == "TPU v5 lite"
    return v5e or any(map(crosses_slices, axes))


def _splits(coordinated: bool) -> tuple[tuple[str, ...], ...]:
    """The axes that split hidden units: all, those with replicated rows, those with other rows."""
    split = tuple(name for name in ("slice", "tensor") if jax.lax.axis_size(name) > 1)
    alike = () if coordinated else tuple(name for name in split if name == "tensor")
    return split, alike, tuple(name for name in split if name not in alike)


def _pad_rows(x_ExRxD: jax.Array) -> jax.Array:
    """Pads the rows to a multiple of the devices of `tensor`."""
    missing = -x_ExRxD.shape[1] % jax.lax.axis_size("tensor")
    return jnp.pad(x_ExRxD, ((0, 0), (0, missing), (0, 0)))


@jax.custom_vjp
def _own_rows(x_ExRxD: jax.Array) -> jax.Array:
    """This device's share of rows that are replicated over `tensor`.

    The gradient gathers the shares. JAX would sum whole arrays that are mostly zeros instead.
    """
    rows = x_ExRxD.shape[1] // jax.lax.axis_size("tensor")
    start = jax.lax.axis_index("tensor") * rows
    return jax.lax.dynamic_slice_in_dim(x_ExRxD, start, rows, axis=1)


def _all_rows(x_ExRxD: jax.Array) -> jax.Array:
    """All-gathers the shares that the devices of `tensor` hold; the result is replicated."""
    return jax.lax.all_gather(x_ExRxD, "tensor", axis=1, tiled=True, to="invarying")


_own_rows.defvjp(lambda x: (_own_rows(x), None), lambda _, dy: (_all_rows(dy),))


def mark_varying(tree, axes: tuple[str, ...]):
    """Marks replicated arrays as varying over `axes`, so that gradients are summed over them."""

    def mark(x):
        already = jax.typeof(x).manual_axis_type.varying
        missing = tuple(name for name in axes if name not in already)
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(mark, tree)
