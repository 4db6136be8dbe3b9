"""Output of the verbs: numbers for people or as JSON, and the log on standard error."""

import json
import logging
import warnings


def show(metrics: dict, as_json: bool) -> None:
    if as_json:
        print(json.dumps(metrics))
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


def log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("prmoe_jax")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    # Orbax and Grain log routine messages and failures here, in many lines. A failure also raises
    # an error, which is shown in one line.
    for library in ("absl", "asyncio", "concurrent.futures"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    # A failed checkpoint ends before all of Orbax's coroutines have started.
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
