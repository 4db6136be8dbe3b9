"""Config and sweep files: Python that a user wrote, whose mistakes are the user's, or ours."""

import contextlib
import runpy
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import prmoe_jax
from prmoe_jax.errors import UserError


def call(path: Path, function: str, *arguments, named: str):
    """Runs a file, and returns what a function in it returns.

    A generator that is returned has not run yet: go through it inside `mistakes`.

    Args:
      path: the file.
      function: the function's name.
      *arguments: what it is given.
      named: how the user named the file, for messages.

    Raises:
      UserError: there is no such function, or the file fails: says how, and at which line.
    """
    with mistakes(path, named):
        found = runpy.run_path(str(path)).get(function)
        if found is None:
            raise UserError(f"{named} defines no function {function}")
        return found(*arguments)


def shipped(name: str) -> Path:
    """The path of a config file that comes with this package, such as 'tiny'.

    Raises:
      UserError: there is none of that name.
    """
    package = Path(prmoe_jax.__file__).parent
    # Installed from a wheel they are inside the package; in a checkout they are beside it.
    folder = next(f for f in (package / "configs", package.parent / "configs") if f.is_dir())
    names = sorted(file.stem for file in folder.glob("*.py") if file.stem != "__init__")
    if name not in names:
        raise UserError(
            f"--config={name} is neither a file nor one of the configs that come with prmoe_jax: "
            f"{', '.join(names)}; for example --config=tiny:prmoe"
        )
    return folder / f"{name}.py"


@contextlib.contextmanager
def mistakes(path: Path, named: str) -> Iterator[None]:
    """Surrounds whatever may run code of a user's file; see `call` for the arguments.

    What the code prints goes to stderr: stdout belongs to the command's own result.

    Raises:
      UserError: the code raised anything, SystemExit included, but not KeyboardInterrupt, which
        is the user's Ctrl-C.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        place = f" at line {lines[-1]}" if lines else ""
        kind = type(error).__name__
        raise UserError(f"{named} fails{place}: {kind}: {_message(error)}") from error


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException:  # the exception's class is the user's code too
        return "(its message cannot be shown)"
