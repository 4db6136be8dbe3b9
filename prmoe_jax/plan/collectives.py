"""The collectives of a compiled program: kind, mesh axes, bytes, and a model of their time."""

import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from prmoe_jax.plan.program import COLLECTIVES, END, Operation, field, numbers, result, size

# Latency in seconds of a transfer between slices: device to host, network, host to device. It is an
# assumption, since no data sheet states it.
LATENCY = 50e-6
# Maps a collective's kind, the devices of one group and the bytes of the larger side (operands or
# result) to seconds.
Network = Callable[[str, np.ndarray, int], float]


class Collective(NamedTuple):
    """A collective operation; numbers are sums over all its runs in a step."""

    kind: str  # one of COLLECTIVES
    axes: tuple[str, ...]  # the mesh axes over which it communicates
    asynchronous: bool  # computation goes on between its start and its end
    runs: int
    bytes: int  # per device, of the larger side (operands or result)
    seconds: float
    away: bool = False  # between slices, or between hosts of GPUs
    exposed_seconds: float = 0.0  # time that computation waits for it


def kind(operation: Operation) -> str | None:
    """The kind of a collective operation; None for other operations.

    In a program for several TPU slices, collectives stay inside a slice. Across slices, a `send` to
    the host names the collective that the hosts perform, and a `recv` takes its result.
    """
    if operation.opcode != "send":
        name = operation.opcode.removesuffix("-start")
        return name if name in COLLECTIVES else None
    named = field(operation.text, r'_xla_megascale_transfer_type="(\w+)"')
    name = named.lower().replace("_", "-")
    return name if name in COLLECTIVES else "collective-permute"


def collectives(
    operations: Sequence[Operation],
    mesh_shape: dict[str, int],
    network: Network,
    island: np.ndarray | None = None,
    partitions: int | None = None,
) -> dict[int, Collective]:
    """The collectives among a program's operations, by their index in the sequence.

    Args:
      operations: from `program.operations`.
      mesh_shape: axis -> number of devices, outermost axis first.
      network: from `torus`, `hosts` or `slices`.
      island: [devices], the slice of each TPU or the host of each GPU; by default all are in one.
      partitions: the number of devices that run one program, those of a TPU slice or (default) of
        the mesh. They come first in the mesh.
    """
    sizes, found = list(mesh_shape.values()), {}
    partitions = partitions or math.prod(sizes)
    for index, operation in enumerate(operations):
        name, runs = kind(operation), operation.runs
        if name is None:
            continue
        if operation.opcode == "send":
            members = _slices(operation.text) * partitions
        else:
            members = groups(operation.text, partitions)[0]
        places = zip(mesh_shape, np.unravel_index(members, sizes), strict=True)
        moved = _bytes(operation, len(members))
        found[index] = Collective(
            kind=name,
            axes=tuple(axis for axis, place in places if len(set(place)) > 1),
            asynchronous=bool(operation.pair),
            runs=runs,
            bytes=moved * runs,
            seconds=network(name, members, moved) * runs,
            away=island is not None and len(set(island[members])) > 1,
        )
    return found


def exposed(
    operations: Sequence[Operation], seconds: Sequence[float], sent: dict[int, Collective]
) -> dict[int, Collective]:
    """Sets `exposed_seconds`: the time that computation waits for each collective.

    Operations run one after the other, in program order. Asynchronous collectives run beside them,
    on the links inside a slice or on the network between slices. Each of the two carries one
    collective at a time, but `LATENCY` does not occupy the network. All runs of a loop are modelled
    as one: they are equal, and each waits only for collectives that began in it or long before it.
    The step ends when all collectives have ended. `seconds` has the time of each operation, all
    runs together; it is ignored for the collectives in `sent`.
    """
    now, free = 0.0, {False: 0.0, True: 0.0}
    found, ends = dict(sent), {}

    def wait(place: int, end: float) -> None:
        nonlocal now
        found[place] = sent[place]._replace(exposed_seconds=max(0.0, end - now))
        now = max(now, end)

    for place, operation in enumerate(operations):
        if collective := sent.get(place):
            latency = LATENCY * collective.runs if operation.opcode == "send" else 0.0
            free[collective.away] = max(now, free[collective.away]) + collective.seconds - latency
            end = free[collective.away] + latency
            if operation.pair:
                ends[operation.pair] = place, end
            else:
                wait(place, end)
        elif operation.opcode != END:
            now += seconds[place]
        elif operation.pair in ends:
            wait(*ends.pop(operation.pair))
    for place, end in ends.values():
        wait(place, end)
    return found


def _slices(text: str) -> np.ndarray:
    """The slices, counted from 0, that take part in a transfer.

    XLA counts slices from 1. It writes slices and the chips of each, '"{1,2}x{0:3}"', or groups of
    devices, '{{100000,200000},{100001,200001}}', where a device is 100,000 * slice + chip.
    """
    target = text.partition("_xla_megascale_target=")[2]
    listed = numbers(field(target, r'^["{]*([\d,]+)\}'))
    return np.array([number // 100_000 or number for number in listed]) - 1


def _bytes(operation: Operation, members: int) -> int:
    """Bytes of the larger side, operands or result.

    The shape of a '-start' is a tuple of operands, result and flags; several arrays sent at once
    form a tuple inside it. For an all-reduce, it may hold one side only, since both are equal.
    """
    shape = result(operation)
    if operation.opcode == "send":
        part = size(re.search(r"\w+\[[\d,]*\]", shape)[0])
        return part * (members if kind(operation) == "all-gather" else 1)
    if operation.opcode.startswith("ragged-all-to-all"):
        # One side holds rows without padding, the other a buffer for more than an even load.
        return min(size(part) for part in re.findall(r"\w+\[\d+,[\d,]*\]", shape))
    if operation.opcode.endswith("-start"):
        parts = _elements(shape)
        one_side = operation.opcode == "all-reduce-start" and not parts[0].startswith("(")
        return size(shape) if one_side else max(map(size, parts))
    return size(shape) * (members if operation.opcode == "reduce-scatter" else 1)


def _elements(shape: str) -> list[str]:
    """The elements of a tuple's shape, which may be tuples; [shape] if it is no tuple."""
    if not shape.startswith("("):
        return [shape]
    found, depth = [""], 0
    for character in shape[1:-1]:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and not depth:
            found.append("")
        else:
            found[-1] += character
    return found


def torus(
    coordinates: np.ndarray, link_bytes_per_s: float, die_bytes_per_s: float = 0.0
) -> Network:
    """Models chips that are linked to their neighbours, as TPUs are.

    A collective uses a ring in every dimension that its group spans, in both directions at once.
    An all-gather or reduce-scatter moves its larger side once, an all-reduce twice. An all-to-all
    is bound by the middle of the longest dimension: a quarter of the data crosses it in each
    direction. Nothing else is assumed to use the links.

    The devices of a chip have equal shares of its links; a group with several devices of a chip
    uses all their shares. Only a group inside one chip uses the die-to-die link.

    Args:
      coordinates: [devices, dimensions], in the order of the mesh.
      link_bytes_per_s, die_bytes_per_s: see `chips.Chip`.
    """

    def seconds(kind: str, members: np.ndarray, moved: int) -> float:
        extents = [len(set(column)) for column in coordinates[members].T]
        rings = sum(extent > 1 for extent in extents)
        share = 1 - 1 / len(members)
        if not rings and len(members) > 1 and die_bytes_per_s:
            return moved * _sent(kind, len(members)) / die_bytes_per_s
        together = len(members) // len(np.unique(coordinates[members], axis=0))
        wires = 2 * link_bytes_per_s * max(1, rings) * together
        return {
            "all-reduce": 2 * moved * share / wires,
            "all-to-all": moved * max(extents) / 8 / link_bytes_per_s,
            "ragged-all-to-all": moved * max(extents) / 8 / link_bytes_per_s,
            "collective-permute": moved / (2 * link_bytes_per_s),
        }.get(kind, moved * share / wires)

    return seconds


def slices(inside: Network, devices: int, network_bytes_per_s: float) -> Network:
    """Models TPU slices that the data-centre network links.

    The chips of a host have equal shares of its network. If S slices gather, scatter or exchange,
    each chip sends 1 - 1/S of its part of the array, twice as much for an all-reduce. `LATENCY` is
    added to each transfer.

    Args:
      inside: from `torus`, the model of a slice's links.
      devices: the number of devices in a slice; slices follow each other in the mesh.
      network_bytes_per_s: see `chips.Chip`.
    """

    def seconds(kind: str, members: np.ndarray, moved: int) -> float:
        count = len(set(members // devices))
        if count == 1:
            return inside(kind, members, moved)
        return LATENCY + moved * _sent(kind, count) / network_bytes_per_s

    return seconds


def _sent(kind: str, members: int) -> float:
    """The share of an array that each of the members sends."""
    share = 1 - 1 / members
    return {"all-reduce": 2 * share, "collective-permute": 1}.get(kind, share)


def hosts(host: np.ndarray, link_bytes_per_s: float, network_bytes_per_s: float) -> Network:
    """Models GPUs that share a switch in each host and divide the host's network evenly.

    Traffic inside a host uses the switch, traffic between hosts the network; their times add up. If
    H hosts gather or scatter an array, 1 - 1/H of it crosses the network, twice as much for an
    all-reduce. In an all-to-all, the parts for other hosts cross it.

    Args:
      host: [devices], the host of each device in the order of the mesh.
      link_bytes_per_s, network_bytes_per_s: see `chips.Chip`.
    """

    def seconds(kind: str, members: np.ndarray, moved: int) -> float:
        spanned = len(set(host[members]))
        inside = len(members) / spanned  # devices of the group per host
        if kind in ("all-to-all", "ragged-all-to-all"):
            away = (1 - inside / len(members)) / network_bytes_per_s
            within = (inside - 1) / len(members) / link_bytes_per_s
            return moved * (away + within)
        if kind == "collective-permute":
            return moved / (link_bytes_per_s if spanned == 1 else network_bytes_per_s)
        # Every GPU of a host moves its own part of the array over the network.
        away = (1 - 1 / spanned) / inside / network_bytes_per_s
        within = (1 - 1 / inside) / link_bytes_per_s
        return (2 if kind == "all-reduce" else 1) * moved * (away + within)

    return seconds


def groups(text: str, devices: int) -> np.ndarray:
    """The groups of devices of a collective, as positions in the mesh: [groups, members].

    XLA writes '{{0,1},{2,3}}', '[2,2]<=[2,2]T(1,0)', or the mesh and its axes, as in
    "mesh['a'=2,'b'=2] {'a'}" and "mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}".
    """
    if pairs := re.search(r"source_target_pairs=\{(\{[\d,{} ]+\})\}", text):
        return np.array(re.findall(r"\{(\d+),\s*(\d+)\}", pairs[1]), int)
    text = text.partition("replica_groups=")[2] or text
    if text.startswith("{}"):
        return np.arange(devices)[None]
    if text.startswith("{"):
        listed = re.match(r"\{(\{[\d,{}]+\})\}", text)[1]
        return np.array([numbers(group) for group in re.findall(r"\{([\d,]+)\}", listed)])
    if not text.startswith("mesh"):
        shape, order = re.match(r"\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text).groups()
        return _iota(order).reshape(numbers(shape))
    sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", text.partition("]")[0])}
    order = re.search(r"device_ids=\((\[[\d,]+\](?:T\([\d,]+\))?)\)", text)
    ids = (_iota(order[1]) if order else np.arange(devices)).reshape(list(sizes.values()))
    inside = re.findall(r"'(\w+)'", field(text, r" \{(.*?)\}"))
    ids = np.moveaxis(ids, [list(sizes).index(name) for name in inside], range(-len(inside), 0))
    return ids.reshape(-1, math.prod(sizes[name] for name in inside))


def _iota(text: str) -> np.ndarray:
    """Device numbers: '[2,4]T(1,0)' is 0 to 7 in that shape, transposed and flattened."""
    shape, order = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    ids = np.arange(np.prod(numbers(shape))).reshape(numbers(shape))
    return (ids.transpose(numbers(order)) if order else ids).reshape(-1)
