"""Where each run of a sweep is: a live table on a terminal, a line for each change elsewhere."""

import logging
import sys
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from prmoe_jax.config import Config
from prmoe_jax.metrics import read_metrics

log = logging.getLogger(__name__)

COLUMNS = "step", "loss", "tokens/s"


class Board:
    """To be entered; `put` says what became of a run."""

    def __init__(self, runs: dict[str, tuple[Path, Config]]):
        """Takes each run's folder and config."""
        self._runs = runs
        self._states = dict.fromkeys(runs, "waiting")
        console = Console(stderr=True)
        self._live = Live(get_renderable=self.table, console=console, refresh_per_second=1)
        self._shown = sys.stderr.isatty()

    def __enter__(self) -> "Board":
        if self._shown:
            self._live.start()
        return self

    def __exit__(self, *error) -> None:
        if self._shown:
            self._live.stop()

    def put(self, name: str, state: str) -> None:
        """A run is in another state, or failed for a reason."""
        self._states[name] = state
        if not self._shown:
            cells = zip(COLUMNS, self._cells(name), strict=False)
            come = "".join(f", {column} {cell}" for column, cell in cells)
            log.info("%s: %s%s", name, state, come)

    def table(self) -> Table:
        """All runs, as far as they have come."""
        table = Table("run", "state", *COLUMNS)
        for name, state in self._states.items():
            table.add_row(name, state, *self._cells(name))
        return table

    def _cells(self, name: str) -> list[str]:
        workdir, config = self._runs[name]
        lines = read_metrics(workdir / "metrics.jsonl")
        if not lines or self._states[name] == "waiting":
            return []
        loss = next(
            (x for x in (m.get("eval/loss", m.get("loss")) for m in reversed(lines)) if x), 0
        )
        speed = next((m["tokens_per_second"] for m in reversed(lines) if "loss" in m), 0)
        return [f"{lines[-1]['step']}/{config.total_steps}", f"{loss:.4f}", f"{speed:,.0f}"]
