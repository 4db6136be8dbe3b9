"""Times functions in interleaved turns, so that the machine's noise affects all alike."""

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from prmoe_jax.errors import UserError
from prmoe_jax.run.directory import device_name

# A turn repeats short calls for about this many seconds: to launch one and to wait for it may take
# longer than its work.
TURN_SECONDS = 0.02


class Timed(NamedTuple):
    """What a benchmark calls to time something, and what a table shows beside its time."""

    seconds: Callable[..., float]  # runs one turn, and returns the seconds of a call
    peak_bytes: Callable[[], int]
    bytes_moved: int = 0  # bytes of weights and their gradients that it must read and write
    drop_fraction: float = 0.0

    def __call__(self, *arguments) -> float:
        return self.seconds(*arguments)


def compiled(function, arguments, bytes_moved: int = 0, drop_fraction: float = 0.0) -> Timed:
    """Compiles a function to be timed; a turn is one call on a CPU, many on an accelerator."""
    program = jax.jit(function).lower(*arguments).compile()
    least = 0.0 if jax.default_backend() == "cpu" else TURN_SECONDS
    seconds = mean_seconds(lambda: program(*arguments), least)
    return Timed(seconds, lambda: program_bytes(program), bytes_moved, drop_fraction)


def program_bytes(program: jax.stages.Compiled) -> int:
    """The memory that a compiled program's arguments, results and temporary arrays need."""
    found = program.memory_analysis()
    parts = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
    return parts - found.alias_size_in_bytes


def mean_seconds(run: Callable[[], Any], least: float) -> Callable[[], float]:
    """Returns a function that makes one turn of calls, and returns their mean seconds.

    `run` starts the work, and returns the arrays to wait for. A turn should last `least` seconds;
    the first is a single call.
    """
    calls = 1

    def seconds() -> float:
        nonlocal calls
        begun = time.perf_counter()
        for _ in range(calls):
            results = run()
        jax.block_until_ready(results)
        each = (time.perf_counter() - begun) / calls
        calls = max(1, math.ceil(least / each))
        return each

    return seconds


def interleaved(seconds: Mapping[Any, Callable[[], float]], repeats: int) -> dict[Any, list[float]]:
    """Calls the functions turn by turn, and returns each one's seconds after two warm-up turns."""
    times: dict[Any, list[float]] = {name: [] for name in seconds}
    for _ in range(2 + repeats):
        for name, run in seconds.items():
            times[name].append(run())
    return {name: values[2:] for name, values in times.items()}


def summary(seconds: list[float]) -> dict:
    """The fields that rows of `prmoe bench moe` and `prmoe bench step` share."""
    return {
        "device": device_name(jax.devices()[0]),
        "jax": jax.__version__,
        "median_s": statistics.median(seconds),
        "min_s": min(seconds),
        "max_s": max(seconds),
    }


def check_memory(flag: str, needed: int, room: int | None = None) -> None:
    """Refuses a flag such as '--batch=8' whose arrays need more memory than there is.

    `needed` is a lower bound of their bytes. `room` is JAX's limit for the first device by default,
    and on CPUs this machine's memory.
    """
    if room is None:
        room = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
        room = room or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > room:
        raise UserError(
            f"{flag} needs {needed / 2**30:,.0f} GiB or more, there are {room / 2**30:,.0f}; "
            "use a smaller one"
        )
