"""The speed of a run's steps: throughput, slow and hanging steps, and the profiler's trace."""

import contextlib
import faulthandler
import logging
import math
import shutil
import statistics
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from prmoe_jax import stores
from prmoe_jax.parallel import processes

log = logging.getLogger(__name__)


# A step is slow if it takes over SLOW times the median of the last REMEMBERED steps, of
# which there must be at least NEEDED.
SLOW, REMEMBERED, NEEDED = 5.0, 100, 10
# The time to come is estimated after so many timed steps.
ESTIMATED = 5


class Clock:
    """The speed of the steps since the last restart, and the goodput since the run `begun`.

    Goodput is the share of wall time, over all restarts, that was spent in productive steps: not in
    compiling, evaluating, saving, waiting for machines, or steps that a restart repeats.
    """

    def __init__(self, begun: float, productive: float = 0.0):
        self.start: float | None = None  # the first step is not timed, because it compiles
        self.tokens, self.wait = 0, 0.0
        self.begun, self.productive = begun, productive
        self.step_times: list[float] = []
        self.usual: deque[float] = deque(maxlen=REMEMBERED)
        self.estimated = False
        names = "tokens_per_second", "input_wait_fraction", "step_time_deviation"
        self.last = dict.fromkeys(names, 0.0)

    def restart(self) -> None:
        self.start = self.step_ended = time.perf_counter()
        self.tokens, self.wait, self.step_times = 0, 0.0, []

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.wait += time.perf_counter() - begun

    def step_done(self, tokens: int) -> str:
        """Counts a step; returns a warning if the step was slow, else ''."""
        if self.start is None:
            self.restart()
            return ""
        now = time.perf_counter()
        took, self.step_ended = now - self.step_ended, now
        warning = ""
        usual = statistics.median(self.usual) if len(self.usual) >= NEEDED else math.inf
        if took > SLOW * usual:
            times = took / usual
            warning = f"took {took:.1f} s, {times:.0f} times as long as usual ({usual:.2f} s)"
        self.usual.append(took)
        self.step_times.append(took)
        self.productive += took
        self.tokens += tokens
        return warning

    def estimate(self, steps: int) -> float:
        """The seconds that so many steps will take, once, after a few steps; 0 at other times."""
        if self.estimated or len(self.usual) < ESTIMATED:
            return 0.0
        self.estimated = True
        return steps * statistics.median(self.usual)

    def rates(self) -> dict[str, float]:
        """Rates since the clock last started, or the previous rates if no step finished.

        step_time_deviation is the standard deviation of step times divided by their mean.
        """
        if self.tokens:
            seconds, times = time.perf_counter() - self.start, self.step_times
            self.last = {
                "tokens_per_second": self.tokens / seconds,
                "input_wait_fraction": self.wait / seconds,
                "step_time_deviation": statistics.pstdev(times) / statistics.fmean(times),
            }
            self.restart()
        return self.last | {"goodput": self.productive / max(time.time() - self.begun, 1e-9)}


@contextlib.contextmanager
def stall_watch(minutes: float) -> Iterator[Callable[[], None]]:
    """Yields a function; after some minutes without a call to it, prints all threads' stacks.

    The stacks tell what a hanging run waits for. They are printed again after each such time, even
    if a thread holds Python's global lock (GIL). Times above `threading.TIMEOUT_MAX`, such as inf,
    print nothing.
    """
    seconds = minutes * 60
    if seconds >= threading.TIMEOUT_MAX:
        yield lambda: None
        return

    def alive() -> None:
        file = processes.error_descriptor
        faulthandler.dump_traceback_later(seconds, repeat=True, file=file)

    alive()
    try:
        yield alive
    finally:
        faulthandler.cancel_dump_traceback_later()


class Trace:
    """The profiler's trace of some steps, from `profile[0]` to `profile[1]`.

    JAX writes to a disk; a trace for an object store is copied there at its end.
    """

    def __init__(self, profile: tuple[int, int] | None, step: int, folder: Path):
        """Takes the steps to trace, and the last step done, which may be past them on resuming."""
        self.first, self.last = profile or (0, 0)
        self.folder, self.local = folder, None
        if profile and step >= self.last:
            log.warning("--profile=%d:%d: those steps are done, nothing is traced", *profile)

    def before(self, step: int) -> None:
        if self.first <= step <= self.last and not self.local:
            on_disk = stores.is_local(self.folder)
            self.local = self.folder if on_disk else Path(tempfile.mkdtemp(prefix="prmoe-"))
            jax.profiler.start_trace(str(self.local))

    def after(self, step: int, metrics: dict, stopping: bool) -> None:
        """After the last traced step, which may still be computed, this writes the trace."""
        if self.local and (step == self.last or stopping):
            jax.block_until_ready(metrics)
            jax.profiler.stop_trace()
            if self.local != self.folder:
                stores.upload(self.local, self.folder)
                shutil.rmtree(self.local)
            self.local = None
            log.info("profile written to %s", self.folder)
