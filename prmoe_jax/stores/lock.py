"""The lock of a folder, so that one command at a time writes there.

On a disk it is a lock of the kernel, which ends with the process. In an object store it is a lease:
an object that its owner rewrites regularly, and that expires if it is not rewritten.
"""

import contextlib
import fcntl
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from prmoe_jax.errors import UserError, end, reason, refusing
from prmoe_jax.stores.paths import client, is_local, no_link

log = logging.getLogger(__name__)

LOCK = ".lock"
# Seconds after its last renewal at which a lease expires.
LEASE = 60.0


class Lock:
    """The lock of a folder on a disk, while it is held."""

    def check(self) -> None:
        """Call this before a write; it ends the process if another run has taken over the lock.

        Raises:
          OSError: the store with the lock fails.
        """


@contextlib.contextmanager
def locked(folder: Path, option: str = "--workdir") -> Iterator[Lock]:
    """Holds the lock of a folder; a local folder is created.

    Args:
      folder: the folder.
      option: names the folder in messages.
    """
    if is_local(folder):
        with _kernel_lock(folder, option):
            yield Lock()
    else:
        with contextlib.closing(Lease(folder, option)) as lease:
            yield lease


def holder(folder: Path) -> str:
    """Who holds a folder's lock, such as 'process 17'; '' if nobody does."""
    if is_local(folder):
        return _process(folder / LOCK) if _is_locked(folder / LOCK) else ""
    with refusing(f"{folder / LOCK} cannot be read", OSError):
        found = _read(folder / LOCK)
    return _owner(found.content) if found and found.age < LEASE else ""


def hold(path: Path, wait: bool = False) -> BinaryIO:
    """Takes the kernel's lock on a file, which it creates if needed; closing the file frees it.

    Args:
      path: the file; a link is not followed.
      wait: whether to wait for a process that holds it.

    Raises:
      BlockingIOError: another process holds it, and `wait` is False.
      OSError: the file can't be opened or locked.
    """
    file = open(path, "a+b", buffering=0, opener=no_link)  # NFS locks only writable files
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        file.close()
        if isinstance(error, BlockingIOError):
            raise
        advice = "use a folder on another file system, or mount this one with flock"
        line = f"it cannot be locked ({error.strerror}); {advice}"
        raise OSError(error.errno, line, os.fspath(path)) from error
    return file


def _kernel_lock(folder: Path, option: str) -> BinaryIO:
    """Takes the lock of a local folder, and writes this process's number into it."""
    with refusing(f"{option}={folder} cannot be written", OSError):
        folder.mkdir(parents=True, exist_ok=True)
        _check_links(folder, option)
        try:
            file = hold(folder / LOCK)
        except BlockingIOError:
            raise _in_use(option, folder, _process(folder / LOCK)) from None
        file.truncate(0)
        file.write(str(os.getpid()).encode())
        return file


def _is_locked(lock: Path) -> bool:
    """Whether a process holds a lock file."""
    if not lock.exists():
        return False
    with open(lock, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _process(lock: Path) -> str:
    """The process whose number is in a lock file."""
    with open(lock, "rb") as file:
        number = file.read(100).decode("ascii", "replace").strip()
    return f"process {number if number.isdecimal() else 'unknown'}"


def _check_links(folder: Path, option: str) -> None:
    """Refuses a folder that contains a link to the outside, where this command would write.

    The folder itself may be a link.
    """
    top = os.path.realpath(folder)
    for path in folder.iterdir():
        target = os.path.realpath(path)
        if path.is_symlink() and os.path.commonpath([top, target]) != top:
            raise UserError(
                f"{option}={folder} has the link {path.name}, through which this command would "
                f"write to {target}; put a file or folder in place of the link"
            )


class Lease(Lock):
    """A lock in an object store: an object that a run writes only if no other run has written it.

    A thread renews the lease. If the run is killed, another one may take over the lease `LEASE`
    seconds later, by the store's clock. A run that was suspended for longer than that ends as soon
    as it sees that its lease was taken over.
    """

    def __init__(self, folder: Path, option: str):
        self._folder, self._option = folder, option
        owner = f"process {os.getpid()} on {socket.gethostname()}\n{uuid.uuid4().hex}\n"
        self._path, self._content = folder / LOCK, owner.encode()
        self._renewing = threading.Lock()
        self._released = threading.Event()
        unusable, advice = f"{option}={folder} cannot be used", "create it, or correct its name"
        with refusing(unusable, OSError), refusing(unusable, FileNotFoundError, fix=advice):
            found = _read(self._path)
            if found and found.age < LEASE:
                raise self._refused(found.content, found.age)
            try:
                self._write(found.generation if found else 0)
            except FileExistsError:  # another run was faster
                raise self._refused(b"which was faster") from None
        if found:
            log.warning("takes over the lock of %s, which was killed", _owner(found.content))
        threading.Thread(target=self._keep, daemon=True).start()

    def close(self) -> None:
        self._released.set()
        with self._renewing:
            try:
                client(self._path).delete_if(self._path, self._generation)
            except OSError as error:  # the lease expires anyway
                log.info("%s was not deleted: %s", self._path, reason(error))

    def check(self) -> None:
        with self._renewing:
            if time.time() > self._renewed + LEASE / 2:
                self._renew()

    def _keep(self) -> None:
        """Renews the lease until it is released."""
        while not self._released.wait(LEASE / 4):
            with self._renewing:
                if self._released.is_set():
                    return
                try:
                    self._renew()
                except OSError as error:  # if this lasts, the next write fails, too
                    log.warning("%s was not renewed: %s", self._path, reason(error))

    def _renew(self) -> None:
        """Renews the lease, or ends this process if another run has taken it over."""
        try:
            self._write(self._generation)
        except (FileExistsError, FileNotFoundError):
            # Any further write of this process could damage the other run's files.
            end(
                f"{self._option}={self._folder}: another run has taken over the folder, since this "
                f"one was silent for {LEASE:.0f} s; it ends"
            )

    def _write(self, generation: int) -> None:
        """Writes the lock object; FileExistsError if another run has written it."""
        begun = time.time()
        try:
            self._generation = client(self._path).write_if(self._path, self._content, generation)
        except FileExistsError:
            # Perhaps we wrote it: the store's answer was lost, and the request was repeated.
            found = _read(self._path)
            if not found or found.content != self._content:
                raise
            self._generation = found.generation
        self._renewed = begun

    def _refused(self, owner: bytes, age: float = 0.0) -> UserError:
        left = f"; if it was killed, its lock ends in {LEASE - age:.0f} s"
        return _in_use(self._option, self._folder, _owner(owner), left)


def _read(path: Path):
    """A lock object as the store's `read` returns it; None if there is none."""
    with contextlib.suppress(FileNotFoundError):
        return client(path).read(path)
    return None


def _owner(content: bytes) -> str:
    """Who wrote a lock object."""
    return content.decode("ascii", "replace").partition("\n")[0][:100]


def _in_use(option: str, folder: Path, who: str, more: str = "") -> UserError:
    return UserError(
        f"{option}={folder} is in use by another run ({who}); wait for it, or give another "
        f"{option}{more}"
    )
