"""A teacher's config, adapted to its student's mesh and checked against its batches."""

import dataclasses
import math

from prmoe_jax.config.loading import load
from prmoe_jax.config.schema import Config
from prmoe_jax.config.validation import check_groups, require
from prmoe_jax.errors import telling
from prmoe_jax.stores import expand


def teacher_of(config: Config) -> Config:
    """Loads the config of a student's teacher and adapts it (`adapt_teacher`)."""
    with telling(fix="--config.teacher.workdir names the run that teaches"):
        teacher = load(expand("teacher.workdir", config.teacher.workdir) / "config.json")
    return adapt_teacher(teacher, config)


def adapt_teacher(teacher: Config, student: Config) -> Config:
    """Adapts a teacher's config: mesh and execution become the student's.

    `teacher.capacity_factor` replaces the teacher's evaluation capacity factor, unless it is 0.
    The teacher's routing groups must fit the student's batches.
    """
    model, factor = student.model, student.teacher.capacity_factor
    require(
        teacher.moe.routes.tokens_choose or math.isfinite(factor),
        "teacher.capacity_factor=inf lets every expert of this teacher "
        f"(moe.router={teacher.moe.router}) take every token; use 0, for its "
        f"own {teacher.moe.eval_capacity_factor:g}, or a finite one",
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
    require(
        any(teacher.model.schedule.experts) or factor == 0,
        f"teacher.capacity_factor={factor:g} has no effect: the teacher has no experts; leave it "
        "at 0",
    )
    require(
        student.teacher.mode == "eval" or _changes_in_training(teacher),
        "teacher.mode=train has no effect: this teacher has neither dropout nor noise, and routes "
        "in training as in evaluation; leave it at eval",
    )
    factor = factor or teacher.moe.eval_capacity_factor
    moe = dataclasses.replace(teacher.moe, eval_capacity_factor=factor)
    teacher = dataclasses.replace(teacher, mesh=student.mesh, execution=student.execution, moe=moe)
    if teacher.moe.group_size:
        shape = dataclasses.replace(teacher.model, length=model.length)
        with telling("the teacher, on its student's batches: "):
            check_groups(dataclasses.replace(teacher, model=shape, train=student.train), student)
    return teacher


def _changes_in_training(config: Config) -> bool:
    """Whether a model computes differently in training and in evaluation."""
    moe = config.moe
    routes = any(config.model.schedule.experts) and (
        moe.noise != "none"
        or moe.overflow == "random"
        or moe.capacity_factor != moe.eval_capacity_factor
        or config.model.top_k == 2  # in training all first choices precede second ones (GShard)
    )
    return config.model.dropout > 0 or routes
