"""Folders that commands make in an object store: whole or unfinished, by one command at a time."""

import json
import os
import signal
from pathlib import Path

import jax
import pytest

from prmoe_jax import files, stores
from prmoe_jax.cli import main, parse_config
from prmoe_jax.config.loading import save
from prmoe_jax.data import copies
from prmoe_jax.errors import UserError
from prmoe_jax.stores import lock
from tests.support.extras import needs_extra
from tests.support.lines import only_line
from tests.support.runs import arguments, finish, logged, start

pytestmark = [needs_extra("gcs", "gcsfs"), pytest.mark.usefixtures("object_store")]


@pytest.fixture
def folder(request, tmp_path, monkeypatch):
    """A new folder of the store; the working directory is a new one, too."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return f"gs://bucket/{request.node.name}"


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
    """A run on a disk, for all that is made of one."""
    workdir = tmp_path_factory.mktemp("local") / "run"
    assert main(arguments(text, workdir, "dense", **{"train.steps": 3})) == 0
    return workdir


def content(folder):
    """The bytes of all files of a folder, by name."""
    from prmoe_jax.stores import gcs

    folder = stores.as_path(folder)
    found = folder.rglob("*") if stores.is_local(folder) else gcs.find(folder)
    return {str(p.relative_to(folder)): p.read_bytes() for p in found if p.is_file()}


def test_a_sweep(text, folder, tmp_path, capsys):
    """kill -9 of a run and its sweep, and the same command again: the records of one on a disk."""
    experiment, there = tmp_path / "experiment", stores.as_path(folder)
    experiment.mkdir()
    command = arguments(text, "x", "dense", **{"train.steps": 40, "checkpoint.every": 5})
    settings = tmp_path / "settings.json"
    save(parse_config(command[1:-2]), settings)
    (experiment / "sweep.py").write_text(
        f"import json\ndef runs():\n    yield 'dense/1', json.load(open({str(settings)!r}))\n"
    )
    assert main(["sweep", str(experiment), "--workdir=gs://nobucket/runs"]) == 2
    line = "--workdir=gs://nobucket/runs cannot be used: there is no such object, or no such bucket"
    assert line in only_line(capsys.readouterr().err)
    process = start("sweep", str(experiment), f"--workdir={folder}")
    run = there / "dense" / "1"
    while not (run / "checkpoints" / "5" / "commit_success.txt").exists():
        assert process.poll() is None, finish(process)
    child = int(lock.holder(run).split()[1])
    process.kill()
    os.kill(child, signal.SIGKILL)
    finish(process)
    (run / ".lock").unlink()  # as if its lease had ended
    capsys.readouterr()
    assert main(["sweep", str(experiment), f"--workdir={folder}", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert "resumed at step" in (run / "log.txt").read_text()
    assert main([*command[:-2], f"--workdir={tmp_path / 'run'}"]) == 0
    assert logged(run) == logged(tmp_path / "run")
    assert row["loss"] == logged(run)[-1]["eval/loss"]
    # The records can be made again from the runs.
    (experiment / "results.jsonl").unlink()
    capsys.readouterr()
    assert main(["sweep", str(experiment), f"--workdir={folder}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [row]
    assert not os.listdir()


def test_an_export_and_an_import(run, folder, tmp_path, capsys):
    for kind in ("gpt2", "safetensors"):
        for out in (f"{folder}/{kind}", tmp_path / kind):
            assert main(["export", f"--kind={kind}", f"--workdir={run}", f"--out={out}"]) == 0
        assert content(f"{folder}/{kind}") == content(tmp_path / kind)
    source = ["import", "--kind=safetensors", f"--source={tmp_path / 'safetensors'}"]
    assert main([*source, f"--workdir={folder}/run"]) == 0
    losses = []
    for workdir in (run, f"{folder}/run"):
        capsys.readouterr()
        assert main(["eval", f"--workdir={workdir}", "--json"]) == 0
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    assert losses[0] == losses[1]
    # Nothing is overwritten.
    before = content(folder)
    export = ["export", "--kind=gpt2", f"--workdir={run}", f"--out={folder}/run"]
    for command, line in (
        (export, f"--out={folder}/run exists; give another folder, or remove it"),
        ([*source, f"--workdir={folder}/run"], f"--workdir={folder}/run holds a run; give another"),
        ([*source, f"--workdir={folder}"], f"--workdir={folder} exists; give another folder"),
    ):
        capsys.readouterr()
        assert main(command) == 2
        assert line in only_line(capsys.readouterr().err)
    assert content(folder) == before and not os.listdir()


def test_a_folder_that_was_not_finished_is_made_anew(run, folder, monkeypatch, capsys):
    """What a killed command left is removed by the next one, and not taken for a whole folder."""
    there = stores.as_path(folder)

    class Killed(BaseException):
        pass

    def upload(source, target, last):
        files.replace(target / "model.safetensors", "half")
        files.replace(target / "part" / "from before", "old")
        raise Killed

    command = ["export", "--kind=safetensors", f"--workdir={run}", f"--out={folder}"]
    with monkeypatch.context() as patch:
        patch.setattr(stores, "upload", upload)
        main(command)
    assert files.UNFINISHED in content(folder) and "config.json" not in content(folder)
    capsys.readouterr()
    with lock.locked(there, "--out"):
        assert main(command) == 2
        assert f"--out={folder} is in use by another run (process" in capsys.readouterr().err
    assert main(command) == 0
    names = {"model.safetensors", "config.json", "README.md", "tokenizer.json"}
    assert content(folder).keys() == names


def test_a_teacher_cache(text, run, folder, tmp_path, capsys, caplog):
    settings = {"teacher.workdir": run, "kd.kind": "top_k", "kd.top_k": 3, "train.steps": 4}
    command = arguments(text, "x", "dense", **settings)[1:-2]
    for out in (f"{folder}/cache", tmp_path / "cache"):
        assert main(["teacher-cache", *command, f"--out={out}"]) == 0
    there, here = content(f"{folder}/cache"), content(tmp_path / "cache")
    assert there.pop("digests.json") and here.pop("digests.json") and there == here
    assert main(["teacher-cache", *command, f"--out={folder}/cache"]) == 2
    assert f"--out={folder}/cache exists; give another" in capsys.readouterr().err
    for name, cache in (("there", f"{folder}/cache"), ("here", tmp_path / "cache")):
        student = [*arguments(text, f"{folder}/{name}", "dense", **settings)]
        assert main([*student, f"--config.teacher.cache={cache}"]) == 0
    assert logged(f"{folder}/there") == logged(f"{folder}/here")
    caplog.clear()
    with caplog.at_level("INFO"):
        copies.sealed(stores.as_path(f"{folder}/cache"), list(there), text[1])
    assert not any("copying" in record.message for record in caplog.records)
    assert not [name for name in os.listdir(text[1]) if name.startswith("prmoe-")]
    # Altered numbers don't teach.
    file = stores.as_path(folder) / "cache" / "log_p.npy"
    files.replace(file, file.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match="log_p.npy is not the file that its index describes"):
        copies.sealed(stores.as_path(f"{folder}/cache"), list(there), tmp_path)
    (file.parent / "digests.json").unlink()
    command = arguments(text, f"{folder}/other", "dense", **settings)
    assert main([*command, f"--config.teacher.cache={folder}/cache"]) == 2
    assert f"{folder}/cache can't be read: " in capsys.readouterr().err
    assert not os.listdir()


def test_a_compile_cache(text, folder, capsys):
    """A restart compiles nothing."""
    settings = {"execution.compile_cache": f"{folder}/programs", "train.steps": 2}
    events = []
    jax.monitoring.register_event_listener(lambda name, **_: events.append(name.split("/")[-1]))
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    try:
        for number in range(2):
            jax.clear_caches()
            events.clear()
            assert main(arguments(text, f"{folder}/run{number}", "dense", **settings)) == 0
            assert ("cache_misses" in events) == (number == 0)
            assert "cache_hits" in events or number == 0
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
    assert any(name.startswith("jit_") for name in content(f"{folder}/programs"))
    capsys.readouterr()
    settings["execution.compile_cache"] = "gs://nobucket/programs"
    assert main(arguments(text, f"{folder}/other", "dense", **settings)) == 2
    line = (
        "prmoe: execution.compile_cache=gs://nobucket/programs cannot be used: there is no such obj"
    )
    assert line in capsys.readouterr().err
    assert not os.listdir()


@needs_extra("beam", "apache_beam")
def test_tokenize(text, folder, capsys):
    """The shards of a disk; another command is kept out meanwhile."""
    given = ["tokenize", "--config=tiny:prmoe", "--config.model.vocab_size=384", "--json"]
    given += [f"--config.data.corpus={text[0]}", "--config.data.tokenizer=bytes"]
    given += [f"--config.data.cache_dir={text[1]}"]
    beam = ["--", "--runner=FnApiRunner", "--direct_num_workers=1"]
    with lock.locked(stores.as_path(folder)):
        assert main([*given, f"--out={folder}", *beam]) == 2
        line = only_line(capsys.readouterr().err)
        assert f"--out={folder} is in use by another run (process" in line
    assert not stores.as_path(folder).exists()
    for out in (folder, "shards"):
        assert main([*given, f"--out={out}", *beam]) == 0
    Path("shards/.lock").unlink()
    assert content(folder) == content("shards")
