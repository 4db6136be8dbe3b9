"""Cache directories, built once and atomically, and checked when they are reused."""

import contextlib
import hashlib
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

from prmoe_jax import files
from prmoe_jax.config.schema import DataConfig
from prmoe_jax.errors import UserError, first_line, reason, refusing
from prmoe_jax.stores import expand
from prmoe_jax.stores.lock import hold

log = logging.getLogger(__name__)

# A file in each directory, with size, modification time and digest of every other file.
DIGESTS = "digests.json"


def root(config: DataConfig) -> pathlib.Path:
    """The folder of all caches."""
    return expand("data.cache_dir", config.cache_dir)


def fingerprint(*parts: Any) -> str:
    """A short digest of JSON-able values; equal exactly when the values are equal."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def build_once(
    directory: pathlib.Path,
    build: Callable[[pathlib.Path], None],
    setting: str = "--config.data.cache_dir",
) -> pathlib.Path:
    """Returns `directory`; if it does not exist, `build(temporary)` and a rename make it.

    Other processes that want the same directory wait for the first one. A build that fails or is
    killed leaves nothing that looks finished. An existing directory is checked. Error messages
    name `setting` as the option that selects another directory.
    """
    if directory.is_dir():  # a complete cache may be read-only: take no lock
        with reading(directory):
            check(directory)
        return directory
    with locked(directory, setting):
        if not directory.is_dir():
            temporary = directory.with_name(directory.name + ".tmp")
            shutil.rmtree(temporary, ignore_errors=True)  # left by a killed run
            try:
                temporary.mkdir()
                build(temporary)
                seal(temporary)
                temporary.rename(directory)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return directory


def seal(directory: pathlib.Path) -> None:
    """Flushes every file to the disk, and writes the record that `check` compares them with."""
    record = _describe(directory)
    for name in record:
        files.sync(directory / name)
    (directory / DIGESTS).write_text(json.dumps(record, indent=2) + "\n")
    files.sync(directory / DIGESTS)


def check(directory: pathlib.Path) -> None:
    """Compares the files of a directory with the record of `seal`; ignores other files.

    Sizes are always compared. Content is compared only if a file's modification time differs: the
    file was then altered or copied. A directory without a record gets one if it is writable.

    Call it within `reading`, which handles its errors: a file is missing, altered or unreadable.
    """
    path = directory / DIGESTS
    if not path.exists():
        if os.access(directory, os.W_OK):
            log.info("recording the digests of %s", directory)
            _record(path, _describe(directory))
        return
    record, copied = files.parse_json(files.read(path)), False
    for name, known in record.items():
        file = directory / name
        files.refuse_pipe(file)
        found = file.stat()
        if found.st_size != known["bytes"]:
            raise ValueError(f"{name} has {found.st_size} bytes, not {known['bytes']}")
        if found.st_mtime_ns != known["mtime_ns"]:
            log.info("comparing the content of %s with its digest", file)
            if _digest(file) != known["sha256"]:
                raise ValueError(f"{name} is not as it was written")
            known["mtime_ns"], copied = found.st_mtime_ns, True
    if copied:
        _record(path, record)


@contextlib.contextmanager
def reading(
    directory: pathlib.Path,
    named: str = "the cache {}",
    fix: str = "delete the folder, it is made again",
) -> Iterator[None]:
    """Turns any failure to read a directory, which messages call `named`, into a UserError."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # readers of damaged files raise anything
        why = first_line(error) if isinstance(error, OSError) else reason(error)
        message = f"{named.format(directory)} can't be read ({why})"
        gone = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
        if isinstance(error, OSError) and not isinstance(error, gone):
            raise UserError(message) from error  # not damaged: no permission, for example
        raise UserError(f"{message}; {fix}") from error


@contextlib.contextmanager
def locked(directory: pathlib.Path, setting: str = "--config.data.cache_dir") -> Iterator[None]:
    """Holds the exclusive lock that guards writing to `directory`, and makes its parent."""
    fix = f"make room or set {setting} to another folder"
    with refusing(f"cannot write the cache {directory}", OSError, fix=fix):
        directory.parent.mkdir(parents=True, exist_ok=True)
        # Keep the lock file: after a removal another process could lock a new file of this name.
        path = directory.with_name(f"{directory.name}.lock")
        try:
            lock = hold(path)
        except BlockingIOError:
            log.warning("waiting for the process that is building %s", directory)
            lock = hold(path, wait=True)
        with lock:
            yield


def _describe(directory: pathlib.Path) -> dict[str, dict[str, int | str]]:
    """Size, modification time and digest of each file, by its path in the directory."""
    found = [file for file in sorted(directory.rglob("*")) if file.is_file()]
    return {
        str(file.relative_to(directory)): {
            "bytes": file.stat().st_size,
            "mtime_ns": file.stat().st_mtime_ns,
            "sha256": _digest(file),
        }
        for file in found
        if file != directory / DIGESTS
    }


def _digest(file: pathlib.Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _record(path: pathlib.Path, record: dict) -> None:
    """Replaces the record of a finished directory, if the directory can be written."""
    try:
        with locked(path.parent):
            files.replace(path, json.dumps(record, indent=2) + "\n")
    except UserError as error:
        log.debug("%s", error)
