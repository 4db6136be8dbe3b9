"""Several processes as one run: the losses of one process, and no hanging when one is lost."""

import json
import socket
import time
from pathlib import Path

import pytest

from prmoe_jax.metrics import read_metrics
from tests.test_train import arguments, finish, start, text, wait_for_lines  # noqa: F401

# Much is compiled here, and little run.
QUICKLY = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
FOUR_DEVICES = QUICKLY | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
EIGHT_DEVICES = QUICKLY | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
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


def losses(workdir):
    lines = read_metrics(Path(workdir) / "metrics.jsonl")
    return [(line["step"], line["loss"], line["drop_fraction"]) for line in lines if "loss" in line]


def test_two_processes_of_four_devices_equal_one_of_eight(text, tmp_path):  # noqa: F811
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


def test_a_lost_process_ends_the_other_and_one_process_resumes(text, tmp_path):  # noqa: F811
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


def test_sigterm_to_one_stops_both_at_the_same_step(text, tmp_path):  # noqa: F811
    settings = SETTINGS | {"train.steps": 2000}
    processes = start_two(arguments(text, tmp_path / "run", **settings))
    wait_for_lines(tmp_path / "run", 5, processes[0])
    processes[1].terminate()
    results = [finish(process) for process in processes]
    assert [code for code, _, _ in results] == [0, 0], results
    steps = [step for step, _, _ in losses(tmp_path / "run")]
    assert steps == list(range(1, steps[-1] + 1)) and 5 <= steps[-1] < 2000
    assert f"interrupted: saved at step {steps[-1]} of 2000" in results[0][2]


def test_variables_are_given_together(text, tmp_path):  # noqa: F811
    process = start("train", "--distributed", *arguments(text, tmp_path)[1:], JAX_PROCESS_ID="0")
    code, _, err = finish(process)
    assert code == 2
    assert "JAX_PROCESS_ID given without JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES" in err
