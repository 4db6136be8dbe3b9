"""Times several things in turns, so that what else the machine does meets all of them alike."""

import math
import time
from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple, TypeVar

import jax

Name = TypeVar("Name", bound=Hashable)

# What a turn of a compiled function takes at least on an accelerator, in seconds.
TURN_SECONDS = 0.02


class Rival(NamedTuple):
    """Something to time beside others."""

    seconds: Callable[[], float]  # runs once, and returns the time it took
    peak_bytes: Callable[[], int]
    bytes_moved: int = 0  # bytes of weights and their gradients that it must read and write
    drop_fraction: float = 0.0


def compiled(function, arguments, bytes_moved: int = 0, drop_fraction: float = 0.0) -> Rival:
    """A rival that calls a compiled function and waits for its results.

    On an accelerator a turn is many calls in a row, since to launch one and to wait for it may take
    longer than its work does; their mean counts. The turns before those that count find how many.
    """
    program = jax.jit(function).lower(*arguments).compile()
    memory = program.memory_analysis()
    parts = "argument", "output", "temp"
    peak = sum(getattr(memory, f"{part}_size_in_bytes") for part in parts)

    calls = 1

    def seconds() -> float:
        nonlocal calls
        begun = time.perf_counter()
        for _ in range(calls):
            results = program(*arguments)
        jax.block_until_ready(results)
        each = (time.perf_counter() - begun) / calls
        if jax.default_backend() != "cpu":
            calls = math.ceil(TURN_SECONDS / each)
        return each

    return Rival(seconds, lambda: peak, bytes_moved, drop_fraction)


def in_turns(seconds: Mapping[Name, Callable[[], float]], repeats: int) -> dict[Name, list[float]]:
    """The seconds of each, in the order of the turns, after two turns to compile and to warm up.

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
