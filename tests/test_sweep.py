"""Sweeps: what is recorded, whatever was killed, failed or done before."""

import dataclasses
import json
import os
import signal
from pathlib import Path

import pytest

from prmoe_jax.cli import main, parse_config
from prmoe_jax.config import resolve, save
from prmoe_jax.sweep import run
from tests.test_train import arguments, finish, start, text, wait_for_lines  # noqa: F401

FILE = """
import json
from pathlib import Path


def runs():
    yield from json.loads((Path(__file__).parent / "runs.json").read_text()).items()
"""
TWICE = "def runs():\n    for _ in 1, 2:\n        yield 'a', {'train': {'steps': 1}}"
# What depends on the machine and not on the runs.
MACHINE = {"tokens_per_second", "revisions", "versions", "device"}


def settings(text, name="dense", **changes):  # noqa: F811
    command = arguments(text, "unused", name, **{"checkpoint.every": 5} | changes)
    return dataclasses.asdict(parse_config(command[1:-2]))


def write(folder, runs):
    folder.mkdir(exist_ok=True)
    (folder / "sweep.py").write_text(FILE)
    (folder / "runs.json").write_text(json.dumps(runs))
    return folder


def sweep(folder, *more):
    return ["sweep", str(folder), f"--workdir={folder / 'runs'}", "--json", *more]


def recorded(folder):
    lines = (folder / "results.jsonl").read_text().splitlines()
    rows = map(json.loads, lines)
    return [{k: v for k, v in row.items() if k not in MACHINE} for row in rows]


def test_killed_or_failed_runs_end_in_the_same_table(text, tmp_path, capsys):  # noqa: F811
    """kill -9 in the middle of a run, and a run that fails: what is left is done next time."""
    good = {"dense/1": settings(text, seed=1, **{"train.steps": 60})}
    whole = write(tmp_path / "whole", good)
    assert main(sweep(whole)) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["run"] == "dense/1" and row["loss"] == row["evaluations"][-1][1]
    assert row["settings"]["model.d_model"] == 16 and row["seed"] == 1
    assert row["tokens"] == 60 * 8 * 32 == row["losses"][-1][0]

    broken = settings(text, **{"data.corpus": tmp_path / "nowhere"})
    killed = write(tmp_path / "killed", good | {"broken": broken})
    process = start(*sweep(killed), PYTHONUNBUFFERED="1")
    wait_for_lines(killed / "runs" / "dense" / "1", 12, process)
    child = int((killed / "runs" / "dense" / "1" / ".lock").read_text())
    process.kill()
    os.kill(child, signal.SIGKILL)
    finish(process)
    assert main(sweep(killed)) == 1
    err = capsys.readouterr().err
    assert "1 of 2 runs failed: broken; the same command tries them again" in err
    assert "broken: failed after" in err and "nowhere" in err
    assert recorded(killed) == recorded(whole)

    # Done is done, also where the runs' folders are gone.
    write(killed, good)
    (killed / "runs").rename(tmp_path / "gone")
    assert main(sweep(killed)) == 0
    assert [row["run"] for row in json.loads(capsys.readouterr().out)] == ["dense/1"]
    assert not (killed / "runs").exists()


def test_shards_share_the_runs(text, tmp_path, monkeypatch, capsys):  # noqa: F811
    names = [f"run-{i}" for i in range(7)]
    folder = write(tmp_path / "sweep", dict.fromkeys(names, settings(text)))
    trained = []
    monkeypatch.setattr(run, "_train", lambda name, *rest: trained.append(name) or "not here")
    for shard in ("1/3", "2/3", "3/3"):
        assert main(sweep(folder, f"--shard={shard}")) == 1
    assert trained == [f"run-{i}" for i in (0, 3, 6, 1, 4, 2, 5)]
    # Of these two records only the first is of the same settings.
    same = run.planned(folder)["run-0"]
    rows = [{"run": "run-0", "settings": run._settings(same)}, {"run": "run-3", "settings": {}}]
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trained.clear()
    assert main(sweep(folder, "--shard=1/3")) == 1
    assert trained == ["run-3", "run-6"]
    for shard, message in (("4/3", "must be I/N, with I from 1 to N"), ("2", "such as 1/4")):
        assert main(sweep(folder, f"--shard={shard}")) == 2
        assert message in capsys.readouterr().err


def test_another_config_is_another_run(text, tmp_path, capsys):  # noqa: F811
    """A folder that holds a run of other settings is left alone."""
    folder = write(tmp_path / "sweep", {"a": settings(text, **{"model.d_ff": 24})})
    (folder / "runs" / "a").mkdir(parents=True)
    save(resolve(settings(text)), folder / "runs" / "a" / "config.json")
    assert main(sweep(folder)) == 1
    assert "model.d_ff was 32, is 24" in capsys.readouterr().err
    assert not (folder / "results.jsonl").exists()
    assert [path.name for path in (folder / "runs" / "a").iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (None, "sweep.py is missing; it must define runs()"),
        ("x = 1", "sweep.py defines no function runs"),
        ("def runs():\n    yield 'a', {}\n    yield 1 / 0", "sweep.py fails at line 3: ZeroDivi"),
        ("def runs():\n    yield 'a'", "runs() yields 'a', not (name, settings)"),
        ("def runs():\n    return []", "runs() yields nothing"),
        ("def runs():\n    yield '../a', {}", "'../a' can't name a folder"),
        ("def runs():\n    yield 'a', {'sed': 1}", "a: config.sed is not a setting; did you"),
        (TWICE, "sweep.py yields 'a' twice"),
    ],
)  # fmt: skip
def test_mistakes(code, message, tmp_path, capsys):
    if code:
        (tmp_path / "sweep.py").write_text(code)
    assert main(sweep(tmp_path)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "runs").exists()


def test_a_runs_own_config_is_a_config(tmp_path):
    """--config=RUN/config.json, with overrides as any other."""
    given = parse_config(arguments(("text", "cache"), "run", "prmoe")[1:-2])
    save(given, tmp_path / "config.json")
    stored = f"--config={tmp_path / 'config.json'}"
    assert parse_config([stored]) == given
    changed = parse_config([stored, "--config.model.experts=8,8,16", "--config.seed=3"])
    assert (changed.model.experts, changed.seed) == ((8, 8, 16), 3)


SWEEPS = sorted((Path(__file__).parent.parent / "experiments").glob("*/sweep.py"))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.parent.name)
def test_committed_sweeps(path):
    """They can be planned, their arms' runs differ in seed alone, and records are of their runs."""
    runs = run.planned(path.parent)
    arms = {}
    for name, config in runs.items():
        same = dataclasses.replace(config, seed=0)
        assert arms.setdefault(name.rpartition("/")[0], same) == same, name
    results = path.with_name("results.jsonl")
    for row in map(json.loads, results.read_text().splitlines() if results.exists() else []):
        assert row["run"] in runs
