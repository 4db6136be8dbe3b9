"""SIGTERM and Ctrl-C: a run saves itself and stops, on all its processes at one step."""

import contextlib
import os
import signal

import jax
from jax.experimental import multihost_utils


class PreemptionGuard:
    """While active, SIGTERM and Ctrl-C make this truthy instead of ending the process.

    A second Ctrl-C ends it. Where there are several processes JAX catches SIGTERM, and lets all of
    them know of the step to stop at; Ctrl-C at one counts as SIGTERM to it.
    """

    def __init__(self):
        self.caught = False
        self._several = jax.process_count() > 1

    def __bool__(self) -> bool:
        return self.caught and not self._several

    def at(self, step: int) -> bool:
        """Whether to stop after this step; to be asked at every step, by every process."""
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
