"""Files are replaced whole, and what is read back is checked."""

import os

import pytest

from prmoe_jax import files
from prmoe_jax.errors import UserError
from tests.support.faults import file_size_limit


def test_an_unchanged_file_is_not_touched(tmp_path):
    path = tmp_path / "config.json"
    files.replace(path, "é\n")
    before = path.stat()
    files.replace(path, "é\n")
    after = path.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    files.replace(path, "another")
    assert path.read_text() == "another" and path.stat().st_ino != before.st_ino
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("operation", ["open", "write", "fsync", "rename"])
def test_a_failure_leaves_the_old_file(operation, tmp_path, monkeypatch):
    """Whichever step fails, by whatever exception."""
    path = tmp_path / "config.json"
    files.replace(path, "old")

    def fail(*arguments, **named):
        raise KeyboardInterrupt

    if operation == "open":
        monkeypatch.setattr("pathlib.Path.open", fail)
    elif operation == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    elif operation == "rename":
        monkeypatch.setattr("pathlib.Path.replace", fail)
    if operation == "write":
        with file_size_limit(1000):
            with pytest.raises(UserError, match="config.json cannot be written: File too large"):
                files.replace(path, "n" * 2000)
    else:
        with pytest.raises(KeyboardInterrupt):
            files.replace(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
    files.replace(path, "new")
    assert path.read_text() == "new"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is damaged: Expecting value"),
        (b"\xff{}", "is damaged: 'utf-8' codec can't decode"),
        (b"[1]", "is damaged: it holds list, not dict; mend it"),
        (b"[" * 100_000, "is damaged: it is nested too deeply; mend it"),
        (b"1" * 5000, "is damaged: "),
        (None, "cannot be read: No such file"),
    ],
)
def test_damaged_json_is_named(content, message, tmp_path):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="x.json") as caught:
        files.read_json(path, dict, "mend it")
    assert message in str(caught.value)


def test_a_torn_line_is_left_out(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    assert files.read_json_lines(path, {"step": int}, "") == []
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"st')
    assert files.read_json_lines(path, {"step": int}, "") == [{"step": 1}, {"step": 2}]
    assert "metrics.jsonl: its last line was torn by a crash and is left out" in caplog.text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "line 2, is damaged: Expecting"),
        (b"7", "line 2, is damaged: not an object but int; delete it"),
        (b'{"loss": 1}', "line 2, is damaged: it has no step; delete it"),
        (b"\0\0\0", "line 2, is damaged: Expecting value"),
    ],
)
def test_a_damaged_line_is_named(line, message, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    with pytest.raises(UserError) as caught:
        files.read_json_lines(path, {"step": int}, "delete it")
    assert message in str(caught.value)
