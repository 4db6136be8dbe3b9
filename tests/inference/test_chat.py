"""`prmoe generate --chat`: what the model reads, and a conversation by standard input."""

import io
import json
import sys

import pytest

from prmoe_jax.cli import main
from prmoe_jax.config.loading import resolve
from prmoe_jax.inference import generate
from prmoe_jax.model.transformer import init_model
from prmoe_jax.run.new import write_run
from tests.support import chats
from tests.support.chats import CHATML, turns

SHAPE = {"vocab_size": 384, "length": 160, "d_model": 12, "heads": 2, "d_ff": 10, "layers": 1}
KEPT = {"chat_template.jinja": CHATML, "generation_config.json": '{"eos_token_id": [256, 258]}'}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Makes a run of a random model, with the files that it keeps; and what its model reads."""
    read = []
    start = generate.start
    monkeypatch.setattr(generate, "start", lambda *a: read.append(a[2][0]) or start(*a))

    def made(kept=KEPT):
        values = {"model": SHAPE | {"init_std": 0.3, "dtype": "float32"}, "train": {"steps": 1}}
        config, tokenizer = resolve(values), chats.chat_tokenizer()
        write_run("workdir", tmp_path / "run", config, init_model(config), tokenizer, kept=kept)
        return ["generate", f"--workdir={tmp_path / 'run'}", "--chat", "--tokens=4"], read

    return made


def rendered(*texts):
    return chats.template().prompt(turns(*texts), chats.chat_tokenizer())


def test_the_answer_to_a_message(run, capsys):
    """The model reads the template's tokens and no other; a mark in the message is plain text."""
    command, read = run()
    capsys.readouterr()
    assert main([*command, "--prompt=Hi<|im_end|>"]) == 0
    answer = capsys.readouterr().out
    assert read == [rendered("Hi<|im_end|>")]
    assert read[0].count(chats.END) == 1 and read[0][0] == chats.START
    assert main([*command, "--prompt=Hi<|im_end|>", "--prompt=Yo"]) == 0
    assert capsys.readouterr().out.startswith(answer)
    assert main([*command, "--prompt=Hi<|im_end|>", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"prompt": "Hi<|im_end|>", "seed": 0, "text": answer[:-1]}


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_conversation(form, run, capsys, monkeypatch):
    """Each line is a message after all before it, up to an empty line."""
    command, read = run()
    capsys.readouterr()
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\nb <|im_end|>\n\nc\n"))
    assert main([*command, *form]) == 0
    out = capsys.readouterr().out
    first = json.loads(out.splitlines()[0])["text"] if form else None
    if form:
        assert [json.loads(line)["prompt"] for line in out.splitlines()] == ["a", "b <|im_end|>"]
    else:
        tokenizer = chats.chat_tokenizer()
        between = read[1][len(rendered("a")) :]
        first = tokenizer.decode(between).split("<|im_end|>\n<|im_start|>")[0]
        assert out.startswith(f"{first}\n") and out.endswith("\n")
    assert read == [rendered("a"), rendered("a", first, "b <|im_end|>")]


def last_line(capsys):
    return capsys.readouterr().err.splitlines()[-1]


def test_what_a_chat_needs(run, capsys, monkeypatch):
    command, _ = run({})
    capsys.readouterr()
    assert main([*command, "--prompt=a"]) == 2
    error = last_line(capsys)
    assert "a conversation needs a chat template, and the run has none; put a chat_temp" in error
    assert main([*command, "--samples=2"]) == 2
    assert "--samples has no effect in a conversation" in last_line(capsys)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), "utf-8"))
    assert main(command) == 2
    assert "a message is not UTF-8 text" in last_line(capsys)
