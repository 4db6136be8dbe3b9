"""The command line: verbs and their output, help without JAX, names of runs."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

import prmoe_jax
from configs import paper, tiny
from prmoe_jax.cli import main, parse_config
from prmoe_jax.cli.options import config_argument, local_path, path
from prmoe_jax.cli.output import as_json
from prmoe_jax.cli.train import run_name
from prmoe_jax.config.loading import save
from prmoe_jax.model.sizes import cost

TINY = f"--config={tiny.__file__}:prmoe"
SHAPE = ["--config.model.d_model=30", "--config.model.heads=3", "--config.model.vocab_size=509"]
VERBS = ("train", "eval", "generate", "params")


def printed(capsys, *arguments) -> str:
    capsys.readouterr()
    assert main(list(arguments)) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def exits(arguments) -> int:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return stop.value.code


def test_params_as_json(capsys):
    counts = json.loads(printed(capsys, "params", TINY, *SHAPE, "--json"))
    counted = cost(parse_config([TINY, *SHAPE]).model)
    assert counts["architecture"] == "6 layers, E=4x2+8, residual"
    assert counts["total_params"] == counted.total_params
    assert counts["active_params"] == counted.active_params
    assert counts["train_flops_per_token"] == counted.train_flops_per_token
    layers = counts["layers"]
    assert [layer["layer"] for layer in layers] == list(range(6))
    assert [layer["kind"] for layer in layers] == ["dense", "moe"] * 3
    assert [layer["experts"] for layer in layers] == [0, 4, 0, 4, 0, 8]
    # The parts make up the whole; the embedding and the logits are beside the layers.
    embedding = counts["embedding_params"]
    assert embedding + sum(layer["params"] for layer in layers) == counts["total_params"]
    assert embedding + sum(layer["active_params"] for layer in layers) == counts["active_params"]
    logits = 3 * 2 * 30 * 509
    flops = sum(layer["train_flops_per_token"] for layer in layers)
    assert logits + flops == counts["train_flops_per_token"]


def numbers(line: str) -> list[int]:
    return [int(word.replace(",", "")) for word in line.split() if word[0].isdigit()]


def test_params_for_people(capsys):
    counts = json.loads(printed(capsys, "params", TINY, *SHAPE, "--json"))
    title, _, _, *rows, total = printed(capsys, "params", TINY, *SHAPE).splitlines()
    assert title.startswith("6 layers, E=4x2+8, residual; d_model 30, d_ff ")
    assert "heads 3, " in title and title.endswith("vocabulary 509")
    names = "total_params", "active_params", "train_flops_per_token"
    assert total.split()[0] == "total" and numbers(total) == [counts[name] for name in names]
    # Each column adds up to its total.
    columns = zip(*(numbers(row)[-3:] for row in rows), strict=True)
    assert [sum(column) for column in columns] == numbers(total)


def test_params_follow_overrides(capsys):
    wide = json.loads(printed(capsys, "params", TINY, "--json", "--config.model.experts=16"))
    assert [layer["experts"] for layer in wide["layers"]] == [0, 16] * 3


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_params_of_a_run(form, tmp_path, capsys):
    save(parse_config([TINY, *SHAPE]), tmp_path / "config.json")
    own = printed(capsys, "params", TINY, *SHAPE, *form)
    assert printed(capsys, "params", f"--workdir={tmp_path}", *form) == own


def test_paper_as_json(capsys):
    rows = json.loads(printed(capsys, "params", "--paper", "--json"))
    assert [row["name"] for row in rows] == list(paper.ROWS)
    for row in rows:
        own = f"--config={paper.__file__}:{row['name']}"
        counts = json.loads(printed(capsys, "params", own, "--json"))
        assert {name: counts[name] for name in row.keys() & counts.keys()} == {
            name: row[name] for name in row.keys() & counts.keys()
        }
        assert row["paper_params"] == paper.ROWS[row["name"]].params * 1e9
        assert row["active_params"] <= row["total_params"]


def test_paper_for_people(capsys):
    head, *rows = printed(capsys, "params", "--paper").splitlines()
    assert head.split()[:4] == ["name", "total", "paper", "active"]
    assert [row.split()[0] for row in rows] == list(paper.ROWS)
    moe = next(row for row in rows if row.startswith("moe_1.3b"))
    assert moe.split()[1:3] == ["52.47B", "52B"] and moe.endswith("  24 layers, E=128")


def test_version(capsys):
    assert exits(["--version"]) == 0
    assert capsys.readouterr().out == f"{prmoe_jax.__version__}\n"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb, capsys):
    assert exits(["--help"]) == 0
    assert verb in capsys.readouterr().out
    assert exits([verb, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: prmoe {verb}") and "--json" in out
    takes_config = verb in ("train", "params")
    assert ("--config=FILE:NAME" in out) == takes_config


# Help and mistakes that need no model, in one fresh process each: with and without a verb.
QUICK = {
    "help": ["--help"],
    "help of a verb": ["train", "--help"],
    "no verb": [],
    "unknown verb": ["fly"],
    "params": ["params", TINY],
    "paper": ["params", "--paper"],
    "no config": ["train"],
    "misspelled setting": ["train", TINY, "--config.train.stepz=2"],
    "wrong value": ["train", TINY, "--config.model.heads=7", "--config.model.d_model=8"],
    "bad profile": ["train", TINY, "--profile=now"],
    "eval nothing": ["eval", "--workdir=/nowhere"],
    "generate nothing": ["generate", "--workdir=/nowhere"],
}
# Runs all of them in one process, so that one import of Python pays for all.
PROBE = """
import contextlib, io, json, sys
from prmoe_jax.cli import main
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        with contextlib.suppress(SystemExit):
            main(arguments)
    print("jax" in sys.modules)
"""


def environment() -> dict[str, str]:
    """This process's, with the package in reach and Python's usual buffering."""
    package = {"PYTHONPATH": str(Path(prmoe_jax.__file__).parent.parent)}
    return {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"} | package


def python(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=60)


def test_help_and_mistakes_do_not_wait_for_jax():
    done = python("-c", PROBE, json.dumps(list(QUICK.values())))
    assert done.returncode == 0, done.stderr
    imported = dict(zip(QUICK, done.stdout.split(), strict=True))
    assert imported == dict.fromkeys(QUICK, "False")


def test_python_m_runs_the_command():
    done = python("-m", "prmoe_jax", "params", TINY, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["total_params"] > 0
    done = python("-m", "prmoe_jax", "params", "--config=nope.py")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("prmoe: --config=nope.py is not a file")


def test_a_closed_pipe_is_no_error():
    """As in `prmoe params --paper | head -1`: whoever reads has gone."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "prmoe_jax", "params", "--paper"]
    done = subprocess.run(
        command, stdout=writing, stderr=subprocess.PIPE, env=environment(), timeout=60
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(
    "arguments, name",
    [
        (["--config=configs/tiny.py:prmoe"], "tiny-prmoe"),
        (["--config", "configs/tiny.py:moe"], "tiny-moe"),
        (["--config.seed=1", "--config=/some/paper.py:prmoe_1.3b"], "paper-prmoe_1.3b"),
        (["--config=configs/tiny.py"], "tiny"),
        (["--config=configs/tiny.py:"], "tiny"),
        (
            ["--config=configs/tiny.py:6 layers, E=4x2+8, residual"],
            "tiny-6-layers--E-4x2-8--residual",
        ),
        (["--config=tiny.py:../../etc"], "tiny-..-..-etc"),
    ],
)
def test_a_run_is_named_after_its_config(arguments, name):
    assert run_name(arguments) == name


def test_the_home_directory_in_paths(tmp_path, monkeypatch):
    """A shell leaves ~ as it is behind --workdir= and --config= ."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for convert in path, local_path:
        assert convert("~/runs/a") == tmp_path / "runs/a"
    assert config_argument(["--config=~/a.py:x"]) == (tmp_path / "a.py", "x", [])


def test_a_config_whose_path_has_a_colon(tmp_path):
    file = tmp_path / "12:30" / "config.json"
    file.parent.mkdir()
    assert config_argument([f"--config={file}"]) == (tmp_path / "12", "30/config.json", [])
    file.write_text("{}")
    assert config_argument([f"--config={file}"]) == (file, "", [])
    long = "E=" + "+".join("1" * 300)
    assert config_argument([f"--config=tiny:{long}"]) == (Path("tiny"), long, [])


def test_json_has_no_infinity():
    value = {"a": [1.5, math.inf, (-math.inf, None)], "b": {"c": math.nan, "d": "inf", "e": True}}
    expected = {"a": [1.5, "inf", ["-inf", None]], "b": {"c": "nan", "d": "inf", "e": True}}
    assert json.loads(as_json(value)) == expected


def test_a_config_string_may_be_an_architecture(capsys):
    architecture = f"--config={tiny.__file__}:9 layers, every 3, E=2+3+5, top 2"
    counts = json.loads(printed(capsys, "params", architecture, "--json"))
    assert counts["architecture"] == "9 layers, every 3, E=2+3+5, top 2"


def test_train_goes_where_it_is_told(monkeypatch, capsys):
    """The verb hands over the config, the folder and the profile, and prints the metrics."""
    import prmoe_jax.training.loop

    calls = []

    def train(*arguments):
        calls.append(arguments)
        return {"step": 600, "eval/loss": 0.123456789, "loads": [1, 2]}

    monkeypatch.setattr(prmoe_jax.training.loop, "train", train)
    arguments = ["train", TINY, "--workdir=here", "--profile=2:3", "--config.seed=5"]
    assert main(arguments) == 0
    assert calls == [(parse_config([TINY, "--config.seed=5"]), Path("here"), (2, 3))]
    out, err = capsys.readouterr()
    assert [line.split() for line in out.splitlines()] == [
        ["step", "600"],
        ["eval/loss", "0.123457"],
    ]
    assert err == "run: here\n"

    assert main(["train", TINY, "--json"]) == 0
    assert calls[1][1:] == (Path("runs/tiny-prmoe"), None)
    assert json.loads(capsys.readouterr().out)["loads"] == [1, 2]


def test_a_plan_opens_no_accelerator_where_a_config_file_imports_jax():
    """JAX reads JAX_PLATFORMS when it is imported."""
    code = (
        "import os, jax\nfrom prmoe_jax.cli.options import compile_only\n"
        "os.environ.pop('JAX_PLATFORMS', None)\njax.config.update('jax_platforms', None)\n"
        "compile_only()\nprint(jax.config.jax_platforms)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment()
    )
    assert done.stdout == "cpu\n", done.stderr


def test_a_stopped_run_and_a_keyboard_interrupt_have_their_own_codes(monkeypatch, capsys):
    import prmoe_jax.training.loop
    from prmoe_jax.errors import TrainingStopped

    for error, code, line in (
        (TrainingStopped("loss is nan\nat step 3"), 1, "prmoe: loss is nan at step 3\n"),
        (KeyboardInterrupt(), 130, "prmoe: interrupted\n"),
        (OSError(28, "disk full", "run/x"), 2, "prmoe: run/x cannot be written: disk full\n"),
    ):

        def train(*arguments, error=error):
            raise error

        monkeypatch.setattr(prmoe_jax.training.loop, "train", train)
        assert main(["train", TINY, "--workdir=here"]) == code
        assert capsys.readouterr().err == line
