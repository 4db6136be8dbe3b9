"""Prepares a command's standard streams, and turns each exception into its exit."""

import contextlib
import io
import logging
import os
import platform
import select
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import prmoe_jax
from prmoe_jax import files
from prmoe_jax.errors import UserError
from prmoe_jax.errors.ending import Failure, describe, on_failure, say, write


def prepare() -> None:
    """Makes the standard streams usable in every state, and reports failures in threads.

    A closed stream is opened on the null device. Otherwise the next file that is opened would get
    its number, and libraries would write their output into that file. Characters that a stream's
    encoding lacks are written as escapes.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is `number`
        stream = getattr(sys, name)
        if stream is None:
            stream = open(number, "r" if name == "stdin" else "w", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
        if isinstance(stream, io.TextIOWrapper) and name != "stdin":
            stream.reconfigure(errors="backslashreplace")
    logging.raiseExceptions = False
    threading.excepthook = _thread_failed
    sys.unraisablehook = _report_unraisable


def guard(task: Callable[[], None], folder: Callable[[], Path | None]) -> int:
    """Runs a command to its end; returns the exit code.

    Every failure ends in one line on standard error. An unforeseen one also leaves its traceback
    in a file in the run's `folder()`, or prints it if PRMOE_TRACEBACK=1.
    """
    try:
        try:
            task()
        finally:
            sys.stdout.flush()  # notice a closed pipe here, not at Python's exit
        return 0
    except BaseException as error:
        if isinstance(error, BrokenPipeError) and _unread(sys.stdout):
            _silence(sys.stdout)
            return 0
        if isinstance(error, SystemExit) and error.code == 0:  # --help or --version was shown
            raise
        failure = describe(error)
        if not failure.foreseen:
            failure = _with_traceback(failure, error, folder())
        say(failure.line)
        for tell in on_failure:
            tell(failure)
        try:
            sys.stdout.flush()
        except (OSError, ValueError):
            _silence(sys.stdout)
        return failure.exit_code


def leave(code: int) -> NoReturn:
    """Ends the process without waiting for threads.

    Orbax's threads would wait ten minutes for a checkpoint's folder that could not be made.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _with_traceback(failure: Failure, error: BaseException, folder: Path | None) -> Failure:
    """Prints an error's traceback or writes it to a file; the failure's line then says where."""
    text = "".join(traceback.format_exception(error))
    kept = None if os.environ.get("PRMOE_TRACEBACK") == "1" else _kept(text, folder)
    if not kept:
        write(text)
    where = kept or "the lines above"
    return failure._replace(line=f"{failure.line}; the traceback is in {where}, please report it")


def _kept(text: str, folder: Path | None) -> Path | None:
    """Writes a traceback into the run's folder, or the temporary folder; returns its path."""
    head = f"prmoe_jax {prmoe_jax.__version__}, Python {platform.python_version()}\n{sys.argv}\n\n"
    name = f"error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    for find in (lambda: folder, lambda: Path(tempfile.gettempdir())):
        with contextlib.suppress(OSError, UserError):
            if (place := find()) and place.is_dir():
                files.replace(place / name, (head + text).encode("utf-8", "backslashreplace"))
                return place / name
    return None


def _thread_failed(failed: threading.ExceptHookArgs) -> None:
    """Reports an exception that ended a thread: one line, and the traceback in a file."""
    if issubclass(failed.exc_type, SystemExit):  # ends only the thread, as Python's own hook does
        return
    error = failed.exc_value or failed.exc_type()
    failure = describe(error)
    say((failure if failure.foreseen else _with_traceback(failure, error, None)).line)


def _report_unraisable(unraisable) -> None:
    """Prints Python's own report of an error in a callback, unless it follows from another error.

    When writing a checkpoint fails, each of Tensorstore's threads finds Orbax's event loop closed.
    When reading a damaged checkpoint fails, Orbax abandons its other reads, and each ends with an
    error. When a user's code recurses too deeply, JAX's garbage collection callback gets a
    RecursionError, too.
    """
    error = unraisable.exc_value
    echo = isinstance(error, RecursionError) or str(error) == "Event loop is closed"
    while error and not echo:
        echo, error = isinstance(error, GeneratorExit), error.__cause__
    if not echo:
        sys.__unraisablehook__(unraisable)


def _unread(stream) -> bool:
    """Whether a stream is a pipe whose reader is gone, such as `head`."""
    with contextlib.suppress(OSError, ValueError):
        poll = select.poll()
        poll.register(stream.fileno(), select.POLLOUT)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    return False


def _silence(stream) -> None:
    """Sends the rest of a stream that cannot be written to the null device."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
