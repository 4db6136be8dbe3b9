"""Sweeps: what is recorded, whatever was killed, failed or done before."""

import contextlib
import dataclasses
import fcntl
import io
import json
import logging
import os
import re
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from prmoe_jax.cli import main, parse_config
from prmoe_jax.config.loading import resolve, save
from prmoe_jax.config.schema import InitConfig, leaves
from prmoe_jax.errors import UserError
from prmoe_jax.sweep import records, run
from prmoe_jax.sweep.definition import Run, branch, planned
from prmoe_jax.sweep.needs import Work, discard_checkpoints
from prmoe_jax.sweep.progress import SweepProgress
from prmoe_jax.training.start import check_new_start
from tests.support.faults import file_size_limit
from tests.support.lines import only_line
from tests.support.paths import REPOSITORY
from tests.support.records import record
from tests.support.runs import arguments, finish, start, wait_for_lines

FILE = """
import json
from pathlib import Path


def runs():
    yield from json.loads((Path(__file__).parent / "runs.json").read_text()).items()
"""
TWICE = "def runs():\n    for _ in 1, 2:\n        yield 'a', {'train': {'steps': 1}}"
SILENT = """class Silent(Exception):
    def __str__(self):
        exit()
raise Silent"""
HIDDEN = """class Hidden:
    def __repr__(self):
        return 1 / 0
def runs():
    yield Hidden()"""
# Runs of which each goes on from the one before, with few checkpoints.
CHAIN = """
import json
from pathlib import Path

KEEP_CHECKPOINTS = False


def runs():
    trunk = ()
    for name, settings in json.loads((Path(__file__).parent / "runs.json").read_text()).items():
        yield name, settings, *trunk
        trunk = (name,)
"""
# Runs of which the others go on from the first.
LONG_TRUNK = """
import json
from pathlib import Path


def runs():
    for name, settings in json.loads((Path(__file__).parent / "runs.json").read_text()).items():
        yield name, settings, *(["50/1"] if name != "50/1" else [])
"""
# Runs of which one goes on from another, and one has no part in that.
BRANCH = """
import json
from pathlib import Path


def runs():
    for name, settings in json.loads((Path(__file__).parent / "runs.json").read_text()).items():
        yield name, settings, *(["6/1"] if name == "12/1" else [])
"""
# What depends on the machine and not on the runs.
MACHINE = {"tokens_per_second", "revisions", "versions", "device"}


def settings(text, name="dense", **changes):
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


def test_killed_or_failed_runs_end_in_the_same_table(text, tmp_path, capsys):
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


def test_shards_share_the_runs(text, tmp_path, monkeypatch, capsys):
    names = [f"run-{i}" for i in range(7)]
    folder = write(tmp_path / "sweep", dict.fromkeys(names, settings(text)))
    trained = []
    monkeypatch.setattr(run, "_train", lambda name, *rest: trained.append(name) or "not here")
    for shard in ("1/3", "2/3", "3/3"):
        assert main(sweep(folder, f"--shard={shard}")) == 1
    assert trained == [f"run-{i}" for i in (0, 3, 6, 1, 4, 2, 5)]
    # Of these two records only the first is of the same settings.
    same = recorded_settings(tmp_path / "other", settings(text))
    rows = [{"run": "run-0", "settings": same}, {"run": "run-3", "settings": {}}]
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trained.clear()
    assert main(sweep(folder, "--shard=1/3")) == 1
    assert trained == ["run-3", "run-6"]
    for shard, message in (("4/3", "must be I/N, with I from 1 to N"), ("2", "such as 1/4")):
        assert main(sweep(folder, f"--shard={shard}")) == 2
        assert message in capsys.readouterr().err


WSD = {"optimizer.schedule": "wsd", "optimizer.decay_tokens": 0, "checkpoint.keep": 1}


def chain(folder, text, steps, code=CHAIN):
    """A sweep of runs of so many steps, each of which goes on from the one before."""
    runs = {f"{n}/1": settings(text, "1 layers", **WSD | {"train.steps": n}) for n in steps}
    write(folder, runs)
    (folder / "sweep.py").write_text(code)
    return folder


@pytest.mark.slow
def test_killed_branches_end_in_the_table_of_whole_runs(text, tmp_path, capsys):
    """kill -9 in the middle of a branch; no step is trained twice, and few checkpoints stay."""
    folder = chain(tmp_path / "chain", text, (20, 60))
    process = start(*sweep(folder), PYTHONUNBUFFERED="1")
    workdir = folder / "runs" / "60" / "1"
    wait_for_lines(workdir, 30, process)
    child = int((workdir / ".lock").read_text())
    process.kill()
    os.kill(child, signal.SIGKILL)
    finish(process)
    assert main(sweep(folder)) == 0
    # Run 60 went on from the 16 steps of run 20 before its decay.
    told = (workdir / "log.txt").read_text()
    assert "at step 16 of 60" in told and "step 1/" not in told
    kept = [os.listdir(folder / "runs" / n / "1" / "checkpoints") for n in ("20", "60")]
    assert kept == [[], ["48"]]
    whole = chain(tmp_path / "whole", text, (60,), FILE)
    assert main(sweep(whole)) == 0
    assert recorded(folder)[1:] == recorded(whole)
    # Without the trunk's checkpoint the record is the same.
    shutil.rmtree(workdir)
    put_rows(folder, lines_of(folder)[0])
    assert main(sweep(folder)) == 0
    assert "60/1: starts at step 0, since 20/1 has no checkpoint of" in capsys.readouterr().err
    assert recorded(folder)[1:] == recorded(whole)
    # A longer run is added, and only its own steps are trained.
    chain(folder, text, (20, 60, 70))
    assert main(sweep(folder)) == 0
    assert "at step 48 of 70" in (folder / "runs" / "70" / "1" / "log.txt").read_text()
    assert recorded(folder)[1:2] == recorded(whole)
    capsys.readouterr()


def test_branches_are_in_the_share_of_their_trunk(text, tmp_path, monkeypatch, capsys):
    """Where the trunk failed, a branch is not trained; if its checkpoint is gone, from step 0."""
    code = """
def runs():
    import json
    from pathlib import Path
    settings = json.loads((Path(__file__).parent / "runs.json").read_text())
    for length in "20", "40":
        for seed in range(3):
            yield f"{length}/{seed}", settings[length], *([f"20/{seed}"] if length == "40" else [])
"""
    given = {n: settings(text, **WSD | {"train.steps": n}) for n in (20, 40)}
    folder = write(tmp_path / "sweep", given)
    (folder / "sweep.py").write_text(code)
    trained = []

    def train(name, config, workdir, progress):
        trained.append((name, config.init.workdir, config.init.step))
        raise OSError("it has no checkpoint")

    monkeypatch.setattr(run, "_train", train)
    assert main(sweep(folder, "--shard=1/2")) == 1
    assert [name for name, *_ in trained] == ["20/0", "20/2"]
    err = capsys.readouterr().err
    assert "40/2: it needs 20/2, which failed" in err
    assert "4 of 4 runs failed: 20/0, 20/2, 40/0, 40/2;" in err
    # A trunk that is recorded, but whose checkpoint is gone.
    rows = [records.record("20/1", resolve(given[20]), finished_run(folder, "20/1", given[20]))]
    put_rows(folder, *rows)
    trained.clear()
    assert main(sweep(folder, "--shard=2/2")) == 1
    line = "40/1: starts at step 0, since 20/1 has no checkpoint of step 16 in"
    assert line in capsys.readouterr().err
    # A run that has a checkpoint goes on as it began, another one begins anew.
    (there, workdir), longer = (folder / "runs" / n / "1" for n in ("20", "40")), resolve(given[40])
    gone_on = dataclasses.replace(longer, init=InitConfig(str(there), step=16))
    workdir.mkdir(parents=True)
    kept, own = there / "checkpoints" / "16", workdir / "checkpoints" / "5"
    for began, checkpoints, expected in (
        (longer, [], 0),
        (gone_on, [], 0),
        (longer, [kept], 16),
        (gone_on, [kept], 16),
        (longer, [kept, own], 0),
        (gone_on, [own], 16),
    ):
        save(began, workdir / "config.json")
        for path in (kept, own):
            shutil.rmtree(path, ignore_errors=True)
        for path in checkpoints:
            path.mkdir(parents=True)
        trained.clear()
        assert main(sweep(folder, "--shard=2/2")) == 1
        assert trained == [("40/1", str(there) if expected else "", expected)]


def test_students_wait_for_their_teacher(text, tmp_path, monkeypatch, capsys):
    """They are in its share, need all of it, and keep its checkpoints until they are recorded."""
    given = {}
    for seed in "01":
        given[f"teacher/{seed}"] = settings(text)
    for seed in "01":
        where = {"teacher.workdir": tmp_path / "sweep" / "runs" / "teacher" / seed}
        given[f"student/{seed}"] = settings(text, **where)
    folder = write(tmp_path / "sweep", given)
    (folder / "sweep.py").write_text(f"KEEP_CHECKPOINTS = False\n{FILE}")
    trained = []

    def train(name, config, workdir, progress):
        trained.append(name)
        if name == "teacher/0":
            raise OSError("it is gone")
        finished_run(folder, name, given[name])
        (workdir / "checkpoints" / "12").mkdir(parents=True)

    monkeypatch.setattr(run, "_train", train)
    assert main(sweep(folder, "--shard=1/2")) == 1
    assert trained == ["teacher/0"]
    assert "student/0: it needs teacher/0, which failed" in capsys.readouterr().err
    kept = []
    discard = run.discard_checkpoints

    def look(work, name):
        discard(work, name)
        kept.append((name, os.listdir(folder / "runs" / "teacher" / "1" / "checkpoints")))

    monkeypatch.setattr(run, "discard_checkpoints", look)
    assert main(sweep(folder, "--shard=2/2")) == 0
    assert kept == [("teacher/1", ["12"]), ("student/1", ["12"]), ("teacher/1", [])]
    capsys.readouterr()

    # A record of the teacher is not the teacher, nor is a part of it.
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    put_rows(folder, *(row for row in rows if row["run"] == "teacher/1"))
    metrics = folder / "runs" / "teacher" / "1" / "metrics.jsonl"
    whole = metrics.read_text()
    for content in ("", "".join(whole.splitlines(keepends=True)[:-1])):
        metrics.write_text(content)
        assert main(sweep(folder, "--shard=2/2")) == 1
        err = capsys.readouterr().err
        assert "student/1: it needs teacher/1, which is not finished" in err
        assert "since it is recorded, to train teacher/1 again, delete its folder and its" in err
    metrics.write_text(whole)
    assert main(sweep(folder, "--shard=2/2")) == 0

    # The folder may hold a teacher of other settings.
    other = resolve(settings(text, **{"optimizer.learning_rate": 0.001}))
    shutil.rmtree(folder / "runs" / "student" / "1")
    put_rows(folder, *(row for row in rows if row["run"] == "teacher/1"))
    save(other, folder / "runs" / "teacher" / "1" / "config.json")
    assert main(sweep(folder, "--shard=2/2")) == 1
    err = capsys.readouterr().err
    assert "student/1: it needs teacher/1: in " in err and "learning_rate was 0.001, is " in err
    save(resolve(given["teacher/1"]), folder / "runs" / "teacher" / "1" / "config.json")

    # A student that is added later would find another checkpoint of the teacher, or none.
    (folder / "runs" / "teacher" / "1" / "checkpoints" / "9").mkdir()
    assert main(sweep(folder, "--shard=2/2")) == 1
    line = "student/1: it needs the checkpoint of step 12 of teacher/1, which is not in"
    assert line in capsys.readouterr().err


ONE = "{'train': {'steps': 1}}"
A_RUN = "{'train': {'steps': %s}, 'optimizer': {'schedule': 'wsd'}}"
LONG = A_RUN.replace("'wsd'", "'wsd', 'decay_tokens': 30 * 16 * 256")


@pytest.mark.parametrize(
    ("trunk", "branch", "name", "message"),
    [
        (A_RUN % 20, A_RUN % 40, "b", "c goes on from 'b', which is no run that comes before it"),
        (A_RUN % 20, A_RUN % 40, "c", "c goes on from 'c', which is no run that comes before it"),
        (A_RUN % 20, "{'train': {'steps': 40}}", "a", "from a needs optimizer.schedule=wsd, not c"),
        ("{'train': {'steps': 40}}", A_RUN % 40, "a", "schedule was 'cosine', is 'wsd'"),
        (A_RUN % 20, A_RUN % "40}, 'model': {'d_ff': 64", "a", "d_ff was 512, is 64; a bra"),
        (A_RUN % 20, A_RUN % "40}, 'init': {'workdir': 'x'", "a", "c: a has another init; the"),
        (A_RUN % 40, A_RUN % 20, "a", "c: it goes on from step 16 of a, which keeps the che"),
        (A_RUN % 1, A_RUN % 20, "a", "c: its learning rate decays from step 0 on, so that "),
        (LONG % 10, LONG % 40, "a", "c: it goes on from step 24 of a, which trains steps 1 to 10"),
    ],
)  # fmt: skip
def test_wrong_trunks(trunk, branch, name, message, tmp_path, capsys):
    code = f"def runs():\n    yield 'a', {trunk}\n    yield 'c', {branch}, {name!r}"
    (tmp_path / "sweep.py").write_text(code)
    assert main(sweep(tmp_path)) == 2
    assert message in only_line(capsys.readouterr().err)


def test_a_branch_does_not_have_the_steps_before_it(tmp_path, capsys):
    code = f"""
def runs():
    yield "a", {A_RUN % 20}
    yield "b", {A_RUN % "60}, 'checkpoint': {'every': 8, 'keep_every': 8"}, "a"
    yield "c", {A_RUN % 10}, "b"
"""
    (tmp_path / "sweep.py").write_text(code)
    assert main(sweep(tmp_path)) == 2
    message = "c: it goes on from step 8 of b, which trains steps 17 to 60; let it go on from the"
    assert message in only_line(capsys.readouterr().err)


def test_one_object_may_hold_the_settings_of_all_runs(tmp_path):
    code = """
def runs():
    settings = {'train': {'steps': 1}}
    for seed in 1, 2:
        settings["seed"] = seed
        yield f"a/{seed}", settings
"""
    (tmp_path / "sweep.py").write_text(code)
    assert [one.config.seed for one in planned(tmp_path).runs.values()] == [1, 2]


def test_a_branch_goes_on_where_its_folder_has_another_name(text, tmp_path, untrained, capsys):
    """Its own config names the old place of its trunk."""
    folder = chain(tmp_path / "sweep", text, (6, 12))
    trunk, longer = (planned(folder).runs[name].config for name in ("6/1", "12/1"))
    given = dataclasses.asdict(trunk)
    put_rows(folder, records.record("6/1", trunk, finished_run(folder, "6/1", given)))
    workdir = finished_run(folder, "12/1", dataclasses.asdict(longer))
    for other, status in (("elsewhere/7/1", 1), ("6/1", 0)):
        save(branch(longer, trunk, Path(other)), workdir / "config.json")
        assert main(sweep(folder)) == status
    assert "12/1: the run in this workdir has another config: init.workdir was 'elsewhere/7/1'" in (
        capsys.readouterr().err
    )
    assert not untrained and [row["run"] for row in lines_of(folder)] == ["6/1", "12/1"]


def test_a_branch_without_a_checkpoint_reads_its_trunk_where_it_is_now(text, tmp_path, monkeypatch):
    """It was killed before its first one, and then the folder of all runs was renamed."""
    folder = chain(tmp_path / "sweep", text, (6, 12))
    trunk, longer = (planned(folder).runs[name].config for name in ("6/1", "12/1"))
    workdir = finished_run(folder, "6/1", dataclasses.asdict(trunk))
    put_rows(folder, records.record("6/1", trunk, workdir))
    (workdir / "checkpoints" / "5").mkdir(parents=True)
    workdir = folder / "runs" / "12" / "1"
    workdir.mkdir(parents=True)
    save(branch(longer, trunk, Path("elsewhere/6/1")), workdir / "config.json")
    given = []
    monkeypatch.setattr(run, "_train", lambda name, config, *rest: given.append(config.init) or 1)
    assert main(sweep(folder)) == 1
    (workdir / "checkpoints" / "9").mkdir(parents=True)
    assert main(sweep(folder)) == 1
    now = str(folder / "runs" / "6" / "1")
    assert [init.workdir for init in given] == [now, "elsewhere/6/1"]


@pytest.mark.parametrize(
    ("began", "now", "step"),
    [(("elsewhere", 16), ("here", 16), 16), (("here", 16), (), 16), ((), ("here", 16), 3)],
)
def test_a_branch_that_saved_nothing_may_begin_elsewhere(began, now, step, tmp_path):
    """Its trunk's folder was renamed, or lost its checkpoint, or has it now."""
    longer = resolve(settings(("corpus", "cache"), **WSD | {"train.steps": 40}))

    def start(saved, given, step):
        saved, given = (dataclasses.replace(longer, init=InitConfig(*x)) for x in (saved, given))
        save(saved, tmp_path / "config.json")
        (tmp_path / "metrics.jsonl").write_text(f'{{"step": {step}, "loss": 4.0}}\n')
        check_new_start(tmp_path, given)

    start(began, now, step)
    for saved, given in (((), ("there",)), (("there",), ())):  # a start, and no branch
        with pytest.raises(UserError, match=r"init\.workdir was"):
            start(saved, given, 3)


def test_a_trunk_keeps_where_its_own_decay_starts(text, tmp_path):
    """One long run with shorter branches, all recorded: a longer one can go on from it."""
    kept = {"checkpoint.every": 8, "checkpoint.keep_every": 8}
    given = {f"{n}/1": settings(text, **WSD | kept | {"train.steps": n}) for n in (50, 10, 20)}
    folder = write(tmp_path / "sweep", given)
    (folder / "sweep.py").write_text(LONG_TRUNK)
    runs, root, rows = planned(folder).runs, folder / "runs", []
    for name, one in runs.items():
        workdir = finished_run(folder, name, given[name])
        rows.append(records.record(name, one.config, workdir))
    for step in (8, 16, 40, 50):
        (root / "50" / "1" / "checkpoints" / str(step)).mkdir(parents=True)
    work = Work(runs, folder, root)
    put_rows(folder, *rows[:2])
    discard_checkpoints(work, "50/1")
    kept = root / "50" / "1" / "checkpoints"
    assert sorted(path.name for path in kept.iterdir()) == ["16", "40"]
    put_rows(folder, *rows)
    discard_checkpoints(work, "50/1")
    assert [path.name for path in kept.iterdir()] == ["40"]


@pytest.mark.parametrize(
    ("where", "kept", "reads"),
    [
        ({"init.workdir": "{base}"}, "4", False),
        # A teacher that stops before the branch begins, and one that goes on.
        ({"teacher.workdir": "{base}", "kd.stop": 512}, "4", False),
        ({"teacher.workdir": "{base}", "kd.stop": 1536}, "4", True),
        ({"teacher.workdir": "{base}", "kd.stop": 1536}, "12", False),
    ],
)
def test_a_branch_needs_no_start_but_its_trunk(
    where, kept, reads, text, tmp_path, untrained, capsys
):
    """A longer run is added, where the last checkpoint of the run that began it all is gone."""
    base = tmp_path / "sweep" / "runs" / "base" / "1"
    where = {name: str(value).format(base=base) for name, value in where.items()}
    given = {"base/1": settings(text)}
    for n in (6, 12):
        given[f"{n}/1"] = settings(text, **WSD | {"train.steps": n} | where)
    folder = write(tmp_path / "sweep", given)
    (folder / "sweep.py").write_text(BRANCH)
    configs = {name: one.config for name, one in planned(folder).runs.items()}
    done = ("base/1", "6/1")
    for name in done:
        finished_run(folder, name, given[name])
    put_rows(folder, *(records.record(n, configs[n], folder / "runs" / n) for n in done))
    (base / "checkpoints" / kept).mkdir(parents=True)
    (folder / "runs" / "6" / "1" / "checkpoints" / "5").mkdir(parents=True)
    assert main(sweep(folder)) == 1
    assert untrained == ([] if reads else ["12/1"])
    line = "12/1: it needs the checkpoint of step 12 of base/1, which is not in"
    assert (line in capsys.readouterr().err) is reads


def test_another_config_is_another_run(text, tmp_path, capsys):
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
        (f"def runs():\n    yield 'a', {ONE}\n    yield 1 / 0", "sweep.py fails at line 3: ZeroD"),
        ("def runs():\n    yield 'a'", "runs() yields 'a', not (name, settings)"),
        ("def runs():\n    return []", "runs() yields nothing"),
        (
            f"CONTRASTS = (('a', 'c'),)\ndef runs():\n    yield 'a/1', {ONE}\n"
            f"    yield 'b', {{'seed': 2, **{ONE}}}",
            "sweep.py: CONTRASTS names 'c'; the runs' arms are a, b",
        ),
        ("def runs():\n    yield '../a', {}", "'../a' can't name a folder"),
        ("def runs():\n    yield 'a', {'sed': 1}", "a: config.sed is not a setting; did you"),
        (TWICE, "sweep.py yields 'a' twice"),
        ("CONTRAST = ()", "sweep.py, line 1: CONTRAST is no constant of a sweep; did you mean"),
        ("def runs():\n    pass", "runs() returns NoneType; it must yield (name, settings)"),
        ("def runs():\n    return 7", "runs() returns int; it must yield (name, settings)"),
        ("runs = 7", "sweep.py fails: TypeError: 'int' object is not callable"),
        ("def runs():\n    yield None", "runs() yields None, not (name, settings)"),
        ("def runs():\n    yield 7, {}", "runs() yields (7, {}), not (name, settings)"),
        ("def runs():\n    yield 'a', {}, 'b', 7", "runs() yields ('a', {}, 'b', 7), not (name, s"),
        ("from common import *", "sweep.py, line 1: import names, not *: a report reads CONTRASTS"),
        ("GRID = {[1]: 2}", "sweep.py fails at line 1: TypeError: "),
        ("KEEP_CHECKPOINTS = 0", "KEEP_CHECKPOINTS is 0; it must be True or False"),
        ("def runs():\n    yield 'a', None", "the settings of a are NoneType, not a dict or Conf"),
        ("def runs():\n    yield 'a', {7: 7}", "a: config.7 is not a setting; known: seed, model"),
        ("def runs():\n    yield 'a/.', {}", "'a/.' can't name a folder"),
        ("def runs():\n    exit('no')", "sweep.py fails at line 2: SystemExit: no"),
        (f"def runs():\n    yield 'a', {ONE}\n    raise SystemExit(0)", "at line 3: SystemExit: 0"),
        ("raise BaseException('\\n')", "sweep.py fails at line 1: BaseException:"),
        (SILENT, "sweep.py fails at line 4: Silent: (its message cannot be shown)"),
        (HIDDEN, "sweep.py fails at line 3: ZeroDivisionError: division by zero"),
    ],
)  # fmt: skip
def test_mistakes(code, message, tmp_path, capsys):
    if code:
        (tmp_path / "sweep.py").write_text(code)
    assert main(sweep(tmp_path)) == 2
    line = only_line(capsys.readouterr().err)
    assert message in line
    assert not (tmp_path / "runs").exists()


def test_the_same_run_under_two_names_is_told(tmp_path, caplog):
    """An arm whose change has no effect, such as a setting that is the default."""
    code = f"def runs():\n    yield 'a/1', {ONE}\n    yield 'b/1', {ONE}"
    (tmp_path / "sweep.py").write_text(f"{code}\n    yield 'c/1', {{'seed': 1, **{ONE}}}")
    assert list(planned(tmp_path).runs) == ["a/1", "b/1", "c/1"]
    told = [text for text in caplog.messages if "has the settings of" in text]
    assert told == [f"{tmp_path}/sweep.py: b/1 has the settings of a/1 and is the same run"]


def finished_run(folder, name, given):
    """A run's folder as training leaves it, with one step and one evaluation."""
    workdir, config = folder / "runs" / name, resolve(given)
    workdir.mkdir(parents=True)
    save(config, workdir / "config.json")
    lines = [
        {"step": 12, "tokens": 12 * 256, "loss": 5.5, "lm_loss": 5.0, "tokens_per_second": 7.0},
        {
            "step": 12, "eval/loss": 4.5, "eval/bits_per_byte": 2.5, "eval/drop_fraction": 0.0,
            "eval/tokens": 31,
        },
    ]  # fmt: skip
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    start = {"git_revision": "abc", "versions": {"jax": "0.1"}, "device": "cpu"}
    (workdir / "environment.json").write_text(json.dumps([start]))
    return workdir


def test_a_record_of_a_branch(text, tmp_path):
    """Its speed is that of its own steps; its revisions are its trunk's as well."""
    given = {n: settings(text, **WSD | {"train.steps": n}) for n in (20, 40)}
    trunk = finished_run(tmp_path, "20/1", given[20])
    workdir = finished_run(tmp_path, "40/1", given[40])
    branched = dataclasses.replace(resolve(given[40]), init=InitConfig(str(trunk), step=16))
    save(branched, workdir / "config.json")
    metrics = workdir / "metrics.jsonl"
    own = {"step": 40, "tokens": 40 * 256, "loss": 4.5, "lm_loss": 4.0, "tokens_per_second": 9.0}
    metrics.write_text(f"{metrics.read_text()}{json.dumps(own)}\n")
    start = {"git_revision": "def", "versions": {"jax": "0.2"}, "device": "gpu"}
    (workdir / "environment.json").write_text(json.dumps([start]))
    row = records.record("40/1", resolve(given[40]), workdir)
    assert (row["tokens_per_second"], row["revisions"]) == (9.0, ["abc", "def"])
    assert (row["versions"], row["device"]) == ({"jax": "0.2"}, "gpu")
    shutil.rmtree(trunk)
    assert records.record("40/1", resolve(given[40]), workdir)["revisions"] == ["def"]


def test_a_record_of_settings_that_may_change_on_resuming(text, tmp_path):
    """Older records have some of them, and are of the same run all the same."""
    runs = {"a": Run(resolve(settings(text, **{"train.accumulate": 2})))}
    row = records.record("a", runs["a"].config, finished_run(tmp_path, "a", settings(text)))
    assert "train.accumulate" not in row["settings"]
    older = row | {"settings": row["settings"] | {"train.accumulate": 4}}
    assert records.of_runs([older], runs) == [older]
    other = row | {"settings": row["settings"] | {"train.batch_size": 4}}
    assert records.of_runs([other], runs) == []


def test_a_record_of_documents(text, tmp_path):
    """Those of the last evaluation; the setting is no other run, and other records have none."""
    plain = finished_run(tmp_path, "plain", settings(text))
    assert "documents" not in records.record("plain", resolve(settings(text)), plain)
    given = settings(text, **{"eval.documents": True})
    workdir = finished_run(tmp_path, "a", given)
    metrics = workdir / "metrics.jsonl"
    line = json.loads(metrics.read_text().splitlines()[-1])
    more = {"step": 13, "eval/documents": [[100.25, 30], [4.0, 1]]}
    metrics.write_text(f"{metrics.read_text()}{json.dumps(line | more)}\n")
    row = records.record("a", resolve(given), workdir)
    assert row["documents"] == [[100.25, 30], [4.0, 1]]
    assert records.of_runs([row], {"a": Run(resolve(settings(text)))}) == [row]
    assert records.complete(tmp_path, [row])
    with pytest.raises(UserError, match=r"the record of a is damaged: documents is \[\[1.0\]\]"):
        records.complete(tmp_path, [row | {"documents": [[1.0]]}])


def recorded_settings(folder, given):
    """The settings in the record of such a run."""
    return records.record("run", resolve(given), finished_run(folder, "run", given))["settings"]


def lines_of(folder):
    return list(map(json.loads, (folder / "results.jsonl").read_text().splitlines()))


def put_rows(folder, *rows, end="\n"):
    lines = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    (folder / "results.jsonl").write_text(lines + end)


@pytest.fixture
def given(text):
    return settings(text)


@pytest.fixture
def untrained(monkeypatch):
    """Nothing is trained: the names of the runs that would have been."""
    asked = []
    monkeypatch.setattr(run, "_train", lambda name, *rest: asked.append(name) or "")
    return asked


def test_records_on_another_text_are_not_replaced(given, tmp_path, untrained, capsys):
    """A text that is not installed here, say; nothing is trained, and the record stays."""
    folder = write(tmp_path / "sweep", {"a": given})
    row = record("a", 1, 3.0, run="a") | {"settings": {"data.corpus": "prose"}}
    (folder / "results.jsonl").write_text(json.dumps(row) + "\n")
    assert main(["sweep", str(folder), f"--workdir={tmp_path / 'runs'}"]) == 2
    line = only_line(capsys.readouterr().err)
    assert "a was trained on data.corpus=prose, and sweep.py asks for" in line
    assert not untrained and json.loads((folder / "results.jsonl").read_text()) == row


def test_records_of_other_runs_are_kept(given, tmp_path, untrained, capsys):
    """Of arms that sweep.py doesn't yield any more, and of other settings, until replaced."""
    folder = write(tmp_path / "sweep", {"b": given, "a": given})
    gone, old = record("gone", 1, 2.0), record("a", 1, 3.0, run="a")
    put_rows(folder, gone, old)
    finished_run(folder, "b", given)
    assert main(sweep(folder)) == 1  # a is nowhere
    assert untrained == ["a"]
    b, *others = lines_of(folder)
    assert (b["run"], b["loss"], b["tokens"], b["evaluated_tokens"]) == ("b", 4.5, 12 * 256, [31])
    assert others == [old, gone]
    err = capsys.readouterr().err
    assert err.count("results.jsonl: keeps 2 records of other runs or settings") == 1
    finished_run(folder, "a", given)
    assert main(sweep(folder)) == 0
    assert [row["run"] for row in json.loads(capsys.readouterr().out)] == ["b", "a"]
    assert [row["loss"] for row in lines_of(folder)] == [4.5, 4.5, 2.0]


def test_records_that_are_added_at_the_same_time_are_all_kept(tmp_path):
    names = [f"run-{i}" for i in range(7)]
    rows = [record(name, 1, 2.0, run=name) for name in names]
    threads = [threading.Thread(target=records.add, args=(tmp_path, r, names)) for r in rows]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lines_of(tmp_path) == rows


@pytest.mark.parametrize("torn", ['{"run": "c', '{"run": "c"}  {', "\x00"])
def test_a_torn_record_is_left_out(torn, given, tmp_path, untrained, caplog):
    folder = write(tmp_path / "sweep", {"b": given})
    put_rows(folder, record("a", 1, 2.0), torn, end="")
    finished_run(folder, "b", given)
    with caplog.at_level(logging.WARNING):
        assert main(sweep(folder)) == 0
    assert [row["run"] for row in lines_of(folder)] == ["b", "a/1"]


def test_a_complete_record_needs_no_newline(given, tmp_path, untrained):
    """Some editors leave it out."""
    folder = write(tmp_path / "sweep", {"b": given})
    put_rows(folder, record("a", 1, 2.0), record("a", 2, 2.0), end="")
    finished_run(folder, "b", given)
    assert main(sweep(folder)) == 0
    assert [row["run"] for row in lines_of(folder)] == ["b", "a/1", "a/2"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("garbage", "line 2, is damaged: Expecting value"),
        ("[]", "line 2, is damaged: not an object but list; delete that line"),
        ('{"settings": {}}', "line 2, is damaged: it has no run; delete that line"),
        ('{"run": "b"}', "line 2, is damaged: it has no settings; delete that line"),
        ('{"run": ["b"], "settings": {}}', "line 2, is damaged: run is ['b']; delete that line"),
        ('{"run": "b\\n", "settings": {}}', "line 2, is damaged: run is 'b\\n'; delete that line"),
        ('{"run": "b", "settings": 7}', "line 2, is damaged: settings is 7; delete that line"),
    ],
)  # fmt: skip
def test_a_damaged_record(row, message, given, tmp_path, untrained, capsys):
    """Nothing is trained, and the file stays as it is, until that line is deleted."""
    folder = write(tmp_path / "sweep", {"b": given})
    put_rows(folder, record("a", 1, 2.0), row)
    before = (folder / "results.jsonl").read_bytes()
    assert main(sweep(folder)) == 2
    line = only_line(capsys.readouterr().err)
    assert f"{folder}/results.jsonl, {message}" in line
    assert untrained == [] and (folder / "results.jsonl").read_bytes() == before


def test_an_incomplete_record(given, tmp_path, untrained, capsys):
    folder = write(tmp_path / "sweep", {"b": given})
    same = recorded_settings(tmp_path / "other", given)
    put_rows(folder, {"run": "b", "settings": same, "seed": 0})
    assert main(sweep(folder)) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert "results.jsonl: the record of b is damaged: it has no total_params, active_p" in line


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("environment.json", "[{", "environment.json is damaged: Expecting"),
        ("environment.json", "{}", "environment.json is damaged: it holds dict, not list; delete"),
        ("environment.json", "[7]", "environment.json is damaged: not an object but int; delete"),
        ("environment.json", '[{"device": 7}]', "is damaged: it has no git_revision, versions; d"),
        ("metrics.jsonl", "garbage\n", "metrics.jsonl, line 1, is damaged: Expecting value"),
        (
            "metrics.jsonl",
            '{"step": 12, "eval/loss": 1, "eval/tokens": 3, "eval/bits_per_byte": 1, '
            '"eval/drop_fraction": 0}\n',
            "metrics.jsonl holds no step, or no evaluation",
        ),
        (
            "metrics.jsonl",
            '{"step": 3, "loss": 1}\n{"step": 12, "eval/loss": 1}\n',
            "metrics.jsonl: the line of step 3 is damaged: it has no tokens, lm_loss, tokens_per_s",
        ),
        (
            "metrics.jsonl",
            '{"step": 3, "tokens": 1, "loss": 1, "lm_loss": 1, "tokens_per_second": 1}\n'
            '{"step": 12, "eval/loss": "1", "eval/tokens": 3, "eval/bits_per_byte": 1, '
            '"eval/drop_fraction": 0}\n',
            "metrics.jsonl: the line of step 12 is damaged: eval/loss is '1'; delete that line",
        ),
    ],
)  # fmt: skip
def test_a_damaged_finished_run(
    file,
    content,
    message,
    given,
    tmp_path,
    untrained,
    capsys,
):
    """One line; the other runs are recorded."""
    folder = write(tmp_path / "sweep", {"a": given, "b": given})
    for name in "ab":
        finished_run(folder, name, given)
    (folder / "runs" / "a" / file).write_text(content)
    assert main(sweep(folder)) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if message in line]
    assert line.startswith("a: ") and untrained == []
    assert [row["run"] for row in lines_of(folder)] == ["b"]


def test_a_lost_environment_is_unknown(given, tmp_path, untrained):
    folder = write(tmp_path / "sweep", {"a": given})
    (finished_run(folder, "a", given) / "environment.json").unlink()
    assert main(sweep(folder)) == 0
    (row,) = lines_of(folder)
    assert (row["revisions"], row["versions"], row["device"]) == (["unknown"], {}, "unknown")


def test_a_run_without_its_last_evaluation_is_trained(given, tmp_path, untrained):
    folder = write(tmp_path / "sweep", {"a": given})
    metrics = finished_run(folder, "a", given) / "metrics.jsonl"
    metrics.write_text(metrics.read_text().splitlines(keepends=True)[0])
    assert main(sweep(folder)) == 1
    assert untrained == ["a"]


@pytest.mark.parametrize("file", ["sweep.json", "log.txt", ".lock", ""])
def test_a_folder_that_cannot_be_written_fails_one_run(
    file,
    given,
    tmp_path,
    capsys,
):
    """The others go on; that a folder is in the file's place stops even an administrator."""
    folder = write(tmp_path / "sweep", {"a": given, "b": given})
    finished_run(folder, "b", given)
    if file:
        (folder / "runs" / "a" / file).mkdir(parents=True)
    else:
        (folder / "runs" / "a").touch()
    assert main(sweep(folder)) == 1
    err = capsys.readouterr().err
    place = (folder / "runs" / "a" / file).resolve()
    why = "Is a directory" if file else "File exists"
    assert f"\na: {place} cannot be written: {why}\n" in f"\n{err}" and "Traceback" not in err
    assert [row["run"] for row in lines_of(folder)] == ["b"]


def test_where_nothing_can_be_written_nothing_is_trained(
    given,
    tmp_path,
    untrained,
    capsys,
):
    folder = write(tmp_path / "sweep", {"a": given})
    (folder / "file").touch()
    for root in "file", "file/runs", "x" * 256:
        assert main(["sweep", str(folder), f"--workdir={folder / root}"]) == 2
        line = only_line(capsys.readouterr().err)
        assert f"{folder / root} cannot be written: " in line
    with file_size_limit(1000):
        assert main(sweep(folder)) == 2
    line = only_line(capsys.readouterr().err)
    assert f"{folder}/results.jsonl cannot be written: File too large" in line
    (folder / ".results.lock").unlink(missing_ok=True)
    (folder / ".results.lock").mkdir()
    assert main(sweep(folder)) == 2
    assert ".results.lock cannot be written: Is a directory" in capsys.readouterr().err
    assert untrained == []


def hold(workdir):
    """Holds a run's folder as process 4711; to be closed."""
    workdir.mkdir(parents=True)
    file = (workdir / ".lock").open("w")
    fcntl.flock(file, fcntl.LOCK_EX)
    file.write("4711")
    file.flush()
    return file


def free(lock):
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return True


def when_it_waits(monkeypatch, act):
    """Calls `act` once the sweep has said that it waits for a folder."""
    put = run.SweepProgress.put

    def watched(self, name, state):
        put(self, name, state)
        if state.startswith("waits"):
            act()

    monkeypatch.setattr(run.SweepProgress, "put", watched)


def test_a_held_folder_is_waited_for(given, tmp_path, monkeypatch, capsys):
    """The run of a killed sweep saves itself, and leaves; another's run doesn't."""
    folder = write(tmp_path / "sweep", dict.fromkeys("ab", given))
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    with hold(folder / "runs" / "b") as file:
        when_it_waits(monkeypatch, file.close)
        assert main(sweep(folder, "--shard=2/2")) == 1
    err = capsys.readouterr().err
    assert err.count("b: waits up to 75 s for process 4711, which holds its folder\n") == 1
    assert re.search(r"b: failed after \d+ s: it said nothing", err)  # so it was started
    monkeypatch.setattr(run, "PATIENCE", 0.2)
    with hold(folder / "runs" / "a"):
        assert main(sweep(folder)) == 1
    err = capsys.readouterr().err
    assert f"a: {folder}/runs/a is in use by process 4711; wait for it, or stop it\n" in err
    assert "b: failed after" in err and not (folder / "runs" / "a" / "log.txt").exists()


def test_a_run_that_another_sweep_records_meanwhile_is_done(
    given, tmp_path, untrained, monkeypatch, capsys
):
    """It waits for the run, whose record and folder stay as they are."""
    folder = write(tmp_path / "sweep", {"a": given})
    row = records.record("a", resolve(given), finished_run(tmp_path / "other", "a", given))
    with hold(folder / "runs" / "a") as file:

        def end():
            put_rows(folder, row)
            file.close()

        when_it_waits(monkeypatch, end)
        assert main(sweep(folder)) == 0
    assert untrained == [] and lines_of(folder) == [row]
    assert row["losses"] == [[12 * 256, 5.0]]  # without the loss that balances the experts
    assert "a: recorded" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("exit 3", "failed after S s: it said nothing"),
        ("echo one >&2; echo 'prmoe: two' >&2; echo three >&2; exit 2", "failed after S s: two"),
        ("echo one >&2; kill -9 $$", "was ended by signal 9 after S s: one"),
        (
            "echo saved >&2; echo run: a >&2; exit 0",
            "stopped before its last evaluation after S s: saved",
        ),
    ],
)
def test_why_a_run_failed(script, reason, given, tmp_path, monkeypatch, capsys):
    """Only what it says itself, this time."""
    folder = write(tmp_path / "sweep", {"a": given})
    (folder / "runs" / "a").mkdir(parents=True)
    log = folder / "runs" / "a" / "log.txt"
    log.write_text("of another start\nprmoe: and why it failed\n")
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    assert main(sweep(folder)) == 1
    told = re.sub(r"after \d+ s", "after S s", capsys.readouterr().err)
    assert f"\na: {reason}\n" in told
    assert log.read_text().startswith("of another start\n")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_does_not_outlive_its_sweep(number, text, tmp_path):
    """After kill -9 or an interrupt of the sweep alone, its run saves itself and ends."""
    folder = write(tmp_path / "sweep", {"a": settings(text, **{"train.steps": 100_000})})
    process = start(*sweep(folder), PYTHONUNBUFFERED="1")
    workdir = folder / "runs" / "a"
    wait_for_lines(workdir, 3, process)
    process.send_signal(number)
    finish(process)
    with (workdir / ".lock").open() as file:
        child, end = int(file.read()), time.monotonic() + 60
        while not free(file) and time.monotonic() < end:
            time.sleep(0.1)
        if not free(file):
            os.kill(child, signal.SIGKILL)
            pytest.fail("its run goes on")
    assert "of 100000; the same command resumes" in (workdir / "log.txt").read_text()
    assert any((workdir / "checkpoints").iterdir())


def test_the_table_shows_states_as_they_are(given, tmp_path, caplog):
    """What looks like a style in brackets, and a file to which a run adds at this moment."""
    config = resolve(given)
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 3, "loss": 5.5, "tokens_per_second": 7.0}\n{"step": 5, "eval/loss": 4.5}\n{"st'
    )
    progress = SweepProgress({"a": (tmp_path, config), "b": (tmp_path / "nowhere", config)})
    progress.put("a", "failed: [/no] [bold]")
    progress.put("b", "running")
    caplog.clear()
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(progress.table())
    shown = console.export_text()
    assert "failed: [/no] [bold]" in shown and "5/12" in shown and "4.5000" in shown
    assert caplog.records == []
    progress.put("a", "running")
    for damage in "garbage\n", "7\n", '{"step": 3, "loss": null}\n', '{"loss": 3}\n':
        (tmp_path / "metrics.jsonl").write_text(damage)
        _, _, *columns = progress.table().columns
        assert [next(iter(column.cells)) for column in columns] == ["", "", ""]


def test_what_sweep_py_prints_is_no_result(given, tmp_path, capsys):
    folder = write(tmp_path / "sweep", {"a": given})
    (folder / "sweep.py").write_text("print('read')\n" + FILE + "    print('yielded')\n")
    finished_run(folder, "a", given)
    assert main(sweep(folder)) == 0
    out, err = capsys.readouterr()
    assert [row["run"] for row in json.loads(out)] == ["a"]
    assert "read\nyielded\n" in err


@pytest.mark.parametrize(
    "shard", ["1/1" + "0" * 20, "0/1", "2/1", "1/0", "1", "٣/٤", "1/²", "-1/2"]
)
def test_odd_shards(shard, given, tmp_path, untrained, capsys):
    folder = write(tmp_path / "sweep", {"a": given})
    assert main(sweep(folder, f"--shard={shard}")) == 2
    line = only_line(capsys.readouterr().err)
    assert f"--shard={shard} must be I/N" in line and untrained == []


@pytest.mark.parametrize("verb", ["sweep", "report"])
def test_odd_folders(verb, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = {"sweep": "sweep.py", "report": "results.jsonl"}[verb]
    for folder, message in (
        ("", "argument folder: is empty; if it was a shell variable, it isn't set"),
        ("x" * 300, f"{'x' * 300}/{file} cannot be read: File name too long"),
        ("nowhere", f"nowhere/{file} is missing"),
    ):
        assert main([verb, folder]) == 2
        line = only_line(capsys.readouterr().err)
        assert message in line


def test_a_runs_own_config_is_a_config(tmp_path):
    """--config=RUN/config.json, with overrides as any other."""
    given = parse_config(arguments(("text", "cache"), "run", "prmoe")[1:-2])
    save(given, tmp_path / "config.json")
    stored = f"--config={tmp_path / 'config.json'}"
    assert parse_config([stored]) == given
    changed = parse_config([stored, "--config.model.experts=8,8,16", "--config.seed=3"])
    assert (changed.model.experts, changed.seed) == ((8, 8, 16), 3)


SWEEPS = sorted((REPOSITORY / "experiments").rglob("sweep.py"))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: str(path.parent.relative_to(REPOSITORY)))
def test_committed_sweeps(path):
    """They can be planned; an arm's runs differ in what is named, and records are of their runs."""
    runs, constants = run.planned(path.parent)
    arms = {}
    for name, (config, _) in runs.items():
        same = {key: value for key, value in leaves(config).items() if key != "seed"}
        same = {key: value for key, value in same.items() if key not in constants.varying}
        assert arms.setdefault(name.rpartition("/")[0], same) == same, name
    assert {arm for pair in constants.contrasts for arm in pair} <= arms.keys()
    results = path.with_name("results.jsonl")
    for row in map(json.loads, results.read_text().splitlines() if results.exists() else []):
        assert row["run"] in runs


def test_the_claims_share_their_runs():
    """Their README gives all of them one folder, in which a name is one run."""
    found = {}
    for path in sorted((REPOSITORY / "experiments/claims").glob("*/sweep.py")):
        for name, (config, _) in run.planned(path.parent).runs.items():
            assert found.setdefault(name, config) == config, name
    assert len(found) > 60
