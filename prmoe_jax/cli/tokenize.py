"""`prmoe tokenize`: text to token shards."""

from prmoe_jax.cli.options import parse_config, path, verb
from prmoe_jax.cli.output import show


def add(verbs) -> None:
    sub = verb(verbs, "tokenize", run, "write the tokens of a config's text as shards", "config")
    sub.add_argument("--out", type=path, required=True, help="the folder; it may be gs://…")
    sub.usage = "prmoe tokenize --config=FILE:NAME --out=FOLDER [--json] [-- BEAM_OPTIONS]"
    sub.set_defaults(passes_on=True)


def run(options, rest) -> None:
    config = parse_config(rest)
    from prmoe_jax.data.tokenize import tokenize
    from prmoe_jax.run.directory import check_outside_checkpoints

    check_outside_checkpoints("--out", options.out)

    show(tokenize(config, options.out, options.passed_on), options.json)
