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
from collections.abc import Iterator
from pathlib import Path

import jax

from prmoe_jax import stores
from prmoe_jax.parallel import processes

log = logging.getLogger(__name__)


# A step is slow if it takes over SLOW times the median of the last REMEMBERED steps, of
# which there must be at least NEEDED.
SLOW, REMEMBERED, NEEDED = 5.0, 100, 10


class Clock:
    """The speed of the steps since the last restart, and the goodput since the run began.

    Goodput is the share of wall time, over all restarts, that was spent in productive steps: not in
    compiling, evaluating, saving, waiting for machines, or steps that a restart repeats.

    Attributes:
      begun: when the run was started for the first time, in seconds since 1970.
      productive: seconds spent in productive steps.
    """

    def __init__(self, begun: float, productive: float = 0.0):
        # The first step is not timed, because it compiles.
        self.start: float | None = None
        self.tokens, self.wait = 0, 0.0
        self.begun, self.productive = begun, productive
        self.step_times: list[float] = []
        self.usual: deque[float] = deque(maxlen=REMEMBERED)
        self.last = {
            "tokens_per_second": 0.0,
            "input_wait_fraction": 0.0,
            "step_time_deviation": 0.0,
        }

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

    def rates(self) -> dict[str, float]:
        """Rates since the clock last started, or the previous rates if no step finished.

        Returns:
          tokens_per_second; input_wait_fraction; step_time_deviation, the standard deviation of
          step times divided by their mean; goodput.
        """
        if self.tokens:
            seconds = time.perf_counter() - self.start
            self.last = {
                "tokens_per_second": self.tokens / seconds,
                "input_wait_fraction": self.wait / seconds,
                "step_time_deviation": statistics.pstdev(self.step_times)
                / statistics.fmean(self.step_times),
            }
            self.restart()
        return self.last | {"goodput": self.productive / max(time.time() - self.begun, 1e-9)}


class StallWatch:
    """While this is active, prints all threads' stacks after some minutes without `alive()`.

    The stacks tell what a hanging run waits for. They are printed again after each such time, even
    if a thread holds Python's global lock (GIL).
    """

    def __init__(self, minutes: float):
        """Takes the minutes; inf and other times above `threading.TIMEOUT_MAX` print nothing."""
        self._seconds = minutes * 60

    def alive(self) -> None:
        """Restarts the timer."""
        if self._seconds < threading.TIMEOUT_MAX:
            file = processes.error_descriptor
            faulthandler.dump_traceback_later(self._seconds, repeat=True, file=file)

    def __enter__(self) -> "StallWatch":
        self.alive()
        return self

    def __exit__(self, *error) -> None:
        if self._seconds < threading.TIMEOUT_MAX:
            faulthandler.cancel_dump_traceback_later()


class Trace:
    """The profiler's trace of some steps, from `profile[0]` to `profile[1]`.

    JAX writes to a disk; a trace for an object store is copied there at its end.
    """

    def __init__(self, profile: tuple[int, int] | None, step: int, folder: Path):
        """Takes the steps to trace, and the last step done, which may be past them on resuming."""
        self.first, self.last = profile or (0, 0)
        self.folder, self.running = folder, False
        if profile and step >= self.last:
            log.warning("--profile=%d:%d: those steps are done, nothing is traced", *profile)

    def before(self, step: int) -> None:
        """Call this before a step is started."""
        if self.first <= step <= self.last and not self.running:
            local = stores.is_local(self.folder)
            self.written = self.folder if local else Path(tempfile.mkdtemp(prefix="prmoe-"))
            jax.profiler.start_trace(str(self.written))
            self.running = True

    def after(self, step: int, metrics: dict, stopping: bool) -> None:
        """Call this after a step is dispatched; after the last traced step it writes the trace."""
        if self.running and (step == self.last or stopping):
            jax.block_until_ready(metrics)
            jax.profiler.stop_trace()
            self.running = False
            if self.written != self.folder:
                stores.upload(self.written, self.folder)
                shutil.rmtree(self.written)
            log.info("profile written to %s", self.folder)
