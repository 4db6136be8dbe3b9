"""A run's folder: after damage or on a full disk, the run goes on undisturbed or says why."""

import errno
import json
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from prmoe_jax.cli import main
from prmoe_jax.config.loading import load
from prmoe_jax.errors import UserError
from prmoe_jax.parallel.mesh import make_mesh
from prmoe_jax.run import checkpoint, directory
from prmoe_jax.run.checkpoint import Checkpoints
from prmoe_jax.run.restore import restore_model
from prmoe_jax.stores import lock
from tests.support.paths import REPOSITORY
from tests.support.runs import (
    arguments,
    assert_same_run,
    finish,
    logged,
    parameters,
    start,
    wait_for_lines,
)


def test_only_checkpoint_damaged(text, tmp_path, capsys):
    """Nothing to fall back on: one line that says so, until someone decides what to do."""
    command = arguments(text, tmp_path / "run", "dense", **{"train.steps": 3})
    assert main(command) == 0
    for file in (tmp_path / "run" / "checkpoints" / "3").rglob("*"):
        if file.is_file():
            os.truncate(file, 0)
    for _ in range(2):
        assert main(command) == 2
        assert "they are beside it as damaged-3: put a copy of one back" in capsys.readouterr().err
    (tmp_path / "run" / "damaged-3").rename(tmp_path / "elsewhere")
    # The run is finished, and a new one would delete its record.
    metrics = tmp_path / "run" / "metrics.jsonl"
    before = metrics.read_bytes(), (tmp_path / "run" / "config.json").read_bytes()
    for other in command, arguments(text, tmp_path / "run", "top2", seed=7):
        assert main(other) == 2
        assert "is finished, and its checkpoints are gone; give ano" in capsys.readouterr().err
        assert (metrics.read_bytes(), (tmp_path / "run" / "config.json").read_bytes()) == before
    metrics.rename(tmp_path / "metrics.jsonl")
    assert main(command) == 0
    assert parameters(tmp_path / "run")[0] == 3


def test_a_run_that_lost_its_checkpoints_is_not_begun_anew(text, tmp_path, capsys):
    """Unless it may have had none yet, as after a kill before the first one; by the same config."""
    settings = {"checkpoint.every": 3}
    command = arguments(text, tmp_path / "run", "dense", **settings)
    assert main(command) == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    metrics = tmp_path / "run" / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(lines[:7]))
    assert main(command) == 2
    assert "came to step 7, and its checkpoints are gone; give another" in capsys.readouterr().err
    metrics.write_text("".join(lines[:6]))
    other = arguments(text, tmp_path / "run", "dense", seed=7, **settings)
    assert main(other) == 2
    assert "another config: seed was 0, is 7; give the same" in capsys.readouterr().err
    assert metrics.read_text() == "".join(lines[:6])
    assert main(command) == 0
    assert "starts again: the run in" in capsys.readouterr().err
    for line, before in zip(logged(tmp_path / "run"), map(json.loads, lines), strict=True):
        assert line["step"] == before["step"] and line.get("loss") == before.get("loss")


@pytest.fixture(scope="module")
def saved_twice(text, tmp_path_factory):
    """A finished run with checkpoints of steps 10 and 12, and the command that made it."""
    workdir = tmp_path_factory.mktemp("saved") / "run"
    settings = {"checkpoint.every": 5, "checkpoint.keep": 2}
    assert main(arguments(text, workdir, "dense", **settings)) == 0
    return workdir, arguments(text, workdir, "dense", **settings)


@pytest.fixture
def copied(saved_twice, tmp_path):
    """A copy of it to spoil, and the command that resumes the copy."""
    workdir, command = saved_twice
    copy = Path(shutil.copytree(workdir, tmp_path / "run"))
    return copy, [part.replace(str(workdir), str(copy)) for part in command]


def flip(folder):
    """Changes one bit in the middle of the largest file, which its reader need not notice."""
    file = max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


# What becomes of checkpoint 12; that of step 10 is good.
def cut(folder):
    """Leaves half of each file."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]
    assert files
    for file in files:
        os.truncate(file, file.stat().st_size // 2)


DAMAGES = {
    "half of the model": lambda step: cut(step / "model"),
    "half of the optimizer": lambda step: cut(step / "optimizer"),
    "half of the data": lambda step: cut(step / "data"),
    "no optimizer": lambda step: shutil.rmtree(step / "optimizer"),
    "no data": lambda step: shutil.rmtree(step / "data"),
    "empty": lambda step: (shutil.rmtree(step), step.mkdir()),
    "a bit of the model": lambda step: flip(step / "model"),
    "a bit of the optimizer": lambda step: flip(step / "optimizer"),
    "set aside before": lambda step: (
        flip(step / "model"), (step.parent.parent / "damaged-12").mkdir()
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside(damage, saved_twice, copied, capsys):
    workdir, command = copied
    DAMAGES[damage](workdir / "checkpoints" / "12")
    assert main(command) == 0
    err = capsys.readouterr().err
    assert "checkpoint 12 cannot be read" in err and "resumed at step 10 of 12" in err
    name = "damaged-12-1" if damage == "set aside before" else "damaged-12"
    assert (workdir / name).is_dir()
    assert_same_run(workdir, saved_twice[0])


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("RESOURCE_EXHAUSTED: 9 GiB"), "out of memory (RESOURCE_EXHAUSTED: 9 GiB)"),
        (PermissionError(13, "Permission denied", "x"), "be read now ([Errno 13] Permission denie"),
        (ValueError("UNAVAILABLE: the network is down"), "be read now (UNAVAILABLE: the network"),
        (OSError(5, "Input/output error"), "be read now ([Errno 5] Input/output error)"),
    ],
)
def test_what_is_no_damage_moves_nothing(error, line, saved_twice, copied, monkeypatch, capsys):
    workdir, command = copied

    def restore(*arguments, **named):
        try:
            raise error
        except Exception as cause:
            raise Exception("Encountered error while reading array") from cause

    with monkeypatch.context() as patch:
        patch.setattr("orbax.checkpoint.CheckpointManager.restore", restore)
        assert main(command) == 2
    assert line in capsys.readouterr().err
    assert not list(workdir.glob("damaged-*"))
    assert main(command) == 0
    assert "the run is complete: step 12 of 12" in capsys.readouterr().err
    assert_same_run(workdir, saved_twice[0])


def test_another_tokenizer_than_the_models_is_refused(copied, capsys):
    """Everywhere a model is used; `test_errors` has it for training."""
    workdir, _ = copied
    path = workdir / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=1))
    out = workdir.parent / "out"
    for command in (
        ["eval"],
        ["generate", "--prompt=x"],
        ["export", "--kind=gpt2", f"--out={out}"],
    ):
        assert main([*command, f"--workdir={workdir}"]) == 2
        assert "tokenizer.json is not the tokenizer of checkpoint 12" in capsys.readouterr().err
    assert not out.exists()


def test_a_file_system_without_locks(copied, monkeypatch, capsys):
    """It is no other run that holds the folder."""

    def flock(file, how):
        raise OSError(errno.ENOSYS, "Function not implemented")

    workdir, command = copied
    monkeypatch.setattr(lock.fcntl, "flock", flock)
    capsys.readouterr()
    assert main(command) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"--workdir={workdir} cannot be written: it cannot be locked (Function not" in line
    assert line.endswith("use a folder on another file system, or mount this one with flock")


def test_a_finished_run_is_evaluated_if_it_was_not(saved_twice, copied, capsys):
    workdir, command = copied
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert "eval/loss" in lines[-1]
    (workdir / "metrics.jsonl").write_text("".join(lines[:-1]))
    capsys.readouterr()
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["eval/loss"] > 0
    assert_same_run(workdir, saved_twice[0])


def test_a_run_without_its_last_checkpoint_is_no_whole_run(saved_twice, copied, capsys):
    """An earlier one is used, and a line says so; the metrics need not be readable."""
    workdir, _ = copied
    used = f"{workdir}: its newest checkpoint, that of step 10 of 12, is used"
    told = f"{used}; the run came to step 12"
    losses = []
    for warned in False, True:
        capsys.readouterr()
        assert main(["eval", f"--workdir={workdir}", "--json"]) == 0
        out, err = capsys.readouterr()
        losses.append(json.loads(out)["loss"])
        assert (told in err) is (used in err) is warned
        shutil.rmtree(workdir / "checkpoints" / "12", ignore_errors=True)
    assert losses[0] != losses[1]
    for content in "garbage\n", '{"step": "x"}\n', None:
        metrics = workdir / "metrics.jsonl"
        metrics.write_text(content) if content else metrics.unlink()
        assert main(["eval", f"--workdir={workdir}"]) == 0
        err = capsys.readouterr().err
        assert used in err and told not in err


def test_a_mesh_of_more_devices_is_left_out(saved_twice, copied, capsys):
    """A run of several devices is evaluated on one, and a line says so."""
    workdir, _ = copied
    config = json.loads((workdir / "config.json").read_text())
    config["mesh"]["fsdp"] = 2
    (workdir / "config.json").write_text(json.dumps(config))
    losses = []
    for folder in saved_twice[0], workdir:
        capsys.readouterr()
        assert main(["eval", f"--workdir={folder}", "--json"]) == 0
        out, err = capsys.readouterr()
        losses.append(json.loads(out)["loss"])
    assert losses[0] == losses[1]
    assert "mesh.fsdp=2 makes 2 devices, there are 1" in err
    assert "here each device holds the whole model" in err


def test_a_resume_touches_nothing_that_has_not_changed(copied):
    workdir, command = copied
    names = "config.json", "tokenizer.json", "environment.json", "metrics.jsonl"
    before = [(workdir / name).stat() for name in names]
    assert main(command) == 0
    after = [(workdir / name).stat() for name in names]
    assert [(s.st_ino, s.st_mtime_ns) for s in before] == [(s.st_ino, s.st_mtime_ns) for s in after]


@pytest.mark.parametrize(
    ("file", "content", "code", "line"),
    [
        ("metrics.jsonl", b'{"step": 12, "lo', 0, "its last line was torn by a crash"),
        ("metrics.jsonl", b"garbage\n", 2, "damaged: Expecting value"),
        ("metrics.jsonl", b"{}\n", 2, "is damaged: it has no step; delete that line, or restore"),
        ("metrics.jsonl", b'{"step": "1"}\n', 2, "is damaged: step is '1'; delete that line, or"),
        ("environment.json", b'[{"time": null}]', 0, ""),
        ("environment.json", b"[", 2, "environment.json is damaged: Expecting value: line"),
        (
            "environment.json",
            b"{}",
            2,
            "environment.json is damaged: it holds dict, not list; d",
        ),
    ],
)
def test_damaged_records_are_named(file, content, code, line, copied, capsys):
    workdir, command = copied
    path = workdir / file
    if file == "environment.json":
        path.write_bytes(content)
        shutil.rmtree(workdir / "checkpoints" / "12")  # else nothing is left to do
    else:
        path.write_bytes(path.read_bytes() + content)
    before = path.read_bytes()
    assert main(command) == code
    assert line in capsys.readouterr().err
    if code:
        assert path.read_bytes() == before


@pytest.mark.parametrize(("first", "last"), [(4, 11), (2, 3)])
def test_a_profile_over_a_resume(first, last, copied, capsys):
    """Steps that are done are not traced; the rest of them are."""
    workdir, command = copied
    shutil.rmtree(workdir / "checkpoints" / "12")
    assert main([*command, f"--profile={first}:{last}"]) == 0
    traced = list((workdir / "profile").rglob("*.xplane.pb"))
    assert bool(traced) == (last > 10)
    said = "--profile=2:3: those steps are done, nothing is traced" in capsys.readouterr().err
    assert said == (last < 10)


# Starts one run many times from one process that has imported everything; each start ends itself
# at an operation on a file of the run's folder, one later than the start before.
KILL_AT_EACH_OPERATION = """
import json, os, signal, sys
from pathlib import Path

workdir, command, first, last, stride = json.loads(sys.argv[1])
from prmoe_jax import train  # noqa: imported before the forks
from prmoe_jax.cli import main

EVENTS = "open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link"


def die_at(count):
    def hook(event, arguments):
        nonlocal count
        # Reading changes nothing: it can't be told from the operation before it.
        reading = event == "open" and not (arguments[1] or "r").strip("rbt") and not (
            arguments[2] & (os.O_WRONLY | os.O_RDWR)
        )
        path = str(arguments[0]) if arguments else ""
        if event in EVENTS and path.startswith(workdir) and not reading:
            count -= 1
            if count == 0:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)


for count in [*range(first, last, stride)]:
    child = os.fork()
    if child == 0:
        die_at(count)
        os._exit(main(command))
    _, status = os.waitpid(child, 0)
    print("start", os.waitstatus_to_exitcode(status), flush=True)
    if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
        break
"""


def killed_at_each_operation(workdir, command, first, last, stride=1):
    """The exit code of each start."""
    settings = json.dumps([str(workdir), command, first, last, stride])
    done = subprocess.run(
        [sys.executable, "-c", KILL_AT_EACH_OPERATION, settings],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    codes = [int(code) for code in re.findall(r"^start (-?\d+)$", done.stdout, re.M)]
    assert codes, done.stderr
    return codes, done.stderr


@pytest.mark.slow
def test_killed_at_each_operation_on_a_file(text, tmp_path):
    """No start is ever refused, whatever the one before left half done."""
    settings = {"checkpoint.every": 3, "eval.every": 4}
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert main(arguments(text, whole, "dense", **settings)) == 0
    command = arguments(text, run, "dense", **settings)
    codes, err = killed_at_each_operation(run, command, 1, 400, int(os.environ.get("STRIDE", 7)))
    assert set(codes[:-1]) == {-signal.SIGKILL} and len(codes) > 5, (codes, err)
    assert codes[-1] in (0, -signal.SIGKILL), err
    assert main(command) == 0
    assert_same_run(run, whole)


def test_full_disk_stops_on_one_line_and_keeps_the_last_checkpoint(
    text, tmp_path, capfd, monkeypatch
):
    command = arguments(text, tmp_path / "run", "dense", **{"checkpoint.every": 4})
    sizes = iter([10**9, 10])  # room for the checkpoint of step 4, not for that of step 8
    real = shutil.disk_usage

    def disk_usage(path):  # TFDS asks as well, for the folder of its own
        usage = real(path)
        return usage._replace(free=next(sizes)) if Path(path).name == "checkpoints" else usage

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    assert main(command) == 2
    err = capfd.readouterr().err
    assert "Traceback" not in err
    assert "0.0 MB are free; the last good one is step 4" in err.splitlines()[-1]
    monkeypatch.undo()
    assert main(command) == 0
    assert parameters(tmp_path / "run")[0] == 12


def test_disk_full_in_the_middle_of_a_checkpoint(text, tmp_path):
    """Orbax and Tensorstore fail in many threads; the user reads one line."""
    settings = {"train.steps": 400, "checkpoint.every": 10, "model.d_model": 64}
    process = start(*arguments(text, tmp_path / "run", "dense", **settings))
    wait_for_lines(tmp_path / "run", 25, process)  # the checkpoint of step 10 is complete
    soft, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100_000, hard))
    code, _, err = finish(process)
    assert code == 2, err
    assert "Traceback" not in err
    assert "Event loop" not in err
    last = err.splitlines()[-1]
    assert last.startswith("prmoe: a checkpoint could not be written to")
    step = int(last.rpartition("the last good one is step ")[2])
    assert parameters(tmp_path / "run")[0] == step


def test_checksums_of_large_arrays_one_by_one(monkeypatch):
    """The same numbers, and never the bits of two large arrays at once."""
    rng = np.random.default_rng(0)
    named = {f"w_{n}": jax.numpy.asarray(rng.normal(size=(n, 300))) for n in range(1, 9)}
    expected = checkpoint.checksums(named)
    assert len(set(expected.values())) == len(named)
    together = []

    def watched(small):
        together.extend(small)
        return jax.tree.map(checkpoint._checksum, small)

    monkeypatch.setattr(checkpoint, "_checksums", watched)
    monkeypatch.setattr(checkpoint, "LARGE_BYTES", named["w_3"].nbytes)
    found = checkpoint.checksums(named)
    assert found == expected and list(found) == list(named)
    assert together == ["w_1", "w_2", "w_3"]
    altered = named | {"w_8": named["w_8"].at[3, 7].add(1)}
    assert checkpoint.checksums(altered)["w_8"] != expected["w_8"]


@pytest.mark.parametrize(("processes", "kind"), [(1, UserError), (2, jax.errors.JaxRuntimeError)])
def test_a_process_lost_during_a_checkpoint_is_told_apart(processes, kind, tmp_path, monkeypatch):
    """Orbax's barrier fails then; the other processes end as if a step had waited in vain."""
    checkpoints = Checkpoints(tmp_path, keep=1)

    def close():
        try:
            raise jax.errors.JaxRuntimeError("INTERNAL: Barrier failed because: task is set to ERR")
        except RuntimeError as cause:
            raise TimeoutError("Timed out while waiting for a barrier") from cause

    monkeypatch.setattr(checkpoints._manager, "close", close)
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    with pytest.raises(kind, match="Barrier failed" if processes > 1 else "Timed out while wait"):
        checkpoints.close()


def test_opening_to_read_prints_nothing(tmp_path, capfd, caplog):
    """Orbax has three warnings for it, which a notebook would show at every evaluation."""
    orbax = logging.getLogger("absl")
    before = orbax.level
    with caplog.at_level(logging.WARNING, "absl"):
        Checkpoints(tmp_path).close()
        assert orbax.level == logging.WARNING
    assert not caplog.records and capfd.readouterr() == ("", "")
    assert orbax.level == before


def test_a_damaged_checkpoint_to_read(copied, capsys):
    """The newest one, or the one that is asked for; no other is read in its place."""
    workdir, _ = copied
    fix = "restore a copy of it, or resume its run, which goes back to an earlier one if it can"
    flip(workdir / "checkpoints" / "12" / "model")
    assert main(["generate", f"--workdir={workdir}", "--prompt=a", "--tokens=1"]) == 2
    assert "checkpoint 12 in" in (line := capsys.readouterr().err) and line.endswith(f"; {fix}\n")
    flip(workdir / "checkpoints" / "10" / "model")
    config = load(workdir / "config.json")
    with pytest.raises(UserError, match=f"checkpoint 10 in .* cannot be read: .*; {fix}"):
        restore_model(workdir, config, make_mesh(config, jax.devices()[:1]), 10)


def test_no_other_projects_revision(tmp_path, monkeypatch):
    """The package may be installed in an environment inside another project's repository."""
    site = tmp_path / "site" / "prmoe_jax"
    site.mkdir(parents=True)
    (site / "__init__.py").touch()
    git = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in ("init", "-q"), ("commit", "-q", "--allow-empty", "-m", "theirs"):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(directory.prmoe_jax, "__file__", str(site / "__init__.py"))
    found = directory.environment(jax.devices())
    assert (found["git_revision"], found["git_changes"]) == (None, False)


def test_a_device_of_another_kind_has_its_own_name():
    card = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3")
    assert directory.device_name(card) == "NVIDIA H100 80GB HBM3"


def test_environment_is_recorded(text, tmp_path):
    assert main(arguments(text, tmp_path / "run", **{"train.steps": 1})) == 0
    (record,) = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert record["versions"]["jax"] == jax.__version__
    assert record["device_count"] == 1
    assert record["device"].startswith("cpu, ") and len(record["device"]) > len("cpu, x")
