"""The clock of a run's steps, its warnings, and what lasts over restarts."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from prmoe_jax.cli import main
from prmoe_jax.config.schema import Config
from prmoe_jax.run.metrics import WandbRun, read_metrics
from prmoe_jax.training.timing import Clock, stall_watch
from tests.support.extras import needs_extra
from tests.support.runs import arguments, assert_same_run


class Time:
    """Replaces the clocks; `seconds` is moved by hand."""

    def __init__(self, monkeypatch):
        self.seconds = 1000.0
        monkeypatch.setattr("time.perf_counter", lambda: self.seconds)
        monkeypatch.setattr("time.time", lambda: self.seconds)


def steps(clock, now, *times):
    """Steps of these times and of 6 tokens; returns the warnings."""
    warnings = []
    for seconds in times:
        now.seconds += seconds
        warnings.append(clock.step_done(6))
    return warnings


def test_rates_by_hand(monkeypatch):
    now = Time(monkeypatch)
    clock = Clock(begun=now.seconds - 100, productive=20.0)
    assert steps(clock, now, 50.0) == [""]  # the first step compiles and does not count
    with clock.waiting():
        now.seconds += 1
    steps(clock, now, 1.0, 2.0, 2.0)  # the wait is a part of the first of them
    rates = clock.rates()
    assert rates["tokens_per_second"] == pytest.approx(3 * 6 / 6)
    assert rates["input_wait_fraction"] == pytest.approx(1 / 6)
    assert rates["step_time_deviation"] == pytest.approx(0)
    assert rates["goodput"] == pytest.approx((20 + 6) / (100 + 56))
    now.seconds += 30  # an evaluation
    clock.restart()
    steps(clock, now, 1.0, 3.0)
    rates = clock.rates()
    assert rates["step_time_deviation"] == pytest.approx(1 / 2)
    assert rates["goodput"] == pytest.approx((20 + 10) / (100 + 90))
    assert clock.rates()["step_time_deviation"] == pytest.approx(1 / 2)  # no step since


def test_the_time_to_come(monkeypatch):
    """It is told once, after five timed steps, by their median."""
    now = Time(monkeypatch)
    clock = Clock(begun=now.seconds)
    steps(clock, now, 50.0, 2.0, 2.0, 9.0, 3.0)
    assert clock.estimate(100) == 0
    steps(clock, now, 3.0)
    assert clock.estimate(100) == 300
    assert clock.estimate(100) == 0


def test_a_slow_step_is_told(monkeypatch):
    now = Time(monkeypatch)
    clock = Clock(begun=now.seconds)
    assert not any(steps(clock, now, 9.0, *[0.5] * 9, 9.0))  # too few to know the usual time
    assert steps(clock, now, 2.5, 2.6, 0.5) == [
        "",
        "took 2.6 s, 5 times as long as usual (0.50 s)",
        "",
    ]
    assert steps(clock, now, *[3.0] * 200)[-1] == ""  # the new usual time


STALLED = """
import sys, time
from prmoe_jax.training.timing import stall_watch

def waits_for_ever():
    time.sleep(2.5)

with stall_watch(1 / 60) as alive:
    for _ in range(10):
        alive()
        time.sleep(0.1)
    print("before", file=sys.stderr, flush=True)
    waits_for_ever()
time.sleep(1.5)
"""


@pytest.mark.parametrize("several", [False, True])
def test_stacks_of_a_run_that_hangs(several):
    """On standard error, also where that of compiled code goes elsewhere (several processes)."""
    keeps = "from prmoe_jax.parallel import processes; processes._keep_output_ours()\n"
    command = [sys.executable, "-c", keeps * several + STALLED]
    err = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    silent, _, stacks = err.partition("before\n")
    assert silent == "" and stacks.count("waits_for_ever") >= 2


@pytest.mark.parametrize("minutes", [math.inf, 1e12])
def test_a_watch_without_end_leaves_others_alone(minutes, monkeypatch):
    for name in "dump_traceback_later", "cancel_dump_traceback_later":
        monkeypatch.setattr(f"faulthandler.{name}", pytest.fail)
    with stall_watch(minutes) as alive:
        alive()


def checkpoints(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdecimal())


def test_what_lasts_over_restarts(text, tmp_path):
    """Checkpoints that stay, the time in steps, and compiled programs."""
    settings = {"checkpoint.every": 2, "checkpoint.keep": 1, "checkpoint.keep_every": 4}
    assert main(arguments(text, tmp_path / "whole", "dense", **settings)) == 0
    assert checkpoints(tmp_path / "whole") == [4, 8, 12]

    run, programs = tmp_path / "run", tmp_path / "programs"
    settings["execution.compile_cache"] = str(programs)
    misses = []
    event = "/jax/compilation_cache/cache_misses"
    jax.monitoring.register_event_listener(lambda name, **_: misses.append(name == event))
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    try:
        # The second start compiles what restores a checkpoint, the third one nothing.
        for length, compiles in ((4, True), (8, True), (12, False)):
            jax.clear_caches()
            misses.clear()
            assert main(arguments(text, run, "dense", **settings, **{"train.steps": length})) == 0
            assert any(misses) == compiles
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
    assert any(programs.iterdir())
    assert checkpoints(run) == [4, 8, 12]
    starts = json.loads((run / "environment.json").read_text())
    times = [start["time"] for start in starts]
    assert times == sorted(times) and len(set(times)) == 3
    shares = [m["goodput"] for m in read_metrics(run / "metrics.jsonl") if "goodput" in m]
    assert shares[0] == 0 and all(0 < share < 1 for share in shares[1:4])
    # The last start begins with the steps of those before it; its own first step only compiles.
    assert shares[8] > 0
    ends = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [m for m in ends if m["step"] == 12 or "eval/loss" not in m]
    (run / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in kept))
    assert_same_run(run, tmp_path / "whole")


@needs_extra("wandb", "wandb")
def test_wandb(text, tmp_path, monkeypatch):
    """Offline: a run is continued under its name, and all of its lines are there."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    for length in (3, 6):
        command = arguments(text, tmp_path / "run", "dense", **{"train.steps": length})
        assert main([*command, "--config.log.wandb=pyramids"]) == 0
    files = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    identities = {file.stem for file in files}
    assert len(files) == 2 and len(identities) == 1
    content = b"".join(file.read_bytes() for file in files)
    assert content.count(b"grad_norm") >= 6
    assert b"pyramids" in content


def test_training_goes_on_without_wandb(monkeypatch, caplog):
    """Its process was killed."""
    asked = []

    def fails(*_):
        asked.append(1)
        raise ConnectionResetError(104, "Connection reset by peer")

    begun = SimpleNamespace(log=fails, finish=fails, define_metric=lambda *_, **__: None)
    package = SimpleNamespace(errors=SimpleNamespace(Error=RuntimeError), Settings=dict)
    package.init = lambda **_: begun
    monkeypatch.setitem(sys.modules, "wandb", package)
    run = WandbRun(Config(), Path("run"), 0.0)
    run.write({"step": 1, "loss": 5.0})
    run.write({"step": 2, "loss": 4.0})
    run.close()
    assert len(asked) == 1
    (line,) = caplog.messages
    assert "Connection reset by peer" in line and line.endswith("; no more is sent there")


def test_wandb_that_is_missing(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    command = arguments(text, tmp_path / "run", "dense")
    assert main([*command, "--config.log.wandb=pyramids"]) == 2
    expected = "log.wandb=pyramids needs a package; pip install 'prmoe_jax[wandb]'"
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
