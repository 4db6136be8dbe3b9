"""The command line: a file for each subcommand declares its options and calls one function.

JAX is imported inside the subcommands, so that help and error messages appear at once.
"""

import argparse
import contextlib
import importlib
import sys

import prmoe_jax
from prmoe_jax import allocator, boundary
from prmoe_jax.cli.options import Parser, check_run, parse_config
from prmoe_jax.cli.output import log_to_stderr
from prmoe_jax.errors import UserError, refusing

# The modules of this folder that declare subcommands, in the order of `prmoe --help`.
MODULES = (
    "train eval generate sweep report interop params distill prune plan check tokenize bench"
).split()


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
    code = boundary.guard(lambda: _run(given, options), lambda: getattr(options, "workdir", None))
    if code and arguments is None:  # this process is the command
        boundary.leave(code)
    return code


def _run(given: list[str], options: argparse.Namespace) -> None:
    """Parses the arguments into `options` and runs the subcommand."""
    for argument in given:
        with refusing(f"the argument {argument!a} is not UTF-8 text", UnicodeEncodeError):
            argument.encode()
    with _processes(given):
        place = given.index("--") if "--" in given else len(given)
        _, rest = _parser().parse_known_args(given[:place], options)
        options.passed_on = given[place + 1 :]  # for another program
        unknown = ["--"] if options.passed_on and not options.passes_on else []
        unknown += rest if options.takes != "config" else []
        if unknown:
            raise UserError(f"'{unknown[0]}' is not understood; see prmoe {options.verb} --help")
        if options.takes == "run":
            check_run(options.workdir)
        options.run(options, rest)


def _processes(arguments: list[str]):
    """Joins the run's other processes before anything else, so that a mistake ends all of them."""
    if arguments[:1] not in (["train"], ["eval"], ["check"]) or "--distributed" not in arguments:
        return contextlib.nullcontext()
    allocator.keep_freed_memory()
    from prmoe_jax.parallel import processes

    return processes.initialize_distributed()


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="prmoe",
        description="Parameter-efficient Mixture-of-Experts language models (PR-MoE) in JAX.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=prmoe_jax.__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name in MODULES:
        importlib.import_module(f"prmoe_jax.cli.{name}").add(verbs)
    return parser
