"""Files of a run: replaced whole, so that none is ever half written, and checked when read back."""

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from prmoe_jax.errors import UserError

log = logging.getLogger(__name__)


def replace(path: Path, content: str | bytes) -> None:
    """Writes a file by way of a temporary one beside it and a rename.

    A crash, `kill -9` or a full disk at any moment leaves the old content or the new one. A file
    that holds the content already is not touched.

    Raises:
      UserError: it cannot be written; what was there before is still there.
    """
    data = content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        if path.is_file() and path.read_bytes() == data:
            return
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        _remove(temporary)
        raise cannot_write(path, error) from error
    except BaseException:
        _remove(temporary)
        raise


def build_folder(folder: Path, build: Callable[[Path], None]) -> None:
    """Makes a folder by `build(temporary)` and a rename, so that it is there whole or not at all.

    The temporary folder lies beside it under a hidden name. What a killed process left there is
    removed first. An empty folder in the target's place is replaced.

    Args:
      folder: the folder to make.
      build: writes the content into the folder that it is given.

    Raises:
      UserError: another process is building the same folder.
      OSError: it cannot be written, or its place is taken.
    """
    folder = Path(os.path.realpath(folder))
    temporary = folder.with_name(f".{folder.name}.tmp")
    temporary.mkdir(parents=True, exist_ok=True)
    with open(temporary / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is writing {folder}; wait for it to end") from None
        try:
            for left in temporary.iterdir():
                if left.is_dir() and not left.is_symlink():
                    shutil.rmtree(left)
                elif left.name != ".lock":
                    left.unlink()
            build(temporary)
            for path in [*temporary.rglob("*"), temporary]:
                if path.is_dir():
                    _sync_folder(path)
                else:
                    sync(path)
            temporary.rename(folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        # Not before the rename: another process could lock a new file, and empty the folder.
        (folder / ".lock").unlink(missing_ok=True)
        _sync_folder(folder.parent)


def cannot_write(path: Path, error: OSError) -> UserError:
    """What to raise where a file could not be written."""
    return UserError(f"{path} cannot be written: {error.strerror or error}")


def regular(path: Path, hint: str = "") -> Path:
    """The path of a file that has an end: reading a pipe or a device might never return.

    Args:
      path: the file.
      hint: what else to tell where it is missing.

    Raises:
      UserError: it is missing, or no regular file.
    """
    try:
        if path.is_file():
            return path
        found = path.exists()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    raise UserError(f"{path} is not a regular file" if found else f"{path} is missing{hint}")


def read_json(path: Path, kind: type = dict, fix: str = "restore a copy of it") -> Any:
    """The value that a JSON file holds.

    Args:
      path: the file.
      kind: the type that the value must have.
      fix: what a user can do about a damaged file, for the message.

    Raises:
      UserError: the file cannot be read, is not UTF-8 JSON, or holds another type.
    """
    try:
        value = parse_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}; {fix}") from None
    if not isinstance(value, kind):
        found = type(value).__name__
        raise UserError(f"{path} is damaged: it holds {found}, not {kind.__name__}; {fix}")
    return value


def read_json_lines(path: Path, required: Iterable[str], fix: str) -> list[dict]:
    """The objects of a file that holds one a line; none where there is no file.

    A last line without a newline is left out, with a warning, unless it is a complete object.

    Args:
      path: the file.
      required: names that every object must have.
      fix: what a user can do about a damaged line, for the message.

    Raises:
      UserError: the file cannot be read, or a line is not such an object; says which.
    """
    try:
        *lines, torn = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    if torn and _is_object(torn):
        lines.append(torn)  # complete: some editors leave out the last newline
    elif torn:
        log.warning("%s: its last line was torn by a crash and is left out", path)
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = parse_json(line)
            if not isinstance(row, dict):
                raise ValueError(f"not an object but {type(row).__name__}")
            if missing := [name for name in required if name not in row]:
                raise ValueError(f"it has no {', '.join(missing)}")
        except ValueError as error:
            raise UserError(f"{path}, line {number}, is damaged: {error}; {fix}") from None
        rows.append(row)
    return rows


def require(row: Any, kinds: Mapping[str, type | tuple[type, ...]], where: str, fix: str) -> None:
    """Checks the fields of an object that was read from a file.

    Args:
      row: the value; must be a dict.
      kinds: the type, or types, of each name that it must have.
      where: the file and the place in it, for the message.
      fix: what a user can do about it, for the message.

    Raises:
      UserError: a name is missing, or its value is of another type.
    """
    if not isinstance(row, dict):
        raise UserError(f"{where} is damaged: not an object but {type(row).__name__}; {fix}")
    if missing := [name for name in kinds if name not in row]:
        raise UserError(f"{where} is damaged: it has no {', '.join(missing)}; {fix}")
    for name, kind in kinds.items():
        if not isinstance(row[name], kind):
            raise UserError(f"{where} is damaged: {name} is {row[name]!r:.60}; {fix}")


def parse_json(data: bytes) -> Any:
    """The value of UTF-8 JSON; ValueError for whatever else it is, also if nested too deeply."""
    try:
        return json.loads(data.decode("utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(parse_json(line), dict)
    except ValueError:
        return False


def sync(path: Path) -> None:
    """Returns when a file's content, or a folder's entries, would survive a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_folder(folder: Path) -> None:
    try:
        sync(folder)
    except OSError:  # some file systems can't; the rename itself has happened
        log.debug("%s cannot be synchronised", folder)


def _remove(temporary: Path) -> None:
    try:
        temporary.unlink(missing_ok=True)
    except OSError:
        log.debug("%s stays", temporary)
