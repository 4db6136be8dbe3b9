"""Branches: a run that goes on from another one is the run that would have started at step 0."""

import json
import shutil

import pytest

from prmoe_jax.cli import main
from prmoe_jax.config.loading import check_branch
from prmoe_jax.errors import UserError
from tests.support.configs import settings
from tests.support.runs import (
    arguments,
    assert_same_run,
    finish,
    logged,
    start,
    wait_for_lines,
)

# All randomness is on. A run of 40 steps decays from step 32 on, one of 80 from step 64.
WSD = {
    "name": "2 layers, E=4, residual",
    "optimizer.schedule": "wsd",
    "optimizer.decay_tokens": 0,
    "optimizer.min_learning_rate": 0.0,
    "model.dropout": 0.1,
    "moe.overflow": "random",
    "checkpoint.every": 25,
    "checkpoint.keep": 1,
    "eval.every": 16,
}


def branch(text, workdir, trunk, step, **changes):
    init = {"init.workdir": trunk, "init.step": step}
    return arguments(text, workdir, **WSD | init | changes)


@pytest.fixture(scope="module")
def trunk(text, tmp_path_factory):
    """A run of 40 steps, which keeps its checkpoint of step 32."""
    workdir = tmp_path_factory.mktemp("trunk") / "run"
    assert main(arguments(text, workdir, **WSD | {"train.steps": 40})) == 0
    assert steps_of(workdir) == [32, 40]
    return workdir


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """A run of 80 steps from step 0, which keeps many checkpoints."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    keeping = {"checkpoint.every": 8, "checkpoint.keep_every": 8}
    assert main(arguments(text, workdir, **WSD | keeping | {"train.steps": 80})) == 0
    return workdir


def error_of(capsys):
    """The one line of the error, after what is logged before."""
    lines = capsys.readouterr().err.splitlines()
    (line,) = (line for line in lines if line.startswith("prmoe: "))
    assert line == lines[-1]
    return line


def steps_of(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def test_a_longer_branch_is_the_run_from_step_0(text, trunk, whole, tmp_path, capsys):
    """Its parameters, and its metrics from step 0 on; it keeps where its own decay starts."""
    before = logged(trunk)
    assert main(branch(text, tmp_path / "run", trunk, 32, **{"train.steps": 80})) == 0
    err = capsys.readouterr().err
    assert f"goes on from {trunk} at step 32 of 80" in err and "resumed" not in err
    assert_same_run(tmp_path / "run", whole)
    assert steps_of(tmp_path / "run") == [64, 80]
    assert (logged(trunk), steps_of(trunk)) == (before, [32, 40])
    # Only the branch's own time counts, so that its goodput is a share.
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert all(0 <= json.loads(line).get("goodput", 0) <= 1 for line in lines)


def test_a_shorter_branch(text, whole, tmp_path):
    """From a checkpoint that `keep_every` keeps, where the branch's decay starts."""
    assert steps_of(whole) == [*range(8, 81, 8)]
    assert main(branch(text, tmp_path / "run", whole, 24, **{"train.steps": 30})) == 0
    assert main(arguments(text, tmp_path / "short", **WSD | {"train.steps": 30})) == 0
    assert_same_run(tmp_path / "run", tmp_path / "short")


def test_a_killed_branch(text, trunk, whole, tmp_path):
    """Killed before its first checkpoint and after it; then it needs its trunk no more."""
    source, workdir = tmp_path / "trunk", tmp_path / "run"
    shutil.copytree(trunk, source)
    command = branch(text, workdir, source, 32, **{"train.steps": 80, "checkpoint.every": 8})
    inherited = sum(line["step"] <= 32 for line in logged(trunk))
    for count in (inherited + 4, inherited + 27):  # steps 36 and 58, when checkpoint 48 is complete
        process = start(*command)
        wait_for_lines(workdir, count, process)
        process.kill()
        finish(process)
    source.rename(tmp_path / "gone")
    assert main(command) == 0
    assert_same_run(workdir, whole)


@pytest.mark.parametrize(
    ("step", "changes", "message"),
    [
        (31, {}, "checkpoint 31 is not in {trunk}/checkpoints, which holds 32, 40"),
        (40, {}, "init.step=40: the run in {trunk} decays from step 32 on, and its learning"),
        (32, {"model.d_ff": 24}, "model.d_ff was 32, is 24; a branch differs in its length"),
        (32, {"seed": 7}, "the run in {trunk} has another config: seed was 0, is 7"),
        (32, {"optimizer.learning_rate": 1e-3}, "optimizer.learning_rate was 0.003, is 0.001"),
        (32, {"train.steps": 39}, "init.step=32 comes after the decay of this run starts, at ste"),
        (32, {"init.workdir": "nowhere"}, "no run in nowhere: config.json is missing; --config.i"),
    ],
)  # fmt: skip
def test_wrong_branch_points(step, changes, message, text, trunk, tmp_path, capsys):
    command = branch(text, tmp_path / "run", trunk, step, **{"train.steps": 80} | changes)
    assert main(command) == 2
    assert message.format(trunk=trunk) in error_of(capsys)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_damaged_branch_point(text, trunk, tmp_path, capsys):
    """The trunk is left as it is, and no other checkpoint is taken in its place."""
    source = tmp_path / "trunk"
    shutil.copytree(trunk, source)
    shutil.rmtree(source / "checkpoints" / "32" / "optimizer")
    assert main(branch(text, tmp_path / "run", source, 32, **{"train.steps": 80})) == 2
    line = error_of(capsys)
    assert "checkpoint 32 in" in line and "cannot be read: it has no optimizer" in line
    assert steps_of(source) == [32, 40] and not list(source.glob("damaged-*"))


def test_distillation_must_end_alike():
    """A share of the run is another number of steps in a longer run."""

    def config(steps, stop, **init):
        return settings(
            train={"steps": steps}, optimizer={"schedule": "wsd"}, init=init,
            teacher={"workdir": "runs/a"}, kd={"stop": stop},
        )  # fmt: skip

    branching = {"workdir": "runs/b", "step": 16}
    tokens = 10.0 * config(20, 0.5).tokens_per_step
    check_branch(config(20, tokens), config(40, tokens, **branching), "b")
    with pytest.raises(
        UserError, match="b distills in 10 steps, its branch in 20; give kd.stop in"
    ):
        check_branch(config(20, 0.5), config(40, 0.5, **branching), "b")
