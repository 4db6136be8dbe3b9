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

from prmoe_jax import errors, files, stores
from prmoe_jax.errors import Failure, UserError, first_line, is_out_of_memory, refusing

# Seconds within which all processes must have started.
JOIN_SECONDS = 40
# A process without heartbeats for this many seconds counts as lost, and the others end.
HEARTBEAT_SECONDS = 20
# Seconds that a network file system may take to show what another process wrote.
SHOW_SECONDS = 10
# Seconds between checks whether another process has ended.
POLL_SECONDS = 0.5
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
    _end_in_one_line_on_abort()
    advice = f"start it on a TPU pod, under SLURM or on GKE, or give {', '.join(VARIABLES)}"
    unknown = "--distributed: the processes of this run were not found"
    with refusing(unknown, (RuntimeError, ValueError), fix=advice):
        jax.distributed.initialize(
            **arguments,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            initialization_timeout=JOIN_SECONDS,
        )
    errors.on_failure.append(_tell_others)
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
    given = [name for name in VARIABLES if name in os.environ]
    if not given:
        return {}
    if len(given) < len(VARIABLES):
        missing = ", ".join(name for name in VARIABLES if name not in given)
        raise UserError(f"{', '.join(given)} given without {missing}; give all or none")
    address, count, number = (os.environ[name] for name in VARIABLES)
    if not re.fullmatch(r"\S+:\d{1,5}", address, re.ASCII):
        raise UserError(f"{VARIABLES[0]}={address} must be HOST:PORT, where process 0 runs")
    for name, value in ((VARIABLES[1], count), (VARIABLES[2], number)):
        if not re.fullmatch(r"\d{1,6}", value, re.ASCII):
            raise UserError(f"{name}={value} must be a whole number")
    if int(number) >= int(count):
        raise UserError(
            f"{VARIABLES[2]}={number} must be below {VARIABLES[1]}={count}; they count from 0"
        )
    return {
        "coordinator_address": address,
        "num_processes": int(count),
        "process_id": int(number),
    }


# --- How they communicate


def agree(what: str, values: Callable[[], dict]) -> None:
    """Refuses values that differ from process 0's; does nothing in a run of one process.

    Args:
      what: describes the values in the error message.
      values: returns this process's values by name; JSON must be able to hold them.
    """
    if _count() == 1:
        return
    ours = json.loads(json.dumps(values()))
    theirs = of_first(ours)
    differing = [name for name in theirs | ours if theirs.get(name) != ours.get(name)]
    if differing:
        details = ", ".join(
            f"{name} is {ours.get(name)!r} in process {_number()}, {theirs.get(name)!r} in "
            "process 0"
            for name in differing
        )
        raise UserError(f"processes of one run must have {what} in common: {details}")


def of_first(value):
    """Returns process 0's value, which JSON must be able to hold, on all processes."""
    if _count() == 1:
        return value
    key = f"prmoe/{next(_calls)}/first"
    if _number() == 0:
        _client().key_value_set(key, json.dumps(value))
        return value
    return json.loads(_wait(key.removesuffix("first"), 1)[key])


def gathered(value) -> list:
    """Returns the values of all processes, in order, on all processes; they travel as JSON."""
    if _count() == 1:
        return [value]
    name = f"prmoe/{next(_calls)}/all/"
    _client().key_value_set(f"{name}{_number()}", json.dumps(value))
    found = _wait(name, _count())
    return [json.loads(found[f"{name}{number}"]) for number in range(_count())]


def barrier() -> None:
    """Waits until all processes have called this."""
    if _count() == 1:
        return
    name = f"prmoe/{next(_calls)}/here/"
    _client().key_value_set(f"{name}{_number()}", "")
    if _number() == 0:
        _wait(name, _count())
    of_first(None)


@contextlib.contextmanager
def main_process_first(cache: Path) -> Iterator[None]:
    """Process 0 runs the block first; processes that share its cache then find its files there.

    Processes with a cache of their own don't wait. Nobody waits if process 0's cache is read-only,
    since it must then be complete.

    Args:
      cache: this process's cache folder.
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

    Does nothing in a run of one process: its first write shows such errors.

    Args:
      workdir: the run's folder, which process 0 has made.
      cache: this process's cache, shared or not; it may be read-only if it holds the text already.
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


def _wait(folder: str, count: int) -> dict[str, str]:
    """Waits until a folder of the store has `count` values, and returns them by key."""
    while len(found := dict(_client().key_value_dir_get(folder))) < count:
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
            ended = [json.loads(value) for _, value in _client().key_value_dir_get(_ENDED)]
        except Exception:  # process 0 is gone: JAX aborts this process
            return
        if causes := [end for end in ended if end["cause"]]:
            cause = min(causes, key=lambda end: end["process"])
            _publish(cause=False)
            _end(f"process {cause['process']} ended: {cause['line']}", cause["code"])


def _tell_others(failure: Failure) -> None:
    """Publishes a printed failure, so that the others end, too; then ends this process."""
    if not _ending.acquire(blocking=False):  # another thread is ending this process
        time.sleep(60)
    _publish(cause=True, line=failure.line, code=failure.exit_code)
    _leave(failure.exit_code)


def _publish(cause: bool, line: str = "", code: int = 1) -> None:
    end = {"process": _number(), "cause": cause, "line": line, "code": code}
    with contextlib.suppress(Exception):  # process 0 is gone, or the key is set already
        _client().key_value_set(f"{_ENDED}{_number()}", json.dumps(end))


def _end(line: str, code: int, others_must_read: bool = True) -> None:
    """Prints one line and ends this process without clean-up, which would wait for others."""
    if not _ending.acquire(blocking=False):
        time.sleep(60)
    errors.say(f"process {_number()}: {line}")
    _leave(code, others_must_read)


def _leave(code: int, others_must_read: bool = True) -> None:
    threading.Timer(HEARTBEAT_SECONDS, os._exit, [code]).start()  # even if the lines below hang
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    # The store ends with process 0, which therefore waits until the others have read the reason.
    if others_must_read and _number() == 0:
        with contextlib.suppress(Exception):
            while len(_client().key_value_dir_get(_ENDED)) < _count():
                time.sleep(POLL_SECONDS / 2)
    os._exit(code)


def _keep_output_ours() -> None:
    """Separates the output of libraries from ours.

    Gloo, which runs collectives on CPUs, prints a greeting to standard output, where --json must
    print only JSON; it is sent to standard error. Standard error of compiled code goes to a file,
    from which `_aborted` reads why JAX ends this process.
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


_native: IO | None = None  # the file with compiled code's standard error
error_descriptor = 2  # the user's standard error, also after `_keep_output_ours`
_ABORT = ctypes.CFUNCTYPE(None, ctypes.c_int)


def _end_in_one_line_on_abort() -> None:
    """Handles abort(): JAX calls it, after a C++ stack trace, if another process was lost."""
    signal_of_libc = ctypes.CDLL(None).signal
    signal_of_libc.restype = ctypes.c_void_p
    signal_of_libc(int(signal.SIGABRT), _aborted)


@_ABORT
def _aborted(number: int) -> None:
    """Runs inside abort(), on the thread that called it, where the store can't be used."""
    _end(*explain(_native_text()), others_must_read=False)


def _native_text() -> str:
    """The end of what compiled code has printed."""
    _native.flush()
    last, most = os.fstat(_native.fileno()).st_size, 1 << 20
    return os.pread(_native.fileno(), most, max(0, last - most)).decode(errors="replace")


def explain(text: str) -> tuple[str, int]:
    """From the text that JAX printed, returns one line on why it aborted, and the exit code."""
    silent = re.search(r"stopped sending heartbeats\):\s*([\d,\s]*\d)", text)
    if silent:
        numbers = re.findall(r"\d+", silent[1])
        if str(_number()) in numbers:
            why = f"nothing was heard of it for {HEARTBEAT_SECONDS} s"
            return f"the other processes of this run ended without this one: {why}; {_AGAIN}", 1
        who = f"process{'es' * (len(numbers) > 1)} {', '.join(numbers)}"
        why = f"nothing was heard of {who} for {HEARTBEAT_SECONDS} s"
        return f"another process of this run was lost: {why}; {_AGAIN}", 1
    if "RegisterTask" in text or "Barrier timed out" in text and "REGISTER" in text.upper():
        count = os.environ.get(VARIABLES[1], "all")
        return (
            f"the {count} processes of this run did not find each other within {JOIN_SECONDS} s; "
            f"see whether each was started, what it printed, and that {VARIABLES[0]} is the same "
            "everywhere and can be reached",
            1,
        )
    if "UNAVAILABLE" in text or "DEADLINE_EXCEEDED" in text:
        return f"another process of this run was lost: process 0 cannot be reached; {_AGAIN}", 1
    path = Path(tempfile.gettempdir()) / f"prmoe-abort-{os.getpid()}.txt"
    with contextlib.suppress(UserError):
        files.replace(path, text)
    reason = next((line for line in text.splitlines() if line.startswith("F")), "without a word")
    return f"internal error: a library aborted: {reason[:200]}; all it printed is in {path}", 1
