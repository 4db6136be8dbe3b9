"""`prmoe prune`: a MoE with fewer experts, chosen by measured importance."""

import json

from prmoe_jax import allocator
from prmoe_jax.cli.options import check_run, path


def add(verb) -> None:
    """Declares the verb and its options."""
    sub = verb("prune", run, "cut a MoE run down to a share of its experts")
    sub.add_argument("--workdir", type=path, required=True, help="the run's folder")
    sub.add_argument("--out", type=path, help="the folder of the new run; without it, plan only")
    sub.add_argument("--keep", type=float, required=True, help="share of all experts that stays")
    kinds = ("load", "activation", "loss")
    sub.add_argument(
        "--importance",
        choices=kinds,
        default="activation",
        help="what makes an expert important: its share of the choices, what it adds to the "
        "tokens (default), or the loss without it, to first order",
    )
    sub.add_argument(
        "--shape",
        choices=("pyramid", "uniform", "inverse"),
        default="pyramid",
        help="more experts where they matter more (default), as many in every layer, or the "
        "pyramid's numbers in reverse order",
    )
    merge = "merge the experts that go into those that stay, instead of dropping them"
    sub.add_argument("--merge", action="store_true", help=merge)
    sub.add_argument("--corpus", help="the text to measure on (default: the run's)")
    sub.add_argument("--batches", type=int, default=16, help="batches of it (default: 16)")


def run(options, rest) -> None:
    allocator.keep_freed_memory()
    check_run(options.workdir)
    from prmoe_jax.distill.prune import prune_run, table

    plan = prune_run(
        options.workdir,
        options.out,
        options.keep,
        options.importance,
        options.shape,
        options.merge,
        options.corpus,
        options.batches,
    )
    if options.json:
        print(json.dumps(plan))
    elif options.out is None:  # otherwise it was logged before the run was written
        print(table(plan))
