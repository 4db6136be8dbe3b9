"""The stages of `prmoe tokenize`: each task reads files and writes files of its own.

    digest    for each chunk: the digest of every document, in sorted order
    compare   for each range of digests: the documents that repeat an earlier one
    write     for each chunk: its documents without repetitions, as tokens, in both splits

A task's result does not depend on which process runs it, when, or how often. A small JSON file,
written last, says that a task is done. Memory is bounded by a chunk's digests, by a range of
digests, and by the text that is encoded at once; texts never leave the task that reads them.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from etils import epath

from prmoe_jax import files, stores
from prmoe_jax.config.schema import DataConfig
from prmoe_jax.data import chunks, shards, split, tokens
from prmoe_jax.data.chunks import Chunk
from prmoe_jax.data.tokenizer import Tokenizer
from prmoe_jax.errors import UserError

# Digests are put into this many ranges by their first bits, which are compared in groups.
RANGES = 1 << 12
_DIGEST = np.dtype([("digest", "S32"), ("document", "<u4")])
_REPEATED = np.dtype("<u4")


@dataclasses.dataclass(frozen=True)
class Work:
    """The folder of the shards, and what all tasks know."""

    out: str
    config: DataConfig
    chunks: int

    @property
    def folder(self) -> epath.Path:
        """The folder of the shards."""
        return epath.Path(self.out)

    @property
    def staging(self) -> epath.Path:
        """The folder of the files that are removed at the end."""
        return self.folder / "work"

    @property
    def local(self) -> bool:
        """Whether the folder is on this machine."""
        return not stores.scheme(self.out)

    @contextlib.contextmanager
    def written(self, path: epath.Path) -> Iterator[BinaryIO]:
        """A file that gets its name when it is complete.

        Until then it is among those that are removed at the end. An object of a store appears
        whole anyway.
        """
        if not self.local:
            with path.open("wb") as file:
                yield file
            return
        with files.whole(Path(path), Path(self.staging)) as file:
            yield file

    def done(self, name: str) -> Any:
        """The result of a finished task, or None.

        Raises:
          UserError: the file that holds it is damaged.
        """
        path = self.staging / f"{name}.json"
        try:
            return files.parse_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise UserError(f"{path} is damaged: {error}; delete it, it is made again") from None

    def finish(self, name: str, result: Any) -> None:
        """Records that a task is done."""
        with self.written(self.staging / f"{name}.json") as file:
            file.write(json.dumps(result).encode())


def digest(work: Work, chunk: Chunk) -> None:
    """Writes the sorted digests of a chunk's documents, without empty ones and repetitions.

    The file begins with the position of each range, as RANGES + 1 numbers. Repetitions within the
    chunk are left out here, so that no digest comes more often than there are chunks; their
    numbers go into another file.
    """
    found = bytearray()
    total = 0
    for total, text in enumerate(chunks.documents(chunk, work.config), 1):
        if not split.is_empty(text):
            found += split.digest(text) + np.array(total - 1, "<u4").tobytes()
    rows = np.frombuffer(bytes(found), _DIGEST)
    rows = rows[np.argsort(rows["digest"], kind="stable")]
    repeats = _repeats(rows)
    counts = {"documents": total, "empty": total - len(rows)}
    with work.written(work.staging / f"again-{chunk.number:05}") as file:
        file.write(rows["document"][repeats].tobytes())
    rows = rows[~repeats]
    with work.written(work.staging / f"digests-{chunk.number:05}") as file:
        file.write(np.searchsorted(_range(rows), np.arange(RANGES + 1)).astype("<i8").tobytes())
        file.write(rows.tobytes())
    work.finish(f"digests-{chunk.number:05}", counts)


def _repeats(rows: np.ndarray) -> np.ndarray:
    """Which of the sorted digests equal the one before."""
    repeats = np.zeros(len(rows), bool)
    repeats[1:] = rows["digest"][1:] == rows["digest"][:-1]
    return repeats


def _range(rows: np.ndarray) -> np.ndarray:
    """The number of the range of each digest: its first 12 bits."""
    first = np.ascontiguousarray(rows["digest"]).view("u1").reshape(-1, 32)
    return (first[:, 0].astype(np.int64) << 4) | (first[:, 1] >> 4)


def compare(work: Work, ranges: tuple[int, int]) -> None:
    """Finds the documents of a group of ranges that repeat one which comes before.

    Writes their numbers chunk by chunk, after the position of each chunk.
    """
    first, last = ranges
    rows, chunk = sorted_digests(work, first, last)
    repeats = _repeats(rows)
    chunk, numbers = chunk[repeats], rows["document"][repeats]
    order = np.lexsort((numbers, chunk))
    name = repeated_name(ranges)
    with work.written(work.staging / name) as file:
        bounds = np.searchsorted(chunk[order], np.arange(work.chunks + 1))
        file.write(bounds.astype("<i8").tobytes())
        file.write(numbers[order].astype(_REPEATED).tobytes())
    work.finish(name, {"different": int(len(rows) - repeats.sum())})


def repeated_name(ranges: tuple[int, int]) -> str:
    """The name of the task that compares a group of ranges, and of its file."""
    return f"repeated-{ranges[0]:04}-{ranges[1]:04}"


def largest_of(work: Work, ranges: tuple[int, int], count: int) -> bytes:
    """The largest of the first `count` different digests of a group of ranges, in their order."""
    rows, _ = sorted_digests(work, *ranges)
    # NumPy drops NUL bytes at the end of a string.
    return bytes(rows[~_repeats(rows)]["digest"][count - 1]).ljust(32, b"\0")


def sorted_digests(work: Work, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    """All digests of ranges, equal ones in the order of the text, and the chunk of each."""
    parts = []
    for number in range(work.chunks):
        with (work.staging / f"digests-{number:05}").open("rb") as file:
            parts.append(_section(file, first, last, RANGES, _DIGEST))
    chunk = np.repeat(np.arange(work.chunks), [len(part) for part in parts])
    rows = np.concatenate(parts)
    # Within a chunk equal digests are in order, and a stable sort keeps that of the chunks.
    order = np.argsort(rows["digest"], kind="stable")
    return rows[order], chunk[order]


def _section(file: BinaryIO, first: int, last: int, sections: int, dtype: np.dtype) -> np.ndarray:
    """The rows of some sections of a file that begins with the position of each."""
    file.seek(8 * first)
    bounds = np.frombuffer(file.read(8 * (last - first + 1)), "<i8")
    file.seek(8 * (sections + 1) + int(bounds[0]) * dtype.itemsize)
    return np.frombuffer(file.read(int(bounds[-1] - bounds[0]) * dtype.itemsize), dtype)


def kept(
    work: Work, chunk: Chunk, groups: Sequence[tuple[int, int]], threshold: bytes
) -> Iterator[tuple[str, str]]:
    """Yields (split, text) for each document of a chunk that is not empty and no repetition.

    Args:
      work: the folder.
      chunk: the chunk.
      groups: the groups of ranges that were compared.
      threshold: the largest digest of a validation document.
    """
    again = (work.staging / f"again-{chunk.number:05}").read_bytes()
    repeated = set(np.frombuffer(again, _REPEATED).tolist())
    for group in groups:
        with (work.staging / repeated_name(group)).open("rb") as file:
            found = _section(file, chunk.number, chunk.number + 1, work.chunks, _REPEATED)
            repeated.update(found.tolist())
    for number, text in enumerate(chunks.documents(chunk, work.config)):
        if number not in repeated and not split.is_empty(text):
            held_out = split.digest(text) <= threshold
            yield chunk.split or ("validation" if held_out else "train"), text


def write(work: Work, chunk: Chunk, groups: Sequence[tuple[int, int]], threshold: bytes) -> None:
    """Writes a chunk's shards, one for each split in which it has documents.

    The folder holds the tokenizer; the other arguments are those of `kept`.
    """
    path = work.folder / shards.TOKENIZER
    tokenizer = Tokenizer(path.read_text(encoding="utf-8"), str(path))
    writers: dict[str, ShardWriter] = {}
    with contextlib.ExitStack() as stack:
        for name, text in kept(work, chunk, groups, threshold):
            if name not in writers:
                path = work.folder / f"{name}-{chunk.number:05}{shards.SUFFIX}"
                writers[name] = ShardWriter(
                    stack.enter_context(work.written(path)), path, tokenizer
                )
            writers[name].add(text)
        for writer in writers.values():
            writer.flush()
    work.finish(
        f"shards-{chunk.number:05}", {name: writer.entry() for name, writer in writers.items()}
    )


class ShardWriter:
    """Writes the documents of one shard, each an end-of-text mark followed by its tokens."""

    def __init__(self, file: BinaryIO, path: epath.Path, tokenizer: Tokenizer):
        self._file, self._path, self._tokenizer = file, path, tokenizer
        self._dtype = tokens.dtype_of(tokenizer)
        self._end_of_text = np.uint32(tokenizer.end_of_text)
        self._digest = hashlib.sha256()
        self._texts: list[str] = []
        self._characters = self._documents = self._tokens = self._bytes = 0

    def add(self, text: str) -> None:
        """Appends a document; it is encoded and written with those that follow."""
        self._texts.append(text)
        self._characters += len(text)
        if self._characters >= tokens.CHUNK_CHARACTERS:
            self.flush()

    def flush(self) -> None:
        """Writes what was not written yet."""
        for text, ids in zip(self._texts, self._tokenizer.encode_batch(self._texts), strict=True):
            content = np.append(self._end_of_text, ids).astype(self._dtype).tobytes()
            self._file.write(content)
            self._digest.update(content)
            self._documents += 1
            self._tokens += 1 + len(ids)
            self._bytes += len(text.encode())
        self._texts, self._characters = [], 0

    def entry(self) -> dict[str, Any]:
        """The shard's entry in the index; its file must be closed."""
        with self._path.open("rb") as file:
            blocks = shards.block_digest(file, self._dtype, self._tokens)
        return {
            "name": self._path.name,
            "documents": self._documents,
            "tokens": self._tokens,
            "bytes": self._bytes,
            "sha256": self._digest.hexdigest(),
            "blocks": blocks,
        }
