"""The progress of a sweep: a live table on a terminal, elsewhere a log line for each change."""

import contextlib
import logging
import sys
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from prmoe_jax import files
from prmoe_jax.config.schema import Config
from prmoe_jax.run.directory import METRICS

log = logging.getLogger(__name__)

COLUMNS = "step", "loss", "tokens/s"


class SweepProgress:
    """A context manager that shows the state of each run; `put` changes it."""

    def __init__(self, runs: dict[str, tuple[Path, Config]]):
        """Takes each run's folder and config."""
        self._runs = runs
        self._states = dict.fromkeys(runs, "waiting")
        self._cells: dict[str, list[str]] = {}  # of all runs but the running one
        console = Console(stderr=True)
        self._live = Live(get_renderable=self.table, console=console, refresh_per_second=1)
        self._shown = sys.stderr.isatty()

    def __enter__(self) -> "SweepProgress":
        if self._shown:
            self._live.start()
        return self

    def __exit__(self, *error) -> None:
        if self._shown:
            self._live.stop()

    def put(self, name: str, state: str) -> None:
        """Sets the state of a run, or the reason why it failed."""
        self._states[name] = state
        self._cells[name] = self._read(name)
        if not self._shown:
            cells = zip(COLUMNS, self._cells[name], strict=False)
            come = "".join(f", {column} {cell}" for column, cell in cells)
            log.info("%s: %s%s", name, state, come)

    def table(self) -> Table:
        """A table with the state and progress of all runs."""
        table = Table("run", "state", *COLUMNS)
        for name, state in self._states.items():
            cells = self._read(name) if state == "running" else self._cells.get(name, [])
            # Text keeps rich from reading brackets in a message as a style.
            table.add_row(*map(Text, (name, state, *cells)))
        return table

    def _read(self, name: str) -> list[str]:
        workdir, config = self._runs[name]
        found: dict = {}  # the newest value by name
        # There may be no line yet, or damage, which the run reports.
        with contextlib.suppress(OSError, KeyError, TypeError, ValueError):
            *lines, _ = (workdir / METRICS).read_bytes().split(b"\n")  # the last is being written
            for line in reversed(lines):
                found = dict(files.parse_json(line)) | found
                if "tokens_per_second" in found:
                    break
            loss = found.get("eval/loss", found.get("lm_loss", found.get("loss", 0)))
            speed = found.get("tokens_per_second", 0)
            return [f"{found['step']}/{config.total_steps}", f"{loss:.4f}", f"{speed:,.0f}"]
        return []
