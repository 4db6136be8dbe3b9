"""`prmoe prune`: a MoE with fewer experts, chosen by measured importance."""

import argparse

from prmoe_jax import allocator
from prmoe_jax.cli.options import filled, path, verb
from prmoe_jax.cli.output import emit
from prmoe_jax.errors import UserError


def add(verbs) -> None:
    kind = "cut a MoE run down to a share of its experts"
    sub = verb(verbs, "prune", run, kind, "run")
    sub.add_argument("--out", type=path, help="the folder of the new run; without it, plan only")
    budget = sub.add_mutually_exclusive_group(required=True)
    budget.add_argument("--keep", type=float, help="share of all experts that stays")
    experts = "experts that stay in each MoE layer, such as 4,8,8"
    budget.add_argument("--experts", type=_counts, help=experts)
    sub.add_argument(
        "--importance",
        choices=("load", "activation", "ean", "reap", "man", "msan", "loss"),
        default="activation",
        help="what makes an expert important: its share of the choices, what it adds to the "
        "tokens (default), the size of its outputs (ean), the means of both over its tokens "
        "(reap, man) or of the squared size (msan), or the loss without it, to first order",
    )
    sub.add_argument(
        "--shape",
        choices=("pyramid", "uniform", "inverse", "measured"),
        help="with --keep: more experts where they matter more (default), the same share in every "
        "layer, the pyramid's numbers in reverse order, or the numbers that change the predictions "
        "least, measured layer by layer",
    )
    merge = "merge the experts that go into those that stay, instead of dropping them"
    sub.add_argument("--merge", action="store_true", help=merge)
    sub.add_argument("--corpus", type=filled, help="the text to measure on (default: the run's)")
    scores = "a file for the importance: read if it exists, else written"
    sub.add_argument("--scores", type=path, help=scores)
    sub.add_argument("--batches", type=int, default=16, help="batches of it (default: 16)")


def _counts(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' must be numbers such as 4,8,8") from None


def run(options, rest) -> None:
    allocator.keep_freed_memory()
    from prmoe_jax.distill.prune import prune_run, table

    if options.experts and options.shape:
        raise UserError(
            f"--shape={options.shape} has no effect with --experts, which gives every layer's "
            "number; leave one of them out"
        )
    plan = prune_run(
        options.workdir,
        options.out,
        options.experts or options.keep,
        options.importance,
        options.shape or "pyramid",
        options.merge,
        options.corpus,
        options.batches,
        options.scores,
    )
    if options.json or options.out is None:  # else it was logged before the run was written
        emit(plan, options.json, table)
