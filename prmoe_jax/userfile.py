"""Calling a function of a Python file that a user wrote, whose mistakes are the user's."""

import runpy
import traceback
from pathlib import Path

from prmoe_jax.errors import UserError


def call(path: Path, function: str, *arguments, named: str):
    """Runs a file, and returns what a function in it returns.

    Args:
      path: the file.
      function: the function's name.
      *arguments: what it is given.
      named: how the user named the file, for messages.

    Raises:
      UserError: there is no such function, or the file fails: says how, and at which line.
    """
    try:
        found = runpy.run_path(str(path)).get(function)
        if found is None:
            raise UserError(f"{named} defines no function {function}")
        result = found(*arguments)
        return list(result) if hasattr(result, "__next__") else result
    except UserError:
        raise
    except Exception as error:  # whatever the file does
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        place = f" at line {lines[-1]}" if lines else ""
        kind = type(error).__name__
        raise UserError(f"{named} fails{place}: {kind}: {error}") from error
