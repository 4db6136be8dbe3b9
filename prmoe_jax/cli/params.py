"""`prmoe params`: counts parameters and FLOPs without building a model."""

from prmoe_jax.cli.options import parse_config, path, verb
from prmoe_jax.cli.output import emit
from prmoe_jax.errors import UserError


def add(verbs) -> None:
    kind = "count a config's or a run's parameters and FLOPs, building nothing"
    sub = verb(verbs, "params", run, kind, "config")
    sub.add_argument("--workdir", type=path, help="the run whose config is counted")
    sub.add_argument("--paper", action="store_true", help="all models of the paper, side by side")


def run(options, rest) -> None:
    from prmoe_jax.config.loading import load
    from prmoe_jax.model import sizes
    from prmoe_jax.run.directory import CONFIG

    others = ["--workdir"] * bool(options.workdir) + rest
    if options.paper and others:
        raise UserError(f"--paper shows fixed configs; leave out {others[0]}")
    if options.workdir and rest:
        raise UserError(f"--workdir shows a run's own config; leave out {rest[0]}")
    if options.paper:
        emit(sizes.paper_rows(), options.json, sizes.paper_table)
        return
    config = load(options.workdir / CONFIG) if options.workdir else parse_config(rest)
    count = sizes.report if options.json else sizes.table
    emit(count(config.model, config.moe), options.json, str)
