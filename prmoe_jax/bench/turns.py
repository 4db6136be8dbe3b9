"""Times several things in turns, so that what else the machine does meets all of them alike."""

import time
from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple, TypeVar

import jax

Name = TypeVar("Name", bound=Hashable)


class Rival(NamedTuple):
    """Something to time beside others."""

    seconds: Callable[[], float]  # runs once, and returns the time it took
    peak_bytes: Callable[[], int]
    bytes_moved: int = 0  # bytes of weights and their gradients that it must read and write
    drop_fraction: float = 0.0


def compiled(function, arguments, bytes_moved: int = 0, drop_fraction: float = 0.0) -> Rival:
    """A rival that calls a compiled function and waits for its results."""
    program = jax.jit(function).lower(*arguments).compile()
    memory = program.memory_analysis()
    parts = "argument", "output", "temp"
    peak = sum(getattr(memory, f"{part}_size_in_bytes") for part in parts)

    def seconds() -> float:
        begun = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        return time.perf_counter() - begun

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
