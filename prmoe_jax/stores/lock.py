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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from prmoe_jax.errors import UserError, reason, refusing
from prmoe_jax.errors.ending import end
from prmoe_jax.stores.paths import client, is_local, no_link

log = logging.getLogger(__name__)

LOCK = ".lock"
# Seconds after its last renewal at which a lease expires.
LEASE = 60.0


@contextlib.contextmanager
def locked(folder: Path, option: str = "--workdir") -> Iterator[Callable[[], None]]:
    """Holds the lock of a folder; a local folder is created.

    Args:
      folder: the folder.
      option: names the folder in messages.

    Yields:
      A function to call before a write. It ends this process if another run has taken over the
      lock, and raises OSError if the store with the lock fails.
    """
    if is_local(folder):
        with _kernel_lock(folder, option):
            yield lambda: None
    else:
        with contextlib.closing(_Lease(folder, option)) as lease:
            yield lease.check


def holder(folder: Path) -> str:
    """Who holds a folder's lock, such as 'process 17'; '' if nobody does."""
    path = folder / LOCK
    if not is_local(folder):
        with refusing(f"{path} cannot be read", OSError):
            found = _read(path)
        return _owner(found.content) if found and found.age < LEASE else ""
    if path.exists():
        with open(path, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return _process(path)
    return ""


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
            raise _in_use(f"{option}={folder}", option, _process(folder / LOCK)) from None
        file.truncate(0)
        file.write(str(os.getpid()).encode())
        return file


def _process(lock: Path) -> str:
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


class _Lease:
    """A lock in an object store: an object that a run writes only if no other run has written it.

    A thread renews the lease. If the run is killed, another one may take over the lease `LEASE`
    seconds later, by the store's clock. A run that was suspended for longer than that ends as soon
    as it sees that its lease was taken over.
    """

    def __init__(self, folder: Path, option: str):
        self._named, self._path = f"{option}={folder}", folder / LOCK
        owner = f"process {os.getpid()} on {socket.gethostname()}\n{uuid.uuid4().hex}\n"
        self._content = owner.encode()
        self._writing, self._released = threading.Lock(), threading.Event()
        unusable, advice = f"{self._named} cannot be used", "create it, or correct its name"
        with refusing(unusable, OSError), refusing(unusable, FileNotFoundError, fix=advice):
            found = _read(self._path)
            if found and found.age < LEASE:
                raise _in_use(self._named, option, _owner(found.content), LEASE - found.age)
            try:
                self._write(found.generation if found else 0)
            except FileExistsError:
                raise _in_use(self._named, option, "which was faster", LEASE) from None
        if found:
            log.warning("takes over the lock of %s, which was killed", _owner(found.content))
        threading.Thread(target=self._keep, daemon=True).start()

    def close(self) -> None:
        self._released.set()
        with self._writing:
            try:
                client(self._path).delete_if(self._path, self._generation)
            except OSError as error:  # the lease expires anyway
                log.info("%s was not deleted: %s", self._path, reason(error))

    def check(self) -> None:
        """Renews the lease if it is time; ends this process if another run has taken it over."""
        with self._writing:
            if self._released.is_set() or time.time() < self._renewed + LEASE / 4:
                return
            try:
                self._write(self._generation)
            except (FileExistsError, FileNotFoundError):
                # Any further write of this process could damage the other run's files.
                end(
                    f"{self._named}: another run has taken over the folder, since this one was "
                    f"silent for {LEASE:.0f} s; it ends"
                )

    def _keep(self) -> None:
        while not self._released.wait(LEASE / 12):
            try:
                self.check()
            except OSError as error:  # if this lasts, the next write fails, too
                log.warning("%s was not renewed: %s", self._path, reason(error))

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


def _read(path: Path):
    """A lock object as the store's `read` returns it; None if there is none."""
    with contextlib.suppress(FileNotFoundError):
        return client(path).read(path)
    return None


def _owner(content: bytes) -> str:
    return content.decode("ascii", "replace").partition("\n")[0][:100]


def _in_use(named: str, option: str, who: str, left: float | None = None) -> UserError:
    more = "" if left is None else f"; if it was killed, its lock ends in {left:.0f} s"
    return UserError(
        f"{named} is in use by another run ({who}); wait for it, or give another {option}{more}"
    )
