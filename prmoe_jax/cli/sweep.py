"""`prmoe sweep`: trains the runs that a folder's sweep.py names."""

import re
from pathlib import Path

from prmoe_jax.cli.options import local_path, path, verb
from prmoe_jax.cli.output import emit
from prmoe_jax.errors import UserError


def add(verbs) -> None:
    kind = "train the runs that a folder's sweep.py names, and record them"
    sub = verb(verbs, "sweep", run, kind)
    sub.add_argument("folder", type=local_path, help="for example experiments/placement")
    sub.add_argument("--workdir", type=path, help="the runs' folder (default: runs/FOLDER)")
    shard = "be the I-th of N processes that share runs"
    sub.add_argument("--shard", default="1/1", metavar="I/N", help=shard)


def run(options, rest) -> None:
    shard = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", options.shard)
    if not shard:
        raise UserError(f"--shard={options.shard} must be I/N, such as 1/4")
    from prmoe_jax.sweep import records, run

    root = options.workdir or Path("runs") / options.folder.resolve().name
    rows = run.sweep(options.folder, root, (int(shard[1]), int(shard[2])))
    emit(rows, options.json, records.table)
