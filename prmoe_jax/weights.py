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

# Elements of a block, and of one of the output matrix, which is read the other way. Measured.
BLOCK, BLOCK_OF_TABLE = 1 << 16, 1 << 19
# Rows up to which a weight's reading is what costs.
FEW_ROWS = 16
# Of a float32 weight, into which its product with few rows is cut, for as many cores. Measured.
SLICES = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Narrow:
    """A weight in bfloat16, or in int8 in units of its own for each output."""

    values: jax.Array
    units: jax.Array | None = None  # float32, 1 along what is summed over

    def __getitem__(self, everything) -> "Narrow":
        """What an nnx.Param does for `[...]`."""
        return self

    def whole(self, dtype) -> jax.Array:
        wide = self.values.astype(dtype)
        return wide if self.units is None else wide * self.units.astype(dtype)


def narrowed(w: jax.Array, kind: str, summed: tuple[int, ...]) -> Narrow:
    """A weight as 'bfloat16' or 'int8'; `summed` are the axes that its product sums over."""
    if kind == "bfloat16":
        return Narrow(w.astype(jnp.bfloat16))
    units = jnp.maximum(jnp.abs(w).max(summed, keepdims=True), 1e-30) / 127
    return Narrow(jnp.round(w / units).astype(jnp.int8), units)


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
        values = w.values if narrow else w
        x_RxD, w_DxF = x.reshape(-1, depth), values.reshape(depth, -1)
        y_RxF = _by_blocks(x_RxD, w_DxF) if narrow else _by_slices(x_RxD, w_DxF)
        y_RxF = y_RxF * w.units.reshape(1, -1) if narrow and w.units is not None else y_RxF
        return y_RxF.astype(x.dtype).reshape(*rows, *values.shape[axes:])

    return jax.lax.platform_dependent(x, w, cpu=of_few, default=plain)


def scores(x_BxD: jax.Array, table_VxD: jax.Array | Narrow) -> jax.Array:
    """x @ tableᵀ, float32."""

    def plain(x_BxD, table_VxD):
        table_VxD = whole(table_VxD, x_BxD.dtype)
        return jnp.einsum("BD,VD->BV", x_BxD, table_VxD, preferred_element_type=jnp.float32)

    narrow = isinstance(table_VxD, Narrow)
    if len(x_BxD) > FEW_ROWS or not (narrow or x_BxD.dtype == table_VxD.dtype == jnp.float32):
        return plain(x_BxD, table_VxD)

    def sliced(x_BxD, table_VxD):
        slices = math.gcd(len(table_VxD), SLICES)
        table_NxVxD = table_VxD.reshape(slices, -1, table_VxD.shape[1])
        y_NxBxV = jnp.einsum("BD,NVD->NBV", x_BxD, table_NxVxD)
        return y_NxBxV.swapaxes(0, 1).reshape(len(x_BxD), -1)

    def blocked(x_BxD, table_VxD):
        vocabulary, width = table_VxD.values.shape
        blocks = _blocks(vocabulary, width, BLOCK_OF_TABLE)

        def some(block_VxD):
            return x_BxD.astype(jnp.float32) @ block_VxD.astype(jnp.float32).T

        y = jax.lax.map(some, table_VxD.values.reshape(blocks, -1, width))
        y_BxV = y.swapaxes(0, 1).reshape(len(x_BxD), -1)
        return y_BxV if table_VxD.units is None else y_BxV * table_VxD.units.T

    of_few = blocked if narrow else sliced
    return jax.lax.platform_dependent(x_BxD, table_VxD, cpu=of_few, default=plain)


def product_with_one(x_1xD: jax.Array, w_ExDxF: jax.Array | Narrow, e: jax.Array) -> jax.Array:
    """x @ w[e] in x's dtype, reading no other expert's weights."""
    narrow = w_ExDxF if isinstance(w_ExDxF, Narrow) else Narrow(w_ExDxF)

    def at(w):
        return jax.lax.dynamic_index_in_dim(w, e, keepdims=False)

    def plain(x_1xD, w, e):
        return x_1xD @ jax.tree.map(at, w).whole(x_1xD.dtype)

    def blocked(x_1xD, w, e):
        y_1xF = _by_blocks(x_1xD, w.values, e)
        return (y_1xF if w.units is None else y_1xF * at(w.units)).astype(x_1xD.dtype)

    return jax.lax.platform_dependent(x_1xD, narrow, e, cpu=blocked, default=plain)


def _blocks(rows: int, width: int, elements: int) -> int:
    """Into how many equal blocks of rows a weight is cut, so that one has few enough elements."""
    fits = (n for n in range(1, rows + 1) if rows % n == 0 and rows // n * width <= elements)
    return next(fits, rows)


def _by_slices(x_RxD: jax.Array, w_DxF: jax.Array) -> jax.Array:
    """x @ w by slices of the depth, which XLA's batched product gives to different cores."""
    slices = math.gcd(len(w_DxF), SLICES)
    x_NxRxd = x_RxD.reshape(len(x_RxD), slices, -1).swapaxes(0, 1)
    w_NxdxF = w_DxF.reshape(slices, -1, w_DxF.shape[1])
    return jnp.einsum("NRd,NdF->NRF", x_NxRxd, w_NxdxF).sum(0)


def _by_blocks(x_RxD: jax.Array, w: jax.Array, e: jax.Array | None = None) -> jax.Array:
    """x @ w, or x @ w[e], float32, some rows of the weight at a time."""
    depth, width = w.shape[-2:]
    # A block is deeper than the rows are many, or the product's own work is too little.
    blocks = _blocks(depth, width, max(BLOCK, 3 * len(x_RxD) * width))
    size = depth // blocks

    def part(i):
        x = jax.lax.dynamic_slice_in_dim(x_RxD, i * size, size, axis=1)
        if e is None:
            block = jax.lax.dynamic_slice_in_dim(w, i * size, size)
        else:
            block = jax.lax.dynamic_slice(w, (e, i * size, 0), (1, size, width))[0]
        return x.astype(jnp.float32) @ block.astype(jnp.float32)

    return jax.lax.fori_loop(1, blocks, lambda i, y_RxF: y_RxF + part(i), part(0))
