"""`prmoe params`: counts parameters and FLOPs without building a model."""

from prmoe_jax.cli.options import parse_config
from prmoe_jax.cli.output import as_json
from prmoe_jax.errors import UserError


def add(verb) -> None:
    """Declares the verb and its options."""
    sub = verb("params", run, "count a config's parameters and FLOPs, building nothing", True)
    sub.add_argument("--paper", action="store_true", help="all models of the paper, side by side")


def run(options, rest) -> None:
    from prmoe_jax.model import sizes

    if options.paper:
        if rest:
            raise UserError(f"--paper shows fixed configs; leave out {rest[0]}")
        rows = sizes.paper_rows()
        print(as_json(rows) if options.json else sizes.paper_table(rows))
    else:
        config = parse_config(rest)
        show = sizes.report if options.json else sizes.table
        counts = show(config.model, config.moe)
        print(as_json(counts) if options.json else counts)
