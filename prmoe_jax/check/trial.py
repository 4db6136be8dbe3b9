"""Writes and reads a file in the workdir, trains a tiny run there, and resumes it bit for bit."""

import contextlib
import logging
import math
import os
import random
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from prmoe_jax import stores
from prmoe_jax.check.findings import FAIL, OK, WARN, Finding, Part, rate, slow_processes
from prmoe_jax.config import architecture
from prmoe_jax.config.loading import resolve
from prmoe_jax.config.schema import Config
from prmoe_jax.errors import UserError, reason
from prmoe_jax.parallel import processes
from prmoe_jax.run.directory import CHECKPOINTS
from prmoe_jax.training.loop import train

log = logging.getLogger(__name__)

FILE_BYTES = 1 << 26  # written and read by each process
STEPS = 4
# With this XLA flag a GPU sums in a fixed order. Without it, NEAR is the relative error allowed.
GPU_FLAG, NEAR = "xla_gpu_deterministic_ops=true", 1e-3
SLOW = 0.5  # a process fails if its rate is below this share of the median


def check(workdir: Path) -> Part:
    """Writes and trains in a new folder of the workdir, and removes that folder afterwards."""
    with _folder(workdir) as (folder, problem):
        problems = processes.gathered(problem)
        if any(problems):
            return Part([_cannot_write(workdir, problems)], {})
        findings, numbers = _store(folder)
        if not numbers:  # the folder can't be used
            return Part(findings, numbers)
        with _corpus() as corpus, _quiet():
            log.info("a run of %d steps", STEPS)
            found = _run(_config(corpus), folder / "run")
        return Part([*findings, *found], numbers)


@contextlib.contextmanager
def _folder(workdir: Path) -> Iterator[tuple[Path, str]]:
    """Yields a new folder and an error message ('' if none); removes all folders that it made."""
    folder = workdir / processes.of_first(f"check-{uuid.uuid4().hex[:8]}")
    first, problem = jax.process_index() == 0, ""
    # Its parents that do not exist yet, innermost first.
    new = [path for path in folder.parents if stores.is_local(path) and not path.exists()]
    if first:
        try:
            folder.mkdir(parents=True)
        except (OSError, UserError) as error:
            problem = reason(error)
    try:
        yield folder, problem
    finally:
        if first and not problem:
            with contextlib.suppress(OSError):  # another program may use it by now
                stores.delete_folder(folder)
                for path in new:
                    path.rmdir()


def _cannot_write(workdir: Path, problems: list[str]) -> Finding:
    shown = [f"process {i}: {problem}" for i, problem in enumerate(problems) if problem]
    listed = "; ".join(shown if len(problems) > 1 else problems)
    fix = "give --workdir a folder that this user may write, or a bucket (gs://BUCKET/FOLDER)"
    return Finding("workdir", FAIL, f"{workdir} cannot be written: {listed}", fix)


def _store(folder: Path) -> tuple[list[Finding], dict]:
    """Each process writes and reads a file, and looks for process 0's file."""
    log.info("writing and reading %d MB", FILE_BYTES / 1e6)
    workdir, file = folder.parent, folder / f"file-{jax.process_index()}"
    problem, rates = "", [0.0, 0.0]
    processes.barrier()  # process 0 has made the folder
    try:
        rates = _write_and_read(file)
    except (OSError, UserError) as error:
        problem = reason(error)
    problems = processes.gathered(problem)
    if any(problems):
        return [_cannot_write(workdir, problems)], {}
    seen = processes.comes_true((folder / "file-0").exists)
    blind = [str(i) for i, found in enumerate(processes.gathered(seen)) if not found]
    with contextlib.suppress(OSError):
        file.unlink()
    if blind:
        line = f"{workdir} is not shared: process {', '.join(blind)} doesn't see process 0's file"
        return [Finding("workdir", FAIL, line, "name a folder that all processes see")], {}
    written, read = (list(values) for values in zip(*processes.gathered(rates), strict=True))
    numbers = {"write_bytes_per_s": written, "read_bytes_per_s": read}
    findings = []
    for name, values in numbers.items():
        verb = name.partition("_")[0]
        if behind := slow_processes(values, SLOW, "B"):
            fix = "see that host's network and disk, or replace it"
            findings.append(Finding(f"store {verb}", FAIL, f"slow: {behind}", fix))
        else:
            line = f"{rate(min(values), 'B')} {'into' if verb == 'write' else 'from'} {workdir}"
            findings.append(Finding(f"store {verb}", OK, line))
    return findings, numbers


def _write_and_read(path: Path) -> list[float]:
    """Bytes per second of writing a file (with fsync if local) and of reading it."""
    content = np.random.default_rng(0).bytes(FILE_BYTES)
    begun = time.perf_counter()
    if stores.is_local(path):
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            written = time.perf_counter()
            if hasattr(os, "posix_fadvise"):  # not on macOS
                # Drops the page cache; otherwise memory would be read instead of the disk.
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    else:
        path.write_bytes(content)
        written = time.perf_counter()
    reading = time.perf_counter()
    found = path.read_bytes()
    read = time.perf_counter()
    if found != content:
        raise OSError(0, "it does not hold what was written to it")
    return [FILE_BYTES / (written - begun), FILE_BYTES / (read - reading)]


@contextlib.contextmanager
def _corpus() -> Iterator[Path]:
    """Yields a folder of text on this machine's disk; all hosts have the same path and content."""
    made = tempfile.mkdtemp(prefix="prmoe-check-") if jax.process_index() == 0 else None
    folder = Path(processes.of_first(made))
    (folder / "text").mkdir(parents=True, exist_ok=True)
    words = "the expert of a token is chosen by its router and so on".split()
    rng = random.Random(0)
    for number in range(40):
        text = f"{number}: " + " ".join(rng.choices(words, k=300))
        (folder / "text" / f"{number}.txt").write_text(text)
    processes.barrier()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what a run logs about itself out of the check's output."""
    logger = logging.getLogger("prmoe_jax")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)


def _config(folder: Path) -> Config:
    """One PR-MoE layer; its length and head width suit every attention kernel."""
    devices, dtype = jax.device_count(), "float32" if jax.default_backend() == "cpu" else "bfloat16"
    shape = {"vocab_size": 384, "length": 128, "d_model": 128, "heads": 2, "d_ff": 128}
    model = architecture.parse_fields("1 layers, every 1, E=4, residual") | shape
    data = {"corpus": str(folder / "text"), "cache_dir": str(folder / "cache")}
    return resolve(
        {
            "model": model | {"dtype": dtype},
            "data": data | {"tokenizer": "bytes"},
            "train": {"steps": STEPS, "batch_size": devices * -(-8 // devices)},
            "eval": {"every": 0},
            "log": {"every": 1},
            "checkpoint": {"every": STEPS // 2, "keep": 2},
        }
    )


def _run(config: Config, workdir: Path) -> list[Finding]:
    """Trains to the end, deletes the last checkpoint, and resumes from the one before it."""
    whole = _losses(config, workdir)
    if jax.process_index() == 0:
        stores.delete_folder(workdir / CHECKPOINTS / str(STEPS))
    processes.barrier()
    resumed = _losses(config, workdir)
    if jax.process_index() != 0:  # only process 0 has metrics
        return []
    half = STEPS // 2
    expected = {name: value for name, value in whole.items() if name[0] > half}
    name = "train and resume"
    if resumed == expected:
        losses = f"loss {whole[1, 'loss']:.4f} at step 1, {whole[STEPS, 'loss']:.4f} at {STEPS}"
        line = f"{STEPS} steps ({losses}); again from step {half}: the same bit for bit"
        return [Finding(name, OK, line)]
    if resumed.keys() != expected.keys():
        line = f"steps {sorted({step for step, _ in resumed})} were resumed, not those after {half}"
        return [Finding(name, FAIL, line, "report it with the versions above")]
    step, what = next(key for key in expected if resumed[key] != expected[key])
    line = f"resumed from step {half}, {what} at step {step} is {resumed[step, what]!r}, "
    line += f"and was {expected[step, what]!r}"
    if jax.default_backend() != "gpu" or GPU_FLAG in os.environ.get("XLA_FLAGS", ""):
        return [Finding(name, FAIL, line, "run nothing here; report it with the versions above")]
    # A GPU may add up a gradient in any order.
    near = all(math.isclose(resumed[key], expected[key], rel_tol=NEAR) for key in expected)
    return [Finding(name, WARN if near else FAIL, line, f"set XLA_FLAGS=--{GPU_FLAG}")]


def _losses(config: Config, workdir: Path) -> dict[tuple[int, str], float]:
    """Trains to the end; (step, name) -> number."""
    lines: list[dict] = []
    train(config, workdir, on_metrics=lines.append)
    names = "loss", "grad_norm", "eval/loss"
    return {(line["step"], name): line[name] for line in lines for name in names if name in line}
