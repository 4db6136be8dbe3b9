"""A run's folder in an object store: the run that a disk would hold, whatever happens to it."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from prmoe_jax import boundary, files, stores
from prmoe_jax.cli import main
from prmoe_jax.errors import UserError
from prmoe_jax.run import metrics
from prmoe_jax.run.checkpoint import Checkpoints
from prmoe_jax.run.metrics import MetricsWriter, read_metrics
from prmoe_jax.stores import lock
from tests.support.extras import needs_extra
from tests.support.lines import only_line
from tests.support.paths import REPOSITORY
from tests.support.runs import arguments, assert_same_run, finish

pytestmark = [needs_extra("gcs", "gcsfs"), pytest.mark.usefixtures("object_store")]
SETTINGS = {"checkpoint.every": 3, "eval.every": 4, "checkpoint.keep": 2}


@pytest.fixture
def folder(request):
    """A new folder of the store."""
    return f"gs://bucket/{request.node.name.replace('[', '-').rstrip(']')}"


@pytest.fixture(scope="module")
def local(text, tmp_path_factory):
    """The same run on a disk."""
    workdir = tmp_path_factory.mktemp("local") / "run"
    assert main(arguments(text, workdir, "dense", **SETTINGS)) == 0
    return workdir


# A lease of four seconds, and lines written four times a second.
QUICK = """
import sys
from prmoe_jax.run import metrics
from prmoe_jax.stores import lock

lock.LEASE, metrics.EVERY = 4.0, 0.25
from prmoe_jax.cli import main

sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def short_lease(monkeypatch):
    """This process judges leases as those that `start` makes do."""
    monkeypatch.setattr(lock, "LEASE", 4.0)


def start(command):
    return subprocess.Popen(
        [sys.executable, "-c", QUICK, *command],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, finish(process)
        time.sleep(0.02)


def wait_until_free(workdir):
    while lock.holder(workdir):
        time.sleep(0.1)


def test_a_run_equals_that_on_a_disk(text, folder, local, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments(text, folder, "dense", **SETTINGS)) == 0
    assert_same_run(folder, local)
    workdir = stores.as_path(folder)
    names = {path.name for path in workdir.iterdir()}
    assert names == {path.name for path in local.iterdir()} - {".lock"}
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"9", "12"}
    assert (workdir / "config.json").read_text() == (local / "config.json").read_text()

    # It is complete for those who start it again, and everyone else who reads it.
    capsys.readouterr()
    assert main(arguments(text, folder, "dense", **SETTINGS)) == 0
    assert "the run is complete: step 12 of 12" in capsys.readouterr().err
    for verb in (["eval"], ["generate", "--tokens=5"], ["report"]):
        shown = []
        for place in (folder, local):
            assert main([*verb, f"--workdir={place}", "--json"]) == 0
            shown.append(capsys.readouterr().out.replace(str(place), "RUN"))
        assert shown[0] == shown[1]
    assert (workdir / "report" / "report.html").read_text().startswith("<!doctype html>")
    for setting in ("init.workdir", "teacher.workdir"):
        command = arguments(text, tmp_path / setting, "dense", **{"train.steps": 2})
        assert main([*command, f"--config.{setting}={folder}"]) == 0
    assert main(["params", f"--config={folder}/config.json"]) == 0
    out = tmp_path / "out"
    assert main(["export", "--kind=safetensors", f"--workdir={folder}", f"--out={out}"]) == 0
    assert not any("gs:" in name for name in os.listdir())


def test_tensorboard_reads_its_file(text, folder, tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    assert main(arguments(text, folder, "dense", **{"train.steps": 3})) == 0
    (path,) = (stores.as_path(folder) / "tensorboard").iterdir()
    data, steps = path.read_bytes(), []
    while data:  # a length of 8 bytes, its checksum of 4, the event, its checksum of 4
        size = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + size])
        steps += [event.step for value in event.summary.value if value.tag == "loss"]
        data = data[16 + size :]
    assert steps == [1, 2, 3]


@pytest.mark.usefixtures("short_lease")
def test_killed_in_the_middle(text, folder, tmp_path, capsys):
    """It costs the rest of the lease; then the run goes on to the lines of one on a disk."""
    settings = {"train.steps": 30, "checkpoint.every": 5, "eval.every": 10}
    assert main(arguments(text, tmp_path / "run", "dense", **settings)) == 0
    command, workdir = arguments(text, folder, "dense", **settings), stores.as_path(folder)
    process = start(command)
    wait_for(workdir / "checkpoints" / "5" / "commit_success.txt", process)
    process.kill()
    process.communicate()
    assert (workdir / ".lock").exists()
    if lock.holder(workdir):  # on a busy machine the lease may have ended
        with pytest.raises(UserError, match="if it was killed, its lock ends in [0-4] s"):
            lock.locked(workdir).__enter__()
    wait_until_free(workdir)
    capsys.readouterr()
    assert main(command) == 0
    err = capsys.readouterr().err
    assert "takes over the lock of process" in err and "resumed at step" in err
    assert_same_run(folder, tmp_path / "run")


def test_two_runs_in_one_folder(text, folder, capsys):
    workdir = stores.as_path(folder)
    with lock.locked(workdir):
        assert lock.holder(workdir).startswith(f"process {os.getpid()} on ")
        assert main(arguments(text, folder, "dense")) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert f"--workdir={folder} is in use by another run (process {os.getpid()} on " in line
        assert "wait for it, or give another --workdir; if it was killed, its lock ends in" in line
    assert lock.holder(workdir) == "" and not workdir.exists()


def test_of_two_that_come_at_once_one_gets_the_lease(folder, monkeypatch):
    """The second reads the folder before the first has written its lock."""
    workdir, read = stores.as_path(folder), lock._read
    with monkeypatch.context() as patch, lock.locked(workdir):
        answers = iter([lambda path: None])
        patch.setattr(lock, "_read", lambda path: next(answers, read)(path))
        with pytest.raises(UserError, match="is in use by another run"):
            lock.locked(workdir).__enter__()
    with lock.locked(workdir):
        pass


def test_a_lease_is_renewed_until_it_is_released(folder, monkeypatch):
    monkeypatch.setattr(lock, "LEASE", 0.8)
    workdir = stores.as_path(folder)
    with lock.locked(workdir):
        for _ in range(4):
            time.sleep(0.5)
            assert lock.holder(workdir)
    time.sleep(0.5)
    assert not (workdir / ".lock").exists()


@pytest.mark.usefixtures("short_lease")
def test_a_write_whose_answer_was_lost_is_our_own(folder, object_store):
    """The store did it and said 503; repeated, the condition no longer holds."""
    with lock.locked(stores.as_path(folder)) as check:
        object_store.fail(lose_answers=1)
        time.sleep(1.1)  # then the lease is renewed
        check()
    assert not stores.as_path(folder).exists()


@pytest.mark.usefixtures("short_lease")
def test_a_run_that_was_suspended_ends_when_it_comes_back(text, folder):
    """Another run has its folder then; nothing more is written."""
    workdir = stores.as_path(folder)
    process = start(arguments(text, folder, "dense", **{"train.steps": 100_000}))
    wait_for(workdir / "metrics.jsonl", process)
    process.send_signal(signal.SIGSTOP)
    wait_until_free(workdir)
    with lock.locked(workdir):
        before = (workdir / "metrics.jsonl").read_bytes()
        process.send_signal(signal.SIGCONT)
        code, _, err = finish(process)
        assert code == 1
        assert "another run has taken over the folder, since this one was silent for" in err
        assert "Traceback" not in err
        assert (workdir / "metrics.jsonl").read_bytes() == before
        assert lock.holder(workdir).startswith(f"process {os.getpid()} on ")


def test_a_store_that_fails_for_a_while(text, folder, local, object_store, caplog):
    command = arguments(text, folder, "dense", **SETTINGS)

    def fail_for_a_while():
        wait = stores.as_path(folder) / "checkpoints" / "3"
        while not wait.exists():
            time.sleep(0.02)
        object_store.fail(until=time.time() + 3)

    thread = threading.Thread(target=fail_for_a_while)
    thread.start()
    assert main(command) == 0
    thread.join()
    assert_same_run(folder, local)


def test_a_store_that_goes_on_failing(folder, monkeypatch):
    """The request is repeated until the patience ends; then one line says so."""
    from gcsfs.core import GCSFileSystem
    from gcsfs.retry import HttpError

    from prmoe_jax.stores import gcs

    tries = []

    async def fail(*arguments, **named):
        tries.append(arguments)
        raise HttpError({"code": 503, "message": "Service Unavailable"})

    workdir = stores.as_path(folder)
    writer = MetricsWriter(workdir, 0)
    writer.write({"step": 1, "loss": 2.0})
    monkeypatch.setattr(gcs, "PATIENCE", 2.5)
    monkeypatch.setattr(GCSFileSystem, "_request", fail)
    with pytest.raises(UserError, match=r"the object store fails \(Service Unavailable, 503\)"):
        writer.sync()
    assert len(tries) > 1
    # When the patience is at its end, each further request is made once.
    store, *_ = gcs._located(workdir / "x")
    assert store._failing_since < time.monotonic()
    store._failing_since -= 2.5
    tries.clear()
    with pytest.raises(OSError, match="the object store fails"):
        gcs.write(workdir / "x", b"content")
    assert len(tries) == 1
    monkeypatch.undo()
    writer.close()  # nothing was lost
    assert read_metrics(workdir / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]


@pytest.mark.usefixtures("short_lease")
def test_what_was_there_before_a_store_failed(
    text, folder, local, object_store, monkeypatch, capsys
):
    """One line, and the same command goes on with what was there before."""
    from gcsfs.core import GCSFileSystem

    from prmoe_jax.stores import gcs

    save = Checkpoints.save

    def fail_from_step_six(checkpoints, step, *arguments):
        if step == 6:
            checkpoints.wait()
            object_store.fail(until=time.time() + 10)
        save(checkpoints, step, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", fail_from_step_six)
        patch.setattr(gcs, "PATIENCE", 1.0)
        patch.setattr(GCSFileSystem, "_request", GCSFileSystem._request.__wrapped__)  # one attempt
        assert main(arguments(text, folder, "dense", **SETTINGS)) == 2
    object_store.fail()
    err = capsys.readouterr().err
    (line,) = [line for line in err.splitlines() if line.startswith("prmoe: ")]
    assert "the object store fails" in line and "Traceback" not in err
    assert (stores.as_path(folder) / "checkpoints" / "3" / "commit_success.txt").exists()
    wait_until_free(stores.as_path(folder))
    assert main(arguments(text, folder, "dense", **SETTINGS)) == 0
    assert "resumed at step 3 of 12" in capsys.readouterr().err
    assert_same_run(folder, local)


@pytest.mark.parametrize(
    ("faults", "place", "line"),
    [
        ({}, "gs://nobucket/run", "cannot be used: there is no such object, or no such bucket; cr"),
        ({"read_only": True}, "gs://bucket/ro", "gs://bucket/ro cannot be used: permission denied"),
        ({"unknown_caller": True}, "gs://bucket/who", "cannot be used: no valid credentials ("),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_store_is_one_line(
    faults, place, line, text, object_store, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    object_store.fail(**faults)
    try:
        assert main(arguments(text, place, "dense")) == 2
        ours = [said for said in capsys.readouterr().err.splitlines() if "prmoe: " in said]
        assert len(ours) == 1 and line in ours[0]
    finally:
        object_store.fail()
    assert not os.listdir() and not stores.as_path(place).exists()


@pytest.mark.parametrize("damage", ["a bit", "no optimizer"])
def test_a_damaged_checkpoint_is_set_aside(damage, text, folder, local, capsys):
    command, workdir = arguments(text, folder, "dense", **SETTINGS), stores.as_path(folder)
    assert main(command) == 0
    newest = workdir / "checkpoints" / "12"
    if damage == "a bit":
        from prmoe_jax.stores import gcs

        names = gcs._store().find(str(newest / "model"), detail=True)
        largest = stores.as_path("gs://" + max(names, key=lambda name: names[name]["size"]))
        content = bytearray(largest.read_bytes())
        content[len(content) // 2] ^= 1
        gcs.write(largest, bytes(content))
    else:
        (newest / "optimizer").rmtree()
    capsys.readouterr()
    assert main(command) == 0
    err = capsys.readouterr().err
    assert "checkpoint 12 cannot be read" in err and "resumed at step 9 of 12" in err
    assert (workdir / "damaged-12" / "commit_success.txt").exists()
    assert_same_run(folder, local)


def test_metrics_are_written_when_it_is_time(folder, monkeypatch):
    """And whole, after a check that the folder is still this run's."""
    monkeypatch.setattr(metrics, "EVERY", 0.3)
    path, checks = stores.as_path(folder) / "metrics.jsonl", []
    files.replace(path, '{"step": 1}\n{"step": 2}\n')
    writer = MetricsWriter(path.parent, 1, lambda: checks.append(path.read_text()))
    writer.write({"step": 2})
    assert not checks
    time.sleep(0.35)
    writer.write({"step": 3})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'
    writer.write({"step": 4})
    assert len(checks) == 1
    writer.sync()
    writer.sync()
    assert len(checks) == 2 and path.read_text().endswith('{"step": 4}\n')
    writer.close()
    assert len(checks) == 2


def test_a_profile(text, folder):
    assert main([*arguments(text, folder, "dense"), "--profile=3:4"]) == 0
    found = (stores.as_path(folder) / "profile" / "plugins" / "profile").iterdir()
    (run,) = found
    assert any(path.name.endswith(".xplane.pb") for path in run.iterdir())


def test_an_unforeseen_error_keeps_its_traceback_there(folder, monkeypatch, capsys):
    monkeypatch.delenv("PRMOE_TRACEBACK")
    workdir = stores.as_path(folder)
    files.replace(workdir / "config.json", "{}")

    def fail():
        raise AssertionError("never")

    assert boundary.guard(fail, lambda: workdir) == 1
    assert f"the traceback is in {folder}/error-" in only_line(capsys.readouterr().err)
