"""The errors that a user is meant to read, and how other exceptions become such errors."""

import contextlib
from collections.abc import Iterator


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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python or a device ran out of memory."""
    text = message(error)
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or "bad_alloc" in text


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if the message is empty."""
    return (message(error).strip() or type(error).__name__).splitlines()[0][:200]


def message(value: object) -> str:
    """`str(value)`, or what the value is if `str` fails."""
    try:
        return str(value)
    except Exception:  # a user's own exception class may fail in str()
        return f"{type(value).__name__} without a message"
