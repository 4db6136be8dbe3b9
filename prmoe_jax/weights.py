"""Weights as inference holds them: in fewer bits than the arithmetic, or one expert's alone.

A CPU reads a weight for each token anew, and that is what a token costs. What a product of few rows
takes there depends on how it is put: by slices for all cores where the weight is as wide as the
arithmetic; else by blocks that are widened while they stay in the cache, since XLA would write a
whole wide copy first; and of an array of experts only the one, not a copy of its slice.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

# Elements of a block: in products of several rows, and of one. Measured, as all of these.
BLOCK, BLOCK_OF_ONE_ROW = 1 << 16, 1 << 19
# Rows up to which a weight's reading is what costs.
FEW_ROWS = 16
# Of a float32 weight, into which its product with few rows is cut, for as many cores.
SLICES = 8
# The weights that are held so, by the end of their names, and the axes their products sum over.
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
class Held:
    """A weight in float32, in bfloat16, or in int8 in units of its own for each output.

    What its product sums over comes last: a CPU's products of few rows are faster so.
    """

    values: jax.Array
    units: jax.Array | None  # float32, 1 along what is summed over
    summed: tuple[int, ...] = dataclasses.field(metadata={"static": True})  # where those axes were

    def __getitem__(self, everything) -> "Held":
        """What an nnx.Param does for `[...]`."""
        return self

    def whole(self, dtype) -> jax.Array:
        """The weight with its axes where they were."""
        wide = self.values.astype(dtype)
        wide = wide if self.units is None else wide * self.units.astype(dtype)
        return jnp.moveaxis(wide, range(-len(self.summed), 0), self.summed)


def held(w: jax.Array, kind: str, summed: tuple[int, ...]) -> Held:
    """A weight as float32, bfloat16 or int8; `summed`: its product's axes, below 0, to sum over."""
    last = tuple(range(-len(summed), 0))
    w = jnp.moveaxis(w, summed, last)
    if kind != "int8":
        return Held(w.astype(kind), None, summed)
    units = jnp.maximum(jnp.abs(w).max(last, keepdims=True), 1e-30) / 127
    return Held(jnp.round(w / units).astype(jnp.int8), units, summed)


def whole(w: jax.Array | Held, dtype) -> jax.Array:
    """A weight in the dtype it is computed with."""
    return w.whole(dtype) if isinstance(w, Held) else w.astype(dtype)


def product(x: jax.Array, w: jax.Array | Held, axes: int = 1) -> jax.Array:
    """Sums over the last axes of x and the first of w, as many as said; in x's dtype."""

    def plain(x, w):
        return jnp.tensordot(x, whole(w, x.dtype), axes)

    rows, depth = x.shape[: x.ndim - axes], math.prod(x.shape[x.ndim - axes :])
    if math.prod(rows) > FEW_ROWS or not isinstance(w, Held):
        return plain(x, w)

    def of_few(x, w):
        y_RxF = _of_few(x.reshape(-1, depth), w.values.reshape(-1, depth), w.units)
        return y_RxF.astype(x.dtype).reshape(*rows, *w.values.shape[:-axes])

    return jax.lax.platform_dependent(x, w, cpu=of_few, default=plain)


def scores(x_BxD: jax.Array, table_VxD: jax.Array | Held) -> jax.Array:
    """x @ tableᵀ, float32."""

    def plain(x_BxD, table_VxD):
        table_VxD = whole(table_VxD, x_BxD.dtype)
        return jnp.einsum("BD,VD->BV", x_BxD, table_VxD, preferred_element_type=jnp.float32)

    if len(x_BxD) > FEW_ROWS or not isinstance(table_VxD, Held):
        return plain(x_BxD, table_VxD)

    def of_few(x_BxD, table_VxD):
        return _of_few(x_BxD, table_VxD.values, table_VxD.units)

    return jax.lax.platform_dependent(x_BxD, table_VxD, cpu=of_few, default=plain)


def product_with_one(x_1xD: jax.Array, w_ExDxF: jax.Array | Held, e: jax.Array) -> jax.Array:
    """x @ w[e] in x's dtype, reading no other expert's weights."""

    def at(w):
        return jax.lax.dynamic_index_in_dim(w, e, keepdims=False)

    def plain(x_1xD, w, e):
        return x_1xD @ whole(jax.tree.map(at, w), x_1xD.dtype)

    def of_one(x_1xD, w, e):
        if isinstance(w, Held):
            units = None if w.units is None else at(w.units)
            return _by_blocks(x_1xD, w.values, units, e).astype(x_1xD.dtype)
        return _by_rows(x_1xD, w, e).astype(x_1xD.dtype)

    return jax.lax.platform_dependent(x_1xD, w_ExDxF, e, cpu=of_one, default=plain)


def _of_few(x_RxD: jax.Array, w_FxD: jax.Array, units) -> jax.Array:
    """x @ wᵀ times units, float32."""
    if w_FxD.dtype != jnp.float32:
        return _by_blocks(x_RxD, w_FxD, units)
    slices = math.gcd(len(w_FxD), SLICES)
    w_NxfxD = w_FxD.reshape(slices, -1, w_FxD.shape[1])
    y_NxRxf = jnp.einsum("RD,NfD->NRf", x_RxD.astype(jnp.float32), w_NxfxD)
    return y_NxRxf.swapaxes(0, 1).reshape(len(x_RxD), -1)


def _by_blocks(x_RxD: jax.Array, w: jax.Array, units, e: jax.Array | None = None) -> jax.Array:
    """x @ wᵀ, or x @ w[e]ᵀ, times units; float32, some outputs at a time."""
    outputs, depth = w.shape[-2:]
    one = len(x_RxD) == 1
    blocks = _blocks(outputs, depth, BLOCK_OF_ONE_ROW if one else BLOCK)
    size = outputs // blocks

    def some(i):
        at, shape = (i * size, 0), (size, depth)
        if e is not None:
            at, shape = (e, *at), (1, *shape)
        block_fxD = jax.lax.dynamic_slice(w, at, shape).reshape(size, depth).astype(jnp.float32)
        x = x_RxD.astype(jnp.float32)
        # With one row x goes first, or else the block is turned before it is multiplied.
        return (x @ block_fxD.T).T if one else block_fxD @ x.T

    y_RxF = jax.lax.map(some, jnp.arange(blocks)).reshape(outputs, -1).T
    return y_RxF if units is None else y_RxF * units.reshape(1, -1)


def _by_rows(x_1xD: jax.Array, w_ExDxF: jax.Array, e: jax.Array) -> jax.Array:
    """x @ w[e], float32, some rows of the weight at a time."""
    _, depth, width = w_ExDxF.shape
    blocks = _blocks(depth, width, BLOCK)
    size = depth // blocks

    def part(i):
        x = jax.lax.dynamic_slice_in_dim(x_1xD, i * size, size, axis=1)
        block = jax.lax.dynamic_slice(w_ExDxF, (e, i * size, 0), (1, size, width))[0]
        return x.astype(jnp.float32) @ block.astype(jnp.float32)

    return jax.lax.fori_loop(1, blocks, lambda i, y_1xF: y_1xF + part(i), part(0))


def _blocks(rows: int, width: int, elements: int) -> int:
    """Into how many equal blocks of rows a weight is cut, so that one has few enough elements."""
    fits = (n for n in range(1, rows + 1) if rows % n == 0 and rows // n * width <= elements)
    return next(fits, rows)
