"""Another library's implementation in its own process, which runs and is timed on request."""

import contextlib
import json
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from prmoe_jax.bench.timing import Timed
from prmoe_jax.errors import UserError


@contextlib.contextmanager
def worker(module: str, **settings) -> Iterator[Timed]:
    """Starts `python -m prmoe_jax.bench.MODULE` with these settings, which calls `serve`."""
    command = [sys.executable, "-m", f"prmoe_jax.bench.{module}", json.dumps(settings)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    peak = 0

    def seconds(*arguments: int) -> float:
        nonlocal peak
        answer = ""
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(f"{json.dumps(arguments)}\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        if not answer:
            raise UserError(f"{module}'s process ended; its message is above")
        taken, peak = json.loads(answer)
        return taken

    try:
        yield Timed(seconds, lambda: peak)
    finally:
        process.kill()
        process.wait()
        with contextlib.suppress(BrokenPipeError):  # a question that it did not read
            process.stdin.close()


def serve(make: Callable[..., Callable[..., float | None]]) -> None:
    """Runs in the worker's process what `make(**settings)` returns, once for each line of input.

    A line holds the arguments of a run. The answer is its seconds, measured here unless the run
    returns them, and the process's peak memory in bytes.
    """
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the answers
        run = make(**json.loads(sys.argv[1]))
    for line in sys.stdin:
        begun = time.perf_counter()
        with contextlib.redirect_stdout(sys.stderr):
            own = run(*json.loads(line))
        taken = time.perf_counter() - begun
        print(json.dumps([taken if own is None else own, peak_bytes()]), flush=True)


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
