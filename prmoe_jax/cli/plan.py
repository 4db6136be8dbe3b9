"""`prmoe plan`: compiles a step for a pod that is not there, and models its cost."""

import logging

from prmoe_jax.cli.options import compile_only, filled, local_path, parse_config, verb
from prmoe_jax.cli.output import emit
from prmoe_jax.errors import UserError

log = logging.getLogger(__name__)


def add(verbs) -> None:
    kind = "compile a config's train step for a pod, and model its cost"
    sub = verb(verbs, "plan", run, kind, "config")
    sub.add_argument("--topology", help="chips, such as v5p:4x4x8, h100:16x8 or 2xv5p:4x4x4")
    sub.add_argument("--find", metavar="CHIP", help="instead, the smallest slice that fits")
    decode = "instead of training, the next token of so many sequences of full context"
    sub.add_argument("--decode", type=int, default=0, metavar="SEQUENCES", help=decode)
    teacher = "the teacher's config; plans a step of distillation"
    sub.add_argument("--teacher", type=filled, metavar="FILE:NAME", help=teacher)
    load = "rows of the fullest device relative to an even share, without drops (default: 1)"
    sub.add_argument("--load", type=float, default=1.0, help=load)
    sub.add_argument("--picture", type=local_path, help="also draw the plan: a .png, .svg or .pdf")


def run(options, rest) -> None:
    config, teacher = parse_config(rest), None
    if options.teacher:
        from prmoe_jax.config.teacher import adapt_teacher

        reasons = {
            "the config has no teacher": not config.kd_steps,
            "nobody teaches in decoding": options.decode,
            "the run learns from teacher.cache": config.teacher.cache,
        }
        if why := next((why for why, holds in reasons.items() if holds), None):
            raise UserError(f"--teacher={options.teacher} has no effect: {why}; leave it out")
        teacher = adapt_teacher(parse_config([f"--config={options.teacher}"]), config)
    elif config.kd_steps and not (options.decode or config.teacher.cache):
        from prmoe_jax.config.teacher import teacher_of

        try:
            teacher = teacher_of(config)
        except UserError as error:
            log.warning("%s; planned without it: --teacher=FILE:NAME gives its config", error)
    if (options.topology is None) == (options.find is None):
        raise UserError("prmoe plan needs either --topology=v5p:4x4x8 or --find=v5p")
    if not 0 <= options.decode < 1 << 31:
        raise UserError(f"--decode={options.decode} must be a number of sequences, below 2^31")
    if not 1 <= options.load <= 1e6:
        raise UserError(f"--load={options.load:g} must be a number from 1, the even load")
    compile_only()
    from prmoe_jax.plan import find, picture, report

    if options.picture:
        picture.check(options.picture)
    if options.find is not None:
        result = find.find(config, options.find, options.decode, teacher, options.load)
    else:
        result = find.fit(config, options.topology, options.decode, teacher, options.load)
    emit(result, options.json, report.table)
    if options.picture:
        picture.draw([("step", result)], options.picture)
