"""Restores a student's teacher, records its predictions, and makes students of its parts.

Predictions for a training split are recorded once, for many students. Their folder holds tokens.npy
and log_p.npy, each [windows, L, K] (`batch.TopKLogProbs`), and meta.json, which identifies the
windows, the teacher and the temperature.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import math
import sys
from collections.abc import Iterable
from functools import partial, reduce
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from prmoe_jax import files, stores
from prmoe_jax.config.schema import Config, group_rows
from prmoe_jax.config.teacher import teacher_of
from prmoe_jax.data import cache, copies
from prmoe_jax.data.arrays import ArrayWriter, open_array
from prmoe_jax.data.pipeline import (
    Data,
    eval_batches,
    fingerprint_changes,
    load_data,
    train_iterator,
    windows_fingerprint,
)
from prmoe_jax.data.tokenizer import Tokenizer, check_same
from prmoe_jax.distill.loss import run_teacher
from prmoe_jax.distill.predictions import record_top_k
from prmoe_jax.distill.student import magnitudes, prune, source_layers, taylor
from prmoe_jax.errors import UserError, refusing, telling
from prmoe_jax.model.batch import Batch, TopKLogProbs
from prmoe_jax.model.loss import forward
from prmoe_jax.model.sizes import cost
from prmoe_jax.model.transformer import Transformer, cast, init_model
from prmoe_jax.nn.precision import Precision
from prmoe_jax.parallel import sharding
from prmoe_jax.parallel.axes import local_rows, platform, replicated, split_batch
from prmoe_jax.parallel.mesh import check_teacher_fits, training_mesh
from prmoe_jax.parallel.microbatches import add_up
from prmoe_jax.run.directory import METRICS, TOKENIZER, check_outside_checkpoints
from prmoe_jax.run.metrics import read_metrics
from prmoe_jax.run.restore import restore_model
from prmoe_jax.stores import expand

log = logging.getLogger(__name__)


class Teacher(NamedTuple):
    """A trained run that no longer changes."""

    config: Config  # the teacher's own, adapted by `config.teacher.adapt_teacher`
    step: int
    model: Transformer


def restore_teacher(
    config: Config, mesh: Mesh, tokenizer: Tokenizer, step: int | None = None
) -> Teacher:
    """Restores `config.teacher.workdir` onto the mesh of the student with this config.

    The teacher's tokenizer must be the student's. `step` is the checkpoint to read; the newest by
    default.
    """
    workdir = expand("teacher.workdir", config.teacher.workdir)
    settings = teacher_of(config)
    check_same(workdir / TOKENIZER, tokenizer, "the teacher")
    check_teacher_fits(settings, config, mesh)
    log.info("teacher: %s, %s", workdir, settings.model.schedule)
    gone = (
        f"step {step} of this teacher taught the run: put a copy of it back, or let another run "
        "start as this one, by --config.init.workdir (a larger --config.checkpoint.keep of the "
        "teacher keeps its steps)"
    )
    with telling(fix=gone) if step is not None else contextlib.nullcontext():
        step, model = restore_model(workdir, settings, mesh, step)
    size = cost(settings.model, settings.moe).total_params
    log.info("teacher: step %d, %.4g parameters", step, size)
    return Teacher(settings, step, model)


def cast_to_compute_dtype(teacher: Teacher, mesh: Mesh) -> Teacher:
    """The teacher in its compute dtype, which does not change its predictions."""
    places, config = sharding.shardings(teacher.model, mesh), teacher.config
    with jax.set_mesh(mesh):
        precision = Precision.of(config.model.dtype, config.execution, platform(), training=False)
    place = jax.jit(cast, static_argnums=1, out_shardings=places)
    return teacher._replace(model=place(teacher.model, precision.factors))


def write_teacher_cache(config: Config, folder: Path) -> dict:
    """`prmoe teacher-cache`: records a teacher's predictions, for many students.

    `config` is one student's, with the teacher and the training split; `folder` is new, for
    `teacher.cache`. Returns the content of the folder's meta.json.
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
            return record_top_k(run_teacher(model, batch, config, None), config.kd)

        def predictions():
            count = -(-len(data.train) // rows)
            for batch in tqdm(batches, total=count, unit="batch", disable=not sys.stderr.isatty()):
                yield jax.device_get(predict(teacher.model, split_batch(batch, mesh, rows)))

        described = {"workdir": config.teacher.workdir, "step": teacher.step}
        described["capacity_factor"] = teacher.config.moe.eval_capacity_factor
        return write_predictions(folder, data, config, described, predictions())


def _check_windows_apart(teacher: Config, length: int) -> None:
    """Checks that predictions for a window don't depend on the other windows of its batch."""
    drops = math.isfinite(teacher.moe.eval_capacity_factor)
    if drops and teacher.moe.group_size > length:
        raise UserError(
            f"the teacher's moe.group_size={teacher.moe.group_size} lets several windows of "
            f"{length} tokens compete, and training shuffles them; use teacher.capacity_factor=inf"
        )


_FIX = "delete it, and write it again by prmoe teacher-cache"


def _parts(config: Config) -> tuple[tuple[str, type], ...]:
    """Name and dtype of each file, in the order of `TopKLogProbs`."""
    token_type = np.uint16 if config.model.vocab_size <= 1 << 16 else np.uint32
    return ("tokens.npy", token_type), ("log_p.npy", np.float32)


def write_predictions(
    folder: Path, data: Data, config: Config, teacher: dict, predictions: Iterable[TopKLogProbs]
) -> dict:
    """Writes a new cache folder completely, or not at all; returns the content of meta.json.

    `config` is a student's, and `teacher` a description for meta.json. `predictions` come in
    batches for all windows of the training split in order; rows past the last one are left out.
    """
    local = stores.is_local(folder)
    check_outside_checkpoints("--out", folder)
    if not local:
        files.check_free_in_store(folder, "--out")
    elif folder.exists():
        raise UserError(f"--out={folder} exists; give another folder, or remove it")
    shape = len(data.train), data.train.length, config.kd.top_k
    meta = {
        "windows": windows_fingerprint(data) | {"vocab_size": config.model.vocab_size},
        "teacher": teacher,
        "top_k": config.kd.top_k,
        "temperature": config.kd.temperature,
    }

    def build(temporary: Path) -> None:
        digest = hashlib.sha256()
        with contextlib.ExitStack() as stack:
            writers = [
                stack.enter_context(ArrayWriter(temporary / name, dtype, shape))
                for name, dtype in _parts(config)
            ]
            for part in predictions:
                for writer, rows in zip(writers, part, strict=True):
                    digest.update(writer.append(rows[: shape[0] - writer.rows]))
        meta["fingerprint"] = digest.hexdigest()[:24]
        (temporary / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")

    if local:
        cache.build_once(folder, build, setting="--out")
        if "fingerprint" not in meta:  # `build` did not run
            raise UserError(f"--out={folder}: another command has just written it; give another")
        return meta

    def build_and_seal(temporary: Path) -> None:
        build(temporary)
        cache.seal(temporary)

    scratch = cache.root(config.data)
    unwritten = f"--out={folder}, which is made in {scratch} and copied, cannot be written"
    with refusing(unwritten, OSError):
        scratch.mkdir(parents=True, exist_ok=True)
        files.build_in_store(folder, "--out", build_and_seal, cache.DIGESTS, scratch)
    return meta


def attach_predictions(data: Data, config: Config) -> Data:
    """Adds the predictions in `config.teacher.cache` to the windows of the training split."""
    folder, kd = expand("teacher.cache", config.teacher.cache), config.kd
    if not stores.is_local(folder):
        names = "tokens.npy", "log_p.npy", "meta.json"
        folder = copies.sealed(folder, names, cache.root(config.data))
    reading = partial(cache.reading, folder, named="teacher.cache={}", fix=_FIX)
    with reading():
        meta = files.parse_json(files.read(folder / "meta.json"))
        known, top_k, temperature = meta["windows"], meta["top_k"], meta["temperature"]
        fingerprint = str(meta["fingerprint"])
        recorded = dict(meta["teacher"]).get("workdir")
        if type(known) is not dict or type(top_k) is not int:
            raise ValueError("meta.json is not as it was written")
    current = windows_fingerprint(data) | {"vocab_size": config.model.vocab_size}
    if changes := fingerprint_changes(known, current):
        raise UserError(
            f"teacher.cache={folder} is about other windows: {changes}; write one for this data "
            "by prmoe teacher-cache"
        )
    if kd.top_k > top_k:
        raise UserError(
            f"kd.top_k={kd.top_k} exceeds the {top_k} tokens that {folder} keeps; use {top_k} or "
            "fewer"
        )
    if kd.temperature != temperature:
        raise UserError(f"kd.temperature={kd.temperature} is not that of {folder}: {temperature}")
    with reading():
        cache.check(folder)
        shape = len(data.train), data.train.length, top_k
        parts = [open_array(folder / name, dtype, shape) for name, dtype in _parts(config)]
    log.info("teacher cache of %.300s: the top %d tokens", meta["teacher"], kd.top_k)
    if config.teacher.workdir not in ("", recorded):
        log.warning(
            "teacher.cache has the predictions of %s, not of %s", recorded, config.teacher.workdir
        )
    predictions = TopKLogProbs(*(part[..., : kd.top_k] for part in parts))
    train = dataclasses.replace(data.train, teacher_top_k=predictions)
    return dataclasses.replace(data, train=train, teacher_cache_fingerprint=fingerprint)


# Number of training batches on which the importance of the teacher's parts is measured.
MEASURED_BATCHES = 16


def init_from_teacher(config: Config, teacher: Teacher, data: Data, mesh: Mesh) -> Transformer:
    """Initialises the student of `config` by pruning its teacher, see `student.py`.

    The teacher is in float32. Importance is measured on the student's text, `data`.
    """
    layers = source_layers(teacher.config, config)
    have, want = teacher.config.model.schedule.experts, config.model.schedule.experts
    workdir = expand("teacher.workdir", config.teacher.workdir)
    load = {
        layer: _expert_load(workdir, teacher.step, layer)
        for layer, count in zip(layers, want, strict=True)
        if count < have[layer]
    }
    log.info("the student starts as layers %s of its teacher", " ".join(map(str, layers)))
    if config.teacher.importance == "taylor":
        importance = _importance(config, teacher, data, mesh)
    else:
        importance = magnitudes(teacher.model)
    shapes = jax.eval_shape(lambda: init_model(config))

    def student(model, importance):
        return prune(model, shapes, layers, load, importance)

    places = sharding.shardings(shapes, mesh)
    return jax.jit(student, out_shardings=places)(teacher.model, importance)


def _importance(config: Config, teacher: Teacher, data: Data, mesh: Mesh) -> dict[str, jax.Array]:
    """`student.taylor` summed over the run's first batches, computed as in evaluation."""
    measure = jax.jit(partial(measure_importance, config, teacher.config))
    size = config.train.batch_size
    batches = train_iterator(data.train, size, config.seed, local_rows(mesh, size))
    found = (
        measure(teacher.model, split_batch(batch._replace(teacher_top_k=None), mesh, size))
        for batch in itertools.islice(batches, MEASURED_BATCHES)
    )
    return reduce(partial(jax.tree.map, jnp.add), found)


def measure_importance(
    config: Config, teacher: Config, model: Transformer, batch: Batch
) -> dict[str, jax.Array]:
    """`student.taylor` of a teacher's mean loss on a batch of the student with this config.

    The gradient is summed over `train.accumulate` microbatches of the batch before it is squared.
    """
    tokens = jnp.maximum(batch.mask_BxL.sum(), 1)

    def loss(model, microbatch):
        return forward(model, microbatch, execution=config.execution).loss / tokens

    gradient, rows = partial(jax.grad(loss), model), group_rows(config, teacher)
    gradient = add_up(gradient, batch, config.train.accumulate, rows, sharding.constrain)
    return taylor(model, gradient)


def _expert_load(workdir: Path, step: int, layer: int) -> list[float]:
    """Each expert's share of the layer's choices, as the teacher's run last logged it by `step`."""
    name = f"layers/{layer:02d}/expert_load"
    for line in reversed(read_metrics(workdir / METRICS)):
        load = line.get(f"eval/{name}", line.get(name))
        if line["step"] <= step and load:
            return load
    raise UserError(
        f"{workdir / METRICS} has no {name}, by which experts are left out; give the student "
        "as many experts as its teacher"
    )
