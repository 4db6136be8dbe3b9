"""Runs and times another library's implementation in a process of its own."""

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
    """Starts `prmoe_jax.bench.MODULE`, which calls `serve`, as a process with these settings."""
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
        with contextlib.suppress(BrokenPipeError):  # it ended before it read the last line
            process.stdin.close()


def serve(make: Callable[..., Callable[..., float | None]]) -> None:
    """In the worker's process, calls the function from `make(**settings)` for each line of input.

    A line holds the call's arguments. The answer is the call's seconds, measured here unless the
    function returns them, and the process's peak memory in bytes.
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
    """The peak memory of this process.

    On Linux `ru_maxrss` is too large: it starts from the peak of the parent process.
    """
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes, on macOS
