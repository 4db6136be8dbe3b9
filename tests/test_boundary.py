"""Whatever a command meets ends in one line: streams, memory, devices, and our own defects."""

import contextlib
import errno
import logging
import os
import pty
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

import pytest

from configs import tiny
from prmoe_jax import boundary
from prmoe_jax.cli import main
from prmoe_jax.errors import UserError, ending
from prmoe_jax.model import sizes
from tests.support.lines import only_line
from tests.support.paths import REPOSITORY

TINY = f"--config={tiny.__file__}:prmoe"
THREAD_FAILED = boundary._thread_failed  # conftest replaces both
REPORT_UNRAISABLE = boundary._report_unraisable


def failing(monkeypatch, error):
    """`prmoe params --paper` that meets an error."""

    def fail():
        raise error

    monkeypatch.setattr(sizes, "paper_rows", fail)
    return ["params", "--paper"]


class Speechless(Exception):
    def __str__(self):
        raise ValueError("no words")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (TypeError("two\nlines"), "TypeError: two"),
        (AssertionError(), "AssertionError: AssertionError"),
        (RuntimeError("x" * 1000), f"RuntimeError: {'x' * 200};"),
        (SystemExit("a library gave up"), "SystemExit: a library gave up"),
        (GeneratorExit(), "GeneratorExit"),
        (Speechless(), "Speechless: Speechless without a message"),
        (OSError("no number, no file"), "OSError: no number, no file"),
    ],
)
def test_the_unforeseen_is_one_line_and_a_file(error, line, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PRMOE_TRACEBACK", "0")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert main(failing(monkeypatch, error)) == 1
    said = only_line(capsys.readouterr().err)
    assert said.startswith("prmoe: internal error: ") and line in said
    assert said.endswith(", please report it")
    (file,) = tmp_path.iterdir()
    assert f"the traceback is in {file}" in said
    assert "in fail" in file.read_text() and type(error).__name__ in file.read_text()


def test_a_traceback_may_hold_what_no_encoding_has(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PRMOE_TRACEBACK", "0")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert main(failing(monkeypatch, TypeError("a \ud800 of a broken name"))) == 1
    assert "internal error: TypeError: a " in only_line(capsys.readouterr().err)
    (file,) = tmp_path.iterdir()
    assert r"TypeError: a \ud800 of a broken name" in file.read_text()


def test_a_broken_pipe_is_no_error_only_where_nobody_reads_the_output(tmp_path, monkeypatch):
    """Another pipe breaks when a process that gets data has ended."""
    monkeypatch.setenv("PRMOE_TRACEBACK", "0")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(failing(monkeypatch, BrokenPipeError())) == 1
        os.close(reading)
        assert main(failing(monkeypatch, BrokenPipeError())) == 0


def test_the_traceback_is_in_the_runs_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PRMOE_TRACEBACK", "0")
    monkeypatch.setattr("prmoe_jax.cli.check_run", lambda workdir: 1 / 0)
    assert main(["eval", f"--workdir={tmp_path}"]) == 1
    (file,) = tmp_path.iterdir()
    assert str(file) in capsys.readouterr().err and "ZeroDivisionError" in file.read_text()


def test_without_any_temporary_folder(tmp_path, monkeypatch, capsys):
    """The traceback is in the run's folder, and without one among the lines above."""

    def nowhere():
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setenv("PRMOE_TRACEBACK", "0")
    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    monkeypatch.setattr("prmoe_jax.cli.check_run", lambda workdir: 1 / 0)
    assert main(["eval", f"--workdir={tmp_path}"]) == 1
    (file,) = tmp_path.iterdir()
    assert f"the traceback is in {file}, please report it" in capsys.readouterr().err
    assert main(["eval", f"--workdir={tmp_path / 'none'}"]) == 1
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err and "is in the lines above, please" in err


def test_the_traceback_is_printed_on_demand(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PRMOE_TRACEBACK", "1")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert main(failing(monkeypatch, TypeError("x"))) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (
            MemoryError("16 GiB"),
            2,
            "out of memory (16 GiB); lower train.batch_size, raise train.ac",
        ),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes"),
            2,
            "lower train.batch_size, raise train.accumulate, set execution.remat",
        ),
        (OSError(errno.ENAMETOOLONG, "File name too long", "nnn"), 2, "nnn: File name too long"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "output cannot be written: No space"),
        (
            PermissionError(errno.EACCES, "Permission denied", "run/x"),
            2,
            "run/x: Permission denied",
        ),
        (
            RuntimeError("Unable to initialize backend 'tpux': not in the list"),
            2,
            "set JAX_PLATFORMS to one that is there, or unset it",
        ),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_the_foreseen_is_one_line(error, code, line, monkeypatch, capsys):
    assert main(failing(monkeypatch, error)) == code
    said = only_line(capsys.readouterr().err)
    assert said.startswith("prmoe: ") and line in said


def test_an_evaluation_without_memory_names_its_own_options(tmp_path, monkeypatch, capsys):
    def fail(*given):
        raise RuntimeError("RESOURCE_EXHAUSTED: 7 GiB")

    monkeypatch.setattr("prmoe_jax.cli.check_run", lambda workdir: None)
    monkeypatch.setattr("prmoe_jax.training.evaluate.evaluate", fail)
    assert main(["eval", f"--workdir={tmp_path}"]) == 2
    assert only_line(capsys.readouterr().err) == (
        "prmoe: out of memory (RESOURCE_EXHAUSTED: 7 GiB); lower --batch-size, or --length, which "
        "changes the loss"
    )


DRIVES = "a\x1b]0;b\x07c\x9b2Jd\u202ee\u2028é"
SHOWN = r"a\x1b]0;b\x07c\x9b2Jd\u202ee"


def test_no_message_drives_the_terminal(tmp_path, monkeypatch, capsys):
    """In a line of the user's, in a defect's with its traceback, and in the log's."""
    assert main(failing(monkeypatch, UserError(DRIVES))) == 2
    assert only_line(capsys.readouterr().err) == f"prmoe: {SHOWN} é"
    assert main(failing(monkeypatch, TypeError(DRIVES))) == 1  # conftest has tracebacks printed
    said = capsys.readouterr().err
    assert said.count(SHOWN) == 2 and all(c.isprintable() or c == "\n" for c in said)
    logging.getLogger("prmoe_jax.run").warning("%s\nsecond line", DRIVES)
    assert capsys.readouterr().err == f"{SHOWN}\\u2028é\nsecond line\n"


BESIDE_A_BAR = """
import logging
from tqdm import tqdm
from prmoe_jax.cli import main
from prmoe_jax.model import sizes

def fail():
    bar = tqdm(total=9)
    logging.getLogger("prmoe_jax").info("logged")
    bar.update()
    raise MemoryError("said")

sizes.paper_rows = fail
main(["params", "--paper"])
"""


def test_a_message_has_a_line_of_its_own_beside_a_progress_bar():
    here, there = pty.openpty()
    termios.tcsetwinsize(there, (24, 80))
    process = subprocess.Popen([sys.executable, "-c", BESIDE_A_BAR], cwd=REPOSITORY, stderr=there)
    os.close(there)
    shown = b""
    with contextlib.suppress(OSError):  # the terminal is closed
        while part := os.read(here, 1 << 16):
            shown += part
    os.close(here)
    assert process.wait() == 0 and b"0/9" in shown
    # What stands in each line in the end, after the bar was wiped out.
    lines = [line.rpartition("\r")[2] for line in shown.decode().split("\r\n")]
    assert "logged" in lines and any(
        line.startswith("prmoe: out of memory (said") for line in lines
    )


def test_other_processes_are_told(monkeypatch, capsys):
    told = []
    monkeypatch.setattr(boundary, "on_failure", [told.append])
    assert main(failing(monkeypatch, UserError("one\ntwo"))) == 2
    assert told == [ending.Failure("one two", 2, True)]


def test_a_failed_thread_is_one_line(monkeypatch, tmp_path, capsys):
    import threading

    monkeypatch.setenv("PRMOE_TRACEBACK", "0")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(boundary, "_thread_failed", THREAD_FAILED)
    boundary.prepare()
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
    line = only_line(capsys.readouterr().err)
    assert line.startswith("prmoe: internal error: ZeroDivisionError: division by zero; the tra")
    thread = threading.Thread(target=sys.exit, args=[3])  # which ends a thread without a word
    thread.start()
    thread.join()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("error", "lines"), [(RecursionError("deep"), 0), (ValueError("x"), 1)])
def test_a_callback_that_fails_with_what_it_runs_in_is_not_told_twice(
    error, lines, monkeypatch, capsys
):
    monkeypatch.setattr(boundary, "_report_unraisable", REPORT_UNRAISABLE)
    boundary.prepare()

    class Dying:
        def __del__(self):
            raise error

    Dying()
    assert capsys.readouterr().err.count("Exception ignored in") == lines


def test_an_abandoned_coroutine_that_ends_with_an_error_is_not_told(monkeypatch, capsys):
    monkeypatch.setattr(boundary, "_report_unraisable", REPORT_UNRAISABLE)
    boundary.prepare()

    def read():
        try:
            yield
        except BaseException as error:
            raise ValueError("the read failed") from error

    abandoned = read()
    next(abandoned)
    del abandoned
    assert capsys.readouterr().err == ""


FAILED_FUTURE = f"""
import concurrent.futures
from prmoe_jax.cli import main

main(["params", {TINY!r}, "--json"])
future = concurrent.futures.Future()
future.add_done_callback(lambda _: 1 / 0)
future.set_result(None)
"""


def test_a_callback_of_a_future_that_fails_is_not_told_twice():
    """A failed checkpoint leaves futures whose callbacks find an event loop closed."""
    command = [sys.executable, "-c", FAILED_FUTURE]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--workdir=", TINY],
        ["eval", "--workdir="],
        ["report", ""],
        ["sweep", ""],
        ["export", "--kind=gpt2", "--workdir=x", "--out="],
    ],
)
def test_an_empty_path_is_refused(arguments, capsys):
    assert main(arguments) == 2
    assert "is empty; if it was a shell variable, it isn't set" in capsys.readouterr().err


def test_an_argument_that_is_no_text_is_refused(capsys):
    assert main(["generate", "--workdir=x", f"--prompt={os.fsdecode(bytes([255]))}"]) == 2
    assert r"the argument '--prompt=\udcff' is not UTF-8 text" in capsys.readouterr().err


NO_ROOM = "prmoe: a file or standard output cannot be written: No space left on device\n"
# How a shell starts it, its exit code, and what is on standard error.
SHELL = {
    "no stdout": (">&-", 0, ""),
    "no streams": ("<&- >&- 2>&-", 0, ""),
    "full stdout": (">/dev/full", 2, NO_ROOM),
    "full stderr": (">/dev/full 2>/dev/full", 2, ""),
}


@pytest.mark.parametrize("name", SHELL)
def test_standard_streams(name):
    redirection, code, said = SHELL[name]
    done = subprocess.run(
        ["sh", "-c", f'"{sys.executable}" -m prmoe_jax params --paper {redirection}'],
        capture_output=True, text=True, cwd=REPOSITORY,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (code, said)


def test_an_ascii_stream_gets_escapes():
    done = subprocess.run(
        [sys.executable, "-m", "prmoe_jax", "params", f"--config={tiny.__file__}:é"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 2 and r"has no '\xe9'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("platform", "reason"),
    [("tpux", "Unable to initialize backend"), ("cuda", "no NVIDIA GPU is visible")],
)
def test_a_platform_that_is_not_there(platform, reason, tmp_path):
    if platform == "cuda" and Path("/dev/nvidia0").exists():
        pytest.skip("a GPU is visible")
    done = subprocess.run(
        [sys.executable, "-m", "prmoe_jax", "train", TINY, f"--workdir={tmp_path / 'run'}"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=os.environ | {"JAX_PLATFORMS": platform},
    )
    assert done.returncode == 2
    line = only_line(done.stderr)
    assert line.startswith(f"prmoe: JAX finds no device to run on ({reason}")
    assert not (tmp_path / "run").exists()
