"""Several processes as one run: the losses of one process; they agree first, and end together."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest
from jax._src import distributed

from prmoe_jax import stores
from prmoe_jax.cli import main
from prmoe_jax.parallel import processes
from prmoe_jax.run.metrics import read_metrics
from tests.support.extras import needs_extra
from tests.support.lines import only_line
from tests.support.paths import REPOSITORY
from tests.support.runs import arguments, finish, start, wait_for_lines

# Much is compiled here, and little run.
QUICKLY = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
FOUR_DEVICES = QUICKLY | {"JAX_NUM_CPU_DEVICES": "4"}
EIGHT_DEVICES = QUICKLY | {"JAX_NUM_CPU_DEVICES": "8"}
SETTINGS = {
    "name": "2 layers, E=4, residual",
    "mesh.expert": 4,
    "moe.overflow": "random",
    "train.steps": 4,
}


def start_two(command):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    variables = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"} | FOUR_DEVICES
    return [start(*command, "--distributed", JAX_PROCESS_ID=str(i), **variables) for i in range(2)]


# Those that wait for others wait for a fifth of the time.
HURRIED = """
import sys
from prmoe_jax.parallel import processes

processes.JOIN_SECONDS, processes.HEARTBEAT_SECONDS, processes.SHOW_SECONDS = 10, 5, 2
from prmoe_jax.cli import main

sys.exit(main(sys.argv[1:]))
"""


def start_hurried(commands, folders=(REPOSITORY, REPOSITORY), code=HURRIED):
    """A process for each command, in its folder; None for one that never comes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    variables = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(len(commands))}
    return [
        command
        and subprocess.Popen(
            [sys.executable, "-c", code, *command, "--distributed"],
            cwd=folder,
            env=os.environ
            | variables
            | FOUR_DEVICES
            | {"JAX_PROCESS_ID": str(number), "PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, (command, folder) in enumerate(zip(commands, folders, strict=True))
    ]


def ends(process, code, line):
    """A process ends with one line of ours, this one, and nothing of C++ or Python."""
    found, out, err = finish(process)
    ours = [part for part in err.splitlines() if part.startswith("prmoe: ")]
    assert (found, len(ours)) == (code, 1) and line in ours[0], err
    assert "Traceback" not in err and "@ 0x" not in err and "external/" not in err, err
    assert out == ""


# Process 0 reads its text after process 1 if each has a cache of its own, and a second late if not.
CACHES = """
import os, sys, time
from pathlib import Path
from prmoe_jax.training import loop

first, load, (mine, other) = os.environ["JAX_PROCESS_ID"] == "0", loop.load_data, sys.argv[1:3]

def load_data(*arguments):
    if mine != other:
        while first and not Path(other, "tokens").exists():
            time.sleep(0.1)
    elif first:
        time.sleep(1)
    else:
        assert Path(mine, "tokens").exists()
    return load(*arguments)

loop.load_data = load_data
from prmoe_jax.cli import main

sys.exit(main(sys.argv[3:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("caches", ["ab", "cc"])
def test_who_prepares_the_text(caches, text, tmp_path):
    """Every process in a cache of its own at once; process 0 in a cache that they share."""
    first, second = (str(tmp_path / name) for name in caches)
    settings = SETTINGS | {"train.steps": 1}
    commands = [
        [mine, other, *arguments(text, tmp_path / "run", **settings, **{"data.cache_dir": mine})]
        for mine, other in ((first, second), (second, first))
    ]
    results = [finish(process) for process in start_hurried(commands, code=CACHES)]
    assert [code for code, _, _ in results] == [0, 0], results
    assert not list(tmp_path.glob("?/.process-0-*"))


def losses(workdir):
    lines = read_metrics(stores.as_path(workdir) / "metrics.jsonl")
    return [(line["step"], line["loss"], line["drop_fraction"]) for line in lines if "loss" in line]


def test_two_processes_of_four_devices_equal_one_of_eight(text, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    code, _, err = finish(start(*arguments(text, one, **SETTINGS), **EIGHT_DEVICES))
    assert code == 0, err
    results = [finish(process) for process in start_two(arguments(text, two, **SETTINGS))]
    assert [code for code, _, _ in results] == [0, 0], results
    assert losses(one) == [pytest.approx(line, rel=1e-5) for line in losses(two)]
    (_, first, err), (_, second, _) = results
    # Gloo, the library of CPUs' collectives, greets on stdout.
    assert "[Gloo]" in err
    (summary,) = first.splitlines()
    assert json.loads(summary)["eval/loss"] > 0
    assert second == ""  # process 0 speaks for all


@needs_extra("gcs", "gcsfs")
def test_two_processes_in_an_object_store(text, tmp_path, object_store):
    """The losses that they have on a disk, also after a checkpoint was lost and both resumed."""
    settings = SETTINGS | {"checkpoint.every": 2}
    for workdir in (tmp_path / "run", "gs://bucket/two"):
        results = [finish(process) for process in start_two(arguments(text, workdir, **settings))]
        assert [code for code, _, _ in results] == [0, 0], results
    assert losses("gs://bucket/two") == losses(tmp_path / "run")
    left = {path.name for path in stores.as_path("gs://bucket/two").iterdir()}
    assert left == {path.name for path in (tmp_path / "run").iterdir()} - {".lock"}
    (stores.as_path("gs://bucket/two") / "checkpoints" / "4").rmtree()
    results = [
        finish(process) for process in start_two(arguments(text, "gs://bucket/two", **settings))
    ]
    assert [code for code, _, _ in results] == [0, 0], results
    assert "resumed at step 2 of 4" in results[0][2]
    assert losses("gs://bucket/two") == losses(tmp_path / "run")
    assert "Traceback" not in results[0][2] + results[1][2]


@pytest.mark.slow
def test_a_lost_process_ends_the_other_and_one_process_resumes(text, tmp_path):
    settings = SETTINGS | {"train.steps": 2000, "checkpoint.every": 5}
    command = arguments(text, tmp_path / "run", **settings)
    processes = start_two(command)
    wait_for_lines(tmp_path / "run", 12, processes[0])
    processes[1].kill()
    killed = time.monotonic()
    code, _, err = finish(processes[0])
    assert time.monotonic() - killed < 60
    assert code not in (0, 2)
    # Ours, where a collective fails; JAX's own, where a heartbeat does.
    assert "another process of this run was lost" in err or "another task died" in err
    processes[1].communicate()
    steps = [step for step, _, _ in losses(tmp_path / "run")]
    # A run of one process and one device goes on where two with eight were.
    process = start(*arguments(text, tmp_path / "run", **settings | {"mesh.expert": 1}))
    wait_for_lines(tmp_path / "run", len(steps) + 5, process)
    process.kill()
    _, _, err = finish(process)
    assert "resumed at step" in err


@pytest.mark.slow
def test_sigterm_to_one_stops_both_at_the_same_step(text, tmp_path):
    settings = SETTINGS | {"train.steps": 2000}
    processes = start_two(arguments(text, tmp_path / "run", **settings))
    wait_for_lines(tmp_path / "run", 5, processes[0])
    processes[1].terminate()
    results = [finish(process) for process in processes]
    assert [code for code, _, _ in results] == [0, 0], results
    steps = [step for step, _, _ in losses(tmp_path / "run")]
    assert steps == list(range(1, steps[-1] + 1)) and 5 <= steps[-1] < 2000
    assert f"interrupted: saved at step {steps[-1]} of 2000" in results[0][2]


# What process 1 is given otherwise than process 0, and what it says; process 0 tells it, too.
MISTAKES = {
    "another seed": (
        {"seed": 3},
        "processes of one run must have the settings in common: seed is 3 in process 1, 0 in pro",
    ),
    "a misspelled setting": (
        {"train.stepz": 2},
        "--config.train.stepz is not a setting; did you mean --config.train.steps?",
    ),
    "no cache": (
        {"data.cache_dir": "/proc/cache"},
        "--config.data.cache_dir=/proc/cache cannot be written by process 1: No such file",
    ),
    "another folder": (
        {"workdir": "elsewhere"},
        "elsewhere is not shared: process 1 doesn't find there what process 0 wrote",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_of_one_process_ends_all(name, text, tmp_path):
    changes, line = MISTAKES[name]
    settings = SETTINGS | changes
    workdir = tmp_path / settings.pop("workdir", "run")
    good = arguments(text, tmp_path / "run", **SETTINGS)
    first, second = start_hurried([good, arguments(text, workdir, **settings)])
    ends(first, 2, "process 0: process 1 ended: ")
    ends(second, 2, line)


def test_processes_must_read_the_same_text(text, tmp_path):
    """A copy on each host's own disk, under the same name, one of which was changed."""
    for host in "ab":
        shutil.copytree(text[0], tmp_path / host / "text")
    (tmp_path / "b" / "text" / "0.txt").write_text("another document")
    command = arguments(("text", tmp_path / "cache"), tmp_path / "run", **SETTINGS)
    first, second = start_hurried([command] * 2, [tmp_path / "a", tmp_path / "b"])
    ends(first, 2, "process 0: process 1 ended: processes of one run must have the text in common")
    ends(second, 2, "the text in common: corpus is '")


@pytest.mark.slow
def test_a_process_that_never_comes_is_not_waited_for(text, tmp_path):
    command = arguments(text, tmp_path / "run", **SETTINGS)
    first, _ = start_hurried([command, None])
    ends(first, 1, "the 2 processes of this run did not find each other within 10 s; see whether")
    _, second = start_hurried([None, command])
    ends(second, 1, "process 1: the 2 processes of this run did not find each other within 10 s")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [0, 1])
def test_a_process_killed_before_the_first_step_ends_the_other(number, text, tmp_path):
    command = arguments(text, tmp_path / "run", **SETTINGS)
    both = start_hurried([command] * 2)
    while not (tmp_path / "run" / ".lock").exists():
        assert both[0].poll() is None, finish(both[0])
        time.sleep(0.01)
    both[number].kill()
    both[number].communicate()
    why = "process 0 cannot be reached" if number == 0 else "nothing was heard of process 1 for 5 s"
    ends(both[1 - number], 1, f"another process of this run was lost: {why}; start the run again")


@pytest.mark.slow
def test_a_stopped_process_ends_the_other_and_then_itself(text, tmp_path):
    command = arguments(text, tmp_path / "run", **SETTINGS | {"train.steps": 100_000})
    first, second = start_hurried([command] * 2)
    wait_for_lines(tmp_path / "run", 3, first)
    second.send_signal(signal.SIGSTOP)
    ends(first, 1, "another process of this run was lost: nothing was heard of process 1 for 5 s")
    second.send_signal(signal.SIGCONT)
    code, _, printed = finish(second)
    # Which, depends on whether process 0 could still tell it.
    reasons = (
        "process 1: another process of this run was lost: process 0 cannot be reached; start",
        "process 1: the other processes of this run ended without this one: nothing was heard of",
    )
    line = printed.strip().splitlines()[-1]
    assert code == 1 and line.startswith(tuple(f"prmoe: {reason}" for reason in reasons)), printed


@pytest.mark.slow
def test_ctrl_c_at_one_stops_both(text, tmp_path):
    command = arguments(text, tmp_path / "run", **SETTINGS | {"train.steps": 100_000})
    both = start_hurried([command] * 2)
    wait_for_lines(tmp_path / "run", 3, both[0])
    both[1].send_signal(signal.SIGINT)
    results = [finish(process) for process in both]
    assert [code for code, _, _ in results] == [0, 0], results
    step = losses(tmp_path / "run")[-1][0]
    assert f"interrupted: saved at step {step} of 100000" in results[0][2]


class Store:
    """Process 0's key-value store, which can be reached or not."""

    def __init__(self, there):
        self.there = there

    def key_value_dir_get(self, key):
        if not self.there:
            raise jax.errors.JaxRuntimeError("UNAVAILABLE: failed to connect to all addresses")
        return []


NO_BACKEND = RuntimeError("Unable to initialize backend 'cpu': UNAVAILABLE: Stream removed")


@pytest.mark.parametrize(
    ("error", "there", "lost"),
    [
        # JAX's backend asks process 0 for the devices of all; a missing TPU is no lost process.
        (NO_BACKEND, False, True),
        (NO_BACKEND, True, False),
        (jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed"), True, True),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), True, False),
        (RuntimeError("something else"), False, False),
    ],
)
def test_what_tells_that_a_process_was_lost(error, there, lost, monkeypatch):
    monkeypatch.setattr(distributed.global_state, "client", Store(there))
    assert processes.is_lost(error) == lost


@pytest.mark.parametrize(
    ("printed", "line"),
    [
        (
            "UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n0\n",
            "the other processes of this run ended without this one: nothing was heard of it for",
        ),
        (
            "UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n1, 3\n"
            "The tasks have crashed.",
            "another process of this run was lost: nothing was heard of processes 1, 3 for 20 s;",
        ),
        ("UNAVAILABLE: Stream removed (Socket closed)", "lost: process 0 cannot be reached; start"),
        ("F1126 x.cc:1] Check failed: a == b\n", "a library aborted: F1126 x.cc:1] Check failed"),
        ("", "a library aborted: without a word; all it printed is in "),
    ],
)
def test_what_jax_prints_is_explained(printed, line, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found = processes.explain(printed)
    assert line in found and "\n" not in found


def test_the_reason_stands_at_the_end(tmp_path, monkeypatch):
    """Behind more warnings than are read."""
    with (tmp_path / "native").open("w+b") as file:
        file.write(b"W1126 a warning\n" * 100_000 + b"UNAVAILABLE: Stream removed\n")
        monkeypatch.setattr(processes, "_native", file)
        assert "process 0 cannot be reached" in processes.explain(processes._native_text())


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        (("localhost", "2", "0"), "JAX_COORDINATOR_ADDRESS=localhost must be HOST:PORT"),
        (("a:1", "two", "0"), "JAX_NUM_PROCESSES=two must be a whole number"),
        (("a:1", "2", "-1"), "JAX_PROCESS_ID=-1 must be a whole number"),
        (("a:1", "2", "²"), "JAX_PROCESS_ID=² must be a whole number"),
        (("a:1", "2", "2"), "JAX_PROCESS_ID=2 must be below JAX_NUM_PROCESSES=2; they count fr"),
        (("a:1",), "JAX_COORDINATOR_ADDRESS given without JAX_NUM_PROCESSES, JAX_PROCESS_ID; give"),
    ],
)
def test_variables_are_checked(variables, line, monkeypatch, capsys):
    for name, value in zip(processes.VARIABLES, variables, strict=False):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("prmoe_jax.allocator.keep_freed_memory", lambda: None)
    assert main(["train", "--distributed", "--config=x.py"]) == 2
    said = only_line(capsys.readouterr().err)
    assert line in said
