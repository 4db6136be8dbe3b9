"""Sweeps: what is recorded, whatever was killed, failed or done before."""

import dataclasses
import json
import os
import signal

import pytest

from prmoe_jax.cli import main, parse_config
from prmoe_jax.config import save
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
    seeds = {f"dense/{seed}": settings(text, seed=seed, **{"train.steps": 60}) for seed in (1, 2)}
    whole = write(tmp_path / "whole", seeds)
    assert main(sweep(whole)) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["run"] for row in rows] == list(seeds)
    assert rows[0]["loss"] != rows[1]["loss"] == rows[1]["evaluations"][-1][1]
    assert rows[0]["settings"]["model.d_model"] == 16 and rows[0]["seed"] == 1
    assert rows[0]["tokens"] == 60 * 8 * 32 == rows[0]["losses"][-1][0]

    broken = settings(text, **{"data.corpus": tmp_path / "nowhere"})
    killed = write(tmp_path / "killed", {"broken": broken} | seeds)
    process = start(*sweep(killed), PYTHONUNBUFFERED="1")
    wait_for_lines(killed / "runs" / "dense" / "1", 12, process)
    child = int((killed / "runs" / "dense" / "1" / ".lock").read_text())
    process.kill()
    os.kill(child, signal.SIGKILL)
    finish(process)
    assert main(sweep(killed)) == 1
    err = capsys.readouterr().err
    assert "1 of 3 runs failed: broken; the same command tries them again" in err
    assert "broken: failed after" in err and "nowhere" in err
    assert recorded(killed) == recorded(whole)

    # Done is done, also where the runs' folders are gone; what the file lost, the table does.
    write(killed, dict(reversed(seeds.items())))
    (killed / "runs").rename(tmp_path / "gone")
    assert main(sweep(killed)) == 0
    assert [row["run"] for row in json.loads(capsys.readouterr().out)] == ["dense/2", "dense/1"]
    assert not (killed / "runs").exists()


def test_shards_share_the_runs(text, tmp_path, monkeypatch, capsys):  # noqa: F811
    names = [f"run-{i}" for i in range(7)]
    folder = write(tmp_path / "sweep", dict.fromkeys(names, settings(text)))
    trained = []
    monkeypatch.setattr(run, "_train", lambda name, *rest: trained.append(name) or "not here")
    for shard in ("1/3", "2/3", "3/3"):
        assert main(sweep(folder, f"--shard={shard}")) == 1
    assert trained == [f"run-{i}" for i in (0, 3, 6, 1, 4, 2, 5)]
    for shard, message in (("4/3", "must be I/N, with I from 1 to N"), ("2", "such as 1/4")):
        assert main(sweep(folder, f"--shard={shard}")) == 2
        assert message in capsys.readouterr().err


def test_another_config_is_another_run(text, tmp_path, capsys):  # noqa: F811
    """A folder that holds a run of other settings is left alone, and so is its record."""
    folder = write(tmp_path / "sweep", {"a": settings(text, **{"train.steps": 2})})
    assert main(sweep(folder)) == 0
    before = recorded(folder)
    write(folder, {"a": settings(text, **{"train.steps": 2, "model.d_ff": 24})})
    assert main(sweep(folder)) == 1
    assert "model.d_ff was 32, is 24" in capsys.readouterr().err
    assert recorded(folder) == before


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
