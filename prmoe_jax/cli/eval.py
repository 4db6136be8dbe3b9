"""`prmoe eval`: the loss on a run's validation split, or its scores in tasks."""

import sys

from prmoe_jax import allocator
from prmoe_jax.cli.options import add_distributed, filled, path, verb
from prmoe_jax.cli.output import is_first_process, show
from prmoe_jax.errors import UserError, lacking_memory


def add(verbs) -> None:
    sub = verb(verbs, "eval", run, "evaluate a run on its validation split", "run")
    add_distributed(sub)
    corpus = "the text whose validation split it is (default: the run's)"
    sub.add_argument("--corpus", type=filled, help=corpus)
    sub.add_argument("--teacher", type=path, help="another run, to compare its predictions with")
    worth = "also what each MoE layer is worth: the loss without its experts and with them permuted"
    sub.add_argument("--worth", action="store_true", help=worth)
    sub.add_argument(
        "--length",
        type=int,
        help="tokens of a window (default: the run's context); fewer leave each token less "
        "context, which changes the loss",
    )
    sub.add_argument(
        "--batch-size",
        type=int,
        help="windows at once, which changes memory and speed, not the loss (default: training's "
        "microbatch, or fewer if the free memory asks for it); of tasks, examples on each device "
        "at once (default: 16)",
    )
    sub.add_argument(
        "--tasks",
        help="instead, tasks of lm-evaluation-harness, or ours, which need no network: cloze, "
        "wiki, logiqa_local, quartz_local, socialiqa_local",
    )
    sub.add_argument("--limit", type=int, help="examples of each task (default: all)")


def run(options, rest) -> None:
    allocator.keep_freed_memory()
    tasks = [] if options.tasks is None else [task.strip() for task in options.tasks.split(",")]
    if not all(tasks):
        raise UserError(f"--tasks={options.tasks} has an empty name; use names such as cloze,wiki")
    if options.limit is not None and not (tasks and 0 < options.limit <= sys.maxsize):
        raise UserError(
            f"--limit={options.limit} is a number of examples, for --tasks: from 1 to {sys.maxsize}"
        )
    if not tasks:
        with lacking_memory("lower --batch-size, or --length, which changes the loss"):
            _on_validation_split(options)
        return
    for name in ("teacher", "corpus", "worth", "length", "distributed"):
        value = getattr(options, name)
        if value is not None and value is not False:
            raise UserError(f"--{name} is for the validation split; leave it or --tasks out")
    from prmoe_jax.tasks.harness import evaluate_tasks

    with lacking_memory("lower --batch-size"):
        shown = evaluate_tasks(options.workdir, tasks, options.limit, options.batch_size)
    if not options.json:
        shown = {f"{task} {name}": x for task, of in shown.items() for name, x in of.items()}
    show(shown, options.json)


def _on_validation_split(options) -> None:
    from prmoe_jax.training.evaluate import evaluate

    metrics = evaluate(
        options.workdir,
        options.teacher,
        options.corpus,
        options.worth,
        options.length,
        options.batch_size,
    )
    if is_first_process():
        show(metrics, options.json)
