"""Directories that are built once: by one process at a time, whole or not at all."""

import contextlib
import fcntl
import hashlib
import json
import logging
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

from prmoe_jax.errors import UserError

log = logging.getLogger(__name__)


def fingerprint(*parts: Any) -> str:
    """A short digest of JSON-able values: equal exactly when the values are."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def build_once(
    directory: pathlib.Path,
    build: Callable[[pathlib.Path], None],
    setting: str = "--config.data.cache_dir",
) -> pathlib.Path:
    """Returns `directory`, made by `build(temporary)` and a rename if it does not exist yet.

    Other processes that want the same directory wait for the first one. A build that
    fails or is killed leaves nothing that a later one could take for finished. `setting` is what
    errors say would choose another directory.

    Raises:
      UserError: the directory cannot be written (permissions, a full disk).
    """
    if directory.is_dir():  # A complete cache may be read-only: take no lock.
        return directory
    with locked(directory, setting):
        if not directory.is_dir():
            temporary = directory.with_name(directory.name + ".tmp")
            shutil.rmtree(temporary, ignore_errors=True)  # Left by a killed run.
            try:
                temporary.mkdir()
                build(temporary)
                temporary.rename(directory)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
    return directory


@contextlib.contextmanager
def locked(directory: pathlib.Path, setting: str = "--config.data.cache_dir") -> Iterator[None]:
    """Holds the exclusive lock that guards writing to `directory`, and makes its parent.

    Raises:
      UserError: for any OSError inside, since what happens there is writing the cache.
    """
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        # The lock file stays: removing it would let two processes hold "the" lock.
        with open(f"{directory}.lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.warning("waiting for the process that is building %s", directory)
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise UserError(
            f"cannot write the cache {directory}: {error.strerror or error}; "
            f"make room or set {setting} to another folder"
        ) from error
