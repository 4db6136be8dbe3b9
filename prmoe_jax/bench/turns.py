"""Times several things in turns, so that what else the machine does meets all of them alike."""

from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

Name = TypeVar("Name", bound=Hashable)


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
