"""Several processes as one run: how they find each other, agree, and end together.

They communicate through the key-value store of JAX's coordination service, which process 0 runs.
No call to it blocks. Processes poll instead, so that one that fails can end all others.
"""

import contextlib
import ctypes
import itertools
import json
import os
import re
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import jax
from jax._src import distributed  # the store has no public name

from prmoe_jax import files, stores
from prmoe_jax.errors import UserError, first_line, is_out_of_memory, refusing
from prmoe_jax.errors.ending import Failure, on_failure, say

JOIN_SECONDS = 40  # within which all processes must have started
HEARTBEAT_SECONDS = 20  # a process that was silent for so long is lost, and the others end
SHOW_SECONDS = 10  # a network file system may take so long to show another process's file
POLL_SECONDS = 0.5  # between checks whether another process has ended
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")

_ENDED = "prmoe/ended/"
_calls = itertools.count()  # equal everywhere: all processes make the same calls


@contextlib.contextmanager
def initialize_distributed() -> Iterator[None]:
    """Joins the processes of a run; use this before JAX is used for anything else.

    On Cloud TPU pods, GKE, SLURM and Open MPI, JAX finds the processes of a run; elsewhere all of
    `VARIABLES` must be set. If a process fails inside the block, all others end: within two seconds
    and with its reason if it could publish that, else once its heartbeats are missed.
    """
    arguments = _arguments()
    _keep_output_ours()
    advice = f"start it on a TPU pod, under SLURM or on GKE, or give {', '.join(VARIABLES)}"
    unknown = "--distributed: the processes of this run were not found"
    with refusing(unknown, (RuntimeError, ValueError), fix=advice):
        jax.distributed.initialize(
            **arguments,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            initialization_timeout=JOIN_SECONDS,
        )
    on_failure.append(_tell_others)
    watch = threading.Thread(target=_watch, daemon=True)
    watch.start()
    try:
        yield
    except RuntimeError as error:
        if not is_lost(error):
            raise
        # Another process was lost. `_watch` and JAX's abort know why: let them end this one first.
        time.sleep(2 * HEARTBEAT_SECONDS)
        _end(f"another process of this run was lost ({first_line(error)}); {_AGAIN}", 1)
    barrier()
    _finished.set()
    watch.join()


def is_lost(error: RuntimeError) -> bool:
    """Whether an error of a run of several processes means that one of them was lost.

    Such an error comes from compiled code, where processes wait for each other, or from the start
    of JAX's backend when process 0, which gathers all device lists, cannot be reached.
    """
    if "Unable to initialize backend" in str(error):
        try:
            _client().key_value_dir_get(_ENDED)
        except Exception:  # process 0 cannot be reached
            return True
        return False
    return isinstance(error, jax.errors.JaxRuntimeError) and not is_out_of_memory(error)


def _arguments() -> dict:
    """Arguments of jax.distributed.initialize from `VARIABLES`; empty if none is set."""
    given = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    if not given:
        return {}
    if missing := [name for name in VARIABLES if name not in given]:
        raise UserError(f"{', '.join(given)} given without {', '.join(missing)}; give all or none")
    address, count, number = given.values()
    if not re.fullmatch(r"\S+:\d{1,5}", address, re.ASCII):
        raise UserError(f"{VARIABLES[0]}={address} must be HOST:PORT, where process 0 runs")
    for name, value in ((VARIABLES[1], count), (VARIABLES[2], number)):
        if not re.fullmatch(r"\d{1,6}", value, re.ASCII):
            raise UserError(f"{name}={value} must be a whole number")
    if int(number) >= int(count):
        raise UserError(
            f"{VARIABLES[2]}={number} must be below {VARIABLES[1]}={count}; they count from 0"
        )
    return dict(coordinator_address=address, num_processes=int(count), process_id=int(number))


# --- How they communicate


def agree(what: str, values: Callable[[], dict]) -> None:
    """Refuses values that differ from process 0's; does nothing in a run of one process.

    `what` describes the values in the message. `values` returns them by name, as JSON has them.
    """
    if _count() == 1:
        return
    ours = json.loads(json.dumps(values()))
    theirs = of_first(ours)
    details = [
        f"{name} is {ours.get(name)!r} in process {_number()}, {theirs.get(name)!r} in process 0"
        for name in theirs | ours
        if theirs.get(name) != ours.get(name)
    ]
    if details:
        raise UserError(f"processes of one run must have {what} in common: {', '.join(details)}")


def of_first(value):
    """Returns process 0's value, which JSON must be able to hold, on all processes."""
    if _count() == 1:
        return value
    folder = f"prmoe/{next(_calls)}/"
    if _number() == 0:
        _put(folder, value)
        return value
    return _wait(folder, 1)[0]


def gathered(value) -> list:
    """Returns the values of all processes, in order, on all processes; they travel as JSON."""
    if _count() == 1:
        return [value]
    folder = f"prmoe/{next(_calls)}/"
    _put(folder, value)
    return [value for _, value in sorted(_wait(folder, _count()).items())]


def barrier() -> None:
    """Waits until all processes have called this."""
    if _count() == 1:
        return
    folder = f"prmoe/{next(_calls)}/"
    _put(folder, None)
    if _number() == 0:
        _wait(folder, _count())
    of_first(None)


@contextlib.contextmanager
def main_process_first(cache: Path) -> Iterator[None]:
    """Process 0 runs the block first; processes that share its cache then find its files there.

    Processes with a cache of their own don't wait. Nobody waits if process 0's cache is read-only,
    since it must then be complete. `cache` is this process's cache folder.
    """
    waits = False
    if _count() > 1:
        with contextlib.suppress(OSError):
            cache.mkdir(parents=True, exist_ok=True)
        waits = of_first(os.access(cache, os.W_OK)) and _sees_first(cache) and _number() > 0
    if waits:
        barrier()
    yield
    if not waits:
        barrier()


def check_folders(workdir: Path, cache: Path) -> None:
    """Checks that every process sees the run's folder, and can write there and to its cache.

    The cache may be read-only if it holds the text already. Does nothing in a run of one process:
    its first write shows such errors.
    """
    if _count() == 1:
        return
    if not _sees_first(workdir, SHOW_SECONDS):
        raise UserError(
            f"--workdir={workdir} is not shared: process {_number()} doesn't find there what "
            "process 0 wrote; name a folder that all processes see"
        )
    _check_writable(workdir, "--workdir")
    if not (cache / "tokens").is_dir() or os.access(cache / "tokens", os.W_OK):
        _check_writable(cache, "--config.data.cache_dir")
    barrier()


def _sees_first(folder: Path, seconds: float = 0.0) -> bool:
    """Whether a file that process 0 writes into its folder shows in this process's folder."""
    written = folder / of_first(f".process-0-{uuid.uuid4().hex}")
    if _number() == 0:
        files.replace(written, "x")
    barrier()
    found = comes_true(written.exists, seconds)
    barrier()
    if _number() == 0:
        written.unlink()
    return found


def comes_true(condition: Callable[[], bool], seconds: float | None = None) -> bool:
    """Whether a condition on another process's files holds within `seconds` (`SHOW_SECONDS`)."""
    end = time.monotonic() + (SHOW_SECONDS if seconds is None else seconds)
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.2)
    return found


def _check_writable(folder: Path, setting: str) -> None:
    with refusing(f"{setting}={folder} cannot be written by process {_number()}", OSError):
        if stores.is_local(folder):
            folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".process-{_number()}-{uuid.uuid4().hex}"
        probe.write_bytes(b"x")
        probe.unlink()


def _count() -> int:
    if distributed.global_state.client is None and jax.process_count() > 1:
        raise UserError(
            "there are several processes, and jax.distributed.initialize() was not called; use "
            "--distributed, or call it first"
        )
    return distributed.global_state.num_processes


def _number() -> int:
    return distributed.global_state.process_id


def _client():
    return distributed.global_state.client


def _put(folder: str, value) -> None:
    _client().key_value_set(f"{folder}{_number()}", json.dumps(value))


def _read(folder: str) -> dict:
    """The values in a folder of the store by process."""
    found = _client().key_value_dir_get(folder)
    return {int(key.rpartition("/")[2]): json.loads(value) for key, value in found}


def _wait(folder: str, count: int) -> dict:
    """Waits until a folder of the store has `count` values, and returns them by process."""
    while len(found := _read(folder)) < count:
        time.sleep(POLL_SECONDS / 5)
    return found


# --- How they end

_AGAIN = "start the run again to resume it"
_finished = threading.Event()
_ending = threading.Lock()  # held by the thread that ends this process


def _watch() -> None:
    """Ends this process as soon as another one has published its failure."""
    while not _finished.wait(POLL_SECONDS):
        try:
            causes = {number: cause for number, cause in _read(_ENDED).items() if cause}
        except Exception:  # process 0 is gone: JAX aborts this process
            return
        if causes:
            number = min(causes)
            line, code = causes[number]
            _publish(None)
            _end(f"process {number} ended: {line}", code)


def _tell_others(failure: Failure) -> None:
    """Publishes a printed failure, so that the others end, too; then ends this process."""
    if not _ending.acquire(blocking=False):  # another thread is ending this process
        time.sleep(60)
    _publish([failure.line, failure.exit_code])
    _leave(failure.exit_code)


def _publish(cause: list | None) -> None:
    """Says that this process ends: by itself, with a line and a code, or because another did."""
    with contextlib.suppress(Exception):  # process 0 is gone, or the key is set already
        _put(_ENDED, cause)


def _end(line: str, code: int, others_must_read: bool = True) -> None:
    """Prints one line and ends this process without clean-up, which would wait for others."""
    if not _ending.acquire(blocking=False):
        time.sleep(60)
    say(f"process {_number()}: {line}")
    _leave(code, others_must_read)


def _leave(code: int, others_must_read: bool = True) -> None:
    threading.Timer(HEARTBEAT_SECONDS, os._exit, [code]).start()  # even if the lines below hang
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    # The store ends with process 0, which therefore waits until the others have read the reason.
    if others_must_read and _number() == 0:
        with contextlib.suppress(Exception):
            _wait(_ENDED, _count())
    os._exit(code)


def _keep_output_ours() -> None:
    """Separates the output of libraries from ours.

    Gloo, which runs collectives on CPUs, prints a greeting to standard output, where --json must
    print only JSON; it is sent to standard error. Standard error of compiled code goes to a file.
    If another process was lost, JAX prints a C++ stack trace there and aborts this process. Then
    `_aborted` reads the reason from the file and ends this process with one line.
    """
    global _native, error_descriptor
    sys.stdout.flush()
    sys.stderr.flush()
    encoding = {"buffering": 1, "encoding": sys.stderr.encoding, "errors": "backslashreplace"}
    output, error = os.dup(1), os.dup(2)
    error_descriptor = error
    os.dup2(2, 1)
    _native = tempfile.TemporaryFile()  # noqa: SIM115, open until the process ends
    os.dup2(_native.fileno(), 2)
    sys.stdout, sys.stderr = open(output, "w", **encoding), open(error, "w", **encoding)  # noqa: SIM115
    libc = ctypes.CDLL(None)
    libc.signal.restype = ctypes.c_void_p
    libc.signal(int(signal.SIGABRT), _aborted)


_native: IO | None = None  # the file with compiled code's standard error
error_descriptor = 2  # the user's standard error, also after `_keep_output_ours`


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _aborted(number: int) -> None:
    """Runs inside abort(), on the thread that called it, where the store can't be used."""
    _end(explain(_native_text()), 1, others_must_read=False)


def _native_text() -> str:
    _native.flush()
    last, most = os.fstat(_native.fileno()).st_size, 1 << 20
    return os.pread(_native.fileno(), most, max(0, last - most)).decode(errors="replace")


def explain(text: str) -> str:
    """One line on why JAX aborted this process, from the text that it printed."""
    if silent := re.search(r"stopped sending heartbeats\):\s*([\d,\s]*\d)", text):
        numbers = re.findall(r"\d+", silent[1])
        what, who = "another process of this run was lost", f"process {numbers[0]}"
        if str(_number()) in numbers:
            what, who = "the other processes of this run ended without this one", "it"
        elif len(numbers) > 1:
            who = f"processes {', '.join(numbers)}"
        return f"{what}: nothing was heard of {who} for {HEARTBEAT_SECONDS} s; {_AGAIN}"
    if "RegisterTask" in text or "Barrier timed out" in text and "REGISTER" in text.upper():
        count = os.environ.get(VARIABLES[1], "all")
        return (
            f"the {count} processes of this run did not find each other within {JOIN_SECONDS} s; "
            f"see whether each was started, what it printed, and that {VARIABLES[0]} is the same "
            "everywhere and can be reached"
        )
    if "UNAVAILABLE" in text or "DEADLINE_EXCEEDED" in text:
        return f"another process of this run was lost: process 0 cannot be reached; {_AGAIN}"
    path = Path(tempfile.gettempdir()) / f"prmoe-abort-{os.getpid()}.txt"
    with contextlib.suppress(UserError):
        files.replace(path, text)
    reason = next((line for line in text.splitlines() if line.startswith("F")), "without a word")
    return f"internal error: a library aborted: {reason[:200]}; all it printed is in {path}"
