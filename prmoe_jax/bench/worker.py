"""Runs a rival in its own process, which reads lines and answers each with one line."""

import contextlib
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

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
        with contextlib.suppress(BrokenPipeError):  # a question that it did not read
            process.stdin.close()


def answer(run: Callable[[], object]) -> None:
    """In a worker's process: answers each line on standard input with one line.

    To 'memory' the answer is the process's peak memory in bytes, to others the seconds of `run()`.
    """
    for line in sys.stdin:
        if line.strip() == "memory":
            print(peak_bytes(), flush=True)
            continue
        begun = time.perf_counter()
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the answers
            run()
        print(time.perf_counter() - begun, flush=True)


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def peak_bytes() -> int:
    """The most memory that this process has had.

    On Linux that is not `ru_maxrss`, which begins with the peak of the process that started it.
    """
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes, on macOS
