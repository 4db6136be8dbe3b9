"""A teacher's config, adapted to the mesh and batches of its student."""

import dataclasses
import math

from prmoe_jax.config.loading import expand, load
from prmoe_jax.config.schema import Config
from prmoe_jax.config.validation import check_groups, require
from prmoe_jax.errors import UserError


def teacher_of(config: Config) -> Config:
    """Loads the teacher's config of a student's config and adapts it by `beside`.

    Raises:
      UserError: the folder holds no run, or the teacher doesn't fit (see `beside`).
    """
    try:
        teacher = load(expand("teacher.workdir", config.teacher.workdir) / "config.json")
    except UserError as error:
        raise UserError(f"{error}; --config.teacher.workdir names the run that teaches") from None
    return beside(teacher, config)


def beside(teacher: Config, student: Config) -> Config:
    """Gives a teacher's config its student's mesh, exchange and `teacher.capacity_factor`.

    A `teacher.capacity_factor` of 0 leaves the teacher's own. The batches are only checked.

    Raises:
      UserError: the teacher doesn't fit its student's vocabulary, context, batch or capacity
        factor.
    """
    model = student.model
    require(
        teacher.moe.router == "token_choice" or math.isfinite(student.teacher.capacity_factor),
        "teacher.capacity_factor=inf lets every expert of this teacher (moe.router=expert_choice) "
        f"take every token; use 0, for its own {teacher.moe.eval_capacity_factor:g}, or a finite "
        "one",
    )
    require(
        teacher.model.vocab_size == model.vocab_size,
        f"model.vocab_size={model.vocab_size} is not the teacher's; use {teacher.model.vocab_size}",
    )
    require(
        teacher.model.length >= model.length,
        f"model.length={model.length} exceeds the teacher's context; use {teacher.model.length} or "
        "less",
    )
    capacity_factor = student.teacher.capacity_factor or teacher.moe.eval_capacity_factor
    moe = dataclasses.replace(
        teacher.moe, exchange=student.moe.exchange, eval_capacity_factor=capacity_factor
    )
    teacher = dataclasses.replace(teacher, mesh=student.mesh, moe=moe)
    if teacher.moe.group_size:
        shape = dataclasses.replace(teacher.model, length=model.length)
        try:
            check_groups(dataclasses.replace(teacher, model=shape, train=student.train), student)
        except UserError as error:
            raise UserError(f"the teacher, on its student's batches: {error}") from None
    return teacher
