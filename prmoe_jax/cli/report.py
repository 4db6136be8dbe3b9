"""`prmoe report`: draws a page of figures about a sweep or a run."""

from prmoe_jax.cli.options import check_run, local_path, path, verb
from prmoe_jax.cli.output import emit, show
from prmoe_jax.errors import UserError


def add(verbs) -> None:
    sub = verb(verbs, "report", run, "make a page with figures about a sweep, or about one run")
    folder = "a sweep's folder, with results.jsonl"
    sub.add_argument("folder", type=local_path, nargs="?", help=folder)
    sub.add_argument("--base", help="the arm the others are compared with (default: the first)")
    sub.add_argument("--workdir", type=path, help="instead, a run's folder; writes report/ there")


def run(options, rest) -> None:
    if (options.folder is None) == (options.workdir is None):
        raise UserError("prmoe report needs a sweep's folder, or --workdir=DIR for one run")
    if options.workdir:
        if options.base is not None:
            raise UserError("--base is for a sweep's folder; a run of its own has no arms")
        check_run(options.workdir)
        from prmoe_jax.report import single

        show(single.report(options.workdir), options.json)
        return
    from prmoe_jax.report import experiment

    emit(experiment.report(options.folder, options.base), options.json, experiment.table)
