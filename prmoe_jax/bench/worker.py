"""Runs and times another library's implementation in a process of its own."""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax

from prmoe_jax.bench.timing import Timed
from prmoe_jax.errors import UserError


@contextlib.contextmanager
def worker(name: str, **settings) -> Iterator[Timed]:
    """Starts a process that runs what `baselines.NAME(**settings)` returns, once for each turn."""
    command = [sys.executable, "-m", "prmoe_jax.bench.baselines", name, json.dumps(settings)]
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
            raise UserError(f"the process of {name} ended; its message is above")
        taken, peak = json.loads(answer)
        return taken

    try:
        yield Timed(seconds, lambda: peak)
    finally:
        process.kill()
        process.wait()
        with contextlib.suppress(BrokenPipeError):  # it ended before it read the last line
            process.stdin.close()


def can_run(*packages: str) -> bool:
    """Whether packages are installed, and JAX runs on CPUs as the worker's process does."""
    return jax.default_backend() == "cpu" and all(map(importlib.util.find_spec, packages))


def check_no_build() -> None:
    """Refuses the lock of an unfinished build, for whose removal torch would wait forever.

    DeepSpeed compiles an extension of PyTorch at its first use.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions"
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache)
    for lock in folder.rglob("deepspeed_*/lock"):
        raise UserError(
            f"{lock} is there, because a process compiles DeepSpeed's extension or was killed "
            "while it did; wait for that process, or delete the file if there is none"
        )


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
