"""Evaluation on the validation split: loss, perplexity, bits per byte, drops, expert load."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from prmoe_jax import workdir as workdirs
from prmoe_jax.checkpoint import Checkpoints
from prmoe_jax.config import Config, MeshConfig, TeacherConfig, load
from prmoe_jax.data.pipeline import Batch, Data, eval_batches, load_data
from prmoe_jax.distill import Agreement, agreement, teach
from prmoe_jax.errors import UserError
from prmoe_jax.loss import Sums
from prmoe_jax.metrics import perplexity, summarise
from prmoe_jax.model import Transformer, resolve_backends
from prmoe_jax.parallel.mesh import choose_mesh, local_rows, make_mesh, replicated, split_batch
from prmoe_jax.step import make_eval_step
from prmoe_jax.teacher import frozen, restore_teacher

log = logging.getLogger(__name__)


def evaluate_model(
    eval_step: Callable[[Transformer, Batch], Sums],
    model: Transformer,
    config: Config,
    data: Data,
    mesh: Mesh,
    limit: int = 0,
) -> dict:
    """Measures a model on the validation split, or its first `limit` batches, deterministically.

    Returns:
      loss (nats a token), perplexity, bits_per_byte (of the text, document ends included),
      tokens, drop_fraction, aux_loss and the per-layer statistics of `metrics.summarise`.
    """
    sums = _summed(lambda batch: eval_step(model, batch), config, data, mesh, limit)
    metrics = summarise(sums, config)
    loss = metrics.pop("lm_loss")
    # Exact over the whole split; of a part, its tokens stand for their share of the bytes.
    tokens_per_byte = data.validation.tokens / data.validation_bytes
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        "bits_per_byte": loss / math.log(2) * tokens_per_byte,
        "tokens": int(sums.tokens),
        **metrics,
    }


def _summed(
    measure: Callable[[Batch], Any], config: Config, data: Data, mesh: Mesh, limit: int = 0
):
    """Adds up what a function measures of each batch of the validation split, or its first ones."""
    sums, batch_size = None, config.train.batch_size
    for batch in eval_batches(data.validation, batch_size, limit, local_rows(mesh, batch_size)):
        part = measure(split_batch(batch, mesh, batch_size))
        sums = part if sums is None else jax.tree.map(jax.numpy.add, sums, part)
    return sums


def evaluate(workdir: Path, teacher: Path | None = None) -> dict:
    """Evaluates a run's newest checkpoint on its whole validation split; see `evaluate_model`.

    Args:
      workdir: the run's folder.
      teacher: another run's, to compare its predictions with; it need not have taught this one.

    Returns:
      step and what `evaluate_model` does; with a teacher also teacher/step, teacher/loss,
      teacher/kl (KL(teacher ‖ run), nats a token) and teacher/agreement (tokens where both find
      the same one the likeliest, a share).

    Raises:
      UserError: a folder holds no run or no checkpoint, or the teacher's vocabulary or tokenizer is
        another.
    """
    config, step, model, mesh = restore_run(workdir)
    data = load_data(
        config.data, config.model.vocab_size, config.model.length, workdir / workdirs.TOKENIZER
    )
    with jax.set_mesh(mesh):
        eval_step = jax.jit(make_eval_step(config), out_shardings=replicated(mesh))
        metrics = {"step": step} | evaluate_model(eval_step, model, config, data, mesh)
        if teacher:
            metrics |= _beside_teacher(model, config, teacher, data, mesh)
        return metrics


def _beside_teacher(
    model: Transformer, config: Config, workdir: Path, data: Data, mesh: Mesh
) -> dict:
    config = replace(config, teacher=TeacherConfig(workdir=str(workdir)))
    teacher = frozen(restore_teacher(config, mesh, data.tokenizer), mesh)

    @partial(jax.jit, out_shardings=replicated(mesh))
    def compare(model: Transformer, taught_by: Transformer, batch: Batch) -> Agreement:
        lesson = teach(teacher.config, taught_by, batch, config.teacher, None)
        factor = config.moe.eval_capacity_factor
        x_BxLxD, _ = model(batch.tokens_BxL, batch.segments_BxL, capacity_factor=factor)
        return agreement(x_BxLxD, model.output_table(x_BxLxD.dtype), lesson, batch)

    sums = _summed(lambda batch: compare(model, teacher.model, batch), config, data, mesh)
    return {
        "teacher/step": teacher.step,
        "teacher/loss": float(sums.teacher_loss / sums.tokens),
        "teacher/kl": float(sums.kl / sums.tokens),
        "teacher/agreement": float(sums.same / sums.tokens),
    }


def restore_run(
    workdir: Path,
    devices: Sequence[jax.Device] | None = None,
    layout: MeshConfig | None = None,
) -> tuple[Config, int, Transformer, Mesh]:
    """A run's config, step, model and the mesh that holds it.

    Args:
      workdir: the run's folder.
      devices: those to use, all unless given.
      layout: the mesh, for batches of any size; unless given it is the run's, or where that doesn't
        fit the devices there are, each of them holds the whole model.

    Raises:
      UserError: the folder holds no run or no readable checkpoint, or the layout doesn't fit.
    """
    config = load(workdir / workdirs.CONFIG)
    anywhere = replace(config, moe=replace(config.moe, exchange="auto"))
    count = len(jax.devices() if devices is None else devices)
    if layout:
        config = replace(anywhere, mesh=layout)
        rows = max(1, config.group_size // config.model.length)
        train = replace(config.train, batch_size=count * rows, accumulate=1)
        mesh = make_mesh(replace(config, train=train), devices)
    else:
        try:
            config = choose_mesh(config, count)
            mesh = make_mesh(config, devices)
        except UserError as error:
            log.info("%s: here each device holds the whole model", error)
            config = replace(anywhere, mesh=MeshConfig())
            mesh = make_mesh(config, devices)
    config = resolve_backends(config, jax.default_backend(), mesh)
    checkpoints = Checkpoints(workdir)
    step, model = checkpoints.restore_model(config, mesh)
    checkpoints.close()
    return config, step, model, mesh
