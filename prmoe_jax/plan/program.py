"""Reads a compiled program: its operations, how often each runs, and their FLOPs and bytes."""

import collections
import math
import re
from collections.abc import Container, Iterable
from typing import NamedTuple

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
# Operations that take no time, or only wait for other operations.
FREE = frozenset(
    "parameter constant bitcast tuple get-tuple-element copy-start copy-done partition-id "
    "replica-id after-all opt-barrier iota call-start".split()
)
COLLECTIVES = (
    "all-reduce all-gather reduce-scatter all-to-all ragged-all-to-all collective-permute".split()
)
END = "collective-end"  # the opcode here of the wait for an asynchronous collective
SENTINEL = 1 << 50  # "unknown" estimates are numbers near 2^64, above this
SHARED = r'_xla_host_transfer_rendezvous="([^"]*)"'  # the name that a `send` and its `recv` share
SPARSE_CORE = "call-done"  # the end of a gather or scatter on a TPU's SparseCore
# These read only as many bytes of their operand as their result has.
SLICES = "dynamic-slice", "gather", "slice", SPARSE_CORE
# These update an operand in place. The value is the index of the operand that holds the update.
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
# Attention kernels, by the prefix of their names: the number of matrix products with a matrix of
# scores (length x length) as operand or result, and the axis of the queries that is the length.
KERNELS = {
    "splash_mha_fwd": (2, -2),
    "splash_mha_dq": (3, -2),
    "splash_mha_dkv": (4, -2),
    "dot_product_attention_fwd": (2, -3),  # cuDNN's
    "dot_product_attention_bwd": (5, -3),
}


class Operation(NamedTuple):
    """One operation of the optimized program."""

    name: str
    opcode: str
    cycles: int | None  # cycles of one run by the TPU compiler's estimate; None without one
    runs: int  # product of the trip counts of the loops around it
    text: str  # from the program: shape, opcode, operands, attributes
    flops: int = 0  # FLOPs of the matrix products and attention kernels in one run
    bytes: int = 0  # bytes read and written in one run
    pair: str = ""  # shared by an asynchronous collective and its `END`; "" for all others


class _Line(NamedTuple):
    name: str
    opcode: str
    text: str
    root: bool


def operations(hlo: str, rounds: int = 1, window: int = 0) -> list[Operation]:
    """The operations that run, in the compiler's order, each with the number of its runs.

    A fusion is one operation. One that contains an all-reduce is a reduce-scatter, which the TPU
    compiler writes as a slice of an all-reduce. An asynchronous collective is two operations, its
    start and its `END`. A transfer to other slices is a `send` to the host and an `END` where the
    result is received. All branches of a conditional are counted, which gives an upper bound.

    Args:
      hlo: `compiled.as_text()`.
      rounds: rounds of the dropless exchange (`moe/rounds.py`); all but the first run in a loop.
      window: the sliding window of attention kernels, in tokens; 0 is none.
    """
    computations, entry = _parse(hlo)
    shapes = {
        name: {line.name: result(line) for line in lines} for name, lines in computations.items()
    }
    found, received = [], {}  # received: name of a `recv` -> its `pair`

    def visit(computation: str, runs: int) -> None:
        parts = _asynchronous(computations[computation], computations)
        begun = set()
        for line in computations[computation]:
            name, opcode, text, _ = line
            if name in parts:
                pair, sent = parts[name]
                if opcode.endswith("-done"):
                    found.append(Operation(name, END, 0, runs, text, pair=pair))
                elif pair not in begun and any(o != pair for o in _operands(line)):
                    begun.add(pair)  # the part that takes the operands
                    found.append(Operation(name, sent.opcode, None, runs, sent.text, pair=pair))
            elif opcode == "send":
                found.append(Operation(name, opcode, None, runs, text, pair=field(text, SHARED)))
            elif opcode == "recv":
                received[name] = field(text, SHARED)
            elif opcode == "recv-done":
                pair = received.get(_operands(line)[0], "")
                found.append(Operation(name, END, 0, runs, text, pair=pair))
            elif opcode == "while":
                if loop := re.search(r'op_name="([^"]*)\brounds\)*/while"', text):
                    # Of two nested stages, only the outer one takes more than one round.
                    inner = re.search(r"\brounds/while/body|jvp\($", loop[1])
                    trips = 0 if inner else rounds - 1
                else:
                    condition = computations[_attribute(text, "condition")]
                    trips = _trip_count(line, computations[computation], condition)
                visit(_attribute(text, "body"), runs * trips)
            elif opcode == "conditional":
                for branch in _branches(text):
                    visit(branch, runs)
            elif opcode == "call":
                visit(_attribute(text, "to_apply"), runs)
            elif not _is_free(opcode, text):
                inside = computations[_attribute(text, "calls")] if "calls=" in text else []
                collective = next((i for i in inside if i.opcode == "all-reduce"), None)
                if collective:
                    summed = text.partition(f" {opcode}(")[0]
                    attributes = collective.text.partition("all-reduce(")[2]
                    opcode, text = "reduce-scatter", f"{summed} reduce-scatter({attributes}"
                cycles = int(field(text, r'"estimated_cycles":"(\d+)"') or SENTINEL)
                known = shapes[computation]
                if opcode == "ragged-all-to-all":  # both sides, as if asynchronous
                    sides = f"({known[_operands(line)[0]]}, {result(line)})"
                    text = sides + text[len(result(line)) :]
                inside = [] if collective else inside
                inner = shapes[_attribute(text, "calls")] if inside else {}
                flops = _flops(line, known, window) + sum(_flops(i, inner, window) for i in inside)
                moved = _bytes(line, known, inside, inner)
                estimate = cycles if cycles < SENTINEL else None
                found.append(Operation(name, opcode, estimate, runs, text, flops, moved))

    visit(entry, 1)
    return found


def _asynchronous(
    lines: list[_Line], computations: dict[str, list[_Line]]
) -> dict[str, tuple[str, _Line]]:
    """Maps each part (start, update, done) of a collective to its start's name and the collective.

    The collective is the start itself or, on a SparseCore, in the computation that it calls.
    """
    parts: dict[str, tuple[str, _Line]] = {}
    for line in lines:
        if line.opcode.endswith("-start"):
            called = field(line.text, r"\b(?:to_apply|calls)=%?([\w.\-]+)")
            for inner in [line, *computations.get(called, [])]:
                if inner.opcode.removesuffix("-start") in COLLECTIVES:
                    parts[line.name] = line.name, inner
                    break
        elif line.opcode.endswith(("-update", "-done")) and _operands(line)[0] in parts:
            parts[line.name] = parts[_operands(line)[0]]
    return parts


def field(text: str, pattern: str) -> str:
    """The first group of a pattern's first match in a text; '' without a match."""
    found = re.search(pattern, text)
    return found[1] if found else ""


def _is_free(opcode: str, text: str) -> bool:
    if opcode.endswith(("-done", "-update")):
        return opcode != SPARSE_CORE
    return opcode in FREE or 'custom_call_target="AllocateBuffer"' in text


def size(shape: str) -> int:
    """Bytes of a shape such as 'bf16[2,3]{1,0}', or of a tuple of shapes."""
    return sum(BYTES[kind] * math.prod(dims) for kind, dims in _arrays(shape))


def result(operation: Operation | _Line) -> str:
    """The shape of an operation's result."""
    return operation.text.partition(f" {operation.opcode}(")[0]


def _arrays(shape: str) -> list[tuple[str, list[int]]]:
    """The types and dimensions of a shape's arrays."""
    found = re.findall(r"\b(\w+)\[([\d,]*)\]", shape)
    return [(kind, numbers(dims)) for kind, dims in found if kind in BYTES]


def _floats(shapes: Iterable[str]) -> list[list[int]]:
    """The dimensions of the arrays of floats."""
    return [dims for shape in shapes for kind, dims in _arrays(shape) if "f" in kind]


def numbers(text: str) -> list[int]:
    """The numbers of '2,3', none of ''."""
    return [int(number) for number in text.split(",") if number]


def is_grouped(operation: Operation | _Line) -> bool:
    """Whether an operation is the TPU compiler's kernel for `jax.lax.ragged_dot`."""
    named = operation.name.startswith("ragged-dot") and "metadata" not in operation.name
    return operation.opcode == "custom-call" and named


def is_kernel(operation: Operation | _Line) -> bool:
    """Whether an operation is an attention kernel."""
    return operation.opcode == "custom-call" and operation.name.startswith(tuple(KERNELS))


def _operands(line: _Line) -> list[str]:
    """The operands' names, which are between the parentheses after the opcode."""
    inside = line.text.partition(f" {line.opcode}(")[2]
    depth = 1
    for end, character in enumerate(inside):  # noqa: B007, read after the loop
        depth += (character == "(") - (character == ")")
        if depth == 0:
            break
    return re.findall(r"%([\w.\-]+)", inside[:end])


def _flops(line: _Line, shapes: dict[str, str], window: int) -> int:
    """FLOPs of a matrix product (2 per multiply-add) or of an attention kernel; otherwise 0.

    A causal kernel computes half of the queries x keys, or the part of it inside the window. A
    grouped product counts all rows of its buffer.
    """
    if is_grouped(line):
        arrays = _floats([result(line), *(shapes[name] for name in _operands(line))])
        rows = max(dims[0] for dims in arrays if len(dims) == 2)
        return 2 * rows * math.prod(d for dims in arrays if len(dims) == 3 for d in dims[1:])
    if is_kernel(line):
        products, length = next(v for k, v in KERNELS.items() if line.name.startswith(k))
        operands = _floats(shapes.get(name, "") for name in _operands(line))
        # The first operand with heads holds the queries.
        queries = next((dims for dims in operands if len(dims) > 2), None)
        if queries is None:
            raise ValueError(f"the attention kernel {line.name} has no visible queries")
        keys = queries[length]
        if 0 < window < keys:  # twice the mean of min(i, window)
            keys = 2 * window - window * window // keys
        return products * math.prod(queries) * keys
    if line.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line.text)
    elif line.opcode == "custom-call" and "__cublas" in line.text:
        contracted = re.search(r'"lhs_contracting_dimensions":\[([\d,"]+)\]', line.text)
    else:
        return 0
    left, output = _arrays(shapes.get(_operands(line)[0], "")), _arrays(result(line))
    if not (contracted and left and output):
        return 0
    terms = math.prod(left[0][1][i] for i in numbers(contracted[1].replace('"', "")))
    return 2 * terms * math.prod(output[0][1])


def _bytes(line: _Line, shapes, inside: list[_Line], inner) -> int:
    """Bytes of result and operands; of sliced or updated arrays, only the slice or update."""
    operands = [size(shapes.get(name, "")) for name in _operands(line)]
    if not inside:
        if line.opcode in SLICES:
            return 2 * size(result(line))
        if line.opcode in UPDATES:
            return 2 * operands[UPDATES[line.opcode]]
        return size(result(line)) + sum(operands)
    # Not the line's own shape: that of an asynchronous fusion also holds its operands.
    total = whole = next(size(inner[i.name]) for i in inside if i.root)
    uses = collections.defaultdict(list)
    for i in inside:
        for name in _operands(i):
            uses[name].append(i)
    for i in inside:
        if i.opcode == "parameter":
            number, using = int(field(i.text, r"parameter\((\d+)\)")), uses[i.name]
            if using and all(_starts_with(u, i.name, SLICES) for u in using):
                total += sum(size(inner[u.name]) for u in using)
            elif not (using and all(_starts_with(u, i.name, UPDATES) for u in using)):
                total += operands[number]
        elif i.opcode in UPDATES and size(inner[i.name]) <= whole:
            total += size(inner[_operands(i)[UPDATES[i.opcode]]]) - size(inner[i.name])
    return max(total, 0)


def _starts_with(line: _Line, name: str, opcodes: Container[str]) -> bool:
    """Whether a line has one of these opcodes and slices or updates `name`."""
    return line.opcode in opcodes and _operands(line)[0] == name


def _parse(hlo: str) -> tuple[dict[str, list[_Line]], str]:
    """Each computation's operations, and the entry's name."""
    computations: dict[str, list] = {}
    current = entry = None
    # Join the attributes of a kernel, which can span several lines.
    for line in re.sub(r"\n(?=[^\s}%E]|}(?!, execution_thread)[^\n])", "", hlo).splitlines():
        if current is None:
            if header := re.match(r"(ENTRY )?%?([\w.\-]+) .*->.*\{\s*$", line):
                current = header[2]
                computations[current] = []
                entry = current if header[1] else entry
        elif line.startswith("}"):  # for a SparseCore, "}, execution_thread=…"
            current = None
        elif found := re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*)$", line):
            root, name, text = found.groups()
            opcode = re.search(r" ([\w\-]+)\(", text)[1]  # after the shape, which has no such word
            computations[current].append(_Line(name, opcode, text, bool(root)))
    return computations, entry


def _attribute(text: str, name: str) -> str:
    return re.search(rf"\b{name}=%?([\w.\-]+)", text)[1]


def _branches(text: str) -> list[str]:
    if listed := re.search(r"branch_computations=\{([^}]*)\}", text):
        return [name.strip(" %") for name in listed[1].split(",")]
    return [_attribute(text, f"{value}_computation") for value in ("true", "false")]


def _trip_count(loop: _Line, lines: list[_Line], condition: list[_Line]) -> int:
    """A loop's trips, fewer if its counter begins at 1, since the compiler took the first one out.

    The counter is the first element of the loop's tuple. If its initial value is no constant, it
    counts from 0.
    """
    if stated := field(loop.text, r'"known_trip_count":\{"n":"(\d+)"\}'):
        return int(stated)
    bounds = [int(v) for line in condition for v in re.findall(r"constant\((\d+)\)", line.text)]
    if not bounds:
        raise ValueError("a loop without a visible trip count")
    known = {line.name: line for line in lines}
    line = known.get(_operands(loop)[0])
    while line and line.opcode in ("tuple", "copy", "bitcast"):
        line = known.get(_operands(line)[0])
    first = field(line.text, r" constant\((\d+)\)") if line else ""
    return max(bounds) - int(first or 0)
