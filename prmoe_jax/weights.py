"""Weights as inference holds them: in fewer bits than the arithmetic, or one expert's alone.

A CPU reads a weight for each token anew, and that is what a token costs. XLA's product of few rows
reads it with one core; here slices of it are read by all. What XLA makes of a narrow weight, or of
one expert's slice of an array, is a whole copy in memory first; here it is read in blocks that stay
in the cache.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

# Elements of a block, and of a narrow weight's in a product of one row. Measured.
BLOCK, BLOCK_OF_NARROW = 1 << 16, 1 << 19
# Rows up to which a weight's reading is what costs.
FEW_ROWS = 16
# Of a float32 weight, into which its product with few rows is cut, for as many cores. Measured.
SLICES = 8
# The weights that are held narrow, by the end of their names, and the axes their products sum over.
SUMMED = {
    "tokens": (-1,),
    "attention.w_qkv": (-4,),
    "attention.w_out": (-3, -2),
    "mlp.w_in": (-2,),
    "mlp.w_out": (-2,),
    "experts.w_in": (-2,),
    "experts.w_out": (-2,),
}


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
            y_RxF = _narrow(x_RxD, w.values.reshape(-1, depth), w.units)
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
            return _narrow(x_BxD, table_VxD.values, table_VxD.units)
        slices = math.gcd(len(table_VxD), SLICES)
        table_NxVxD = table_VxD.reshape(slices, -1, table_VxD.shape[1])
        y_NxBxV = jnp.einsum("BD,NVD->NBV", x_BxD, table_NxVxD)
        return y_NxBxV.swapaxes(0, 1).reshape(len(x_BxD), -1)

    return jax.lax.platform_dependent(x_BxD, table_VxD, cpu=of_few, default=plain)


def product_with_one(x_1xD: jax.Array, w_ExDxF: jax.Array | Narrow, e: jax.Array) -> jax.Array:
    """x @ w[e] in x's dtype, reading no other expert's weights."""

    def at(w):
        return jax.lax.dynamic_index_in_dim(w, e, keepdims=False)

    def plain(x_1xD, w, e):
        return x_1xD @ whole(jax.tree.map(at, w), x_1xD.dtype)

    def of_one(x_1xD, w, e):
        if isinstance(w, Narrow):
            units = None if w.units is None else at(w.units)
            return _narrow(x_1xD, w.values, units, e).astype(x_1xD.dtype)
        return _by_blocks(x_1xD, w, e).astype(x_1xD.dtype)

    return jax.lax.platform_dependent(x_1xD, w_ExDxF, e, cpu=of_one, default=plain)


def _blocks(rows: int, width: int, elements: int) -> int:
    """Into how many equal blocks of rows a weight is cut, so that one has few enough elements."""
    fits = (n for n in range(1, rows + 1) if rows % n == 0 and rows // n * width <= elements)
    return next(fits, rows)


def _narrow(x_RxD: jax.Array, w: jax.Array, units, e: jax.Array | None = None) -> jax.Array:
    """x @ wᵀ, or x @ w[e]ᵀ, times units; float32, some outputs at a time."""
    outputs, depth = w.shape[-2:]
    one = len(x_RxD) == 1
    blocks = _blocks(outputs, depth, BLOCK_OF_NARROW if one else BLOCK)
    size = outputs // blocks

    def some(i):
        at, shape = (i * size, 0), (size, depth)
        if e is not None:
            at, shape = (e, *at), (1, *shape)
        block_fxD = jax.lax.dynamic_slice(w, at, shape).reshape(size, depth).astype(jnp.float32)
        x = x_RxD.astype(jnp.float32)
        # Several rows come second: first, they have XLA turn the block before it is multiplied.
        return (x @ block_fxD.T).T if one else block_fxD @ x.T

    y_RxF = jax.lax.map(some, jnp.arange(blocks)).reshape(outputs, -1).T
    return y_RxF if units is None else y_RxF * units.reshape(1, -1)


def _by_slices(x_RxD: jax.Array, w_DxF: jax.Array) -> jax.Array:
    """x @ w by slices of the depth, which XLA's batched product gives to different cores."""
    slices = math.gcd(len(w_DxF), SLICES)
    x_NxRxd = x_RxD.reshape(len(x_RxD), slices, -1).swapaxes(0, 1)
    w_NxdxF = w_DxF.reshape(slices, -1, w_DxF.shape[1])
    return jnp.einsum("NRd,NdF->NRF", x_NxRxd, w_NxdxF).sum(0)


def _by_blocks(x_1xD: jax.Array, w_ExDxF: jax.Array, e: jax.Array) -> jax.Array:
    """x @ w[e], float32, some rows of the weight at a time."""
    _, depth, width = w_ExDxF.shape
    blocks = _blocks(depth, width, BLOCK)
    size = depth // blocks

    def part(i):
        x = jax.lax.dynamic_slice_in_dim(x_1xD, i * size, size, axis=1)
        block = jax.lax.dynamic_slice(w_ExDxF, (e, i * size, 0), (1, size, width))[0]
        return x.astype(jnp.float32) @ block.astype(jnp.float32)

    return jax.lax.fori_loop(1, blocks, lambda i, y_1xF: y_1xF + part(i), part(0))
