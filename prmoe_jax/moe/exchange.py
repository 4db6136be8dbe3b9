"""Expert parallelism inside shard_map: rows go to their expert's device and come back.

The flat exchange is one all-to-all each way over all of the layer's axes. The hierarchical one (the
paper's hierarchical all-to-all) takes one axis after the other: devices of one host exchange first,
and hosts exchange larger pieces. The coordinated one (the paper's parallelism-coordinated
all-to-all) is for rows that are replicated over the L devices of `tensor`: each device exchanges
only its share, 1/L of the bytes, and an all-gather puts the shares together.

X is the number of devices that exchange with each other, I the number of experts on each.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from prmoe_jax.moe import rounds
from prmoe_jax.moe.experts import Experts
from prmoe_jax.nn import remat

# At or below this many experts on a device, each expert's products are compiled separately.
FEW = 4
# Rows of the smallest buffer of the dropless exchange: below that, the cost is the weights'.
LEAST_ROWS = 128


def resolve(name: str, mesh: Mesh | AbstractMesh) -> str:
    """Resolves `moe.exchange`; 'auto' is coordinated if the mesh splits tensors, else flat."""
    if name != "auto":
        return name
    return "coordinated" if mesh.shape["tensor"] > 1 else "flat"


class ExpertParallel(NamedTuple):
    """All experts of a layer, called on one device of the mesh like `Experts`."""

    experts: Experts  # this device's part
    axes: tuple[str, ...]  # mesh axes over which the experts are spread, outermost first
    exchange: str  # flat | hierarchical | coordinated
    buffer_factor: float  # rows of the dropless exchange's buffer, relative to the even share

    @property
    def count(self) -> int:
        """The number of experts of the layer."""
        return self.experts.count

    def __call__(self, x_ExRxD: jax.Array) -> jax.Array:
        """Applies expert e to x[e], for the rows of every device; same shape and dtype."""
        rows = x_ExRxD.shape[1]
        coordinated = self.exchange == "coordinated"
        if coordinated:
            x_ExRxD = _own_rows(_pad_rows(x_ExRxD))
        devices = jax.lax.axis_size(self.axes)
        x_XxIxRxD = x_ExRxD.reshape(devices, -1, *x_ExRxD.shape[1:])
        y_XxIxRxD = self._exchange(self._apply(self._exchange(x_XxIxRxD), coordinated))
        y_ExRxD = y_XxIxRxD.reshape(x_ExRxD.shape)
        if coordinated:
            y_ExRxD = _all_rows(y_ExRxD)[:, :rows]
        return y_ExRxD

    def ragged(self, x_RxD, rows_E, expert_R) -> tuple[jax.Array, jax.Array]:
        """As `Experts.ragged`, for the rows of every device; also returns the rounds it took."""
        return self._in_rounds("ragged", x_RxD, rows_E, expert_R)

    def block_loop(self, x_RxD, rows_E, expert_R) -> tuple[jax.Array, jax.Array]:
        """As `Experts.block_loop`, for the rows of every device; also returns the rounds."""
        return self._in_rounds("block_loop", x_RxD, rows_E, expert_R)

    def _in_rounds(self, form: str, x_RxD, rows_E, expert_R):
        rows, width = x_RxD.shape
        coordinated = self.exchange == "coordinated"
        if coordinated:
            # Every L-th row, so that each of the L devices has its share of every expert's rows.
            parts = jax.lax.axis_size("tensor")
            x_RxD = _own_rows(_pad_rows(x_RxD[None]).reshape(-1, parts, width))[:, 0]
            expert_RxL = jnp.pad(expert_R, (0, -rows % parts), constant_values=self.count).reshape(
                -1, parts
            )
            own_R = expert_RxL[:, jax.lax.axis_index("tensor")]
            rows_E = (own_R[:, None] == jnp.arange(self.count)).sum(0)
        even = len(x_RxD)
        buffer = max(LEAST_ROWS, -(-math.ceil(self.buffer_factor * even) // 8) * 8)
        devices = jax.lax.axis_size(self.axes)
        buffer = min(buffer, devices * even)

        apply = partial(self._apply_runs, form, coordinated)
        stages = [rounds.Stage(self.axes, 1)] if self.axes else []
        if self.exchange == "hierarchical":
            sizes = [jax.lax.axis_size(name) for name in self.axes]
            stages = [
                rounds.Stage((name,), math.prod(sizes[:i])) for i, name in enumerate(self.axes)
            ]
        for stage in stages:  # the last one is the first to exchange
            apply = partial(rounds.serve, stage, apply, buffer)
        y_RxD, runs = apply(self.experts, x_RxD, rows_E)
        if coordinated:
            y_RxD = _all_rows(y_RxD[:, None]).reshape(-1, width)[:rows]
        return y_RxD, runs

    def _apply_runs(self, form: str, coordinated: bool, experts: Experts, x_BxD, rows_I):
        """Applies this device's experts to received rows, which are sorted by expert."""
        split, alike, others = _splits(coordinated)
        places_B = jnp.arange(len(x_BxD))
        expert_B = jnp.searchsorted(jnp.cumsum(rows_I), places_B, side="right")
        # A grouped product of one group wastes time on TPUs and GPUs.
        alone = len(rows_I) == 1 and form == "ragged"
        apply = experts.alone if alone else getattr(experts, form)
        if not split:
            return apply(x_BxD, rows_I, expert_B), jnp.int32(1)
        x_BxD = mark_varying(x_BxD, split)
        if others:
            x_PxBxD = jax.lax.all_gather(x_BxD, others)
            rows_PxI = jax.lax.all_gather(rows_I, others)
            expert_PxB = jax.lax.all_gather(expert_B, others)
            gathered = zip(x_PxBxD, rows_PxI, expert_PxB, strict=True)
            y_PxBxD = jnp.stack([apply(*inputs, last_bias=False) for inputs in gathered])
            y_BxD = jax.lax.psum_scatter(y_PxBxD, others)
        else:
            y_BxD = apply(x_BxD, rows_I, expert_B, last_bias=False)
        if alike:
            y_BxD = jax.lax.psum(y_BxD, alike)
        return y_BxD + experts.last_bias(expert_B, y_BxD.dtype), jnp.int32(1)

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

    def _apply(self, x_XxIxRxD: jax.Array, coordinated: bool) -> jax.Array:
        """Applies this device's experts to the rows that all devices sent.

        Devices that split an expert's hidden units all-gather their rows and reduce-scatter the
        results. Over `tensor` they do so only in the coordinated exchange. Otherwise all devices of
        `tensor` have the same rows, and sum up the results.
        """
        devices, local, rows, width = x_XxIxRxD.shape
        split, alike, others = _splits(coordinated)
        if not split and local <= FEW:
            return self.experts.unrolled(x_XxIxRxD)
        x_IxRxD = x_XxIxRxD.swapaxes(0, 1).reshape(local, -1, width)
        if others:
            x_IxRxD = jax.lax.all_gather(x_IxRxD, others, axis=1, tiled=True)
        # Each device has its own part of the weights, and so of the rows' gradient.
        y_IxRxD = self.experts.without_last_bias(mark_varying(x_IxRxD, split))
        if others:
            y_IxRxD = jax.lax.psum_scatter(y_IxRxD, others, scatter_dimension=1, tiled=True)
        if alike:
            y_IxRxD = jax.lax.psum(y_IxRxD, alike)
        y_IxRxD += self.experts.b_out[...].astype(y_IxRxD.dtype)[:, None]
        return y_IxRxD.reshape(local, devices, rows, width).swapaxes(0, 1)


def _splits(coordinated: bool) -> tuple[tuple[str, ...], ...]:
    """The axes that split hidden units: all, those with equal rows, those with different rows."""
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
    """Marks replicated arrays as varying over `axes`, so that their gradients are summed here."""

    def mark(x):
        already = jax.typeof(x).manual_axis_type.varying
        missing = tuple(name for name in axes if name not in already)
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(mark, tree)
