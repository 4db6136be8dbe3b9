"""`prmoe sweep`: trains the runs that a Python file defines, one after another, and records each.

Every run is its own process, so that a failed run stops no other. A run that was stopped resumes,
and a run that is recorded with the same settings isn't trained again. A run may be a branch, which
continues from a checkpoint of another run, its trunk. Its record is as if it began at step 0.
"""

import contextlib
import dataclasses
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from prmoe_jax import files, stores
from prmoe_jax.config.loading import check_resume, load, save
from prmoe_jax.config.schema import Config
from prmoe_jax.errors import UserError, reason, refusing
from prmoe_jax.run import directory as workdirs
from prmoe_jax.run.metrics import finished
from prmoe_jax.stores import lock
from prmoe_jax.sweep import records
from prmoe_jax.sweep.definition import Run, branch, planned
from prmoe_jax.sweep.needs import Work, check_needed, discard_checkpoints, has_checkpoint, share
from prmoe_jax.sweep.progress import SweepProgress

log = logging.getLogger(__name__)

# Seconds to wait for a run's folder that another process holds: after its sweep was killed, a run
# still saves a checkpoint; after it was killed itself, its lease in an object store has to expire.
PATIENCE = lock.LEASE + 15


class RunsFailed(UserError):
    """Some runs of a sweep failed; the others are recorded."""

    exit_code = 1


def sweep(folder: Path, root: Path, shard: tuple[int, int] = (1, 1)) -> list[dict]:
    """Trains the unfinished runs of a sweep and records them in the folder's results.jsonl.

    Args:
      folder: the folder of sweep.py.
      root: the parent of the runs' folders, local or in an object store.
      shard: (i, n) trains only the i-th of n shares of the runs, so that n processes can share a
        sweep; see `needs.share`.

    Returns:
      All records of the sweep's runs, in the sweep's order; see `records.record`.

    Raises:
      UserError: the sweep or its records can't be used.
      RunsFailed: some runs failed.
    """
    runs, constants = planned(folder)
    number, count = shard
    if not 1 <= number <= count:
        raise UserError(f"--shard={number}/{count} must be I/N, with I from 1 to N")
    work = Work(runs, folder, root)
    mine = share(work.needs, number, count)
    rows = records.read(folder)
    _check_text(folder, rows, runs)
    if others := len(rows) - len(records.of_runs(rows, runs)):
        log.info("%s: keeps %d records of other runs or settings", folder / records.RESULTS, others)
    if not work.recorded().issuperset(mine):
        _prepare(folder, root)
    failed: list[str] = []
    shown = {name: (root / name, runs[name].config) for name in mine}
    with SweepProgress(shown) as progress:
        for name in mine:
            try:
                for needed in work.needs[name]:
                    if needed in failed:
                        raise UserError(f"it needs {needed}, which failed")
                state = _done(work, name, progress)
                if not constants.keep_checkpoints:
                    for one in (name, *work.needs[name]):
                        discard_checkpoints(work, one)
            except (UserError, OSError) as error:
                failed.append(name)
                state = _one_line(error)
            progress.put(name, state)
    if failed:
        raise RunsFailed(
            f"{len(failed)} of {len(mine)} runs failed: {', '.join(failed)}; the same command "
            "tries them again"
        )
    return records.complete(folder, records.of_runs(records.read(folder), runs))


def _check_text(folder: Path, rows: list[dict], runs: dict[str, Run]) -> None:
    """Raises UserError if a run would replace its record that was trained on another text."""
    for row in rows:
        if row["run"] in runs:
            was, asked = row["settings"].get("data.corpus"), runs[row["run"]].config.data.corpus
            if was and was != asked:
                raise UserError(
                    f"{folder / records.RESULTS}: {row['run']} was trained on data.corpus={was}, "
                    f"and sweep.py asks for {asked}; install the text, or move the records away"
                )


def _done(work: Work, name: str, progress: SweepProgress) -> str:
    """Trains and records a run: 'finished', or 'recorded' if there is a record already."""
    (config, trunk), root = work.runs[name], work.root
    workdir = root / name
    if name in work.recorded():
        return "recorded"
    if _wait_until_free(name, workdir, progress) and name in work.recorded():
        return "recorded"  # by another sweep
    begun = (workdir / workdirs.CONFIG).exists()
    saved = load(workdir / workdirs.CONFIG) if begun else None
    over = begun and finished(config, workdir)
    # A run without a checkpoint starts again.
    kept = (workdir / workdirs.CHECKPOINTS).glob("*")
    goes_on = over or any(path.name.isdecimal() for path in kept)
    given = config if trunk is None else branch(config, work.runs[trunk].config, root / trunk)
    if not (trunk is None or goes_on or has_checkpoint(root / trunk, given.init.step)):
        # The branch then trains the trunk's steps itself, see `training.branch`.
        there = f"{trunk} has no checkpoint of step {given.init.step} in {root / trunk}"
        log.info("%s: starts at step 0, since %s", name, there)
        given = config
    check_needed(work, name, None if goes_on else given)
    if begun:
        asked = given
        of_trunk = f"/{saved.init.workdir}".endswith(f"/{trunk}")
        if trunk is not None and (saved.init == config.init or of_trunk):
            # It began at step 0 or from its trunk, whose parent folder may have been renamed.
            asked = dataclasses.replace(given, init=saved.init)
        check_resume(saved, asked)
        if goes_on:
            given = asked
    if not over:
        _train(name, given, workdir, progress)
    records.add(work.folder, records.record(name, config, workdir), list(work.runs))
    return "finished"


def _train(name: str, config: Config, workdir: Path, progress: SweepProgress) -> None:
    workdir.mkdir(parents=True, exist_ok=True)
    settings, told = workdir / "sweep.json", workdir / "log.txt"
    save(config, settings)
    command = [sys.executable, "-m", "prmoe_jax.sweep.child", "train", "--json"]
    command += [f"--config={settings}", f"--workdir={workdir}"]
    # `train` takes this setting from no file, since JAX runs the programs in that folder.
    command += [f"--config.execution.compile_cache={config.execution.compile_cache}"]
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
        finally:  # if the run is still going, as after Ctrl-C, it saves a checkpoint and ends
            process.stdin.close()
            process.wait()
    if process.returncode == 0 and finished(config, workdir):
        return
    how = "failed" if process.returncode else "stopped before its last evaluation"
    if process.returncode < 0:
        how = f"was ended by signal {-process.returncode}"
    lines = told.read_bytes()[before:].decode("utf-8", "replace").split("\n")
    # After success, the last line is 'run: FOLDER'.
    said = [line for line in lines if line.strip() and not line.startswith("run: ")]
    errors = [line.removeprefix("prmoe: ") for line in said if line.startswith("prmoe: ")]
    seconds = time.monotonic() - begun
    raise UserError(
        f"{how} after {seconds:.0f} s: {(errors or said or ['it said nothing'])[-1]:.300}"
    )


@contextlib.contextmanager
def _appending(path: Path) -> Iterator[BinaryIO]:
    """Opens a file for a child process to append to; a store gets it when the block ends."""
    if stores.is_local(path):
        with open(path, "ab", opener=stores.no_link) as file:
            yield file
        return
    with tempfile.TemporaryFile() as file:
        file.write(path.read_bytes() if path.exists() else b"")
        file.flush()
        yield file
        file.seek(0)
        files.replace(path, file.read())


def _wait_until_free(name: str, workdir: Path, progress: SweepProgress) -> bool:
    """Waits until no process holds a run's folder; returns whether one did.

    A run whose sweep was killed stops by itself, but not at once.
    """
    begun, waiting = time.monotonic(), False
    while process := lock.holder(workdir):
        if time.monotonic() - begun > PATIENCE:
            raise UserError(f"{workdir} is in use by {process}; wait for it, or stop it")
        if not waiting:
            told = f"waits up to {PATIENCE:.0f} s for {process}, which holds its folder"
            progress.put(name, told)
            waiting = True
        time.sleep(0.1 if stores.is_local(workdir) else 1.0)
    return waiting


def _prepare(folder: Path, root: Path) -> None:
    """Creates the runs' folder, and checks before any training that results can be written."""
    stores.check_reachable(root, "--workdir")
    with refusing(f"{root} cannot be written", OSError):
        root.mkdir(parents=True, exist_ok=True)
    with records.locked(folder):
        unwritten = f"{folder / records.RESULTS} cannot be written"
        with refusing(unwritten, OSError), tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
            file.flush()


def _one_line(error: UserError | OSError) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename} cannot be written: {reason(error)}"
    return " ".join(str(error).split())
