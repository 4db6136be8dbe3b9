"""The run that teaches: restored onto the student's mesh; what the student inherits from it."""

import dataclasses
import logging
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from prmoe_jax import workdir as workdirs
from prmoe_jax.checkpoint import Checkpoints
from prmoe_jax.config import Config, load
from prmoe_jax.data.tokenizer import Tokenizer
from prmoe_jax.errors import UserError
from prmoe_jax.metrics import read_metrics
from prmoe_jax.model import Transformer, cast, resolve_backends
from prmoe_jax.parallel import rules
from prmoe_jax.parallel.mesh import check_splits
from prmoe_jax.sizes import cost
from prmoe_jax.step import init_model
from prmoe_jax.student import cut, layer_map

log = logging.getLogger(__name__)


class Teacher(NamedTuple):
    """A trained run, frozen."""

    config: Config  # its own, with the backends of this platform and mesh
    step: int  # of the checkpoint
    model: Transformer


def restore_teacher(
    config: Config, mesh: Mesh, tokenizer: Tokenizer, step: int | None = None
) -> Teacher:
    """Restores `config.teacher.workdir` onto the student's mesh.

    Args:
      config: the student's.
      mesh: the student's.
      tokenizer: the student's, which must be the teacher's.
      step: the checkpoint to read, the newest unless given.

    Raises:
      UserError: no run there, no such checkpoint, or one that cannot teach this student.
    """
    workdir = Path(config.teacher.workdir)
    try:
        settings = load(workdir / workdirs.CONFIG)
    except UserError as error:
        raise UserError(f"{error}; --config.teacher.workdir names the run that teaches") from None
    _check_teaches(settings, config, tokenizer)
    settings = dataclasses.replace(
        settings,
        mesh=config.mesh,
        moe=dataclasses.replace(settings.moe, exchange=config.moe.exchange),
    )
    check_splits(settings, {"tensor": mesh.shape["tensor"], "expert_slice": mesh.shape["slice"]})
    log.info("teacher: %s, %s", workdir, settings.model.schedule)
    settings = resolve_backends(settings, jax.default_backend(), mesh)
    checkpoints = Checkpoints(workdir)
    step, model = checkpoints.restore_model(settings, mesh, step)
    checkpoints.close()
    log.info(
        "teacher: step %d, %.4g parameters; it teaches %d of %d steps",
        step,
        cost(settings.model).total_params,
        config.kd_steps,
        config.total_steps,
    )
    return Teacher(settings, step, model)


def frozen(teacher: Teacher, mesh: Mesh) -> Teacher:
    """The teacher in the dtype it computes in, which changes nothing that it says."""
    places = rules.shardings(teacher.model, mesh)
    dtype = jnp.dtype(teacher.config.model.dtype)
    return teacher._replace(
        model=jax.jit(cast, static_argnums=1, out_shardings=places)(teacher.model, dtype)
    )


def inherited(config: Config, teacher: Teacher, mesh: Mesh) -> Transformer:
    """The student of `config` as the part of its teacher that `student.py` describes.

    Raises:
      UserError: it isn't a part of it, or experts are left out whose load isn't known.
    """
    layers = layer_map(teacher.config.model, config.model, config.teacher.layers)
    shapes = jax.eval_shape(lambda: init_model(config))
    have, want = teacher.config.model.schedule.experts, config.model.schedule.experts
    load = {}
    for i, layer in enumerate(layers):
        if want[i] < have[layer]:
            load[layer] = _expert_load(Path(config.teacher.workdir), teacher.step, layer)
    log.info("the student starts as layers %s of its teacher", " ".join(map(str, layers)))
    places = rules.shardings(shapes, mesh)
    return jax.jit(lambda model: cut(model, shapes, layers, load), out_shardings=places)(
        teacher.model
    )


def _expert_load(workdir: Path, step: int, layer: int) -> list[float]:
    """Each expert's share of the choices, as the teacher's run logged it last."""
    name = f"layers/{layer:02d}/expert_load"
    for line in reversed(read_metrics(workdir / "metrics.jsonl")):
        load = line.get(f"eval/{name}", line.get(name))
        if line["step"] <= step and load:
            return load
    raise UserError(
        f"{workdir}/metrics.jsonl has no {name}, by which experts are left out; give the student "
        "as many experts as its teacher"
    )


def _check_teaches(teacher: Config, student: Config, tokenizer: Tokenizer) -> None:
    path = Path(student.teacher.workdir) / workdirs.TOKENIZER
    if Tokenizer.load(path).fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"the teacher has another tokenizer; use --config.data.tokenizer={path}, "
            f"with --config.model.vocab_size={teacher.model.vocab_size}"
        )
    if teacher.model.vocab_size != student.model.vocab_size:
        raise UserError(
            f"model.vocab_size={student.model.vocab_size} is not the teacher's; use "
            f"{teacher.model.vocab_size}"
        )
    if teacher.model.length < student.model.length:
        raise UserError(
            f"model.length={student.model.length} exceeds the teacher's context; use "
            f"{teacher.model.length} or less"
        )
