"""Times several functions in interleaved turns, so that the machine's noise affects all alike."""

import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax

from prmoe_jax.run.directory import device_name

Name = TypeVar("Name", bound=Hashable)

# A turn repeats short calls for about this many seconds: to launch one and to wait for it may take
# longer than its work.
TURN_SECONDS = 0.02


class Timed(NamedTuple):
    """A function to time, and what a table shows beside its time."""

    seconds: Callable[..., float]  # runs one turn, and returns the seconds of a call
    peak_bytes: Callable[[], int]
    bytes_moved: int = 0  # bytes of weights and their gradients that it must read and write
    drop_fraction: float = 0.0


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

    Args:
      run: starts the work, and returns the arrays to wait for.
      least: seconds that a turn should last. The first turn is a single call.
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
    """Calls the functions turn by turn; returns each one's seconds after two warm-up turns.

    Args:
      seconds: functions by name; each makes its turn and returns the seconds.
      repeats: number of turns after the warm-up.
    """
    times: dict[Name, list[float]] = {name: [] for name in seconds}
    for turn in range(-2, repeats):
        for name, run in seconds.items():
            taken = run()
            if turn >= 0:
                times[name].append(taken)
    return times


def summary(seconds: list[float]) -> dict:
    """The fields that rows of `prmoe bench moe` and `prmoe bench step` share."""
    return {
        "device": device_name(jax.devices()[0]),
        "jax": jax.__version__,
        "median_s": statistics.median(seconds),
        "min_s": min(seconds),
        "max_s": max(seconds),
    }
