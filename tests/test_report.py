"""Reports: statistics by hand, figures that are the same each time, pages that need no network."""

import csv
import json
import re
from pathlib import Path

import pytest

from prmoe_jax.cli import main
from prmoe_jax.config import load
from prmoe_jax.report.arms import Mean, arms, difference, mean
from prmoe_jax.sweep.run import record as recorded
from tests.test_train import arguments, text  # noqa: F401

# Of three arms, the last with a seed of its own.
LOSSES = {"one": {1: 3.0, 2: 3.2, 3: 3.1}, "two": {1: 2.9, 2: 3.0, 3: 2.8}, "<b>": {4: 2.0}}


def record(arm, seed, loss, **changes):
    settings = {"model.layers": len(arm), "seed": seed}
    return {
        "run": f"{arm}/{seed}", "settings": settings, "seed": seed, "loss": loss,
        "bits_per_byte": loss / 2, "drop_fraction": 0.1, "tokens": 2000,
        "total_params": 3_000_000 + len(arm), "active_params": 1_000_000,
        "flops_per_token": 6_000_000, "tokens_per_second": 500.0, "device": "cpu",
        "layers": {"01": {"position_drop_fraction": [0.0, 0.2]}},
        "evaluations": [[1000, loss + 1], [2000, loss]], "losses": [[10, 9.0]],
        "revisions": ["abc"], "versions": {"jax": "0.1"},
    } | changes  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    rows = [record(arm, seed, loss) for arm, by in LOSSES.items() for seed, loss in by.items()]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_statistics_by_hand():
    """Means of three, Student's t of 2 degrees of freedom; differences seed by seed."""
    found = arms([record(a, s, x) for a, by in LOSSES.items() for s, x in by.items()])
    assert list(found) == list(LOSSES)
    assert mean([3.0, 3.2, 3.1]) == pytest.approx((3.1, 4.302653 * 0.1 / 3**0.5), rel=1e-6)
    apart = difference(found["two"], found["one"])  # -0.1, -0.2, -0.3
    assert apart == pytest.approx((-0.2, 4.302653 * 0.1 / 3**0.5), rel=1e-6)
    assert str(apart) == "-0.2000 ± 0.2484"
    assert difference(found["<b>"], found["one"]) is None
    assert str(Mean(*mean([2.0]))) == "2.0000"


def test_report_of_a_sweep(folder, capsys):
    """The table, what is in the files, and the same bytes again."""
    assert main(["report", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["arms"]
    assert found["two"]["difference"] == pytest.approx(-0.2)
    assert found["<b>"] == {"seeds": 1, "loss": 2.0}
    lines = list(csv.DictReader((folder / "results.csv").open()))
    assert [line["run"] for line in lines] == ["one/1", "one/2", "one/3", "two/1", "two/2",
                                               "two/3", "<b>/4"]  # fmt: skip
    assert lines[3]["loss"] == "2.9" and lines[0]["seed"] == "1"
    assert "model.layers" not in lines[0]  # all the same
    names = {f"{name}.{kind}" for name in ("loss_tokens", "loss_flops", "loss_parameters",
             "differences", "drops") for kind in ("png", "svg")}  # fmt: skip
    made = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert made.keys() == names | {"results.csv", "results.jsonl", "report.html"}
    html = made["report.html"].decode()
    assert "<td>3.1000 ± 0.2484</td>" in html and "<td>-0.2000 ± 0.2484</td>" in html
    assert "&lt;b&gt;" in html and "<b>" not in html
    assert html.count("data:image/svg+xml;base64,") == 5
    assert not re.search(r"https?:|src=\"(?!data:)|<script|<link", html)
    assert main(["report", str(folder)]) == 0
    assert "two                              3    2.9000 ± 0.2484     -0.2000 ± 0.2484" in (
        capsys.readouterr().out
    )
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == made
    assert main(["report", str(folder), "--base=two"]) == 0
    out = capsys.readouterr().out
    assert "above two" in out
    assert "one                              3    3.1000 ± 0.2484     +0.2000 ± 0.2484" in out
    assert main(["report", str(folder), "--base=three"]) == 2
    assert "no arm 'three'; --base is one of one, two, <b>" in capsys.readouterr().err


def test_report_of_a_run(text, tmp_path, capsys):  # noqa: F811
    """What a run logged, drawn by layer."""
    run = tmp_path / "run"
    assert main(arguments(text, run, "4 layers, E=4+8, residual", **{"eval.every": 6})) == 0
    trained = json.loads(capsys.readouterr().out)
    assert main(["report", f"--workdir={run}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["step"] == 12 and found["validation_loss"] == trained["eval/loss"]
    html = Path(found["page"]).read_text()
    figures = {path.stem for path in (run / "report").glob("*.svg")}
    assert figures == {"loss", "speed", "drop_fraction", "router_entropy", "residual_coefficient",
                       "expert_load", "expert_drop_fraction"}  # fmt: skip
    assert html.count("<figure>") == len(figures)
    assert "<td>model.experts</td><td>(4, 8)</td>" in html
    layers = recorded("prmoe/0", load(run / "config.json"), run)["layers"]
    assert list(layers) == ["01", "03"]
    assert len(layers["03"]["position_drop_fraction"]) == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "results.jsonl").unlink(), "results.jsonl is missing; prmoe sweep"),
        (lambda f: (f / "results.jsonl").write_text('{"a": 1}\n'), "holds no runs of prmoe sweep"),
        (
            lambda f: (f / "results.jsonl").write_text(
                json.dumps(record("a", 1, 2.0)) + "\n"
                + json.dumps(record("a", 2, 2.0, settings={"seed": 2})) + "\n"
            ),
            "a/1 and a/2 are of one arm, but differ in model.layers, seed; an arm's runs differ in",
        ),
    ],
)  # fmt: skip
def test_mistakes(change, message, folder, tmp_path, capsys):
    change(folder)
    assert main(["report", str(folder)]) == 2
    assert message in capsys.readouterr().err
    for command in (["report"], ["report", str(folder), f"--workdir={tmp_path}"]):
        assert main(command) == 2
        assert "needs a sweep's folder, or --workdir=DIR" in capsys.readouterr().err
    assert main(["report", f"--workdir={tmp_path}", "--base=one"]) == 2
    assert "--base is for a sweep's folder" in capsys.readouterr().err
    assert main(["report", f"--workdir={tmp_path}"]) == 2
    assert "no run in" in capsys.readouterr().err
