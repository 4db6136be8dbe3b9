"""The command line: each verb parses its flags and calls one function.

JAX is imported inside the verbs, so that help and mistakes are answered at once.
"""

import argparse
import errno
import json
import logging
import os
import sys
from pathlib import Path

import prmoe_jax
from prmoe_jax.errors import UserError

CONFIG_HELP = """
settings:
  --config=FILE:NAME            a config file and the architecture in it, for example
                                configs/tiny.py:prmoe, configs/paper.py:prmoe_1.3b or
                                configs/tiny.py:'6 layers, E=8x2+16, residual'
  --config.GROUP.NAME=VALUE     overrides any setting, after --config:
                                --config.train.steps=40 --config.model.experts=8,8,16
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs one verb; returns 0, 1 (the run failed) or 2 (the input cannot be used)."""
    _log_to_stderr()
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    try:
        if rest and not options.takes_config:
            raise UserError(f"'{rest[0]}' is not understood; see prmoe {options.verb} --help")
        return options.run(options, rest) or 0
    except UserError as error:
        return _fail(error, error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG):
            raise
        return _fail(f"{error.filename or 'a file'} cannot be written: {error.strerror}", 2)


def parse_config(arguments: list[str]):
    """The `Config` that --config and its overrides describe.

    Raises:
      UserError: no or no such config file, an unknown or mistyped setting, a failed check.
    """
    from absl import flags
    from ml_collections import config_flags

    from prmoe_jax.config import resolve

    path, _ = _config_argument(arguments)
    if not path.is_file():
        raise UserError(f"--config={path} is not a file; for example configs/tiny.py:prmoe")
    argv = ["prmoe", *arguments]
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    try:
        leftover = values(argv)[1:]
        settings = config.value.to_dict()  # a file that could not be loaded raises here
    except UserError:
        raise
    except Exception as error:  # absl, ml_collections and the config file itself
        cause = error.__cause__ if isinstance(error, OSError) else error
        # An unknown key's text is a repr, with quotes and line breaks spelled out.
        text = str(cause)[1:-1] if isinstance(cause, (KeyError, AttributeError)) else str(cause)
        raise UserError(text.replace("\\n", " ").replace("\\'", "'")) from error
    if leftover:
        raise UserError(f"'{leftover[0]}' is not understood; settings look like --config.seed=1")
    return resolve(settings)


def _config_argument(arguments: list[str]) -> tuple[Path, str]:
    """The file and the name of --config=FILE:NAME."""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        flag, _, value = argument.partition("=")
        if flag == "--config":
            file, _, name = (value or following).partition(":")
            return Path(file), name
    raise UserError("no --config; for example --config=configs/tiny.py:prmoe")


def _train(options, rest) -> None:
    config = parse_config(rest)
    profile = _profile_steps(options.profile, config)
    workdir = options.workdir or Path("runs") / _run_name(rest)
    from prmoe_jax.train import train

    metrics = train(config, workdir, profile)
    _show(metrics, options.json)
    print(f"run: {workdir}", file=sys.stderr)


def _eval(options, rest) -> None:
    from prmoe_jax.evaluate import evaluate

    _show(evaluate(options.workdir), options.json)


def _generate(options, rest) -> None:
    from prmoe_jax.generate import generate

    arguments = options.prompt, options.tokens, options.temperature, options.seed
    text = generate(options.workdir, *arguments)
    if options.json:
        print(json.dumps({"prompt": options.prompt, "text": text}))
    else:
        print(options.prompt + text)


def _params(options, rest) -> None:
    from prmoe_jax import sizes

    if options.paper:
        if rest:
            raise UserError(f"--paper shows fixed configs; leave out {rest[0]}")
        rows = sizes.paper_rows()
        print(json.dumps(rows) if options.json else sizes.paper_table(rows))
    else:
        model = parse_config(rest).model
        print(json.dumps(sizes.report(model)) if options.json else sizes.table(model))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prmoe",
        description="Parameter-efficient Mixture-of-Experts language models (PR-MoE) in JAX.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=prmoe_jax.__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, run, help: str, takes_config: bool = False):
        sub = verbs.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + ".",
            epilog=CONFIG_HELP if takes_config else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.add_argument("--json", action="store_true", help="print JSON for machines")
        sub.set_defaults(run=run, takes_config=takes_config)
        return sub

    sub = verb("train", _train, "train a config, or resume the run in its workdir", True)
    sub.add_argument("--workdir", type=Path, help="the run's folder (default: runs/NAME)")
    sub.add_argument("--profile", metavar="FIRST:LAST", help="trace these steps with the profiler")

    sub = verb("eval", _eval, "evaluate a run on its validation split")
    sub.add_argument("--workdir", type=Path, required=True, help="the run's folder")

    sub = verb("generate", _generate, "continue a prompt with a trained run")
    sub.add_argument("--workdir", type=Path, required=True, help="the run's folder")
    sub.add_argument("--prompt", default="", help="the text to continue (default: none)")
    sub.add_argument("--tokens", type=int, default=100, help="at most this many (default: 100)")
    sub.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default: 0.8)")
    sub.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")

    sub = verb("params", _params, "count a config's parameters and FLOPs, building nothing", True)
    sub.add_argument("--paper", action="store_true", help="all models of the paper, side by side")
    return parser


def _profile_steps(text: str | None, config) -> tuple[int, int] | None:
    if text is None:
        return None
    first, _, last = text.partition(":")
    if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise UserError(f"--profile={text} must be FIRST:LAST, two steps such as 10:15")
    if int(last) > config.total_steps:
        raise UserError(f"--profile={text} ends after the run's {config.total_steps} steps")
    return int(first), int(last)


def _run_name(arguments: list[str]) -> str:
    """'tiny-prmoe' for --config=configs/tiny.py:prmoe."""
    path, name = _config_argument(arguments)
    words = "".join(c if c.isalnum() or c in "._" else "-" for c in name)
    return f"{path.stem}-{words}".rstrip("-")


def _show(metrics: dict, as_json: bool) -> None:
    if as_json:
        print(json.dumps(metrics))
        return
    for name, value in metrics.items():
        if not isinstance(value, list):
            print(f"{name:40} {value:.6g}" if isinstance(value, float) else f"{name:40} {value}")


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("prmoe_jax")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    # Orbax and Grain report their own housekeeping here; what matters reaches us as an error.
    logging.getLogger("absl").setLevel(logging.ERROR)


def _fail(message, code: int) -> int:
    print(f"prmoe: {' '.join(str(message).split())}", file=sys.stderr)
    return code
