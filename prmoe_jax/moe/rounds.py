"""The dropless exchange: a chunked all-to-all brings rows to their experts and back, in rounds.

Without a capacity, a device may get any number of rows, so devices exchange row counts first. In a
round, each device receives up to B rows (its buffer), applies its experts to them and sends the
results back. All devices run as many rounds as the fullest device needs; one is enough if it gets
at most B rows. Nothing is dropped and no buffer grows.

A receiver orders its rows by expert, then by sender. Round r takes the rows [r·B, (r + 1)·B) of
this order. Some devices can only exchange pieces of equal size. There, round r takes the rows
[r·P, (r + 1)·P) that each sender has for each receiver, and B = X·P.

Axes: S senders and X receivers (the same devices), I experts that a sender addresses through one
receiver, R rows of a sender, Q rows of the result, N flattened pairs of a device and an expert.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from prmoe_jax.moe.kernels import alike, first_rows
from prmoe_jax.nn import remat
from prmoe_jax.parallel.axes import platform

TILE_ROWS, TILE = 8, 8 * 128  # rows and elements of a TPU's tile

# Applies experts to rows [B, D] sorted by expert; the third argument is the number of rows of each
# expert. Returns the results and the number of rounds.
Apply = Callable[[object, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


class Stage(NamedTuple):
    """An exchange over mesh axes: each of the X devices has a part of every group of experts."""

    axes: tuple[str, ...]
    groups: int  # expert e of E is on device e // (E / groups / X) % X
    buffer: int  # B, the rows that a device receives in a round
    piece: int  # P, the most rows that one device sends to another in a round; 0 is no limit


class _Pieces(NamedTuple):
    """The rows that each sender has for each receiver's experts; each array is [S, X, I]."""

    rows: jax.Array  # number of rows
    start: jax.Array  # the first row's index at the sender
    # The first row's index among all rows for the receiver. If `piece` is set, it is the index
    # among this sender's rows for the receiver.
    order: jax.Array


class _Transfer(NamedTuple):
    """What one device sends and receives in a round; flat arrays [N], by device and expert."""

    sent: jax.Array  # numbers of rows
    sent_from: jax.Array  # offsets in this device's rows
    sent_to: jax.Array  # offsets in the receivers' buffers
    received: jax.Array  # numbers of rows
    received_from: jax.Array  # offsets in the senders' rows
    received_to: jax.Array  # offsets in this device's buffer


def serve(stage: Stage, apply: Apply, experts, x_RxD: jax.Array, rows_E: jax.Array):
    """Applies experts on all devices of a stage to each device's rows.

    The backward pass reads values of the first round, which are kept as `remat` says. It repeats
    the exchange and the computation of later rounds.

    Args:
      stage: which devices exchange.
      apply: applies the experts of this device.
      experts: the first argument of `apply`, a pytree with a gradient.
      x_RxD: rows sorted by expert; rows of no expert come last.
      rows_E: the number of rows for each of the stage's experts.

    Returns:
      The results for x, 0 for rows of no expert, and the sum of the rounds that `apply` returned.
    """

    def arrive(x_RxD, transfer: _Transfer) -> jax.Array:
        """The rows that this device receives in a round, and zeros after them."""
        with jax.named_scope("exchange"):
            x_Bx = _ragged_all_to_all(
                _as_exchanged(x_RxD, stage),
                _empty(stage.buffer, x_RxD, stage),
                transfer.sent_from,
                transfer.sent,
                transfer.sent_to,
                transfer.received,
                stage,
            )
            return first_rows(_as_matrix(x_Bx, stage), transfer.received.sum())

    def give_back(y_BxD, into_Rx, transfer: _Transfer) -> jax.Array:
        """Sends a round's results back and writes them into `into_Rx`, at their rows."""
        with jax.named_scope("exchange"):
            return _ragged_all_to_all(
                _as_exchanged(y_BxD, stage),
                into_Rx,
                transfer.received_to,
                transfer.received,
                transfer.received_from,
                transfer.sent,
                stage,
            )

    def served(y_Rx, pieces: _Pieces) -> jax.Array:
        """All results as a matrix [R, D], with zeros for rows of no expert."""
        sent = pieces.rows[jax.lax.axis_index(stage.axes)].sum()
        return first_rows(_as_matrix(y_Rx, stage), sent)

    def in_round(index, pieces: _Pieces) -> tuple[_Transfer, jax.Array]:
        transfer = _transfer(pieces, index, stage)
        return transfer, transfer.received.reshape(pieces.rows.shape[::2]).sum(0)

    def forward(experts, x_RxD, rows_E, differentiate: bool = True):
        with jax.named_scope("dispatch"):
            pieces = remat.save_collective(_pieces(rows_E, stage))
            rounds = remat.save_collective(_rounds(pieces, stage))
            transfer, rows_I = in_round(0, pieces)
        x_BxD = remat.save_collective(arrive(x_RxD, transfer))
        derivative = None
        if differentiate:
            y_BxD, derivative, runs = jax.vjp(
                lambda experts, x_BxD: apply(experts, x_BxD, rows_I), experts, x_BxD, has_aux=True
            )
        else:
            y_BxD, runs = apply(experts, x_BxD, rows_I)
        y_Rx = give_back(y_BxD, _empty(len(x_RxD), x_RxD, stage), transfer)

        def another(carry):
            index, runs, y_Rx = carry
            transfer, rows_I = in_round(index, pieces)
            y_BxD, more = apply(experts, arrive(x_RxD, transfer), rows_I)
            return index + 1, runs + more, give_back(y_BxD, y_Rx, transfer)

        with jax.named_scope("rounds"):
            _, runs, y_Rx = jax.lax.while_loop(
                lambda carry: carry[0] < rounds, another, (jnp.int32(1), runs, y_Rx)
            )
        y_RxD = remat.save_collective(served(y_Rx, pieces))
        return (y_RxD, runs), (derivative, experts, x_RxD, pieces, rounds)

    def backward(saved, gradients):
        derivative, experts, x_RxD, pieces, rounds = saved
        dy_RxD, _ = gradients
        with jax.named_scope("dispatch"):
            transfer, _ = in_round(0, pieces)
        dexperts, dx_BxD = derivative(arrive(dy_RxD, transfer))
        dx_Rx = give_back(dx_BxD, _empty(len(x_RxD), x_RxD, stage), transfer)

        def another(carry):
            index, dexperts, dx_Rx = carry
            transfer, rows_I = in_round(index, pieces)
            _, derivative, _ = jax.vjp(
                lambda experts, x_BxD: apply(experts, x_BxD, rows_I),
                experts,
                arrive(x_RxD, transfer),
                has_aux=True,
            )
            more, dx_BxD = derivative(arrive(dy_RxD, transfer))
            dexperts = jax.tree.map(jnp.add, dexperts, more)
            return index + 1, dexperts, give_back(dx_BxD, dx_Rx, transfer)

        with jax.named_scope("rounds"):
            _, dexperts, dx_Rx = jax.lax.while_loop(
                lambda carry: carry[0] < rounds, another, (jnp.int32(1), dexperts, dx_Rx)
            )
        return dexperts, served(dx_Rx, pieces), None

    @jax.custom_vjp
    def run(experts, x_RxD, rows_E):
        return forward(experts, x_RxD, rows_E, differentiate=False)[0]

    run.defvjp(forward, backward)
    return run(experts, x_RxD, rows_E)


def _pieces(rows_E: jax.Array, stage: Stage) -> _Pieces:
    devices = jax.lax.axis_size(stage.axes)

    def by_receiver(n_E):  # to [X, I]
        return n_E.reshape(stage.groups, devices, -1).swapaxes(0, 1).reshape(devices, -1)

    start_E = jnp.cumsum(rows_E) - rows_E
    mine_2xXxI = jnp.stack([by_receiver(rows_E), by_receiver(start_E)])
    all_Sx2xXxI = jax.lax.all_gather(mine_2xXxI, stage.axes, to="invarying")
    rows_SxXxI, start_SxXxI = all_Sx2xXxI[:, 0], all_Sx2xXxI[:, 1]
    if stage.piece:
        order_SxXxI = jnp.cumsum(rows_SxXxI, 2) - rows_SxXxI
    else:
        order_SxXxI = _arrival(rows_SxXxI)
    return _Pieces(rows_SxXxI, start_SxXxI, order_SxXxI)


def _arrival(rows_SxXxI: jax.Array) -> jax.Array:
    """The index of each first row at its receiver, which orders by expert, then by sender."""
    senders, receivers, _ = rows_SxXxI.shape
    ordered_XxN = rows_SxXxI.transpose(1, 2, 0).reshape(receivers, -1)
    place_XxN = jnp.cumsum(ordered_XxN, 1) - ordered_XxN
    return place_XxN.reshape(receivers, -1, senders).transpose(2, 0, 1)


def _rounds(pieces: _Pieces, stage: Stage) -> jax.Array:
    """The number of rounds in which all rows of the whole mesh are received."""
    at_once, together = (stage.piece, 2) if stage.piece else (stage.buffer, (0, 2))
    most = pieces.rows.sum(together).max()
    # Devices of a stage compute the same number. All others must run as many rounds, too: else a
    # collective would wait for ever.
    others = tuple(jax.typeof(most).manual_axis_type.varying)
    if others:
        most = jax.lax.pmax(most, others)
    return -(-most // at_once)


def _transfer(pieces: _Pieces, index, stage: Stage) -> _Transfer:
    at_once = stage.piece or stage.buffer
    first = jnp.maximum(pieces.order, index * at_once)
    last = jnp.minimum(pieces.order + pieces.rows, (index + 1) * at_once)
    rows = jnp.maximum(last - first, 0)
    places = pieces.start + first - pieces.order, _arrival(rows)
    moved = [jnp.where(rows > 0, n_SxXxI, 0) for n_SxXxI in (rows, *places)]
    me = jax.lax.axis_index(stage.axes)
    sent = [n_SxXxI[me].reshape(-1) for n_SxXxI in moved]
    received = [n_SxXxI[:, me].reshape(-1) for n_SxXxI in moved]
    return _Transfer(*sent, *received)


def _as_exchanged(x_RxD: jax.Array, stage: Stage) -> jax.Array:
    """Rows in the layout of the exchange: on a TPU [R, 8, D / 8], so that each row fills tiles.

    A tile of a matrix [R, D] has parts of eight rows. By default, the TPU's compiler would move
    rows to quarters of tiles, which is three times slower, and often transpose them first. Rows
    whose width does not fill tiles still go to quarters of tiles, but are not transposed.
    """
    if platform() != "tpu" or stage.piece:
        return x_RxD
    x_RxD = _by_rows(x_RxD)
    return x_RxD if x_RxD.shape[1] % TILE else x_RxD.reshape(len(x_RxD), TILE_ROWS, -1)


def _as_matrix(x_Rx: jax.Array, stage: Stage) -> jax.Array:
    """Exchanged rows as a matrix, [R, D]."""
    if platform() != "tpu" or stage.piece:
        return x_Rx
    return _by_rows(x_Rx.reshape(len(x_Rx), -1))


def _by_rows(x_RxD: jax.Array) -> jax.Array:
    """The same matrix in row-major layout, even if a product next to it prefers another."""
    return with_layout_constraint(x_RxD, Layout(major_to_minor=(0, 1)))


def _empty(rows: int, like_RxD: jax.Array, stage: Stage) -> jax.Array:
    """An uninitialised buffer for rows like these, in the layout of the exchange."""
    part = jax.eval_shape(lambda x: _as_exchanged(x, stage), like_RxD)

    def fresh() -> jax.Array:
        return jax.lax.empty((rows, *part.shape[1:]), part.dtype)

    # JAX would hoist the constant buffer out of the scan over layers, and the TPU would copy it for
    # each layer. `cond`, with two equal branches, makes it depend on the layer.
    buffer = jax.lax.cond(like_RxD[0, 0] == 0, fresh, fresh) if platform() == "tpu" else fresh()
    return alike(buffer, like_RxD)


def _ragged_all_to_all(x_RxD, into_QxD, starts, sizes, places, received, stage: Stage) -> jax.Array:
    """`jax.lax.ragged_all_to_all`, or an all-to-all of pieces that are padded to one size.

    XLA has no ragged all-to-all on CPUs. There, a piece is large enough for all rows.
    """
    if not stage.piece and platform() != "cpu":
        return jax.lax.ragged_all_to_all(
            x_RxD, into_QxD, starts, sizes, places, received, axis_name=stage.axes
        )
    piece = stage.piece or min(len(x_RxD), len(into_QxD))
    devices = jax.lax.axis_size(stage.axes)
    sizes_XxI = sizes.reshape(devices, -1)
    ends_XxI = jnp.cumsum(sizes_XxI, 1)
    shift_XxI = starts.reshape(devices, -1) - ends_XxI + sizes_XxI
    slot_P = jnp.arange(piece)
    which_XxP = (ends_XxI[:, None] <= slot_P[:, None]).sum(2)
    source_XxP = slot_P + jnp.take_along_axis(shift_XxI, which_XxP, 1, mode="clip")
    x_XxPxD = jnp.take(x_RxD, source_XxP, axis=0, mode="clip")
    place_3xN = jnp.stack([sizes, places])
    x_SxPxD = jax.lax.all_to_all(x_XxPxD, stage.axes, 0, 0)
    size_SxI, place_SxI = (
        jax.lax.all_to_all(n.reshape(devices, -1), stage.axes, 0, 0) for n in place_3xN
    )
    # For each row of the result, its index in the received pieces.
    begin_SxI = jnp.cumsum(size_SxI, 1) - size_SxI + piece * jnp.arange(devices)[:, None]
    size_N, place_N, begin_N = (n.reshape(-1) for n in (size_SxI, place_SxI, begin_SxI))
    slot_Qx1 = jnp.arange(len(into_QxD))[:, None]
    inside_QxN = (place_N <= slot_Qx1) & (slot_Qx1 < place_N + size_N)
    from_N = begin_N - place_N
    source_Q = jnp.where(inside_QxN, from_N + slot_Qx1, 0).sum(1)
    x_NxD = x_SxPxD.reshape(-1, x_SxPxD.shape[-1])
    return jnp.where(inside_QxN.any(1)[:, None], jnp.take(x_NxD, source_Q, axis=0), into_QxD)
