"""On SIGTERM or Ctrl-C, a run saves a checkpoint and stops, at one step on all its processes."""

import contextlib
import os
import signal

import jax
from jax.experimental import multihost_utils


class PreemptionGuard:
    """While this is active, SIGTERM and Ctrl-C ask the run to stop instead of ending the process.

    With one process, `bool(guard)` is true after such a signal. With several, it is always false:
    JAX catches SIGTERM, and `at` tells all processes the same step to stop after; on Ctrl-C, a
    process sends itself SIGTERM. A second Ctrl-C ends the process.
    """

    def __init__(self):
        self.caught = False
        self._several = jax.process_count() > 1

    def __bool__(self) -> bool:
        return self.caught and not self._several

    def at(self, step: int) -> bool:
        """Whether to stop after this step; every process must call this at every step."""
        if self._several:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.caught

    def __enter__(self) -> "PreemptionGuard":
        self._before = {}
        numbers = [signal.SIGINT] if self._several else [signal.SIGTERM, signal.SIGINT]
        with contextlib.suppress(ValueError):  # only the main thread may catch signals
            for number in numbers:
                self._before[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _catch(self, number, frame) -> None:
        if self.caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.caught = True
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)
