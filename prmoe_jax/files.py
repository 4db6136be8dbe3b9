"""Reads and checks files, and writes files and folders atomically, also in an object store."""

import contextlib
import json
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from prmoe_jax import stores
from prmoe_jax.errors import UserError, refusing
from prmoe_jax.stores.lock import LOCK, hold, locked

log = logging.getLogger(__name__)

UNFINISHED = ".unfinished"
_TEMPORARY = ".tmp"


def replace(path: Path, content: str | bytes) -> None:
    """Writes a file atomically. One that already holds the content is not touched."""
    data = content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content
    with refusing(f"{path} cannot be written", OSError):
        if path.is_file() and not os.path.islink(path) and path.read_bytes() == data:
            return
        if stores.is_local(path):
            with whole(path) as file:
                file.write(data)
        else:
            stores.client(path).write(path, data)


@contextlib.contextmanager
def whole(path: Path, scratch: Path | None = None) -> Iterator[BinaryIO]:
    """A new file on a disk, which replaces `path` when the block has ended.

    A crash, `kill -9` or a full disk at any moment leaves the old content or the new one. Until the
    end the file has a random hidden name in `scratch`, a folder on the same disk, by default that
    of `path`. A link is replaced, not followed.
    """
    temporary = (scratch or path.parent) / f".{secrets.token_hex(8)}{_TEMPORARY}"
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        _remove(temporary)
        raise
    _sync_folder(path.parent)


def remove_unfinished(folder: Path) -> None:
    """Removes files that killed processes left in a folder where no other process writes."""
    for path in folder.glob(f".*{_TEMPORARY}"):
        if path.is_symlink() or path.is_file():
            _remove(path)


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder on a disk, which is renamed to `folder` when the block has ended.

    Until then it lies beside `folder` under a hidden name. Files that a killed process left in it
    are removed first. If `folder` exists and is empty, it is replaced; else an OSError is raised.
    """
    folder = Path(os.path.realpath(folder))
    temporary = folder.with_name(f".{folder.name}{_TEMPORARY}")
    if temporary.is_symlink():
        raise UserError(
            f"{temporary} is a link to {os.path.realpath(temporary)}, where files would be "
            "deleted; remove the link"
        )
    temporary.mkdir(parents=True, exist_ok=True)
    try:
        lock = hold(temporary / LOCK)
    except BlockingIOError:
        raise UserError(f"another process is writing {folder}; wait for it to end") from None
    with lock:
        try:
            for left in temporary.iterdir():
                if left.is_dir() and not left.is_symlink():
                    shutil.rmtree(left)
                elif left.name != LOCK:
                    left.unlink()
            yield temporary
            for path in [*temporary.rglob("*"), temporary]:
                (_sync_folder if path.is_dir() else sync)(path)
            temporary.rename(folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        # If the lock were removed before the rename, another process could lock a new file and
        # empty the folder.
        (folder / LOCK).unlink(missing_ok=True)
        _sync_folder(folder.parent)


@contextlib.contextmanager
def building_in_store(folder: Path, option: str) -> Iterator[None]:
    """Makes the block, which writes a folder in an object store, safe to repeat.

    It holds the folder's lock, and keeps an object `UNFINISHED` there until the block has
    succeeded. If a command was killed or failed, the next one removes its objects first. The block
    must write last the object without which readers refuse the folder.
    """
    store, mark = stores.client(folder), folder / UNFINISHED
    with locked(folder, option) as check_lock:
        check_free_in_store(folder, option)
        for path in store.find(folder):
            if path not in (mark, folder / LOCK):
                path.unlink()
        store.write(mark, b"another command may remove this folder's objects\n")
        yield
        check_lock()
        mark.unlink()


def build_in_store(
    folder: Path,
    option: str,
    build: Callable[[Path], None],
    last: str,
    scratch: Path | None = None,
) -> None:
    """Makes a folder in an object store: builds it on a disk, then uploads it.

    Args:
      folder: the folder to make.
      option: names it in messages.
      build: writes the content into a local folder.
      last: the file without which the folder counts as incomplete; it is copied last.
      scratch: the parent of the temporary local folder; the system's by default.
    """
    with (
        building_in_store(folder, option),
        tempfile.TemporaryDirectory(prefix="prmoe-", dir=scratch) as temporary,
    ):
        build(Path(temporary))
        stores.upload(Path(temporary), folder, last)


def check_free_in_store(folder: Path, option: str) -> None:
    """Raises UserError if a folder in a store holds anything but an unfinished build."""
    paths = stores.client(folder).find(folder)
    found = {path.relative_to(folder).parts[:1] for path in paths} - {(LOCK,)}
    if found and (UNFINISHED,) not in found:
        raise UserError(f"{option}={folder} exists; give another folder, or remove it")


def is_plain(name: Any) -> bool:
    """Whether an untrusted value is a plain file name, which cannot lead to another folder.

    It also has no control characters and no lone surrogates.
    """
    return (
        isinstance(name, str)
        and name.isprintable()
        and "/" not in name
        and name not in ("", ".", "..")
        and len(name.encode()) <= 255
    )


def regular(path: Path, hint: str = "") -> Path:
    """Returns the path of a regular file, and refuses others: reading a pipe may never end.

    `hint` is added to the message if the file is missing.
    """
    with refusing(f"{path} cannot be read", OSError):
        if path.is_file():
            return path
        found = path.exists()
    raise UserError(f"{path} is not a regular file" if found else f"{path} is missing{hint}")


def read(path: Path) -> bytes:
    """The content of an untrusted file, which may be a pipe."""
    refuse_pipe(path)
    return path.read_bytes()


def refuse_pipe(path: Path) -> None:
    """Raises UserError if a path is a pipe, a socket or a device: reading it may never end."""
    if stores.is_local(path) and path.exists() and not (path.is_file() or path.is_dir()):
        raise UserError(f"{path}: a pipe, a socket or a device, not a file; leave it out")


def read_json(path: Path, kind: type = dict, fix: str = "restore a copy of it") -> Any:
    """Reads the value that a JSON file holds, of the type `kind`; `fix` is advice about damage."""
    with (
        refusing(f"{path} cannot be read", OSError),
        refusing(f"{path} is damaged", ValueError, fix=fix),
    ):
        value = parse_json(read(path))
    if not isinstance(value, kind):
        found = type(value).__name__
        raise UserError(f"{path} is damaged: it holds {found}, not {kind.__name__}; {fix}")
    return value


def read_json_lines(
    path: Path, kinds: Mapping[str, type | tuple[type, ...]], fix: str
) -> list[dict]:
    """Reads a file with one JSON object on each line; a missing file has no objects.

    A last line without a newline is left out, with a warning, unless it is a complete object.
    `kinds` and `fix` are as in `require`.
    """
    with refusing(f"{path} cannot be read", OSError):
        if not path.exists():
            return []
        *lines, torn = read(path).split(b"\n")
    if torn and _is_object(torn):
        lines.append(torn)  # some editors leave out the last newline
    elif torn:
        log.warning("%s: its last line was torn by a crash and is left out", path)
    rows = []
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number},"
        with refusing(f"{where} is damaged", ValueError, fix=fix):
            row = parse_json(line)
        require(row, kinds, where, fix)
        rows.append(row)
    return rows


def require(row: Any, kinds: Mapping[str, type | tuple[type, ...]], where: str, fix: str) -> None:
    """Checks that a value that was read from a file is a dict with certain fields.

    Args:
      row: the value.
      kinds: names that it must have, with the allowed types of their values.
      where: the file and the line or object in it, for the message.
      fix: advice for the user, for the message.
    """
    if not isinstance(row, dict):
        raise UserError(f"{where} is damaged: not an object but {type(row).__name__}; {fix}")
    if missing := [name for name in kinds if name not in row]:
        raise UserError(f"{where} is damaged: it has no {', '.join(missing)}; {fix}")
    for name, kind in kinds.items():
        wrong = isinstance(row[name], bool) and kind in (int, (int, float))  # True is an int
        if wrong or not isinstance(row[name], kind):
            raise UserError(f"{where} is damaged: {name} is {row[name]!r:.60}; {fix}")


def parse_json(data: bytes) -> Any:
    """Parses UTF-8 JSON; raises ValueError for anything else, and for JSON nested too deeply."""
    try:
        return json.loads(data.decode("utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _is_object(line: bytes) -> bool:
    with contextlib.suppress(ValueError):
        return isinstance(parse_json(line), dict)
    return False


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's entries, would survive a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems can't do this; the rename has happened
        sync(folder)


def _remove(temporary: Path) -> None:
    with contextlib.suppress(OSError):  # the file then stays
        temporary.unlink(missing_ok=True)
