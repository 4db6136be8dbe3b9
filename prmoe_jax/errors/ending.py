"""How an error ends a command: a line for the user on standard error, and an exit code."""

import contextlib
import errno
import os
import sys
import traceback
from collections.abc import Callable
from typing import NamedTuple, NoReturn

from prmoe_jax.errors import UserError, first_line, is_out_of_memory, message

LONGEST = 1000  # characters in a line for the user


class Failure(NamedTuple):
    """How a command ends."""

    line: str  # for the user
    exit_code: int = 2
    foreseen: bool = True  # False for a defect, whose traceback is worth keeping


# Called with a failure after it was printed, before the process ends, to tell other processes.
on_failure: list[Callable[[Failure], None]] = []


def say(line: str) -> None:
    """Prints a line about the command on standard error, if the stream can be written."""
    write(f"prmoe: {line}")


def write(lines: str) -> None:
    """Prints lines on standard error, above a progress bar, if the stream can be written."""
    tqdm = sys.modules.get("tqdm")  # no bar without it
    with contextlib.suppress(OSError, ValueError):
        (tqdm.tqdm.write if tqdm else print)(_printable(lines), file=sys.stderr)
        sys.stderr.flush()


def end(line: str) -> NoReturn:
    """Ends this process at once, from any thread, with one line and exit code 1."""
    say(line)
    for tell in on_failure:
        tell(Failure(line, 1))
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(1)


def describe(error: BaseException) -> Failure:
    """Turns any exception into one line for the user and an exit code."""
    if isinstance(error, UserError):
        return Failure(_one_line(error), error.exit_code)
    if isinstance(error, KeyboardInterrupt):
        return Failure("interrupted", 130)
    if is_out_of_memory(error):
        return Failure(
            f"out of memory ({first_line(error)}); lower train.batch_size, raise train.accumulate, "
            "set execution.remat=dots or full, or split the model over more devices by mesh.fsdp, "
            "mesh.expert or mesh.tensor"
        )
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        name = error.filename or "a file or standard output"
        return Failure(_one_line(f"{name} cannot be written: {error.strerror}"))
    if isinstance(error, OSError) and error.filename:
        return Failure(_one_line(f"{error.filename}: {error.strerror or error}"))
    if reason := _no_device(error):
        return Failure(
            f"JAX finds no device to run on ({reason}); set JAX_PLATFORMS to one that is there, or "
            "unset it"
        )
    return Failure(f"internal error: {type(error).__name__}: {first_line(error)}", 1, False)


# No space, no quota, a read-only disk or a file too large; such errors can lack a file's name.
_NO_ROOM = errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG


def _no_device(error: BaseException) -> str:
    """Why JAX found no device; '' for another error."""
    if isinstance(error, RuntimeError) and "Unable to initialize backend" in str(error):
        return first_line(error)
    # Without a GPU, JAX skips CUDA and then asserts that there is another backend.
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    places = [(frame.f_globals.get("__name__"), frame.f_code.co_name) for frame in frames[-1:]]
    if isinstance(error, AssertionError) and places == [("jax._src.xla_bridge", "backends")]:
        return "no NVIDIA GPU is visible"
    return ""


def _one_line(value: object) -> str:
    line = _printable(" ".join(message(value).split()))
    if len(line) <= LONGEST:
        return line
    return f"{line[: LONGEST * 2 // 3]} … {line[-LONGEST // 4 :]}"  # the end may say the fix


def _printable(line: str) -> str:
    """Escapes control characters, which text from a file may hold, as `repr` does."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in line)
