"""`prmoe sweep`: trains the runs that a Python file defines, one after another, and records each.

Every run is its own process, so that a failed run stops no other. A run that was stopped resumes,
and a run that is recorded with the same settings isn't trained again. A run may go on from another
one of the sweep, its trunk, instead of repeating the trunk's steps; its record is the same.
"""

import contextlib
import dataclasses
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from prmoe_jax import files, stores
from prmoe_jax.config import RESUMABLE, Config, changed, check_resume, load, save
from prmoe_jax.errors import UserError
from prmoe_jax.model.sizes import cost
from prmoe_jax.run import directory as workdirs
from prmoe_jax.run.metrics import read_metrics
from prmoe_jax.stores import lock
from prmoe_jax.sweep import records
from prmoe_jax.sweep.definition import Run, branch, planned
from prmoe_jax.sweep.progress import SweepProgress
from prmoe_jax.tables import aligned

log = logging.getLogger(__name__)

# Number of points of a run's training loss that its record keeps.
POINTS = 100
# Seconds to wait for a run that another process holds, such as a run whose sweep was killed and
# which is saving its checkpoint, or that was killed itself and left its lease in an object store.
PATIENCE = lock.LEASE + 15
# The fields that are used here: a step's and an evaluation's in metrics.jsonl, and a start's in
# environment.json.
TRAINED = {
    "step": int,
    "tokens": int,
    "loss": records.NUMBER,
    "lm_loss": records.NUMBER,
    "tokens_per_second": records.NUMBER,
}
EVALUATED = {
    "step": int,
    "eval/tokens": int,
    "eval/loss": records.NUMBER,
    "eval/bits_per_byte": records.NUMBER,
    "eval/drop_fraction": records.NUMBER,
}
START = {"git_revision": (str, type(None)), "versions": dict, "device": str}


class RunsFailed(UserError):
    """Some runs of a sweep failed; the others are recorded."""

    exit_code = 1


def sweep(folder: Path, root: Path, shard: tuple[int, int] = (1, 1)) -> list[dict]:
    """Trains the unfinished runs of a sweep and records them in the folder's results.jsonl.

    Args:
      folder: the folder of sweep.py.
      root: the parent of the runs' folders, local or in an object store.
      shard: (i, n) trains only the i-th, the (n + i)-th, … run, so that n processes can share a
        sweep. A run that goes on from another one or learns from it is in that one's share.

    Returns:
      All records of the sweep's runs, in the sweep's order; see `record`.

    Raises:
      UserError: the sweep or its records cannot be used.
      RunsFailed: some runs failed.
    """
    runs, constants = planned(folder)
    number, count = shard
    if not 1 <= number <= count:
        raise UserError(f"--shard={number}/{count} must be I/N, with I from 1 to N")
    needs = _needs(runs, root)
    mine = _share(needs, number, count)
    rows = records.read(folder)
    _check_text(folder, rows, runs)
    if others := len(rows) - len(_recorded(rows, runs)):
        log.info("%s: keeps %d records of other runs or settings", folder / records.RESULTS, others)
    if len(_recorded(rows, {name: runs[name] for name in mine})) < len(mine):
        _prepare(folder, root)
    failed: list[str] = []
    shown = {name: (root / name, runs[name].config) for name in mine}
    with SweepProgress(shown) as progress:
        for name in mine:
            try:
                for needed in needs[name]:
                    if needed in failed:
                        raise UserError(f"it needs {needed}, which failed")
                state = _done(folder, name, runs, needs, root, progress)
                if not constants.keep_checkpoints:
                    for one in (name, *needs[name]):
                        _discard_checkpoints(one, runs, needs, records.read(folder), root)
            except (UserError, OSError) as error:
                failed.append(name)
                state = _one_line(error)
            progress.put(name, state)
    if failed:
        raise RunsFailed(
            f"{len(failed)} of {len(mine)} runs failed: {', '.join(failed)}; the same command "
            "tries them again"
        )
    return records.complete(folder, _recorded(records.read(folder), runs))


def _check_text(folder: Path, rows: list[dict], runs: dict[str, Run]) -> None:
    """Raises UserError if a run would take the place of a record on a text that it names."""
    for row in rows:
        if row["run"] in runs:
            was, asked = row["settings"].get("data.corpus"), runs[row["run"]].config.data.corpus
            if was and was != asked:
                raise UserError(
                    f"{folder / records.RESULTS}: {row['run']} was trained on data.corpus={was}, "
                    f"and sweep.py asks for {asked}; install the text, or move the records away"
                )


def _needs(runs: dict[str, Run], root: Path) -> dict[str, list[str]]:
    """For each run, those of the sweep that it needs: its trunk, its start and its teacher."""

    names = {_place(root / name): name for name in runs}
    needs = {}
    for name, (config, trunk) in runs.items():
        read = filter(None, (config.init.workdir, config.teacher.workdir))
        found = [trunk, *(names.get(_place(stores.as_path(folder))) for folder in read)]
        needs[name] = [other for other in dict.fromkeys(found) if other not in (None, name)]
    return needs


def _place(folder: Path) -> Path:
    """A run's folder by one path, however it is named."""
    return folder.resolve() if stores.is_local(folder) else folder


def _share(needs: dict[str, list[str]], number: int, count: int) -> list[str]:
    """The runs of the `number`-th of `count` shares; those that need one another count as one."""
    first = {name: name for name in needs}  # one run of those that belong together
    for name, others in needs.items():
        for other in others:
            old, new = first[name], first[other]
            first = {one: new if of == old else of for one, of in first.items()}
    mine = set(list(dict.fromkeys(first.values()))[number - 1 :: count])
    return [name for name in needs if first[name] in mine]


def _done(
    folder: Path,
    name: str,
    runs: dict[str, Run],
    needs: dict[str, list[str]],
    root: Path,
    progress: SweepProgress,
) -> str:
    """Trains and records a run and returns 'finished', or 'recorded' if there is a record already.

    Raises:
      UserError: the run cannot be trained, or its record cannot be written; gives the reason.
      OSError: a file in the run's folder cannot be written.
    """
    (config, trunk), workdir = runs[name], root / name
    recorded = _names(folder, runs)
    if name not in recorded and _wait_until_free(name, workdir, progress):
        recorded = _names(folder, runs)  # another sweep may have trained the run meanwhile
    if name in recorded:
        return "recorded"
    begun = (workdir / workdirs.CONFIG).exists()
    saved = load(workdir / workdirs.CONFIG) if begun else None
    over = begun and _finished(config, workdir)
    # A run without a checkpoint begins anew.
    goes_on = over or any(path.name.isdecimal() for path in (workdir / "checkpoints").glob("*"))
    given = config if trunk is None else branch(config, runs[trunk].config, root / trunk)
    if not (trunk is None or goes_on or _kept(root / trunk, given.init.step)):
        # It trains those steps itself; see `training.branch`.
        there = f"{trunk} has no checkpoint of step {given.init.step} in {root / trunk}"
        log.info("%s: starts at step 0, since %s", name, there)
        given = config
    starts = _starts_from(config, given)
    for other in needs[name]:
        if other == trunk:
            continue
        if not _finished(runs[other].config, root / other):
            fix = f"the same command goes on with {name} once it is"
            if other in recorded:
                fix = f"since it is recorded, {_again(other, folder)}"
            raise UserError(f"it needs {other}, which is not finished in {root / other}; {fix}")
        _check_same(other, runs[other], root / other)
        if not goes_on and _place(root / other) in starts:
            _check_kept(folder, root, other, runs[other].config.total_steps)
    if begun:
        asked = given
        if trunk is not None and (saved.init == config.init or _ends(saved.init.workdir, trunk)):
            # From step 0 or from its trunk; the folder of all runs may have another name now.
            asked = dataclasses.replace(given, init=saved.init)
        check_resume(saved, asked)
        if goes_on:
            given = asked
    if not over:
        _train(name, given, workdir, progress)
    records.add(folder, record(name, config, workdir), list(runs))
    return "finished"


def _check_same(name: str, run: Run, workdir: Path) -> None:
    """Raises UserError if the run in a folder, which another run needs, has other settings."""
    saved, asked = load(workdir / workdirs.CONFIG), run.config
    if run.trunk is not None:  # a branch is the run from step 0, wherever it began
        asked = dataclasses.replace(asked, init=saved.init)
    try:
        check_resume(saved, asked)
    except UserError as error:
        raise UserError(f"it needs {name}: in {workdir} {error}") from None


def _starts_from(config: Config, given: Config) -> set[Path]:
    """The folders of runs of which a run reads the last checkpoint when it begins.

    Args:
      config: the run's config, as if it started at step 0.
      given: the config with which it is trained; a branch takes its parameters from its trunk.
    """
    starts = []
    if not given.init.step:
        starts.append(config.init.workdir)
    inherits = config.teacher.inherit and not given.init.step
    learns = given.init.step < config.kd_steps and not config.teacher.cache
    if inherits or learns:
        starts.append(config.teacher.workdir)
    return {_place(stores.as_path(folder)) for folder in starts if folder}


def _check_kept(folder: Path, root: Path, name: str, step: int) -> None:
    """Raises UserError if a run's checkpoint of a step, which another run needs, is gone."""
    if not _kept(root / name, step):
        raise UserError(
            f"it needs the checkpoint of step {step} of {name}, which is not in {root / name}; "
            f"{_again(name, folder)}"
        )


def _kept(workdir: Path, step: int) -> bool:
    """Whether a run's folder has the checkpoint of a step."""
    return (workdir / "checkpoints" / str(step)).is_dir()


def _again(name: str, folder: Path) -> str:
    """How a recorded run is trained again."""
    where = folder / records.RESULTS
    return f"to train {name} again, delete its folder and its line in {where}"


def _ends(folder: str, name: str) -> bool:
    """Whether a folder is one of a run of this name."""
    return f"/{folder}".endswith(f"/{name}")


def _discard_checkpoints(
    name: str, runs: dict[str, Run], needs: dict[str, list[str]], rows: list[dict], root: Path
) -> None:
    """Deletes the checkpoints of a recorded run that no run of the sweep will need.

    Of a run that none goes on from, the checkpoint at which its decay starts stays, so that a
    longer one can be added to the sweep.

    Raises:
      OSError: a checkpoint cannot be deleted.
    """
    config = runs[name].config
    branches = {other: run for other, run in runs.items() if run.trunk == name}
    done = {row["run"] for row in _recorded(rows, runs)}
    needed = {
        branch(run.config, config, root / name).init.step
        for other, run in branches.items()
        if other not in done
    }
    if not branches:
        needed.add(config.decay_start or 0)
    learners = {other for other in needs if name in needs[other]} - branches.keys()
    if name not in done or not learners <= done:
        return
    for path in (root / name / "checkpoints").glob("*"):
        if path.is_dir() and path.name not in map(str, needed):
            stores.delete_folder(path)


def record(name: str, config: Config, workdir: Path) -> dict:
    """The results of a finished run.

    Returns:
      run, settings (that differ from the defaults), seed; total_params, active_params,
      flops_per_token (of training); tokens, loss, bits_per_byte and drop_fraction at the end;
      layers, the statistics of `metrics.summarise` for each MoE layer at the end, by the layer's
      number; evaluations and losses, each a list of [tokens, nats per token]; evaluated_tokens,
      the number of the validation split's tokens in each evaluation; tokens_per_second;
      revisions, versions and device.

    Raises:
      UserError: metrics.jsonl or environment.json cannot be read, or lacks a field that is needed.
    """
    (trained, evaluated), size = logged(workdir), cost(config.model, config.moe)
    if not (trained and evaluated):
        raise UserError(f"{workdir}/metrics.jsonl holds no step, or no evaluation")
    last, a_step = evaluated[-1], config.tokens_per_step
    starts = _starts(workdir / "environment.json")
    layers: dict[str, dict] = {}
    for key, value in last.items():
        if key.startswith("eval/layers/"):
            layer, _, of = key.removeprefix("eval/layers/").partition("/")
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
        "evaluated_tokens": [line["eval/tokens"] for line in evaluated],
        "losses": [
            [line["tokens"], line["lm_loss"]] for line in trained[:: -(-len(trained) // POINTS)]
        ],
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in trained),
        "revisions": sorted({start["git_revision"] or "unknown" for start in starts}),
        "versions": starts[-1]["versions"],
        "device": starts[-1]["device"],
    }


def logged(workdir: Path) -> tuple[list[dict], list[dict]]:
    """The lines of a run's metrics.jsonl: those of steps, and those of evaluations.

    Raises:
      UserError: the file cannot be read, or a line lacks a field; names the line.
    """
    path = workdir / "metrics.jsonl"
    lines = read_metrics(path)
    trained = [line for line in lines if "loss" in line]
    evaluated = [line for line in lines if "eval/loss" in line]
    for kind, some in (TRAINED, trained), (EVALUATED, evaluated):
        for line in some:
            where = f"{path}: the line of step {line['step']}"
            files.require(line, kind, where, "delete that line, or restore a copy of the file")
    return trained, evaluated


def table(records: list[dict]) -> str:
    """The records as text."""
    rows = [
        (
            row["run"],
            f"{row['loss']:.4f}",
            f"{row['bits_per_byte']:.4f}",
            f"{row['total_params'] / 1e6:.2f}M",
            f"{row['active_params'] / 1e6:.2f}M",
            f"{row['tokens_per_second']:,.0f}",
        )
        for row in records
    ]
    return aligned(("run", "loss", "bits/byte", "params", "active", "tokens/s"), rows)


def _train(name: str, config: Config, workdir: Path, progress: SweepProgress) -> None:
    """Trains or resumes one run in its own process.

    Raises:
      UserError: the run did not finish; gives the reason.
      OSError: a file in the run's folder cannot be written.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    settings, told = workdir / "sweep.json", workdir / "log.txt"
    save(config, settings)
    command = [sys.executable, "-m", "prmoe_jax.sweep.child", "train", "--json"]
    command += [f"--config={settings}", f"--workdir={workdir}"]
    begun = time.monotonic()
    with _appending(told) as output:
        before = output.tell()
        progress.put(name, "running")
        # The child reads from the pipe until this process ends.
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=output
        )
        try:
            process.wait()
        except BaseException:  # Ctrl-C also reaches the run, which saves a checkpoint
            process.wait()
            raise
        finally:
            process.stdin.close()
    if process.returncode == 0 and _finished(config, workdir):
        return
    how = "failed" if process.returncode else "stopped before its last evaluation"
    if process.returncode < 0:
        how = f"was ended by signal {-process.returncode}"
    lines = told.read_bytes()[before:].decode("utf-8", "replace").split("\n")
    # The last line of a run that ended well only names its folder.
    said = [line for line in lines if line.strip() and not line.startswith("run: ")]
    errors = [line.removeprefix("prmoe: ") for line in said if line.startswith("prmoe: ")]
    seconds = time.monotonic() - begun
    raise UserError(
        f"{how} after {seconds:.0f} s: {(errors or said or ['it said nothing'])[-1]:.300}"
    )


@contextlib.contextmanager
def _appending(path: Path) -> Iterator[BinaryIO]:
    """A file that others can append to; in an object store it is written at the end."""
    if stores.is_local(path):
        with path.open("ab") as file:
            yield file
        return
    before = path.read_bytes() if path.exists() else b""
    with tempfile.TemporaryFile() as file:
        file.write(before)
        file.flush()
        yield file
        file.seek(0)
        files.replace(path, file.read())


def _wait_until_free(name: str, workdir: Path, progress: SweepProgress) -> bool:
    """Waits until no process holds a run's folder; returns whether one did.

    A run whose sweep was killed stops by itself, but not at once.

    Raises:
      UserError: a process still holds it after `PATIENCE` seconds.
    """
    begun, waiting = time.monotonic(), False
    while process := lock.holder(workdir):
        if time.monotonic() - begun > PATIENCE:
            raise UserError(f"{workdir} is in use by {process}; wait for it, or stop it")
        if not waiting:
            progress.put(
                name, f"waits up to {PATIENCE:.0f} s for {process}, which holds its folder"
            )
            waiting = True
        time.sleep(0.1 if stores.is_local(workdir) else 1.0)
    return waiting


def _finished(config: Config, workdir: Path) -> bool:
    lines = read_metrics(workdir / "metrics.jsonl")
    return bool(lines) and "eval/loss" in lines[-1] and lines[-1]["step"] == config.total_steps


def _starts(path: Path) -> list[dict]:
    """The starts of a run in its environment.json, oldest first; without any, an unknown one."""
    fix = "delete it (the record then says 'unknown'), or restore a copy"
    starts = files.read_json(path, list, fix) if path.exists() else []
    for start in starts:
        files.require(start, START, str(path), fix)
    return starts or [{"git_revision": None, "versions": {}, "device": "unknown"}]


def _settings(config: Config) -> dict:
    """Settings that differ from the defaults, without those that may change on resuming."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in changed(config).items()
        if not name.startswith(RESUMABLE)
    }


def _names(folder: Path, runs: dict[str, Run]) -> set[str]:
    """The names of the runs that are recorded."""
    return {row["run"] for row in _recorded(records.read(folder), runs)}


def _recorded(rows: list[dict], runs: dict[str, Run]) -> list[dict]:
    """The records whose run is one of `runs`, with the same settings, in the order of `runs`."""
    known = {
        row["run"]: row
        for row in rows
        if row["run"] in runs and row["settings"] == _settings(runs[row["run"]].config)
    }
    return [known[name] for name in runs if name in known]


def _prepare(folder: Path, root: Path) -> None:
    """Creates the runs' folder, and checks before hours of training that results can be written.

    Raises:
      UserError: a folder cannot be written, or the disk is full.
    """
    stores.check_reachable(root, "--workdir")
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise files.cannot_write(root, error) from error
    with records.locked(folder):
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(4096))
                file.flush()
        except OSError as error:
            raise files.cannot_write(folder / records.RESULTS, error) from error


def _one_line(error: UserError | OSError) -> str:
    if isinstance(error, OSError) and error.filename:
        error = files.cannot_write(Path(error.filename), error)
    return " ".join(str(error).split())
