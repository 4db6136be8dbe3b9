"""`prmoe eval`: the loss on a run's validation split, or its scores in tasks."""

import sys

from prmoe_jax import allocator
from prmoe_jax.cli.options import add_distributed, check_run, filled, path
from prmoe_jax.cli.output import as_json, is_first_process, show
from prmoe_jax.errors import UserError


def add(verb) -> None:
    """Declares the subcommand and its options."""
    sub = verb("eval", run, "evaluate a run on its validation split")
    sub.add_argument("--workdir", type=path, required=True, help="the run's folder")
    add_distributed(sub)
    corpus = "the text whose validation split it is (default: the run's)"
    sub.add_argument("--corpus", type=filled, help=corpus)
    sub.add_argument("--teacher", type=path, help="another run, to compare its predictions with")
    sub.add_argument(
        "--tasks",
        help="instead, tasks of lm-evaluation-harness, or ours, which need no network: cloze, "
        "wiki, logiqa_local, quartz_local, socialiqa_local",
    )
    sub.add_argument("--limit", type=int, help="examples of each task (default: all)")


def run(options, rest) -> None:
    allocator.keep_freed_memory()
    check_run(options.workdir)
    tasks = [] if options.tasks is None else [task.strip() for task in options.tasks.split(",")]
    if not all(tasks):
        raise UserError(f"--tasks={options.tasks} has an empty name; use names such as cloze,wiki")
    if options.limit is not None and not (tasks and 0 < options.limit <= sys.maxsize):
        raise UserError(
            f"--limit={options.limit} is a number of examples, for --tasks: from 1 to {sys.maxsize}"
        )
    for name in ("teacher", "corpus"):
        if tasks and getattr(options, name):
            raise UserError(f"--{name} is for the validation split; leave it or --tasks out")
    if tasks and options.distributed:
        raise UserError("--tasks runs in one process; leave --distributed out")
    if tasks:
        from prmoe_jax.tasks.harness import evaluate_tasks

        scores = evaluate_tasks(options.workdir, tasks, options.limit)
        if options.json:
            print(as_json(scores))
        else:
            for task, values in scores.items():
                show({f"{task} {name}": value for name, value in values.items()}, False)
        return
    from prmoe_jax.training.evaluate import evaluate

    metrics = evaluate(options.workdir, options.teacher, options.corpus)
    if is_first_process():
        show(metrics, options.json)
