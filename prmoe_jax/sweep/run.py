"""`prmoe sweep`: the runs that a Python file names, one after another, and a record of each.

A run is a process of its own, so that one that fails stops no other. It resumes where it was
stopped; one that is recorded, by the same settings, isn't done again.
"""

import fcntl
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

from prmoe_jax import files, userfile
from prmoe_jax import workdir as workdirs
from prmoe_jax.config import RESUMABLE, Config, changed, check_resume, load, resolve, save
from prmoe_jax.errors import UserError
from prmoe_jax.metrics import read_metrics
from prmoe_jax.sizes import cost
from prmoe_jax.sweep.board import Board

RESULTS = "results.jsonl"
# Points of a run's training loss that its record keeps.
POINTS = 100


class RunsFailed(UserError):
    """Some runs of a sweep failed; the others are recorded."""

    exit_code = 1


def planned(folder: Path) -> dict[str, Config]:
    """The runs of a folder's sweep.py: what its function `runs` yields, (name, settings) each.

    Raises:
      UserError: no such file, or something else in it; nothing has run then.
    """
    path = folder / "sweep.py"
    if not path.is_file():
        raise UserError(f"{path} is missing; it must define runs(), which yields (name, settings)")
    found: dict[str, Config] = {}
    for item in userfile.call(path, "runs", named=str(path)):
        if not (isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)):
            raise UserError(f"{path}: runs() yields {item!r:.80}, not (name, settings)")
        name, settings = item
        if not re.fullmatch(r"[\w.+=-]+(/[\w.+=-]+)*", name) or ".." in name:
            raise UserError(f"{path}: {name!r} can't name a folder; use letters, digits, '-', '/'")
        if name in found:
            raise UserError(f"{path} yields {name!r} twice")
        try:
            found[name] = resolve(settings)
        except UserError as error:
            raise UserError(f"{path}: {name}: {error}") from None
    if not found:
        raise UserError(f"{path}: runs() yields nothing")
    return found


def sweep(folder: Path, root: Path, shard: tuple[int, int] = (1, 1)) -> list[dict]:
    """Trains what is left of a sweep and records it in the folder's results.jsonl.

    Args:
      folder: holds sweep.py.
      root: where the runs' folders are.
      shard: (i, n) trains the i-th, the (n + i)-th, … run only, for n of these at once.

    Returns:
      The records of all runs that there are, in the sweep's order; see `record`.

    Raises:
      UserError: nothing has run.
      RunsFailed: some did, and failed.
    """
    runs = planned(folder)
    number, count = shard
    if not 1 <= number <= count:
        raise UserError(f"--shard={number}/{count} must be I/N, with I from 1 to N")
    mine = {name: runs[name] for name in list(runs)[number - 1 :: count]}
    failed = []
    with Board({name: (root / name, config) for name, config in mine.items()}) as board:
        for name, config in mine.items():
            if _recorded(folder, {name: config}):
                board.put(name, "recorded")
                continue
            why = _train(name, config, root / name, board)
            if why:
                failed.append(name)
                board.put(name, why)
                continue
            _write(folder, runs, {name: record(name, config, root / name)})
            board.put(name, "finished")
    if failed:
        raise RunsFailed(
            f"{len(failed)} of {len(mine)} runs failed: {', '.join(failed)}; the same command "
            "tries them again"
        )
    return _recorded(folder, runs)


def record(name: str, config: Config, workdir: Path) -> dict:
    """What a finished run came to.

    Returns:
      run, settings (that differ from the defaults), seed; total_params, active_params,
      flops_per_token (of training); tokens, loss, bits_per_byte and drop_fraction at the end, and
      layers, by number what `metrics.summarise` says of each MoE layer then; evaluations and
      losses, [tokens, nats a token] each; tokens_per_second; revisions, versions and device.
    """
    lines, size = read_metrics(workdir / "metrics.jsonl"), cost(config.model)
    evaluated = [line for line in lines if "eval/loss" in line]
    trained = [line for line in lines if "loss" in line]
    last, a_step = evaluated[-1], config.tokens_per_step
    starts = json.loads((workdir / "environment.json").read_text())
    layers: dict[str, dict] = {}
    for key, value in last.items():
        if key.startswith("eval/layers/"):
            _, _, layer, of = key.split("/")
            layers.setdefault(layer, {})[of] = value
    return {
        "run": name,
        "settings": _settings(config),
        "seed": config.seed,
        "total_params": size.total_params,
        "active_params": size.active_params,
        "flops_per_token": size.train_flops_per_token,
        "tokens": last["step"] * a_step,
        "loss": last["eval/loss"],
        "bits_per_byte": last["eval/bits_per_byte"],
        "drop_fraction": last["eval/drop_fraction"],
        "layers": layers,
        "evaluations": [[line["step"] * a_step, line["eval/loss"]] for line in evaluated],
        "losses": [
            [line["tokens"], line["loss"]] for line in trained[:: -(-len(trained) // POINTS)]
        ],
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in trained),
        "revisions": sorted({start["git_revision"] or "unknown" for start in starts}),
        "versions": starts[-1]["versions"],
        "device": starts[-1]["device"],
    }


def table(records: list[dict]) -> str:
    """The records for people."""
    lines = [f"{'run':32} {'loss':>8} {'bits/byte':>9} {'params':>9} {'active':>9} {'tokens/s':>9}"]
    for row in records:
        lines.append(
            f"{row['run']:32} {row['loss']:8.4f} {row['bits_per_byte']:9.4f} "
            f"{row['total_params'] / 1e6:8.2f}M {row['active_params'] / 1e6:8.2f}M "
            f"{row['tokens_per_second']:9,.0f}"
        )
    return "\n".join(lines)


def _train(name: str, config: Config, workdir: Path, board: Board) -> str:
    """Trains, or goes on with, one run in a process of its own; returns what went wrong."""
    if (workdir / workdirs.CONFIG).exists():
        try:
            check_resume(load(workdir / workdirs.CONFIG), config)
        except UserError as error:
            return f"{error}"
        if _finished(config, workdir):
            return ""
    workdir.mkdir(parents=True, exist_ok=True)
    settings = workdir / "sweep.json"
    save(config, settings)
    log = workdir / "log.txt"
    command = [sys.executable, "-m", "prmoe_jax", "train", "--json"]
    command += [f"--config={settings}", f"--workdir={workdir}"]
    begun = time.monotonic()
    board.put(name, "running")
    with log.open("a") as output:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=output)
        try:
            process.wait()
        except BaseException:  # Ctrl-C reaches the run as well, which saves itself
            process.wait()
            raise
    if process.returncode or not _finished(config, workdir):
        lines = log.read_text(errors="replace").splitlines() or ["it said nothing"]
        return f"failed after {time.monotonic() - begun:.0f} s: {lines[-1][:300]}"
    return ""


def _finished(config: Config, workdir: Path) -> bool:
    lines = read_metrics(workdir / "metrics.jsonl")
    return bool(lines) and "eval/loss" in lines[-1] and lines[-1]["step"] == config.total_steps


def _settings(config: Config) -> dict:
    """Those that differ from the defaults and make the run what it is."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in changed(config).items()
        if not name.startswith(RESUMABLE)
    }


def _recorded(folder: Path, runs: dict[str, Config]) -> list[dict]:
    """The records that there are of these runs, in their order."""
    path = folder / RESULTS
    lines = path.read_text().splitlines() if path.exists() else []
    rows = {row["run"]: row for row in map(json.loads, lines)}
    return [
        rows[name]
        for name, config in runs.items()
        if name in rows and rows[name]["settings"] == _settings(config)
    ]


def _write(folder: Path, runs: dict[str, Config], new: dict[str, dict]) -> None:
    """Adds records, in the sweep's order, whoever else adds some at the same time."""
    path = folder / RESULTS
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        known = {row["run"]: row for row in _recorded(folder, runs)} | new
        lines = [json.dumps(known[name]) + "\n" for name in runs if name in known]
        files.replace(path, "".join(lines))
    finally:
        os.close(handle)  # which frees the lock
