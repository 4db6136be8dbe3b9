"""Runs Python files of the user or of this package (configs, sweeps) and reports their errors."""

import contextlib
import runpy
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import prmoe_jax
from prmoe_jax.errors import UserError


def call(path: Path, function: str, *arguments, named: str):
    """Runs a file, calls a function in it, and returns the result.

    If the result is a generator, it has not run yet: iterate over it inside `mistakes`. `named` is
    the file as the user named it, for error messages.
    """
    with mistakes(path, named):
        found = runpy.run_path(str(path)).get(function)
        if found is None:
            raise UserError(f"{named} defines no function {function}")
        return found(*arguments)


def shipped(name: str) -> Path:
    """The path of a config file that comes with this package, such as 'tiny'."""
    package = Path(prmoe_jax.__file__).parent
    # A wheel has the configs inside the package; a checkout has them beside it.
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
    """Reports errors in a user's file whose code runs in this context; arguments as for `call`.

    Output of that code goes to stderr, because stdout is for the command's own result. Any
    exception becomes a UserError, even SystemExit; only KeyboardInterrupt (Ctrl-C) passes.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        where = f"{named} fails at line {lines[-1]}" if lines else f"{named} fails"
        try:
            message = str(error)
        except BaseException:  # its __str__ may be the user's code, too
            message = "(its message cannot be shown)"
        raise UserError(f"{where}: {type(error).__name__}: {message}") from error
