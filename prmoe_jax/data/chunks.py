"""The text of a corpus, in chunks that can be read independently."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from prmoe_jax import stores
from prmoe_jax.config.schema import DataConfig
from prmoe_jax.data import cache, copies, sources
from prmoe_jax.errors import UserError, missing, refusing

SUFFIXES = *sources.SUFFIXES, ".parquet"
# The number of chunks to aim at, within these bounds of a chunk's size. A chunk is one task of a
# worker, is repeated as a whole after a kill, and gives one shard per split.
_CHUNKS = 2048
_MIN_BYTES, _MAX_BYTES = 16 << 20, 1 << 30


@dataclasses.dataclass(frozen=True)
class Piece:
    """Bytes of a .jsonl file, row groups of a .parquet file, or examples of a TFDS split.

    A JSON line belongs to the piece in which it begins. A file of another kind is one piece.
    """

    path: str
    first: int
    last: int


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Pieces that are read one after the other.

    `split` is their split in a TFDS dataset, or '' if each document's content decides its split.
    """

    number: int
    split: str
    pieces: tuple[Piece, ...]


def find_chunks(config: DataConfig) -> tuple[list[Chunk], list[Any], list[float]]:
    """The chunks of `config.corpus` for `prmoe tokenize`, in the order of the text.

    Returns:
      the chunks; what identifies the text: name and size of each file or TFDS split; and the
      modification times of the files.
    """
    if config.corpus.startswith("tokens:"):
        raise UserError(f"data.corpus={config.corpus} holds tokens already; give text")
    if config.corpus.startswith("tfds:"):
        lengths = {split: len(found) for split, found in _tfds(config).items()}
        return of_tfds(config), [config.corpus, lengths], []
    found = _find_files(config)
    stats = [_stat(file) for file in found]
    listed = [[file.name, stat.length] for file, stat in zip(found, stats, strict=True)]
    return of_files(found, config), listed, [stat.mtime for stat in stats]


def of_files(files: Sequence[Path], config: DataConfig) -> list[Chunk]:
    """The chunks of files; they depend only on the files' order and sizes."""
    lengths = [_stat(file).length for file in files]
    size = min(max(sum(lengths) // _CHUNKS, _MIN_BYTES), _MAX_BYTES)
    groups: list[list[Piece]] = []
    room = 0
    for file, length in zip(files, lengths, strict=True):
        for piece, weight in _pieces(file, length, size):
            if weight > room or not groups:
                groups.append([])
                room = size
            groups[-1].append(piece)
            room -= weight
    if not groups:
        raise UserError(f"the files of data.corpus={config.corpus} are empty")
    return [Chunk(i, "", tuple(pieces)) for i, pieces in enumerate(groups)]


def _find_files(config: DataConfig) -> Sequence[Path]:
    """The files of a corpus, local or in an object store."""
    if not stores.scheme(config.corpus):
        return sources.files(config.corpus, cache.root(config), SUFFIXES)
    found = copies.find(config.corpus)
    for path in found:
        if not path.name.endswith(SUFFIXES):
            raise UserError(f"{path}: unsupported kind of file; use {', '.join(SUFFIXES)}")
    return found


def documents(chunk: Chunk, config: DataConfig) -> Iterator[str]:
    """The documents of a chunk; UserError if a file can't be read or lacks the text field."""
    for piece in chunk.pieces:
        file = epath.Path(piece.path)
        if chunk.split:
            yield from _tfds(config)[chunk.split].read(piece.first, piece.last)
        elif file.suffix == ".jsonl":
            yield from sources.json_lines(file, config.text_field, piece.first, piece.last)
        elif file.suffix == ".parquet":
            yield from _rows(file, piece, config.text_field)
        else:
            yield from sources.read_documents([file], config.text_field)


def _stat(file: Path):
    with sources.reading(file):
        return epath.Path(file).stat()


def _pieces(file: Path, length: int, size: int) -> Iterator[tuple[Piece, int]]:
    """The pieces of a file, each with its size in bytes."""
    path = str(file)
    if file.suffix == ".jsonl":
        for first in range(0, length, size):
            last = min(first + size, length)
            yield Piece(path, first, last), last - first
    elif file.suffix == ".parquet":
        with _parquet(file) as table:
            for i in range(table.num_row_groups):
                yield Piece(path, i, i + 1), table.metadata.row_group(i).total_byte_size
    else:
        yield Piece(path, 0, length), length


def _rows(file: Path, piece: Piece, text_field: str) -> Iterator[str]:
    with _parquet(file) as table:
        names = table.schema_arrow.names
        if text_field not in names:
            raise UserError(
                f"{file}: no column {text_field!r}; it has {', '.join(names)}; "
                "set --config.data.text_field"
            )
        groups = list(range(piece.first, piece.last))
        batches = table.iter_batches(1024, row_groups=groups, columns=[text_field])
        texts = (text for batch in batches for text in batch.column(0).to_pylist())
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise UserError(
                    f"{file}: row {row} of row group {piece.first} has "
                    f"{type(text).__name__} in the column {text_field!r}, not text"
                )
            yield text


@contextlib.contextmanager
def _parquet(file: Path) -> Iterator[Any]:
    """Opens a Parquet file; failures to read it become a UserError that names it."""
    with missing(f"{file}: .parquet files need pyarrow", "prmoe_jax[beam]"):
        import pyarrow
        import pyarrow.parquet
    with (
        sources.reading(file),
        refusing(f"{file}: not a Parquet file, or damaged", pyarrow.ArrowException),
        epath.Path(file).open("rb") as opened,
        pyarrow.parquet.ParquetFile(opened) as table,
    ):
        yield table


def of_tfds(config: DataConfig) -> list[Chunk]:
    """The chunks; validation first, so that `prmoe tokenize` drops its duplicates from training."""
    chunks: list[Chunk] = []
    for split in ("validation", "train"):
        length = len(_tfds(config)[split])
        step = max(length // _CHUNKS, 10_000)
        for first in range(0, length, step):
            piece = Piece(config.corpus, first, min(first + step, length))
            chunks.append(Chunk(len(chunks), split, (piece,)))
    return chunks


def _tfds(config: DataConfig) -> dict[str, Any]:
    """The documents of each split, as `builders.Documents`."""
    from prmoe_jax.data import builders  # takes a second to import

    return builders.prepare_named(config, cache.root(config) / "tfds")
