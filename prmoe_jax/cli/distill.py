"""`prmoe distill-plan` and `prmoe teacher-cache`: a student's layers and its teacher's cache."""

import logging

from prmoe_jax import allocator
from prmoe_jax.cli.options import parse_config, path, verb
from prmoe_jax.cli.output import emit
from prmoe_jax.errors import UserError

log = logging.getLogger(__name__)


def add(verbs) -> None:
    part = "show which part of its teacher a student starts as"
    verb(verbs, "distill-plan", _distill_plan, part, "config", formerly="distil-plan")

    keep = "record a teacher's predictions for a student's training text, for many students"
    sub = verb(verbs, "teacher-cache", _teacher_cache, keep, "config")
    sub.add_argument("--out", type=path, required=True, help="the folder to write, a new one")


def _distill_plan(options, rest) -> None:
    from prmoe_jax.config.teacher import teacher_of
    from prmoe_jax.distill import student

    config = _student_config(rest)
    if not config.teacher.inherit:
        log.warning("this student starts at random; the plan is one for teacher.inherit=true")
    emit(student.plan(teacher_of(config), config), options.json, student.table)


def _teacher_cache(options, rest) -> None:
    allocator.keep_freed_memory()
    config = _student_config(rest)
    if config.kd.kind != "top_k":
        raise UserError("only top-k tokens are kept; use --config.kd.kind=top_k, with kd.top_k")
    if config.teacher.mode != "eval" or config.teacher.cache:
        raise UserError("leave teacher.cache out, and leave teacher.mode at eval")
    from etils import epath

    from prmoe_jax.distill.teacher import write_teacher_cache

    meta = write_teacher_cache(config, options.out)
    size = sum(file.stat().length for file in epath.Path(options.out).iterdir())
    emit(meta, options.json, lambda _: f"{options.out}: {size / 1e6:,.0f} MB")


def _student_config(rest):
    """Parses the config of a student whose teacher is a run."""
    config = parse_config(rest)
    if not config.teacher.workdir:
        raise UserError("no run teaches; name one by --config.teacher.workdir")
    return config
