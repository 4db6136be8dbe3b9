"""Decay branches: runs that continue from a checkpoint of a base run (`trunk`).

With `optimizer.schedule=wsd` the learning rate does not depend on a run's length until it decays.
A branch therefore equals, to the last bit, a run of the same length that started at step 0.
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
    """Checks that a run can branch off from the run in `config.init.workdir`."""
    with reading_source():
        workdir, trunk = source_of(config)
        check_branch(trunk, config, f"the run in {workdir}")


def restore(config: Config, shapes: TrainState, mesh: Mesh) -> tuple[int, TrainState, dict]:
    """Reads checkpoint `config.init.step` of the base run: its step, state and data record.

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
    record.pop("productive_s", None)  # the base run's; the branch's wall time starts now
    return step, state, record


def copy_metrics(config: Config, workdir: Path) -> None:
    """Starts the branch's metrics.jsonl with the base run's lines up to `config.init.step`."""
    with reading_source():
        lines = read_metrics(expand("init.workdir", config.init.workdir) / METRICS)
    kept = [line for line in lines if line["step"] <= config.init.step]
    files.replace(workdir / METRICS, "".join(json.dumps(line) + "\n" for line in kept))
