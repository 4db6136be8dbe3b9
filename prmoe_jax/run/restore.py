"""Restores a run from its folder, for every use except resuming its training."""

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
from jax.sharding import Mesh

from prmoe_jax import stores
from prmoe_jax.config.loading import load
from prmoe_jax.config.schema import Config, MeshConfig
from prmoe_jax.errors import UserError
from prmoe_jax.model.attention_kernels import resolve_attention
from prmoe_jax.model.backends import check_backends
from prmoe_jax.model.transformer import Transformer
from prmoe_jax.parallel.mesh import axis_sizes, choose_mesh, make_mesh, on_slices, with_mesh
from prmoe_jax.run import directory as workdirs
from prmoe_jax.run.checkpoint import Checkpoints
from prmoe_jax.run.metrics import METRICS, read_metrics

log = logging.getLogger(__name__)


def restore_run(
    workdir: Path,
    devices: Sequence[jax.Device] | None = None,
    layout: MeshConfig | None = None,
) -> tuple[Config, int, Transformer, Mesh]:
    """Restores a run's newest checkpoint; returns its config, step, model and the model's mesh.

    Args:
      workdir: the run's folder.
      devices: the devices to use; all by default.
      layout: the mesh; by default the run's, or the suggested one if the run has none. If that
        doesn't fit these devices, each device holds the whole model. It need not suit the run's
        batch size.
    """
    workdir = stores.as_path(workdir)
    config = _with_attention(load(workdir / workdirs.CONFIG))
    count = len(jax.devices() if devices is None else devices)
    if layout:
        config = with_mesh(config, layout)
    else:
        try:
            config = choose_mesh(on_slices(config, devices), count, any_batch=True)
            axis_sizes(config, count)
        except UserError as error:
            log.info("%s: here each device holds the whole model", error)
            config = with_mesh(config)
    mesh = make_mesh(config, devices)
    step, model = restore_model(workdir, config, mesh)
    return config, step, model, mesh


def restore_model(
    workdir: Path, config: Config, mesh: Mesh, step: int | None = None
) -> tuple[int, Transformer]:
    """Restores a run's model onto a given mesh, such as its student's; returns its step and it.

    `config` is the run's, adapted to the mesh. Without `step` it is the newest checkpoint.
    """
    config = _with_attention(config)
    check_backends(config, jax.default_backend(), mesh)
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        found, model = checkpoints.restore_model(config, mesh, step)
    # Metrics may be large, so they are read only if the checkpoint is not the run's last one.
    if step is None and found < config.total_steps:
        last = [found]
        with contextlib.suppress(UserError):  # the metrics need not be readable
            last += [line["step"] for line in read_metrics(workdir / METRICS)[-1:]]
        if any(last):
            log.warning(
                "%s: its newest checkpoint, that of step %d of %d, is used%s",
                *(workdir, found, config.total_steps),
                f"; the run came to step {max(last)}" if max(last) > found else "",
            )
    return found, model


def trained_text(workdir: Path) -> dict[str, str]:
    """{'corpus': fingerprint of the text that a run was trained on}; empty if not known."""
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        found = checkpoints.fingerprint()
    return {name: value for name, value in found.items() if name == "corpus"}


def check_text(workdir: Path, config: Config, fingerprint: str) -> None:
    """Checks that a run's text, which now has this fingerprint, is that of its training."""
    if trained_text(workdir).get("corpus", fingerprint) != fingerprint:
        raise UserError(
            f"data.corpus={config.data.corpus} is not the text that the run in {workdir} was "
            "trained on, so that its validation split may hold text of the training; restore the "
            "text, or evaluate the loss on one that the run has not seen, by --corpus"
        )


def _with_attention(config: Config) -> Config:
    """The config, with attention `auto` if its attention kernel cannot run on these devices."""
    try:
        resolve_attention(config.execution.attention, config.model, jax.default_backend())
    except UserError as error:
        log.info("%s, as is done here", error)
        return replace(config, execution=replace(config.execution, attention="auto"))
    return config
