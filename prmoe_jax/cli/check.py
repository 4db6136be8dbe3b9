"""`prmoe check`: what this machine or pod can do, and what is wrong with it."""

import logging
from pathlib import Path

from prmoe_jax import allocator
from prmoe_jax.cli.options import add_distributed, parse_config, path, verb
from prmoe_jax.cli.output import as_json, is_first_process
from prmoe_jax.errors import CheckFailed

log = logging.getLogger("prmoe_jax.check")


def add(verbs) -> None:
    kind = "check this machine or pod: devices, kernels, rates, and a tiny run in the workdir"
    sub = verb(verbs, "check", run, kind, "config")
    where = "the folder in whose store a tiny run is trained, and removed (default: runs)"
    sub.add_argument("--workdir", type=path, default=Path("runs"), help=where)
    add_distributed(sub)
    bench = "also run prmoe bench moe, step and decode, in at most ten minutes in all"
    sub.add_argument("--bench", action="store_true", help=bench)


def run(options, rest) -> None:
    allocator.keep_freed_memory()
    config = parse_config(rest) if rest else None
    from prmoe_jax.check.run import check, wrong

    tell = print
    if options.json:  # only JSON on standard output; lines for people go to the log
        tell = lambda text: log.info("%s", text)  # noqa: E731
    record = check(options.workdir, config, options.bench, tell)
    if "backend" in record["environment"] and not is_first_process():
        return
    if options.json:
        print(as_json(record))
    lines, count = wrong(record), len(record["findings"])
    if not lines:
        tell(f"all is well: {count} findings in {record['seconds']:.0f} s")
        return
    tell("\n".join(["what is wrong, and the fix", *(f"  {line}" for line in lines)]))
    raise CheckFailed(f"{len(lines)} of {count} findings are wrong; the lines above have the fixes")
