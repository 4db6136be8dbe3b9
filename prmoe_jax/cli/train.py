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
    steps = "trace these steps with the profiler"
    sub.add_argument("--profile", type=_profiled, metavar="FIRST:LAST", help=steps)
    add_distributed(sub)


def run(options, rest) -> None:
    allocator.keep_freed_memory()
    config = parse_config(rest)
    workdir = options.workdir or Path("runs") / run_name(rest)
    from prmoe_jax.training.loop import train

    metrics = train(config, workdir, options.profile)
    if is_first_process():
        show(metrics, options.json)
        print(f"run: {workdir}", file=sys.stderr)


def _profiled(text: str) -> tuple[int, int]:
    match = re.fullmatch("([0-9]{1,9}):([0-9]{1,9})", text)
    if not match:
        raise UserError(f"--profile={text} must be FIRST:LAST, two steps such as 10:15")
    return int(match[1]), int(match[2])


def run_name(arguments: list[str]) -> str:
    """The default name of a run: 'tiny-prmoe' for --config=configs/tiny.py:prmoe."""
    path, name, _ = config_argument(arguments)
    words = "".join(c if c.isalnum() or c in "._" else "-" for c in name)
    return f"{path.stem}-{words}".rstrip("-")
