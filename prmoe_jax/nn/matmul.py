"""Weights as inference holds them, in as many bits as the arithmetic or fewer, and their products.

A CPU reads a weight for each token anew, and that is what a token costs. XLA's product of few rows
reads it with one core; here slices of it are read by all. A narrow weight is never widened: the few
rows are split into parts as narrow as it is.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

# Rows up to which a weight's reading is what costs.
FEW_ROWS = 16
# Of a float32 weight, into which its product with few rows is cut, for as many cores. Measured.
SLICES = 8
# Bytes of a weight that is multiplied whole: a larger one in int8 may be read at a fifth of the
# speed (jax 0.12 on Zen 4). Measured.
LARGEST = 1 << 23
# Of a float32 number: three of bfloat16 have all its bits, three of int8 those that a row's largest
# number leaves it.
PARTS = 3


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Narrow:
    """A weight in bfloat16, or in int8 in units of its own for each output.

    What its product sums over comes last: a CPU's products of few rows are faster so.
    """

    values: jax.Array
    units: jax.Array | None  # float32, 1 along what is summed over
    summed: tuple[int, ...] = dataclasses.field(metadata={"static": True})  # where those axes were

    def __getitem__(self, everything) -> "Narrow":
        """What an nnx.Param does for `[...]`."""
        return self

    def whole(self, dtype) -> jax.Array:
        """The weight with its axes where they were."""
        wide = self.values.astype(dtype)
        wide = wide if self.units is None else wide * self.units.astype(dtype)
        return jnp.moveaxis(wide, range(-len(self.summed), 0), self.summed)


def narrowed(w: jax.Array, kind: str, summed: tuple[int, ...]) -> Narrow:
    """A weight as 'bfloat16' or 'int8'; `summed`, below 0, are the axes its product sums over."""
    last = tuple(range(-len(summed), 0))
    w = jnp.moveaxis(w, summed, last)
    if kind == "bfloat16":
        return Narrow(w.astype(jnp.bfloat16), None, summed)
    units = jnp.maximum(jnp.abs(w).max(last, keepdims=True), 1e-30) / 127
    return Narrow(jnp.round(w / units).astype(jnp.int8), units, summed)


def whole(w: jax.Array | Narrow, dtype) -> jax.Array:
    """A weight in the dtype it is computed with."""
    return w.whole(dtype) if isinstance(w, Narrow) else w.astype(dtype)


def product(x: jax.Array, w: jax.Array | Narrow, axes: int = 1) -> jax.Array:
    """Sums over the last axes of x and the first of w, as many as said; in x's dtype."""

    def plain(x, w):
        return jnp.tensordot(x, whole(w, x.dtype), axes)

    rows, depth = x.shape[: x.ndim - axes], math.prod(x.shape[x.ndim - axes :])
    narrow = isinstance(w, Narrow)
    if math.prod(rows) > FEW_ROWS or not (narrow or x.dtype == w.dtype == jnp.float32):
        return plain(x, w)

    def of_few(x, w):
        x_RxD = x.reshape(-1, depth)
        if narrow:
            y_RxF = _by_parts(x_RxD, w.values.reshape(-1, depth), w.units)
            return y_RxF.astype(x.dtype).reshape(*rows, *w.values.shape[:-axes])
        return _by_slices(x_RxD, w.reshape(depth, -1)).reshape(*rows, *w.shape[axes:])

    return jax.lax.platform_dependent(x, w, cpu=of_few, default=plain)


def scores(x_BxD: jax.Array, table_VxD: jax.Array | Narrow) -> jax.Array:
    """x @ tableᵀ, float32."""

    def plain(x_BxD, table_VxD):
        table_VxD = whole(table_VxD, x_BxD.dtype)
        return jnp.einsum("BD,VD->BV", x_BxD, table_VxD, preferred_element_type=jnp.float32)

    narrow = isinstance(table_VxD, Narrow)
    if len(x_BxD) > FEW_ROWS or not (narrow or x_BxD.dtype == table_VxD.dtype == jnp.float32):
        return plain(x_BxD, table_VxD)

    def of_few(x_BxD, table_VxD):
        if narrow:
            return _by_parts(x_BxD, table_VxD.values, table_VxD.units)
        return _by_outputs(x_BxD, table_VxD, jnp.float32)

    return jax.lax.platform_dependent(x_BxD, table_VxD, cpu=of_few, default=plain)


def _by_parts(x_RxD: jax.Array, w_FxD: jax.Array, units: jax.Array | None) -> jax.Array:
    """x @ wᵀ times units, float32, each row of x as a sum of `PARTS` in w's type."""
    rest_RxD = x_RxD.astype(jnp.float32)
    if units is None:
        finer, kind = 1, jnp.float32
        # A cast there and back may be left out by XLA.
        nearest = functools.partial(jax.lax.reduce_precision, exponent_bits=8, mantissa_bits=7)
    else:
        finer, kind, nearest = 254, jnp.int32, jnp.round
        units_Rx1 = jnp.maximum(jnp.abs(rest_RxD).max(-1, keepdims=True), 1e-30) / 127
        rest_RxD /= units_Rx1
    parts = []
    for _ in range(PARTS):
        parts.append(nearest(rest_RxD))
        rest_RxD = (rest_RxD - parts[-1]) * finer
    y_SxF = _by_outputs(jnp.concatenate(parts).astype(w_FxD.dtype), w_FxD, kind)
    y_PxRxF = y_SxF.reshape(PARTS, len(x_RxD), -1)
    y_RxF = sum(y_RxF.astype(jnp.float32) / finer**p for p, y_RxF in enumerate(y_PxRxF))
    return y_RxF if units is None else y_RxF * units_Rx1 * units.reshape(1, -1)


def _by_outputs(x_RxD: jax.Array, w_FxD: jax.Array, kind) -> jax.Array:
    """x @ wᵀ in the type `kind`, of a large weight by slices of the outputs."""
    slices = math.gcd(len(w_FxD), 1 << (w_FxD.nbytes // LARGEST).bit_length())
    w_NxfxD = w_FxD.reshape(slices, -1, w_FxD.shape[1])
    x_NxRxD = jnp.broadcast_to(x_RxD, (slices, *x_RxD.shape))  # or XLA makes them one again
    y_NxfxR = jnp.einsum("NfD,NRD->NfR", w_NxfxD, x_NxRxD, preferred_element_type=kind)
    return y_NxfxR.reshape(len(w_FxD), -1).T


def _by_slices(x_RxD: jax.Array, w_DxF: jax.Array) -> jax.Array:
    """x @ w by slices of the depth, which XLA gives to different cores."""
    slices = math.gcd(len(w_DxF), SLICES)
    x_NxRxd = x_RxD.reshape(len(x_RxD), slices, -1).swapaxes(0, 1)
    w_NxdxF = w_DxF.reshape(slices, -1, w_DxF.shape[1])
    return jnp.einsum("NRd,NdF->NRF", x_NxRxd, w_NxdxF).sum(0)
