"""Runs a rival in its own process, which reads lines and answers each with one line."""

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator

from prmoe_jax.errors import UserError


@contextlib.contextmanager
def worker(module: str, *arguments) -> Iterator[Callable[[str], float]]:
    """Starts `python -m prmoe_jax.bench.MODULE`; yields a function from a line to its answer.

    Raises:
      UserError: the process ended.
    """
    command = [sys.executable, "-m", f"prmoe_jax.bench.{module}", *map(str, arguments)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(question: str) -> float:
        answer = ""
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(f"{question}\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        if not answer:
            raise UserError(f"{module}'s process ended; its message is above")
        return float(answer)

    try:
        yield ask
    finally:
        process.kill()
        process.wait()
