"""The collectives of a compiled program: kind, mesh axes, bytes, and a model of their time."""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from prmoe_jax.plan.program import COLLECTIVES, END, Operation, result, size

# A function from a collective's kind, the devices of a group, and the bytes of its larger side
# (operands or result) to its seconds.
Network = Callable[[str, np.ndarray, int], float]


class Collective(NamedTuple):
    """All runs of one operation in a step."""

    kind: str
    axes: tuple[str, ...]  # the mesh axes over which it communicates
    asynchronous: bool  # computation goes on between its begin and its end
    runs: int
    bytes: int  # a device's larger side (operands or result), all runs together
    seconds: float
    exposed_seconds: float = 0.0  # in which computation waits for it


def kind(operation: Operation) -> str | None:
    """The kind of collective that an operation is; None if it is none."""
    name = operation.opcode.removesuffix("-start")
    return name if name in COLLECTIVES else None


def collectives(
    operations: Sequence[Operation], mesh_shape: dict[str, int], network: Network
) -> dict[int, Collective]:
    """The collectives among a program's operations, by their place in the sequence.

    Args:
      operations: from `program.operations`.
      mesh_shape: axis -> number of devices, outermost axis first.
      network: from `torus` or `hosts`.
    """
    devices = int(np.prod(list(mesh_shape.values())))
    found = {}
    for place, operation in enumerate(operations):
        if not kind(operation):
            continue
        members = groups(operation.text, devices)[0]
        positions = np.stack(np.unravel_index(members, list(mesh_shape.values())), 1)
        axes = tuple(
            name
            for name, column in zip(mesh_shape, positions.T, strict=True)
            if len(set(column)) > 1
        )
        moved = _bytes(operation, len(members))
        runs = operation.runs
        seconds = network(kind(operation), members, moved)
        found[place] = Collective(
            kind(operation), axes, bool(operation.pair), runs, moved * runs, seconds * runs
        )
    return found


def exposed(
    operations: Sequence[Operation], seconds: Sequence[float], sent: dict[int, Collective]
) -> dict[int, Collective]:
    """The collectives with the time that computation waits for each.

    Operations run one after the other in their order. Meanwhile the network moves the data of
    asynchronous collectives, one collective after the other. All runs of a loop are taken together:
    they are equal, and no collective goes on from one run to the next.

    Args:
      operations: from `program.operations`.
      seconds: the time of each operation, all runs together; that of collectives is not used.
      sent: from `collectives`.
    """
    now = network_free = 0.0
    found, ends = dict(sent), {}
    for place, operation in enumerate(operations):
        if place in sent:
            network_free = max(now, network_free) + sent[place].seconds
            if operation.pair:
                ends[operation.pair] = place, network_free
                continue
            begun, end = place, network_free
        elif operation.opcode == END:
            begun, end = ends.pop(operation.pair)
        else:
            now += seconds[place]
            continue
        found[begun] = sent[begun]._replace(exposed_seconds=max(0.0, end - now))
        now = max(now, end)
    return found


def _bytes(operation: Operation, members: int) -> int:
    """Bytes of the larger side; the shape of a '-start' holds both result and operands."""
    shape = result(operation)
    if operation.opcode.endswith("-start"):
        return max(size(part) for part in re.findall(r"\w+\[[\d,]*\]", shape))
    return size(shape) * (members if operation.opcode == "reduce-scatter" else 1)


def torus(coordinates: np.ndarray, link_bytes_per_s: float) -> Network:
    """Models chips that are linked to their neighbours, as TPUs are.

    A collective uses a ring in every dimension that its group spans, in both directions at once.
    An all-gather or reduce-scatter moves its larger side once, an all-reduce twice. An all-to-all
    is bound by the middle of the longest dimension: a quarter of the data crosses it in each
    direction. Nothing else is assumed to use the links.

    Args:
      coordinates: [devices, dimensions], in the order of the mesh.
      link_bytes_per_s: bandwidth of one link in one direction.
    """

    def seconds(kind: str, members: np.ndarray, moved: int) -> float:
        extents = [len(set(column)) for column in coordinates[members].T]
        wires = 2 * link_bytes_per_s * max(1, sum(extent > 1 for extent in extents))
        share = 1 - 1 / len(members)
        return {
            "all-reduce": 2 * moved * share / wires,
            "all-to-all": moved * max(extents) / 8 / link_bytes_per_s,
            "collective-permute": moved / (2 * link_bytes_per_s),
        }.get(kind, moved * share / wires)

    return seconds


def hosts(host: np.ndarray, link_bytes_per_s: float, network_bytes_per_s: float) -> Network:
    """Models GPUs that share a switch in each host and divide the host's network evenly.

    Traffic within a host uses the switch, and traffic between hosts the network, one after the
    other and each at full speed. Over the network go all but 1/H of an array that H hosts gather,
    twice as much for an all-reduce, and for an all-to-all the parts for other hosts.

    Args:
      host: [devices], the host of each device in the order of the mesh.
      link_bytes_per_s: bandwidth of a GPU's link to the switch, in one direction.
      network_bytes_per_s: bandwidth of a GPU's share of the network, in one direction.
    """

    def seconds(kind: str, members: np.ndarray, moved: int) -> float:
        places = host[members]
        spanned = len(set(places))
        inside = len(members) / spanned  # devices of a group on one host
        if kind == "all-to-all":
            away = 1 - inside / len(members)
            within = (inside - 1) / len(members)
            return moved * (away / network_bytes_per_s + within / link_bytes_per_s)
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
        return np.array([_numbers(group) for group in re.findall(r"\{([\d,]+)\}", listed)])
    if not text.startswith("mesh"):
        shape, order = re.match(r"\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text).groups()
        return _iota(order).reshape(_numbers(shape))
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", text.partition("]")[0]))
    order = re.search(r"device_ids=\((\[[\d,]+\](?:T\([\d,]+\))?)\)", text)
    ids = _iota(order[1]) if order else np.arange(devices)
    ids = ids.reshape([int(size) for size in sizes.values()])
    inside = re.findall(r"'(\w+)'", re.search(r" \{(.*?)\}", text)[1])
    ids = np.moveaxis(ids, [list(sizes).index(name) for name in inside], range(-len(inside), 0))
    return ids.reshape(-1, np.prod([int(sizes[name]) for name in inside]))


def _iota(text: str) -> np.ndarray:
    """Device numbers: '[2,4]T(1,0)' is 0 to 7 in that shape, transposed and flattened."""
    shape, order = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    ids = np.arange(np.prod(_numbers(shape))).reshape(_numbers(shape))
    return (ids.transpose(_numbers(order)) if order else ids).reshape(-1)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
