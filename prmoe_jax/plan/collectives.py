"""What a compiled program sends between devices: kind, axes, bytes, and a model of the time."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from prmoe_jax.plan.cycles import Operation

KINDS = "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}


class Collective(NamedTuple):
    """All runs of one operation in a step."""

    kind: str
    axes: tuple[str, ...]  # of the mesh, over which it goes
    hidden: bool  # starts and ends apart, so that computation can go on
    runs: int
    bytes: int  # of a device's result, all runs together
    seconds: float


def collectives(
    operations: Sequence[Operation],
    mesh_shape: dict[str, int],
    coordinates: np.ndarray,
    link_bytes_per_s: float,
) -> list[Collective]:
    """The collectives among a program's operations, dearest first.

    The model of time: a ring in every dimension of the torus that the devices span, both ways at
    once, at `link_bytes_per_s` a link and direction. An all-gather or reduce-scatter moves its
    larger side once, an all-reduce twice; an all-to-all is bound by the middle of the longest
    dimension, which a quarter of what it spans crosses. Nothing else shares the links.

    Args:
      operations: of `cycles.cycles`.
      mesh_shape: axis -> devices, outermost first.
      coordinates: [devices, dimensions] in the torus, in the order of the mesh.
      link_bytes_per_s: of one link in one direction.
    """
    found = []
    for operation in operations:
        kind = operation.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        members = groups(operation.text, len(coordinates))[0]
        places = np.stack(np.unravel_index(members, list(mesh_shape.values())), 1)
        axes = tuple(
            name for name, column in zip(mesh_shape, places.T, strict=True) if len(set(column)) > 1
        )
        extents = [len(set(column)) for column in coordinates[members].T]
        size = _result_bytes(operation)
        if kind == "reduce-scatter":
            size *= len(members)
        wires = 2 * link_bytes_per_s * max(1, sum(extent > 1 for extent in extents))
        share = 1 - 1 / len(members)
        seconds = {
            "all-reduce": 2 * size * share / wires,
            "all-to-all": size * max(extents) / 8 / link_bytes_per_s,
            "collective-permute": size / (2 * link_bytes_per_s),
        }.get(kind, size * share / wires)
        hidden = operation.opcode.endswith("-start")
        runs = operation.runs
        found.append(Collective(kind, axes, hidden, runs, size * runs, seconds * runs))
    return sorted(found, key=lambda collective: -collective.seconds)


def _result_bytes(operation: Operation) -> int:
    """Of the result; a '-start' has its operands in it too: the largest part counts."""
    result = operation.text[: operation.text.index(f" {operation.opcode}(")]
    sizes = [
        BYTES[kind] * int(np.prod([int(d) for d in dims.split(",") if d]))
        for kind, dims in re.findall(r"\b(\w+)\[([\d,]*)\]", result)
        if kind in BYTES
    ]
    return max(sizes) if operation.opcode.endswith("-start") else sum(sizes)


def groups(text: str, devices: int) -> np.ndarray:
    """Which devices go together, as positions in the mesh: [groups, members].

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
    """'[2,4]T(1,0)': 0 to 7 in that shape, transposed, in a row."""
    shape, order = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    ids = np.arange(np.prod(_numbers(shape))).reshape(_numbers(shape))
    return (ids.transpose(_numbers(order)) if order else ids).reshape(-1)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
