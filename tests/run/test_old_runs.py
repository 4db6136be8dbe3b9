"""A run that an earlier version wrote goes on here: commit 91ef632, jax 0.10.2.

Its folder is tests/goldens/run_91ef632.zip, with what that version computed from it.
"""

import json
import zipfile
from pathlib import Path

import pytest

from prmoe_jax.cli import main
from prmoe_jax.config.loading import load
from prmoe_jax.config.schema import declarations, leaves
from prmoe_jax.run.metrics import read_metrics
from tests.support.paths import GOLDENS

ARCHIVE = GOLDENS / "run_91ef632.zip"


@pytest.fixture
def expected(tmp_path, monkeypatch):
    """What is known of the run, which lies in the current folder as `run`."""
    zipfile.ZipFile(ARCHIVE).extractall(tmp_path)
    monkeypatch.chdir(tmp_path)
    return json.loads(Path("expected.json").read_text())


def test_it_is_resumed(expected):
    """The steps after it equal those of the version that wrote it."""
    assert (
        main(["train", "--config=run/config.json", "--config.train.steps=12", "--workdir=run"]) == 0
    )
    lines = read_metrics(Path("run/metrics.jsonl"))
    found = [line for line in lines if line["step"] > 8 and "loss" in line]
    assert [line["step"] for line in found] == [9, 10, 11, 12]
    for line, known in zip(found, expected["resumed"], strict=True):
        for name, value in known.items():
            assert line[name] == pytest.approx(value, rel=1e-5), (line["step"], name)
    assert lines[-1]["eval/loss"] == pytest.approx(expected["final_eval_loss"], rel=1e-5)


def test_it_is_evaluated_and_generates(expected, capsys):
    assert main(["eval", "--workdir=run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for name, value in expected["eval"].items():
        assert found[name] == pytest.approx(value, rel=1e-5), name
    command = ["generate", "--workdir=run", "--prompt=the", "--temperature=0", "--tokens=5"]
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"]


def test_its_settings_are_all_known(expected):
    """None was removed since; a renamed one is known by both names."""
    saved = json.loads(Path("run/config.json").read_text())
    names = {
        f"{group}.{name}" if isinstance(values, dict) else group
        for group, values in saved.items()
        for name in (values if isinstance(values, dict) else [""])
    }
    now = {setting.formerly: name for name, setting in declarations().items()}
    known = leaves(load(Path("run/config.json")))
    assert {now.get(name, name) for name in names} <= known.keys()
