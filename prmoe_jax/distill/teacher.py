"""Restores a teacher onto its student's mesh, prunes students from it, and writes its cache."""

import itertools
import logging
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from tqdm import tqdm

from prmoe_jax.config.schema import Config, group_rows
from prmoe_jax.config.teacher import teacher_of
from prmoe_jax.data.pipeline import (
    Batch,
    Data,
    TopKLogProbs,
    eval_batches,
    load_data,
    train_iterator,
)
from prmoe_jax.data.tokenizer import Tokenizer, check_same
from prmoe_jax.distill import teacher_cache
from prmoe_jax.distill.loss import record_top_k, run_teacher
from prmoe_jax.distill.student import magnitudes, prune, source_layers, taylor
from prmoe_jax.errors import UserError
from prmoe_jax.model.loss import forward
from prmoe_jax.model.sizes import cost
from prmoe_jax.model.transformer import Transformer, cast, init_model
from prmoe_jax.parallel import sharding
from prmoe_jax.parallel.axes import local_rows, replicated, split_batch
from prmoe_jax.parallel.mesh import check_teacher_fits, training_mesh
from prmoe_jax.parallel.microbatches import add_up
from prmoe_jax.run import directory as workdirs
from prmoe_jax.run.metrics import read_metrics
from prmoe_jax.run.restore import restore_model
from prmoe_jax.stores import expand

log = logging.getLogger(__name__)


class Teacher(NamedTuple):
    """A trained run that no longer changes."""

    config: Config  # the teacher's own, adapted by `config.teacher.adapt_teacher`
    step: int  # the checkpoint's step
    model: Transformer


def restore_teacher(
    config: Config, mesh: Mesh, tokenizer: Tokenizer, step: int | None = None
) -> Teacher:
    """Restores `config.teacher.workdir` onto the student's mesh.

    Args:
      config: the student's config.
      mesh: the student's mesh.
      tokenizer: the student's tokenizer, which must be the teacher's.
      step: the checkpoint to read; the newest by default.
    """
    workdir = expand("teacher.workdir", config.teacher.workdir)
    settings = teacher_of(config)
    check_same(workdir / workdirs.TOKENIZER, tokenizer, "the teacher")
    check_teacher_fits(settings, config, mesh)
    log.info("teacher: %s, %s", workdir, settings.model.schedule)
    try:
        step, model = restore_model(workdir, settings, mesh, step)
    except UserError as error:
        if step is None:
            raise
        raise UserError(
            f"{error}; step {step} of this teacher taught the run: put a copy of it back, or let "
            "another run start as this one, by --config.init.workdir (a larger "
            "--config.checkpoint.keep of the teacher keeps its steps)"
        ) from error
    log.info(
        "teacher: step %d, %.4g parameters", step, cost(settings.model, settings.moe).total_params
    )
    return Teacher(settings, step, model)


def cast_to_compute_dtype(teacher: Teacher, mesh: Mesh) -> Teacher:
    """The teacher in its compute dtype, which does not change its predictions."""
    places = sharding.shardings(teacher.model, mesh)
    dtype = jnp.dtype(teacher.config.model.dtype)
    return teacher._replace(
        model=jax.jit(cast, static_argnums=1, out_shardings=places)(teacher.model, dtype)
    )


def write_teacher_cache(config: Config, folder: Path) -> dict:
    """`prmoe teacher-cache`: records a teacher's predictions, for many students.

    Args:
      config: a student's config, with the teacher and the training split.
      folder: a new folder, for `config.teacher.cache`; see `teacher_cache.py`.

    Returns:
      The content of the folder's meta.json.
    """
    config, mesh = training_mesh(config)
    data = load_data(config.data, config.model.vocab_size, config.model.length)
    with jax.set_mesh(mesh):
        teacher = cast_to_compute_dtype(restore_teacher(config, mesh, data.tokenizer), mesh)
        _check_windows_apart(teacher.config, config.model.length)
        # One microbatch of training's batch at a time: predictions don't depend on other windows.
        rows = config.train.batch_size // config.train.accumulate
        batches = eval_batches(data.train, rows, rows=local_rows(mesh, rows))

        @partial(jax.jit, out_shardings=replicated(mesh))
        def predict(model: Transformer, batch: Batch) -> TopKLogProbs:
            output = run_teacher(model, batch, config, None)
            return record_top_k(output, config.kd)

        def predictions():
            count = -(-len(data.train) // rows)
            for batch in tqdm(batches, total=count, unit="batch", disable=not sys.stderr.isatty()):
                yield jax.device_get(predict(teacher.model, split_batch(batch, mesh, rows)))

        described = {"workdir": config.teacher.workdir, "step": teacher.step}
        described["capacity_factor"] = teacher.config.moe.eval_capacity_factor
        return teacher_cache.write(folder, data, config, described, predictions())


def _check_windows_apart(teacher: Config, length: int) -> None:
    """Checks that predictions for a window don't depend on the other windows of its batch."""
    drops = math.isfinite(teacher.moe.eval_capacity_factor)
    if drops and teacher.moe.group_size > length:
        raise UserError(
            f"the teacher's moe.group_size={teacher.moe.group_size} lets several windows of "
            f"{length} tokens compete, and training shuffles them; use "
            "teacher.capacity_factor=inf"
        )


# Number of training batches on which the importance of the teacher's parts is measured.
MEASURED_BATCHES = 16


def init_from_teacher(config: Config, teacher: Teacher, data: Data, mesh: Mesh) -> Transformer:
    """Initialises the student of `config` by pruning its teacher, see `student.py`.

    Args:
      config: the student's config.
      teacher: the teacher, in float32.
      data: the student's text, on which importance is measured.
      mesh: the mesh of both.
    """
    layers = source_layers(teacher.config, config)
    shapes = jax.eval_shape(lambda: init_model(config))
    have, want = teacher.config.model.schedule.experts, config.model.schedule.experts
    load = {}
    for i, layer in enumerate(layers):
        if want[i] < have[layer]:
            load[layer] = _expert_load(
                expand("teacher.workdir", config.teacher.workdir), teacher.step, layer
            )
    log.info("the student starts as layers %s of its teacher", " ".join(map(str, layers)))
    if config.teacher.importance == "taylor":
        importance = _importance(config, teacher, data, mesh)
    else:
        importance = magnitudes(teacher.model)
    part = partial(prune, student=shapes, layers=layers, load=load)
    places = sharding.shardings(shapes, mesh)
    return jax.jit(
        lambda model, importance: part(model, importance=importance), out_shardings=places
    )(teacher.model, importance)


def _importance(config: Config, teacher: Teacher, data: Data, mesh: Mesh) -> dict[str, jax.Array]:
    """`student.taylor` summed over the run's first batches, computed as in evaluation."""
    measure, batch_size = (
        jax.jit(measure_importance(config, teacher.config)),
        config.train.batch_size,
    )
    total = None
    batches = train_iterator(data.train, batch_size, config.seed, local_rows(mesh, batch_size))
    for batch in itertools.islice(batches, MEASURED_BATCHES):
        batch = split_batch(batch._replace(teacher_top_k=None), mesh, batch_size)
        found = measure(teacher.model, batch)
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    return total


def measure_importance(
    config: Config, teacher: Config
) -> Callable[[Transformer, Batch], dict[str, jax.Array]]:
    """A function of (the teacher's model, batch) that returns `student.taylor` of the mean loss.

    The gradient is summed over `train.accumulate` microbatches of the batch before it is squared.
    """

    def measure(model: Transformer, batch: Batch) -> dict[str, jax.Array]:
        tokens = jnp.maximum(batch.mask_BxL.sum(), 1)

        def loss(model, microbatch):
            return forward(model, microbatch, execution=config.execution).loss / tokens

        rows = group_rows(config, teacher)
        gradient = partial(jax.grad(loss), model)
        gradient = add_up(gradient, batch, config.train.accumulate, rows, sharding.constrain)
        return taylor(model, gradient)

    return measure


def _expert_load(workdir: Path, step: int, layer: int) -> list[float]:
    """Each expert's share of the layer's choices, as the teacher's run last logged it by `step`."""
    name = f"layers/{layer:02d}/expert_load"
    for line in reversed(read_metrics(workdir / workdirs.METRICS)):
        load = line.get(f"eval/{name}", line.get(name))
        if line["step"] <= step and load:
            return load
    raise UserError(
        f"{workdir}/metrics.jsonl has no {name}, by which experts are left out; give the student "
        "as many experts as its teacher"
    )
