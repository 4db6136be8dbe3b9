"""Output of the subcommands: numbers as text or JSON, and the log on standard error."""

import json
import logging
import math
import warnings
from collections.abc import Callable
from typing import Any

from prmoe_jax.errors.ending import write


def as_json(value) -> str:
    """A result as JSON, which has no infinity and no NaN: they become 'inf', '-inf' and 'nan'."""
    return json.dumps(_finite(value), allow_nan=False)


def _finite(value):
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def emit(result, in_json: bool, as_text: Callable[[Any], str]) -> None:
    """Prints a subcommand's result, as JSON or as the text that `as_text` makes of it."""
    print(as_json(result) if in_json else as_text(result))


def show(metrics: dict, in_json: bool) -> None:
    if in_json:
        print(as_json(metrics))
        return
    from prmoe_jax.run.metrics import router_table

    for name, value in metrics.items():
        if not (isinstance(value, list) or "layers/" in name):
            print(f"{name:24} {value:.6g}" if isinstance(value, float) else f"{name:24} {value}")
    if table := router_table({name.removeprefix("eval/"): v for name, v in metrics.items()}):
        print(f"\n{table}")


def is_first_process() -> bool:
    import jax

    return jax.process_index() == 0


class _StandardError(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        write(self.format(record))


def log_to_stderr() -> None:
    logger = logging.getLogger("prmoe_jax")
    logger.handlers = [_StandardError()]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    # Orbax and Grain log routine messages and failures here, in many lines. A failure also raises
    # an error, which is shown in one line.
    for library in ("absl", "asyncio", "concurrent.futures"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    # A failed checkpoint ends before all of Orbax's coroutines have started.
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
