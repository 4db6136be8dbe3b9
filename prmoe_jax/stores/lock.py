"""The lock of a folder, so that one command at a time writes there.

On a disk it is the kernel's, which ends with the process. In an object store it is a lease: an
object that its owner writes again and again, and that counts for nothing once it is too old.
"""

import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import BinaryIO, Protocol

from prmoe_jax.errors import UserError, end
from prmoe_jax.stores.paths import is_local, no_link

log = logging.getLogger(__name__)

LOCK = ".lock"
# Seconds after its last renewal at which a lease may be taken over.
LEASE = 60.0


class Lock(Protocol):
    """A context manager that holds a folder's lock."""

    def __enter__(self) -> "Lock": ...

    def __exit__(self, *error) -> None: ...

    def check(self) -> None:
        """Call this before a write; it doesn't return if another run has taken the lock over.

        Raises:
          OSError: the store that would tell it fails.
        """


def locked(folder: Path, option: str = "--workdir") -> Lock:
    """The lock of a folder, to be entered; that of a local folder creates it.

    Entering raises UserError if the folder cannot be written, or another run holds the lock.
    `option` names the folder in messages.
    """
    return (FileLock if is_local(folder) else Lease)(folder, option)


def holder(folder: Path) -> str:
    """Who holds a folder's lock, such as 'process 17', or ''."""
    return (FileLock if is_local(folder) else Lease).holder(folder)


def hold(path: Path, wait: bool = False) -> BinaryIO:
    """Takes the kernel's lock on a file, which is made if needed; closing the file frees it.

    Args:
      path: the file; a link is not followed.
      wait: whether to wait for a process that holds it.

    Raises:
      BlockingIOError: another process holds it, and `wait` is False.
      OSError: the file can't be opened or locked.
    """
    file = open(path, "a+b", buffering=0, opener=no_link)  # NFS locks only files to write to
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BaseException:
        file.close()
        raise
    return file


class FileLock:
    """A lock of the kernel on a file, freed when the process dies."""

    def __init__(self, folder: Path, option: str):
        self._folder, self._option = folder, option

    def __enter__(self) -> "FileLock":
        folder, named = self._folder, f"{self._option}={self._folder}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _check_links(folder, named)
            self._file = hold(folder / LOCK)
        except BlockingIOError:
            raise _in_use(self._option, folder, _process(folder / LOCK)) from None
        except OSError as error:
            if error.filename is not None:
                raise UserError(f"{named} cannot be written: {error.strerror}") from None
            raise UserError(  # a file system without locks, such as some mounts of Lustre
                f"{named} cannot be locked: {error.strerror}; use a folder on another file "
                "system, or mount this one with flock"
            ) from None
        self._file.truncate(0)
        self._file.write(str(os.getpid()).encode())
        return self

    def __exit__(self, *error) -> None:
        self._file.close()

    def check(self) -> None:
        """Does nothing: no other run can have taken the lock."""

    @staticmethod
    def holder(folder: Path) -> str:
        try:
            with open(folder / LOCK, "rb") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    return ""
                except BlockingIOError:
                    return _process(folder / LOCK)
        except (FileNotFoundError, NotADirectoryError):
            return ""


def _process(lock: Path) -> str:
    """The process whose number a lock file holds."""
    with open(lock, "rb") as file:
        number = file.read(100).decode("ascii", "replace").strip()
    return f"process {number if number.isdecimal() else 'unknown'}"


def _check_links(folder: Path, named: str) -> None:
    """Refuses a folder with a link that leads out of it, through which files would be written.

    The folder itself may be a link.
    """
    top = os.path.realpath(folder)
    for path in folder.iterdir():
        target = os.path.realpath(path)
        if path.is_symlink() and os.path.commonpath([top, target]) != top:
            raise UserError(
                f"{named} has the link {path.name}, through which this command would write to "
                f"{target}; put a file or folder in place of the link"
            )


class Lease:
    """A lock in an object store: an object that is written only if no other run wrote it since.

    A thread renews it. A run that was killed leaves it behind, for `LEASE` seconds at most: after
    them another run may take it over. The age is measured by the store's clock. A run that comes
    back late, after it was suspended for example, ends as soon as it sees that its lease was taken
    over.
    """

    def __init__(self, folder: Path, option: str):
        from prmoe_jax.stores import gcs

        self._gcs, self._path = gcs, folder / LOCK
        self._folder, self._option = folder, option
        self._owner = uuid.uuid4().hex
        self._renewing = threading.Lock()
        self._released = threading.Event()
        self._generation, self._until = 0, 0.0

    def __enter__(self) -> "Lease":
        try:
            found = _Found.at(self._path)
            if found and found.left > 0:
                raise self._refused(found)
            if found:
                log.warning("takes over the lock of %s, which ended without freeing it", found.who)
            self._write(found.generation if found else 0)
        except FileExistsError:  # another run was faster
            raise self._refused(_Found.at(self._path)) from None
        except FileNotFoundError:
            bucket = os.fspath(self._folder).split("/")[2]
            raise UserError(
                f"{self._option}={self._folder}: there is no bucket {bucket}; create it, or "
                "correct its name"
            ) from None
        except OSError as error:
            raise UserError(
                f"{self._option}={self._folder} cannot be used: {error.strerror or error}"
            ) from None
        threading.Thread(target=self._keep, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self._released.set()
        with self._renewing:
            try:
                self._gcs.delete_if(self._path, self._generation)
            except OSError as failed:  # it ends by itself
                log.info("%s was not deleted: %s", self._path, failed.strerror or failed)

    def check(self) -> None:
        with self._renewing:
            if _now() > self._until:
                self._renew()

    @staticmethod
    def holder(folder: Path) -> str:
        try:
            found = _Found.at(folder / LOCK)
        except OSError as error:
            raise UserError(f"{folder / LOCK} cannot be read: {error.strerror or error}") from None
        return found.who if found and found.left > 0 else ""

    def _keep(self) -> None:
        """Renews the lease until it is released."""
        while not self._released.wait(LEASE / 4):
            with self._renewing:
                if self._released.is_set():
                    return
                try:
                    self._renew()
                except OSError as error:  # the next write to the store tells it, if it lasts
                    log.warning("%s was not renewed: %s", self._path, error.strerror or error)

    def _renew(self) -> None:
        """Renews the lease, or ends this process if another run has taken it over."""
        try:
            self._write(self._generation)
        except (FileExistsError, FileNotFoundError):
            # Whatever this process wrote now could spoil the other run.
            end(
                f"{self._option}={self._folder}: another run has taken over the folder, since this "
                f"one was silent for {LEASE:.0f} s; it ends"
            )

    def _write(self, generation: int) -> None:
        """Writes the lock object.

        Raises:
          FileExistsError: another run wrote it.
        """
        begun = _now()
        content = {"host": socket.gethostname(), "process": os.getpid()}
        content |= {"lease": LEASE, "owner": self._owner}
        data = (json.dumps(content) + "\n").encode()
        try:
            self._generation = self._gcs.write_if(self._path, data, generation)
        except FileExistsError:
            # An attempt whose answer was lost may have written it, before it was repeated.
            found = _Found.at(self._path)
            if not found or found.owner != self._owner:
                raise
            self._generation = found.generation
        self._until = begun + LEASE

    def _refused(self, found: "_Found | None") -> UserError:
        if not found:
            return _in_use(self._option, self._folder, "which just ended")
        return _in_use(
            *(self._option, self._folder),
            f"{found.who}, seen {found.age:.0f} s ago",
            f"; if it was killed, its lock ends in {max(found.left, 0):.0f} s",
        )


class _Found:
    """A lock object in a store."""

    def __init__(self, content: bytes, generation: int, age: float):
        try:
            values = dict(json.loads(content))
            lease, self.owner = float(values["lease"]), values["owner"]
            self.who = f"process {values['process']} on {values['host']}"
        except (KeyError, TypeError, ValueError):  # someone else's
            lease, self.owner, self.who = LEASE, "", "process unknown"
        self.generation, self.age, self.left = generation, age, lease - age

    @classmethod
    def at(cls, path: Path) -> "_Found | None":
        from prmoe_jax.stores import gcs

        try:
            return cls(*gcs.read(path))
        except FileNotFoundError:
            return None


def _in_use(option: str, folder: Path, who: str, more: str = "") -> UserError:
    return UserError(
        f"{option}={folder} is in use by another run ({who}); wait for it, or give another "
        f"{option}{more}"
    )


def _now() -> float:
    """Seconds that go on while this machine sleeps, where its system has such a clock."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
