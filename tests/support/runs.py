"""Small runs: the command that trains one, its process, and what it leaves in its folder."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

from configs import tiny
from prmoe_jax import stores
from prmoe_jax.cli import main
from prmoe_jax.nn.parameters import named_leaves
from prmoe_jax.run.metrics import read_metrics
from prmoe_jax.run.restore import restore_run
from tests.support.paths import REPOSITORY

# What depends on the clock and not on the run.
CLOCK = {"tokens_per_second", "input_wait_fraction", "step_time_deviation", "goodput"}
# A run of seconds: one dense layer on bytes, in the working directory.
SETTINGS = [
    f"--config={tiny.__file__}:1 layers",
    *"""
    --config.model.d_model=16 --config.model.heads=2 --config.model.d_ff=32
    --config.model.length=32 --config.model.vocab_size=384
    --config.data.corpus=corpus --config.data.cache_dir=cache --config.data.tokenizer=bytes
    --config.train.steps=2 --config.train.batch_size=4 --config.optimizer.warmup_tokens=0
    """.split(),
]
NEW = ["train", "--workdir=new", *SETTINGS]


def train_in(folder, command):
    """Makes a corpus in a folder, and trains by a command as from there, compiled fast."""
    (folder / "corpus").mkdir()
    for i in range(20):
        (folder / "corpus" / f"{i}.txt").write_text(f"Document {i} {'na ' * (20 + i)}")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        with contextlib.chdir(folder):
            assert main(command) == 0
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
    return folder


def tuned(run, workdir, folder, **settings):
    """Trains two steps from a run, with half of its context."""
    (folder / "text").mkdir()
    for i in range(20):
        (folder / "text" / f"{i}.txt").write_text(f"Document {i} {'na ' * (20 + i)}")
    values = {
        "init.workdir": run,
        "data.corpus": folder / "text",
        "data.cache_dir": folder / "cache",
        "model.length": 16,
        "train.steps": 2,
        "train.batch_size": 4,
        "train.accumulate": 1,
        "optimizer.warmup_tokens": 0,
    } | settings
    options = [f"--config.{name}={value}" for name, value in values.items()]
    return main(["train", f"--config={run}/config.json", f"--workdir={workdir}", *options])


def arguments(text, workdir, name="prmoe", **overrides):
    folder, cache = text
    small = {
        "data.corpus": folder,
        "data.cache_dir": cache,
        "data.tokenizer": "bytes",
        "model.vocab_size": 384,
        "model.length": 32,
        "model.d_model": 16,
        "model.d_ff": 32,
        "model.heads": 2,
        "train.batch_size": 8,
        "train.steps": 12,
        "eval.every": 0,
        "log.every": 1,
        "optimizer.warmup_tokens": 8 * 32 * 5,
        # One schedule, so that runs of different lengths are compiled once.
        "optimizer.decay_tokens": 8 * 32 * 400,
        "optimizer.learning_rate": 3e-3,
    }
    settings = [f"--config.{key}={value}" for key, value in (small | overrides).items()]
    config = f"--config={REPOSITORY}/configs/tiny.py:{name}"
    return ["train", config, *settings, f"--workdir={workdir}", "--json"]


def start(*args, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "prmoe_jax", *args],
        cwd=REPOSITORY,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    """Exit code, stdout, stderr; for errors a reader can act on."""
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def logged(workdir):
    lines = read_metrics(stores.as_path(workdir) / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]


def parameters(workdir):
    _, step, model, _ = restore_run(stores.as_path(workdir))
    return step, {name: np.asarray(leaf) for name, leaf in named_leaves(model).items()}


def assert_same_run(workdir, reference):
    assert logged(workdir) == logged(reference)
    (step, model), (expected_step, expected) = parameters(workdir), parameters(reference)
    assert step == expected_step
    for name in expected:
        np.testing.assert_array_equal(model[name], expected[name], err_msg=name)


def wait_for_lines(workdir, count, process):
    path = Path(workdir) / "metrics.jsonl"
    while process.poll() is None:
        with contextlib.suppress(FileNotFoundError):
            if path.read_bytes().count(b"\n") >= count:
                return
        time.sleep(0.002)
    raise AssertionError(f"the run ended before line {count}: {finish(process)}")
