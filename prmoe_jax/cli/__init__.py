"""The command line: a file for each subcommand declares its options and calls one function.

JAX is imported inside the subcommands, so that help and error messages appear at once.
"""

import argparse
import contextlib
import sys

import prmoe_jax
from prmoe_jax import allocator, boundary
from prmoe_jax.cli import (
    bench,
    check,
    distill,
    eval,
    generate,
    interop,
    params,
    plan,
    prune,
    report,
    sweep,
    tokenize,
    train,
)
from prmoe_jax.cli.options import CONFIG_HELP, Parser, parse_config
from prmoe_jax.cli.output import log_to_stderr
from prmoe_jax.errors import UserError, refusing


def main(arguments: list[str] | None = None) -> int:
    """Runs one subcommand.

    Returns:
      The exit code: 0; 1 if the run or this program failed; 2 if the input, the files or the
      machine must change; 130 after Ctrl-C.
    """
    boundary.prepare()
    log_to_stderr()
    given = sys.argv[1:] if arguments is None else arguments
    options = argparse.Namespace()

    def command() -> None:
        nonlocal options
        for argument in given:
            with refusing(f"the argument {argument!a} is not UTF-8 text", UnicodeEncodeError):
                argument.encode()
        with _processes(given):
            own, passed_on = _split(given)
            options, rest = _parser().parse_known_args(own)
            if passed_on and not options.passes_on:
                raise UserError(f"'--' is not understood; see prmoe {options.verb} --help")
            options.passed_on = passed_on
            if rest and not options.takes_config:
                raise UserError(f"'{rest[0]}' is not understood; see prmoe {options.verb} --help")
            options.run(options, rest)

    code = boundary.guard(command, lambda: getattr(options, "workdir", None))
    if code and arguments is None:  # this process is the command
        boundary.leave(code)
    return code


def _processes(arguments: list[str]):
    """Joins the run's other processes before anything else, so that a mistake ends all of them."""
    if arguments[:1] not in (["train"], ["eval"], ["check"]) or "--distributed" not in arguments:
        return contextlib.nullcontext()
    allocator.keep_freed_memory()
    from prmoe_jax.parallel import processes

    return processes.initialize_distributed()


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The arguments before a `--`, and the arguments after it, which are for another program."""
    if "--" not in arguments:
        return arguments, []
    place = arguments.index("--")
    return arguments[:place], arguments[place + 1 :]


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="prmoe",
        description="Parameter-efficient Mixture-of-Experts language models (PR-MoE) in JAX.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=prmoe_jax.__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, run, help: str, takes_config=False, parsers=verbs, formerly: str = ""):
        sub = parsers.add_parser(
            name,
            aliases=[formerly] if formerly else [],
            help=help,
            description=help[0].upper() + help[1:] + ".",
            epilog=CONFIG_HELP if takes_config else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.add_argument("--json", action="store_true", help="print JSON for machines")
        sub.set_defaults(run=run, takes_config=takes_config, passes_on=False)
        sub.takes_config = takes_config
        return sub

    for module in (
        train, eval, generate, sweep, report, interop, params, distill, prune, plan, check,
        tokenize,
    ):  # fmt: skip
        module.add(verb)
    bench.add(verb, verbs)
    return parser
