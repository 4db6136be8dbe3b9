"""Matrix products with weights, in variants that are fast on CPUs.

For few rows, reading the weight is the cost. Weights of inference have the axes that are summed
over last: for 2 to 16 rows, XLA then multiplies about twice as fast (measured with jax 0.10 on
Zen 4). A weight of fewer bits is not dequantized: instead, each of the few rows is split into a sum
of parts in the weight's dtype. In training, the gradient is written by hand, so that it transposes
as little as possible.

R: rows. F: outputs. P: parts of a row. S: P·R. N: slices of a weight; f: F of a slice.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from prmoe_jax.nn.quantized import InferenceWeight, to_dtype

# With at most this many rows, a product is bound by reading the weight.
FEW_ROWS = 16
# From this many bytes on, a weight is multiplied in slices: XLA may read a larger int8 weight at a
# fifth of the speed (measured with jax 0.12 on Zen 4).
LARGEST = 1 << 23
# Parts of a float32 number. Three bfloat16 hold all its bits; three int8 hold it with an error of
# 2⁻²⁴, relative to the largest number of its row.
PARTS = 3


def matmul(x: jax.Array, w: jax.Array | InferenceWeight, axes: int = 1) -> jax.Array:
    """Sums over the last `axes` axes of x and the first `axes` of w; the result has x's dtype.

    Both factors have the dtype of fewer bits (see `precision.py`).
    """

    def plain(x, w):
        return _tensordot(axes, x, to_dtype(w, x.dtype))

    rows, depth = x.shape[: x.ndim - axes], math.prod(x.shape[x.ndim - axes :])
    if not isinstance(w, InferenceWeight) or math.prod(rows) > FEW_ROWS:
        return plain(x, w)

    def of_few(x, w):
        y_RxF = _by_parts(x.reshape(-1, depth), w.values.reshape(-1, depth), w.scales)
        return y_RxF.astype(x.dtype).reshape(*rows, *w.values.shape[:-axes])

    return jax.lax.platform_dependent(x, w, cpu=of_few, default=plain)


def dot(x_RxD: jax.Array, w_DxF: jax.Array) -> jax.Array:
    """x @ w with x in w's dtype; the result has the dtype that x has here."""
    return jnp.matmul(x_RxD.astype(w_DxF.dtype), w_DxF, preferred_element_type=x_RxD.dtype)


def sum_over_rows(x_RxD: jax.Array, dy_RxF: jax.Array, dtype, result=None) -> jax.Array:
    """xᵀ @ dy with factors in `dtype`, as in the gradient of a weight.

    Args:
      x_RxD, dy_RxF: the weight's input and the gradient of its output.
      dtype: the dtype of the factors.
      result: the dtype of the result, by default dy's.
    """
    result = result or dy_RxF.dtype
    x_DxR = x_RxD.astype(dtype).T
    if dtype != result:
        # On CPUs, XLA multiplies bfloat16 fast only if no factor is transposed in place.
        x_DxR = with_layout_constraint(x_DxR, Layout((0, 1)))
    return jnp.matmul(x_DxR, dy_RxF.astype(dtype), preferred_element_type=result)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tensordot(axes: int, x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.tensordot(x.astype(w.dtype), w, axes, preferred_element_type=x.dtype)


def _tensordot_backward(axes: int, residuals, dy):
    x, w = residuals
    rows, outputs = tuple(range(x.ndim - axes)), tuple(range(axes, w.ndim))
    if dy.dtype != w.dtype:
        depth = math.prod(w.shape[:axes])
        dy_RxF = dy.reshape(-1, w.size // depth)
        dx_RxD = dot(dy_RxF, w.reshape(depth, -1).T)
        dw_DxF = sum_over_rows(x.reshape(-1, depth), dy_RxF, w.dtype)
        return dx_RxD.reshape(x.shape), dw_DxF.reshape(w.shape).astype(w.dtype)

    def plain(x, w, dy):
        dx = jnp.tensordot(dy, w, (tuple(range(len(rows), dy.ndim)), outputs))
        return dx, jnp.tensordot(x, dy, (rows, rows))

    def turned(x, w, dy):
        # On CPUs, XLA copies a left operand that is transposed, so the narrower one comes left. The
        # barrier keeps XLA from fusing the copy with other operations into a slow loop.
        w_DxF = w.reshape(math.prod(w.shape[:axes]), -1)
        depth, width = w_DxF.shape
        x_RxD, dy_RxF = x.reshape(-1, depth), dy.reshape(-1, width)
        barrier = jax.lax.optimization_barrier
        if depth <= width:
            dw_DxF = barrier(x_RxD.T) @ dy_RxF
        else:
            dw_DxF = (barrier(dy_RxF.T) @ x_RxD).T
        return (dy_RxF @ w_DxF.T).reshape(x.shape), dw_DxF.reshape(w.shape)

    return jax.lax.platform_dependent(x, w, dy, cpu=turned, default=plain)


_tensordot.defvjp(
    lambda axes, x, w: (_tensordot(axes, x, w), (x.astype(w.dtype), w)), _tensordot_backward
)


@jax.custom_vjp
def cpu_scores(x_RxD: jax.Array, table_VxD: jax.Array) -> jax.Array:
    """x @ tableᵀ in float32, with factors of the same dtype in its derivative, for CPUs.

    JAX's derivative would multiply the float32 gradient of the result.
    """
    return scores(x_RxD, table_VxD)


def _cpu_scores_backward(residuals, dy_RxV):
    x_RxD, table_VxD = residuals
    dx_RxD = dot(dy_RxV, table_VxD).astype(x_RxD.dtype)
    dtable_VxD = sum_over_rows(dy_RxV, x_RxD, table_VxD.dtype, jnp.float32)
    return dx_RxD, dtable_VxD.astype(table_VxD.dtype)


cpu_scores.defvjp(lambda x, table: (cpu_scores(x, table), (x, table)), _cpu_scores_backward)


def scores(x_BxD: jax.Array, table_VxD: jax.Array | InferenceWeight) -> jax.Array:
    """x @ tableᵀ in float32."""

    def plain(x_BxD, table_VxD):
        table_VxD = to_dtype(table_VxD, x_BxD.dtype)
        return jnp.einsum("BD,VD->BV", x_BxD, table_VxD, preferred_element_type=jnp.float32)

    if not isinstance(table_VxD, InferenceWeight) or len(x_BxD) > FEW_ROWS:
        return plain(x_BxD, table_VxD)

    def of_few(x_BxD, table_VxD):
        return _by_parts(x_BxD, table_VxD.values, table_VxD.scales)

    return jax.lax.platform_dependent(x_BxD, table_VxD, cpu=of_few, default=plain)


def _by_parts(x_RxD: jax.Array, w_FxD: jax.Array, scales: jax.Array | None) -> jax.Array:
    """x @ wᵀ · scales in float32; each row of x is a sum of `PARTS` rows in a narrow w's dtype."""
    rest_RxD = x_RxD.astype(jnp.float32)
    if w_FxD.dtype == jnp.float32:
        return _by_outputs(rest_RxD, w_FxD, jnp.float32)
    nearest: Callable[[jax.Array], jax.Array]
    if scales is None:
        finer, kind = 1, jnp.float32
        # Not a cast to bfloat16 and back, which XLA may remove.
        nearest = functools.partial(jax.lax.reduce_precision, exponent_bits=8, mantissa_bits=7)
    else:
        finer, kind, nearest = 254, jnp.int32, jnp.round
        scale_Rx1 = jnp.maximum(jnp.abs(rest_RxD).max(-1, keepdims=True), 1e-30) / 127
        rest_RxD /= scale_Rx1
    parts = []
    for _ in range(PARTS):
        parts.append(nearest(rest_RxD))
        rest_RxD = (rest_RxD - parts[-1]) * finer
    y_SxF = _by_outputs(jnp.concatenate(parts).astype(w_FxD.dtype), w_FxD, kind)
    y_PxRxF = y_SxF.reshape(PARTS, len(x_RxD), -1)
    y_RxF = sum(y_RxF.astype(jnp.float32) / finer**p for p, y_RxF in enumerate(y_PxRxF))
    return y_RxF if scales is None else y_RxF * scale_Rx1 * scales.reshape(1, -1)


def _by_outputs(x_RxD: jax.Array, w_FxD: jax.Array, kind) -> jax.Array:
    """x @ wᵀ in the dtype `kind`; a large weight is multiplied in slices of its outputs."""
    slices = math.gcd(len(w_FxD), 1 << (w_FxD.nbytes // LARGEST).bit_length())
    w_NxfxD = w_FxD.reshape(slices, -1, w_FxD.shape[1])
    x_NxRxD = jnp.broadcast_to(x_RxD, (slices, *x_RxD.shape))  # else XLA merges the slices again
    y_NxfxR = jnp.einsum("NfD,NRD->NfR", w_NxfxD, x_NxRxD, preferred_element_type=kind)
    return y_NxfxR.reshape(len(w_FxD), -1).T
