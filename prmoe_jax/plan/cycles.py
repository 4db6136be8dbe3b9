"""What the TPU compiler thinks its own program costs: per-operation `estimated_cycles`, summed."""

import re
from typing import NamedTuple

# Operations that take no time, or whose time is that of the work they wait for.
FREE = frozenset(
    "parameter constant bitcast tuple get-tuple-element copy-start copy-done partition-id "
    "replica-id after-all opt-barrier iota".split()
)
SENTINEL = 1 << 50  # "unknown" is written as a number near 2^64


class Operation(NamedTuple):
    """One operation of the optimized program."""

    name: str
    opcode: str
    cycles: int  # of all its runs; 0 without an estimate
    runs: int  # product of the trip counts of the loops around it
    text: str  # as the program writes it: shape, opcode, operands, attributes


class Cycles(NamedTuple):
    """The TensorCore's time in cycles; what `uncosted` holds comes on top of it or beside it."""

    total: int
    costed: list[Operation]  # dearest first
    uncosted: list[Operation]  # without an estimate: collectives, custom calls, some small ones


def cycles(hlo: str) -> Cycles:
    """Sums the estimates over what runs: the entry, and loop bodies times their trip count.

    A fusion's estimate stands on the fusion, so that its computation isn't visited. Of a
    conditional all branches count: an upper bound.

    Args:
      hlo: `compiled.as_text()` of a program compiled for a TPU.

    Raises:
      ValueError: a loop's trip count isn't visible.
    """
    computations, entry = _parse(hlo)
    costed, uncosted = [], []

    def visit(computation: str, runs: int) -> None:
        for name, opcode, text in computations[computation]:
            if opcode == "while":
                trips = _trip_count(text, computations[_attribute(text, "condition")])
                visit(_attribute(text, "body"), runs * trips)
            elif opcode == "conditional":
                for branch in _branches(text):
                    visit(branch, runs)
            elif opcode == "call":
                visit(_attribute(text, "to_apply"), runs)
            else:
                estimate = re.search(r'"estimated_cycles":"(\d+)"', text)
                value = int(estimate[1]) if estimate else SENTINEL
                if value < SENTINEL:
                    costed.append(Operation(name, opcode, value * runs, runs, text))
                elif opcode not in FREE and not opcode.endswith(("-done", "-update")):
                    uncosted.append(Operation(name, opcode, 0, runs, text))

    visit(entry, 1)
    costed.sort(key=lambda operation: -operation.cycles)
    return Cycles(sum(operation.cycles for operation in costed), costed, uncosted)


def _parse(hlo: str) -> tuple[dict[str, list[tuple[str, str, str]]], str]:
    """Each computation's operations as (name, opcode, line), and the entry's name."""
    computations: dict[str, list] = {}
    current = entry = None
    # A kernel's attributes go over several lines.
    for line in re.sub(r"\n(?=[^\s}%E]|}[^\n])", "", hlo).splitlines():
        if current is None:
            if header := re.match(r"(ENTRY )?%?([\w.\-]+) .*->.*\{\s*$", line):
                current = header[2]
                computations[current] = []
                entry = current if header[1] else entry
        elif line == "}":
            current = None
        elif operation := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)$", line):
            computations[current].append((operation[1], _opcode(operation[2]), operation[2]))
    return computations, entry


def _opcode(text: str) -> str:
    """The word after the result's shape, which may be a tuple with parentheses inside."""
    end = text.find(" ")
    if text.startswith("("):
        depth = 0
        for end, character in enumerate(text, 1):  # noqa: B007, read after the loop
            depth += (character == "(") - (character == ")")
            if depth == 0:
                break
    return re.match(r"\s*([\w\-]+)\(", text[end:])[1]


def _attribute(text: str, name: str) -> str:
    return re.search(rf"\b{name}=%?([\w.\-]+)", text)[1]


def _branches(text: str) -> list[str]:
    if listed := re.search(r"branch_computations=\{([^}]*)\}", text):
        return [name.strip(" %") for name in listed[1].split(",")]
    return [_attribute(text, f"{value}_computation") for value in ("true", "false")]


def _trip_count(text: str, condition: list) -> int:
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', text):
        return int(known[1])
    bounds = [int(v) for *_, line in condition for v in re.findall(r"constant\((\d+)\)", line)]
    if not bounds:
        raise ValueError("a loop without a visible trip count")
    return max(bounds)
