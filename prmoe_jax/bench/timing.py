"""Times several things in interleaved turns, so that noise of the machine affects all alike."""

import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax

from prmoe_jax.run.directory import device_name

Name = TypeVar("Name", bound=Hashable)

# Seconds that a turn of short calls lasts at least: to launch one and to wait for it may take
# longer than its work does.
TURN_SECONDS = 0.02


class Timed(NamedTuple):
    """Something to time beside others."""

    seconds: Callable[..., float]  # runs once, and returns the time it took
    peak_bytes: Callable[[], int]
    bytes_moved: int = 0  # bytes of weights and their gradients that it must read and write
    drop_fraction: float = 0.0


def compiled(function, arguments, bytes_moved: int = 0, drop_fraction: float = 0.0) -> Timed:
    """Times a compiled function: called once in a turn on a CPU, often on an accelerator."""
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
    """A turn of calls in a row, which returns the mean time of one of them.

    Args:
      run: starts the work, and returns the arrays to wait for.
      least: seconds that a turn lasts at least, but the first one, which is a single call.
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


def interleaved(
    seconds: Mapping[Name, Callable[[], float]], repeats: int
) -> dict[Name, list[float]]:
    """The seconds of each by turn, after two turns of all to compile and to warm up.

    Args:
      seconds: for each name a function that runs once and returns the time that this took.
      repeats: number of turns that count.
    """
    times: dict[Name, list[float]] = {name: [] for name in seconds}
    for turn in range(-2, repeats):
        for name, run in seconds.items():
            taken = run()
            if turn >= 0:
                times[name].append(taken)
    return times


def summary(seconds: list[float]) -> dict:
    """The fields of a row that all timings of the library have."""
    return {
        "device": device_name(jax.devices()[0]),
        "jax": jax.__version__,
        "median_s": statistics.median(seconds),
        "min_s": min(seconds),
        "max_s": max(seconds),
    }
