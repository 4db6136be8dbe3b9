"""Training on chats, by the command line."""

import json

import pytest

from prmoe_jax.cli import main
from prmoe_jax.run.metrics import read_metrics
from tests.support.chats import turns, write_lines, write_model
from tests.support.runs import SETTINGS


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Trains on chats with the tokenizer and the template of a folder of their own."""
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model")
    lines = [{"messages": turns(f"{i}?", f"{i}!" * (1 + i % 3))} for i in range(20)]
    write_lines(tmp_path / "chats.jsonl", *lines)
    settings = "data.corpus=chats.jsonl", "data.tokenizer=model/tokenizer.json", "train.steps=2"
    return ["train", *SETTINGS, *(f"--config.{setting}" for setting in settings)]


def test_a_run_on_chats(command, tmp_path, capsys):
    """It counts answers alone, keeps the template, goes on, and passes it to the next run."""
    assert main([*command, "--workdir=run"]) == 0
    found = read_metrics(tmp_path / "run/metrics.jsonl")[-1]
    held_out = next((tmp_path / "cache").glob("tokens/*/validation-*.tokens")).read_bytes()
    answered = sum(not word[3] & 0x80 for word in zip(*[iter(held_out)] * 4, strict=True))
    assert found["step"] == 2 and found["eval/tokens"] == answered > 0
    source = (tmp_path / "model/chat_template.jinja").read_text()
    assert (tmp_path / "run/hugging_face/chat_template.jinja").read_text() == source
    (tmp_path / "model").rename(tmp_path / "gone")  # the run has all that it needs
    assert main([*command, "--workdir=run"]) == 0
    capsys.readouterr()
    assert main(["eval", "--workdir=run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == answered
    start = "--config.init.workdir=run", "--config.data.tokenizer=run/tokenizer.json"
    assert main([*command, "--workdir=next", *start]) == 0
    assert (tmp_path / "next/hugging_face/chat_template.jinja").read_text() == source


def test_a_resumed_run_has_the_template_of_its_beginning(command, tmp_path, capsys):
    assert main([*command, "--workdir=run"]) == 0
    path = tmp_path / "run/hugging_face/chat_template.jinja"
    path.write_text(" " + path.read_text())
    capsys.readouterr()
    assert main([*command, "--workdir=run"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "the data changed since the checkpoint was written: chat_template was" in error
