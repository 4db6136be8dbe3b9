"""Finds a corpus's duplicates and validation documents, by their content alone.

The stages `digest` and `compare` (see `stages`) find the duplicates. Validation documents are those
with the smallest digests, up to a threshold.
"""

import hashlib
import logging
import math
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from prmoe_jax.config.schema import DataConfig
from prmoe_jax.data import chunks
from prmoe_jax.data.chat import Chat
from prmoe_jax.data.chunks import Chunk
from prmoe_jax.data.stages import Run, Work
from prmoe_jax.errors import UserError

log = logging.getLogger(__name__)

# Digests are divided into this many ranges by their first 12 bits. One task compares a group of
# ranges, with at most about this many digests (36 bytes each).
RANGES = 1 << 12
_COMPARED = 1 << 21
RANK_BYTES = 32
_DIGEST = np.dtype([("digest", f"S{RANK_BYTES}"), ("document", "<u4")])
_REPEATED = np.dtype("<u4")


class Selection(NamedTuple):
    """Which documents are kept, and the split of each."""

    threshold: bytes  # the largest digest of a validation document; b'' if the text has splits
    # The groups of ranges whose duplicates are dropped. If there are none, duplicates are kept,
    # and a dataset with its own splits keeps its empty documents too.
    groups: Sequence[tuple[int, int]] = ()
    chats: int = 0  # the number of chats among the documents


def rank(text: str) -> bytes:
    """The digest by which documents are ranked, SHA-256."""
    return hashlib.sha256(text.encode()).digest()


def selected(
    chunk: Chunk, config: DataConfig, selection: Selection, repeated: Collection[int] = ()
) -> Iterator[tuple[str, str]]:
    """Yields (split, text) for each document of a chunk that is kept.

    `repeated` holds the indices in the chunk of duplicates to drop.
    """
    for number, text in enumerate(chunks.documents(chunk, config)):
        if chunk.split and not selection.groups:
            yield chunk.split, text
        elif number not in repeated and text.strip():
            held_out = rank(text) <= selection.threshold
            yield chunk.split or ("validation" if held_out else "train"), text


def select(work: Work, parts: Sequence[Chunk], run: Run) -> Selection:
    """Finds a corpus's duplicates, by the stages `digest` and `compare`, and validation documents.

    Unless the text has splits, documents with the smallest digests are for validation, at least
    one and not all. The choice depends neither on file names nor on order, and equal documents are
    in one split.
    """
    counts = run(digest, {f"digests-{chunk.number:05}": (chunk,) for chunk in parts})
    names = "documents", "empty", "chats"  # earlier versions knew no chats
    total, empty, chats = (sum(count.get(name, 0) for count in counts) for name in names)
    # A power of two, so that each group has the same number of ranges.
    step = RANGES >> min((total // _COMPARED).bit_length(), RANGES.bit_length() - 1)
    groups = [(first, first + step) for first in range(0, RANGES, step)]
    counts = run(compare, {_repeated_name(group): (group,) for group in groups})
    different = [count["different"] for count in counts]
    log.info("%d documents: %d empty, %d repeated", total, empty, total - empty - sum(different))
    if any(chunk.split for chunk in parts):
        return Selection(b"", groups, chats)
    left = _held_out_count(sum(different), total, empty, work.config)
    for group, count in zip(groups, different, strict=True):
        if left <= count:
            return Selection(_largest_of(work, group, left), groups, chats)
        left -= count
    raise AssertionError("fewer digests than counted")


def _held_out_count(different: int, total: int, empty: int, config: DataConfig) -> int:
    """The number of validation documents: a share of the distinct documents, rounded up."""
    if empty:
        log.warning("corpus %s: %d of %d documents are empty; skipped", config.corpus, empty, total)
    if different < 2:
        raise UserError(
            f"corpus {config.corpus!r} has {different} different non-empty documents "
            f"(of {total}, {empty} empty); training and validation need at least 2: "
            "split the text into several files or JSON lines"
        )
    return min(math.ceil(config.validation_fraction * different), different - 1)


def digest(work: Work, chunk: Chunk) -> None:
    """Writes the sorted digests of a chunk's distinct documents, without empty ones.

    The file begins with RANGES + 1 offsets, counted in digests: where each range begins, and the
    end. Indices of duplicates within the chunk go into a second file; the first has each digest
    once.
    """
    found, total, chats = bytearray(), 0, 0
    for total, text in enumerate(chunks.documents(chunk, work.config), 1):
        chats += isinstance(text, Chat)
        if text.strip():
            found += rank(text) + (total - 1).to_bytes(4, "little")
    rows = np.frombuffer(found, _DIGEST)
    rows = rows[np.argsort(rows["digest"], kind="stable")]
    repeats = _repeats(rows)
    counts = {"documents": total, "empty": total - len(rows), "chats": chats}
    work.save(work.staging / f"again-{chunk.number:05}", rows["document"][repeats].tobytes())
    rows = rows[~repeats]
    name = f"digests-{chunk.number:05}"
    bounds = np.searchsorted(_range(rows), np.arange(RANGES + 1)).astype("<i8")
    work.save(work.staging / name, bounds.tobytes() + rows.tobytes())
    work.finish(name, counts)


def _repeats(rows: np.ndarray) -> np.ndarray:
    """A mask of the sorted digests that equal the previous digest."""
    return np.append(False, rows["digest"][1:] == rows["digest"][:-1])[: len(rows)]


def _range(rows: np.ndarray) -> np.ndarray:
    """The range of each digest: the number in its first 12 bits."""
    first = np.ascontiguousarray(rows["digest"]).view("u1").reshape(-1, RANK_BYTES)
    return (first[:, 0].astype(np.int64) << 4) | (first[:, 1] >> 4)


def compare(work: Work, ranges: tuple[int, int]) -> None:
    """Writes which documents in a group of ranges duplicate one of an earlier chunk.

    A table of offsets, one per chunk and one for the end, precedes the indices in their chunks.
    """
    rows, chunk = _sorted_digests(work, *ranges)
    repeats = _repeats(rows)
    chunk, numbers = chunk[repeats], rows["document"][repeats]
    order = np.lexsort((numbers, chunk))
    name = _repeated_name(ranges)
    bounds = np.searchsorted(chunk[order], np.arange(work.chunks + 1)).astype("<i8")
    work.save(work.staging / name, bounds.tobytes() + numbers[order].astype(_REPEATED).tobytes())
    work.finish(name, {"different": int(len(rows) - repeats.sum())})


def _repeated_name(ranges: tuple[int, int]) -> str:
    return f"repeated-{ranges[0]:04}-{ranges[1]:04}"


def _largest_of(work: Work, ranges: tuple[int, int], count: int) -> bytes:
    """The `count`-th smallest distinct digest in a group of ranges."""
    rows, _ = _sorted_digests(work, *ranges)
    # NumPy drops NUL bytes at the end of a string.
    return bytes(rows[~_repeats(rows)]["digest"][count - 1]).ljust(RANK_BYTES, b"\0")


def _sorted_digests(work: Work, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    """The sorted digests in ranges [first, last), equal ones by chunk; and the chunk of each."""
    names = [f"digests-{number:05}" for number in range(work.chunks)]
    parts = [_section(work.staging / name, first, last, RANGES, _DIGEST) for name in names]
    chunk = np.repeat(np.arange(work.chunks), [len(part) for part in parts])
    rows = np.concatenate(parts)
    # A digest occurs at most once per chunk, and a stable sort keeps the order of the chunks.
    order = np.argsort(rows["digest"], kind="stable")
    return rows[order], chunk[order]


def _section(path: epath.Path, first: int, last: int, sections: int, dtype: np.dtype) -> np.ndarray:
    """The rows of sections [first, last) in a file that begins with a table of offsets."""
    with path.open("rb") as file:
        file.seek(8 * first)
        bounds = np.frombuffer(file.read(8 * (last - first + 1)), "<i8")
        file.seek(8 * (sections + 1) + int(bounds[0]) * dtype.itemsize)
        return np.frombuffer(file.read(int(bounds[-1] - bounds[0]) * dtype.itemsize), dtype)


def kept(work: Work, chunk: Chunk, selection: Selection) -> Iterator[tuple[str, str]]:
    """`selected`, without the duplicates that the stages found."""
    repeated: set[int] = set()
    if selection.groups:
        again = (work.staging / f"again-{chunk.number:05}").read_bytes()
        repeated.update(np.frombuffer(again, _REPEATED).tolist())
    for group in selection.groups:
        path, number = work.staging / _repeated_name(group), chunk.number
        repeated.update(_section(path, number, number + 1, work.chunks, _REPEATED).tolist())
    return selected(chunk, work.config, selection, repeated)
