"""Recorded teachers: what is written comes back, and no altered number teaches."""

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from prmoe_jax.config.schema import TeacherConfig
from prmoe_jax.data import cache
from prmoe_jax.distill import teacher as teachers
from prmoe_jax.errors import UserError
from tests.support.faults import altered, file_size_limit
from tests.support.paths import REPOSITORY
from tests.support.teacher_caches import config_of, data_of, predictions_of, write


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lessons")
    data = data_of(folder)
    write(folder / "lessons", data)
    return folder / "lessons", data


@pytest.fixture
def copy(written, tmp_path):
    source, data = written
    return shutil.copytree(source, tmp_path / "lessons"), data


def refused(folder, data, *expected):
    with pytest.raises(UserError) as error:
        teachers.attach_predictions(data, config_of(folder))
    message = str(error.value)
    assert message.startswith(f"teacher.cache={folder} can't be read (") and "\n" not in message
    assert message.endswith("); delete it, and write it again by prmoe teacher-cache")
    for text in expected:
        assert text in message


def test_what_was_recorded_comes_back(written):
    folder, data = written
    assert len(data.train) % 7 and len(data.train) > 14
    taught = teachers.attach_predictions(data, config_of(folder)).train.teacher_top_k
    tokens, log_p = (np.concatenate(part) for part in zip(*predictions_of(data), strict=True))
    np.testing.assert_array_equal(taught.tokens_BxLxK, tokens[: len(data.train)])
    np.testing.assert_array_equal(taught.log_p_BxLxK, log_p[: len(data.train)])
    assert [part.dtype for part in taught] == [np.uint16, np.float32]


def test_the_fingerprint_is_that_of_the_numbers(written, tmp_path):
    """A run that was taught by one folder goes on with another of the same content."""
    folder, data = written
    known = teachers.attach_predictions(data, config_of(folder)).teacher_cache_fingerprint
    assert write(tmp_path / "again", data)["fingerprint"] == known
    left, digest = len(data.train), hashlib.sha256()
    for tokens, log_p in predictions_of(data):
        digest.update(tokens[:left].astype(np.uint16).tobytes() + log_p[:left].tobytes())
        left -= len(tokens)
    assert known == digest.hexdigest()[:24]


@pytest.mark.parametrize("name", ["tokens.npy", "log_p.npy", "meta.json"])
def test_altered_numbers_do_not_teach(copy, name):
    folder, data = copy
    content = (folder / name).read_bytes()
    if name == "meta.json":
        (folder / name).write_bytes(content.replace(b'"step": 5', b'"step": 7'))
    else:
        (folder / name).write_bytes(altered(content))
    refused(folder, data, f"{name} is not as it was written")
    if name != "meta.json":
        (folder / name).write_bytes(content[:-4])
        refused(folder, data, f"{name} has {len(content) - 4} bytes, not {len(content)}")
    (folder / name).unlink()
    refused(folder, data, "No such file or directory", name)


def test_a_copy_teaches_and_other_files_are_ignored(written, tmp_path):
    source, data = written
    folder = shutil.copytree(source, tmp_path / "lessons", copy_function=shutil.copyfile)
    (folder / "notes.txt").write_text("mine")
    teachers.attach_predictions(data, config_of(folder))
    record = json.loads((folder / cache.DIGESTS).read_text())
    assert set(record) == {"tokens.npy", "log_p.npy", "meta.json"}
    for name, known in record.items():
        assert known["mtime_ns"] == (folder / name).stat().st_mtime_ns


def other_array(name, change):
    def damage(folder):
        np.save(folder / name, change(np.load(folder / name)))

    return damage


def meta(content):
    return lambda folder: (folder / "meta.json").write_text(content)


# Damage in folders that hold no digests.
BEFORE = {
    "fewer windows": other_array("log_p.npy", lambda p: p[1:]),
    "shorter windows": other_array("log_p.npy", lambda p: p[:, 1:]),
    "fewer tokens": other_array("tokens.npy", lambda p: p[..., 1:]),
    "flat": other_array("tokens.npy", lambda p: p.ravel()),
    "doubles": other_array("log_p.npy", lambda p: p.astype(np.float64)),
    "signed": other_array("tokens.npy", lambda p: p.astype(np.int16)),
    "wide": other_array("tokens.npy", lambda p: p.astype(np.uint32)),
    "no array": lambda folder: (folder / "tokens.npy").write_bytes(b"tokens"),
    "garbage": meta("{"),
    "list": meta("[]"),
    "text": meta('"meta"'),
    "nothing": meta("{}"),
    "windows": meta('{"windows": 3, "top_k": 3, "temperature": 1.0, "fingerprint": "a"}'),
    "top_k": meta('{"windows": {}, "top_k": "3", "temperature": 1.0, "fingerprint": "a"}'),
    "deep": meta("[" * 9999),
}


@pytest.mark.parametrize("name", BEFORE)
def test_damage_is_found_without_digests(copy, name):
    folder, data = copy
    (folder / cache.DIGESTS).unlink()
    BEFORE[name](folder)
    refused(folder, data)


def test_caches_from_before_are_sealed_by_their_first_use(copy):
    folder, data = copy
    (folder / cache.DIGESTS).unlink()
    teachers.attach_predictions(data, config_of(folder))
    content = (folder / "log_p.npy").read_bytes()
    (folder / "log_p.npy").write_bytes(altered(content))
    refused(folder, data, "log_p.npy is not as it was written")


def test_a_disk_without_room_is_told_of_before_the_teacher_is_asked(written, tmp_path, monkeypatch):
    def no_room(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def predictions():
        raise AssertionError("asked")
        yield

    _, data = written
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", no_room)
        with pytest.raises(
            UserError, match="lessons: No space left on device; make room or set --o"
        ):
            write(tmp_path / "lessons", data, predictions())
    assert [path.name for path in tmp_path.iterdir()] == ["lessons.lock"]
    write(tmp_path / "lessons", data)


def test_of_two_commands_for_one_folder_the_second_is_refused(written, tmp_path, monkeypatch):
    """It found the folder free, and waited for the first one."""
    _, data = written
    build_once = cache.build_once

    def after_the_other(folder, build, setting):
        monkeypatch.setattr(cache, "build_once", build_once)
        write(folder, data)
        return build_once(folder, build, setting)

    monkeypatch.setattr(cache, "build_once", after_the_other)
    with pytest.raises(UserError, match="lessons: another command has just written it; give"):
        write(tmp_path / "lessons", data)


def test_another_teacher_than_the_one_named_is_told_of(written, caplog):
    folder, data = written
    for workdir, told in (("runs/a", 0), ("runs/b", 1)):
        config = config_of(folder)
        teacher = dataclasses.replace(config.teacher, workdir=workdir)
        teachers.attach_predictions(data, dataclasses.replace(config, teacher=teacher))
        assert caplog.text.count("has the predictions of runs/a, not of runs/b") == told


@pytest.mark.parametrize("size", [1, 50, 128, 211, 1009, 2003, 4001])
def test_every_write_to_a_full_disk_is_one_line(written, tmp_path, size):
    _, data = written
    with (
        file_size_limit(size),
        pytest.raises(UserError, match="write the cache .*: File too large"),
    ):
        write(tmp_path / "lessons", data)
    assert [path.name for path in tmp_path.iterdir()] == ["lessons.lock"]
    write(tmp_path / "lessons", data)
    teachers.attach_predictions(data, config_of(tmp_path / "lessons"))


FULL = """
import sys
from pathlib import Path
from prmoe_jax.errors import UserError
from tests.support.teacher_caches import data_of, write
try:
    write(Path(sys.argv[2]), data_of(Path(sys.argv[1]), words=1000))
except UserError as error:
    print(error)
"""


def test_a_small_disk_does_not_end_the_process(tmp_path):
    """SIGBUS ends a process that writes to a memory map where the disk is full."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        found = subprocess.run(
            [sys.executable, "-c", FULL, tmp_path, disk / "lessons"],
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
        )
        assert found.returncode == 0, found.stderr
        assert "lessons: No space left on device; make room or set --out" in found.stdout
        assert [path.name for path in disk.iterdir()] == ["lessons.lock"]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_folder_in_an_unknown_home_directory(written, monkeypatch):
    _, data = written
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    config = config_of("~/lessons")
    with pytest.raises(UserError, match="teacher.cache=~/lessons: Could not determine home direc"):
        teachers.attach_predictions(data, config)
    config = dataclasses.replace(config, teacher=TeacherConfig(cache="lessons"))
    with pytest.raises(UserError, match="teacher.cache=lessons can't be read"):
        teachers.attach_predictions(data, config)
