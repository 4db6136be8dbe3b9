"""The errors that a user is meant to read, and a line for the user for every other error."""

import contextlib
import errno
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import NamedTuple, NoReturn

LONGEST = 1000  # characters in a line for the user


class UserError(Exception):
    """Input that cannot be used as given; the message names it, the numbers and the fix.

    The command line prints it on one line and exits with `exit_code`.
    """

    exit_code = 2


class TrainingStopped(UserError):
    """A run that cannot go on, although the command was right.

    Its loss or gradient is not finite, or a checkpoint of a run of several processes is damaged.
    """

    exit_code = 1


class CheckFailed(UserError):
    """Something is wrong with the machine, although the command was right."""

    exit_code = 1


class Failure(NamedTuple):
    """How a command ends."""

    line: str  # for the user
    exit_code: int = 2
    foreseen: bool = True  # False for a defect, whose traceback is worth keeping


# Called with a failure after it was printed, before the process ends, to tell other processes.
on_failure: list[Callable[[Failure], None]] = []


@contextlib.contextmanager
def refusing(
    what: str,
    kinds: type[Exception] | tuple[type[Exception], ...] = Exception,
    fix: str = "",
) -> Iterator[None]:
    """Turns exceptions of a library or of the system into a UserError of one line.

    A `UserError` and a `MemoryError` stay as they are.

    Args:
      what: what could not be done, such as 'x.json cannot be read'; the reason follows it.
      kinds: the exceptions; by default all, since readers of damaged files raise anything.
      fix: ends the line.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except kinds as error:
        line = f"{what}: {reason(error)}"
        raise UserError(f"{line}; {fix}" if fix else line) from error


@contextlib.contextmanager
def lacking_memory(fix: str) -> Iterator[None]:
    """Turns running out of memory in the block into a UserError; `fix` ends the line."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory ({first_line(error)}); {fix}") from error


@contextlib.contextmanager
def telling(before: str = "", fix: str = "") -> Iterator[None]:
    """Adds to a UserError: `before` says where it arose, `fix` what to do."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{before}{error}{f'; {fix}' if fix else ''}") from error


@contextlib.contextmanager
def missing(what: str, package: str) -> Iterator[None]:
    """Turns an ImportError in the block into a UserError that says what to install."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"{what}; pip install '{package}'") from error


def reason(error: BaseException) -> str:
    """Why something failed: the operating system's message, or else the error's first line.

    Errors whose message is rarely a sentence, such as KeyError, come with their type.
    """
    line = (getattr(error, "strerror", None) or first_line(error)).removesuffix(".")
    unclear = isinstance(error, (AttributeError, LookupError, TypeError))
    return f"{type(error).__name__}: {line}" if unclear else line


def say(line: str) -> None:
    """Prints a line about the command on standard error, if the stream can be written."""
    write(f"prmoe: {line}")


def write(text: str) -> None:
    """Prints lines on standard error, above a progress bar, if the stream can be written."""
    text = _printable(text)
    tqdm = sys.modules.get("tqdm")  # no bar without it
    with contextlib.suppress(OSError, ValueError):
        (tqdm.tqdm.write if tqdm else print)(text, file=sys.stderr)
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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python or a device ran out of memory."""
    text = _text(error)
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or "bad_alloc" in text


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if the message is empty."""
    return (_text(error).strip() or type(error).__name__).splitlines()[0][:200]


def _one_line(message: object) -> str:
    line = _printable(" ".join(_text(message).split()))
    if len(line) <= LONGEST:
        return line
    return f"{line[: LONGEST * 2 // 3]} … {line[-LONGEST // 4 :]}"  # the end may say the fix


def _printable(text: str) -> str:
    """Escapes control characters, which text from a file may hold, as `repr` does."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def _text(value: object) -> str:
    try:
        return str(value)
    except Exception:  # a user's own exception class may fail in str()
        return f"{type(value).__name__} without a message"
