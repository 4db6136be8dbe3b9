"""Branches: runs that go on from a checkpoint of another run, their trunk.

With `optimizer.schedule=wsd` the learning rate does not depend on a run's length until it decays.
A branch is therefore, to the last bit, the run of its length that would have started at step 0.
"""

import contextlib
import json
from pathlib import Path

from jax.sharding import Mesh

from prmoe_jax import files
from prmoe_jax.config.loading import check_branch
from prmoe_jax.config.schema import Config
from prmoe_jax.model.state import TrainState
from prmoe_jax.run.checkpoint import Checkpoints
from prmoe_jax.run.metrics import METRICS, read_metrics
from prmoe_jax.stores import expand
from prmoe_jax.training.upcycle import reading_source, source_of


def check(config: Config) -> None:
    """Checks that a run can go on from the one in `config.init.workdir`."""
    with reading_source():
        workdir, trunk = source_of(config)
        check_branch(trunk, config, f"the run in {workdir}")


def restore(config: Config, shapes: TrainState, mesh: Mesh) -> tuple[int, TrainState, dict]:
    """The trunk's checkpoint of step `config.init.step`: its step, state and data record.

    Args:
      config: the branch's config.
      shapes: the shapes of the state.
      mesh: the branch's mesh.

    Raises:
      UserError: there is no such checkpoint, or it cannot be read.
    """
    with reading_source():
        trunk = Checkpoints(expand("init.workdir", config.init.workdir))
        with contextlib.closing(trunk):
            step, state, record = trunk.restore(shapes, mesh, config.init.step)
    record.pop("productive_s", None)  # the trunk's seconds; the branch's wall time starts now
    return step, state, record


def copy_metrics(config: Config, workdir: Path) -> None:
    """Starts the branch's metrics.jsonl with the lines that its trunk wrote up to there."""
    with reading_source():
        lines = read_metrics(expand("init.workdir", config.init.workdir) / METRICS)
    kept = [line for line in lines if line["step"] <= config.init.step]
    files.replace(workdir / METRICS, "".join(json.dumps(line) + "\n" for line in kept))
