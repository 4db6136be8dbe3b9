"""The speed of a run's steps: throughput, and the profiler's trace."""

import contextlib
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from prmoe_jax import stores

log = logging.getLogger(__name__)


class Clock:
    """Throughput, and the share of time spent waiting for input, since the last restart."""

    def __init__(self):
        # The first step is not timed, because it compiles.
        self.start: float | None = None
        self.tokens, self.wait = 0, 0.0
        self.last = {"tokens_per_second": 0.0, "input_wait_fraction": 0.0}

    def restart(self) -> None:
        self.start, self.tokens, self.wait = time.perf_counter(), 0, 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.wait += time.perf_counter() - begun

    def step_done(self, tokens: int) -> None:
        if self.start is None:
            self.restart()
        else:
            self.tokens += tokens

    def rates(self) -> dict[str, float]:
        """Rates since the clock last started, or the previous rates if no step finished."""
        if self.tokens:
            seconds = time.perf_counter() - self.start
            self.last = {
                "tokens_per_second": self.tokens / seconds,
                "input_wait_fraction": self.wait / seconds,
            }
            self.restart()
        return self.last


class Trace:
    """The profiler's trace of some steps, from `profile[0]` to `profile[1]`.

    JAX writes to a disk; a trace for an object store is copied there at its end.
    """

    def __init__(self, profile: tuple[int, int] | None, step: int, folder: Path):
        """Takes the steps to trace, and the last step done, which may be later in a resumed run."""
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
        """Call this after a step was started; it writes the trace after the last traced step."""
        if self.running and (step == self.last or stopping):
            jax.block_until_ready(metrics)
            jax.profiler.stop_trace()
            self.running = False
            if self.written != self.folder:
                stores.upload(self.written, self.folder)
                shutil.rmtree(self.written)
            log.info("profile written to %s", self.folder)
