"""`prmoe train`: trains a config, or resumes the run in its folder."""

import re
import sys
from pathlib import Path

from prmoe_jax import allocator
from prmoe_jax.cli.options import add_distributed, config_argument, parse_config, path, verb
from prmoe_jax.cli.output import is_first_process, show
from prmoe_jax.errors import UserError


def add(verbs) -> None:
    sub = verb(verbs, "train", run, "train a config, or resume the run in its workdir", "config")
    sub.add_argument("--workdir", type=path, help="the run's folder (default: runs/NAME)")
    sub.add_argument("--profile", metavar="FIRST:LAST", help="trace these steps with the profiler")
    add_distributed(sub)


def run(options, rest) -> None:
    allocator.keep_freed_memory()
    config = parse_config(rest)
    profile = profile_steps(options.profile)
    workdir = options.workdir or Path("runs") / run_name(rest)
    from prmoe_jax.training.loop import train

    metrics = train(config, workdir, profile)
    if is_first_process():
        show(metrics, options.json)
        print(f"run: {workdir}", file=sys.stderr)


def profile_steps(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch("([0-9]{1,9}):([0-9]{1,9})", text)
    if not match:
        raise UserError(f"--profile={text} must be FIRST:LAST, two steps such as 10:15")
    return int(match[1]), int(match[2])


def run_name(arguments: list[str]) -> str:
    """The default name of a run: 'tiny-prmoe' for --config=configs/tiny.py:prmoe."""
    path, name, _ = config_argument(arguments)
    words = "".join(c if c.isalnum() or c in "._" else "-" for c in name)
    return f"{path.stem}-{words}".rstrip("-")
