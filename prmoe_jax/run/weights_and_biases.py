"""Sends a run's metrics to Weights & Biases, beside metrics.jsonl and TensorBoard."""

import dataclasses
import hashlib
import importlib.util
import logging
import os
from collections.abc import Callable
from pathlib import Path

from prmoe_jax.config.schema import Config
from prmoe_jax.errors import UserError, first_line, refusing

log = logging.getLogger(__name__)


def check_installed(config: Config) -> None:
    """Raises UserError if the config asks for Weights & Biases and its package is missing."""
    if config.log.wandb and not importlib.util.find_spec("wandb"):
        raise UserError(
            f"log.wandb={config.log.wandb} needs a package; pip install 'prmoe_jax[wandb]'"
        )


class WandbRun:
    """A run at Weights & Biases. A resumed run continues it; repeated steps appear there twice.

    If Weights & Biases fails, training goes on without it; metrics.jsonl has everything.
    """

    def __init__(self, config: Config, workdir: Path, begun: float):
        """Starts or continues the run.

        Args:
          config: `log.wandb` names the project.
          workdir: the run's folder; its name is also the name at Weights & Biases.
          begun: time of the run's first start; with the folder it identifies the run.
        """
        import wandb

        identity = hashlib.sha256(f"{os.fspath(workdir)} {begun}".encode()).hexdigest()[:12]
        advice = "run wandb login, or set WANDB_MODE=offline"
        failures = wandb.errors.Error, OSError
        with refusing(f"log.wandb={config.log.wandb}", failures, fix=advice):
            self._run = wandb.init(
                project=config.log.wandb,
                name=workdir.name,
                id=identity,
                resume="allow",
                config=dataclasses.asdict(config),
                settings=wandb.Settings(silent=True, console="off"),
            )
        # W&B's own counter never goes back, but a resumed run does.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, metrics: dict) -> None:
        """Sends the numbers among a step's metrics."""
        numbers = {name: v for name, v in metrics.items() if isinstance(v, (int, float))}
        self._send(lambda run: run.log({"step": step, **numbers}))

    def close(self) -> None:
        """Sends what is left."""
        self._send(lambda run: run.finish())

    def _send(self, act: Callable) -> None:
        if self._run is None:
            return
        import wandb

        try:
            act(self._run)
        except (wandb.errors.Error, OSError) as error:
            log.warning("log.wandb: %s; no more is sent there", first_line(error))
            self._run = None
