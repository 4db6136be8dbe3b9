"""What a run keeps of a released model, from its import to an export: how to talk to it."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import tokenizers

from prmoe_jax import Generator
from prmoe_jax.cli import main
from prmoe_jax.config.loading import load
from prmoe_jax.data import released
from prmoe_jax.data.tokenizer import Tokenizer
from prmoe_jax.interop.hugging_face import with_context
from tests.support.extras import needs_extra
from tests.support.lines import only_line
from tests.support.paths import GOLDENS
from tests.support.runs import tuned
from tests.support.tokenizers import byte_tokenizer

# Llama with scaled rotary positions, and MoEs with a window in all layers and in some.
CLASSES = ["llama3", "mixtral", "gpt_oss"]
START, END, TOOL = 257, 258, 259  # the ids of a chat's markup, after <|endoftext|>
IDS = {"bos_token_id": START, "eos_token_id": [END, TOOL], "pad_token_id": TOOL}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\r\n{{ m.content }}é<|im_end|>{% endfor %}"
)
TEXTS = {
    "chat_template.jinja": TEMPLATE,
    "generation_config.json": json.dumps(
        IDS | {"eos_token_id": [TOOL, 256], "temperature": 0.7, "do_sample": True}
    ),
    "tokenizer_config.json": json.dumps(
        {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|tool|>"}
        | {"tokenizer_class": "LlamaTokenizer", "model_max_length": 32, "padding_side": "left"}
        | {"auto_map": {"AutoTokenizer": ["tokenization.Theirs", None]}}
    ),
    "special_tokens_map.json": '{"eos_token": "<|im_end|>"}',
    "additional_chat_templates/tools.jinja": TEMPLATE.replace("é", "ß"),
}


def chat_tokenizer():
    inner = tokenizers.Tokenizer.from_str(byte_tokenizer().description)
    inner.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|tool|>"])
    return inner.to_str(pretty=True)


def released_model(folder, name):
    shutil.copytree(GOLDENS / "open" / name, folder)
    (folder / "tokenizer.json").write_text(chat_tokenizer())
    (folder / "additional_chat_templates").mkdir()
    for file, text in TEXTS.items():
        (folder / file).write_bytes(text.encode())
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | IDS))
    return folder


def imported(source, workdir, kind="hf"):
    return main(["import", f"--kind={kind}", f"--source={source}", f"--workdir={workdir}"])


def exported(workdir, out, kind="hf"):
    return main(["export", f"--kind={kind}", f"--workdir={workdir}", f"--out={out}"])


def read(path):
    return json.loads(Path(path).read_text())


def check_export(out, source, length):
    for name in TEXTS.keys() - {"tokenizer_config.json"}:
        assert (out / name).read_bytes() == (source / name).read_bytes()
    config, theirs = read(out / "config.json"), read(source / "config.json")
    names = *IDS, "max_position_embeddings", "rope_parameters", "sliding_window", "layer_types"
    assert {n: config.get(n) for n in names} == {n: theirs.get(n) for n in names}
    assert config["max_position_embeddings"] == length
    settings, theirs = read(out / "tokenizer_config.json"), read(source / "tokenizer_config.json")
    del theirs["auto_map"]
    theirs |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    assert settings == theirs
    assert read(out / "tokenizer.json") == read(source / "tokenizer.json")


@pytest.mark.parametrize("name", CLASSES)
def test_a_tuned_model_keeps_its_marks_template_and_context(name, tmp_path):
    source, run = released_model(tmp_path / "source", name), tmp_path / "run"
    assert imported(source, run) == 0
    assert main(["params", f"--workdir={run}"]) == 0
    assert tuned(run, tmp_path / "tuned", tmp_path) == 0
    assert load(tmp_path / "tuned/config.json").model.length == 16
    assert exported(tmp_path / "tuned", tmp_path / "out") == 0
    check_export(tmp_path / "out", source, length=32)
    generator = Generator.restore(tmp_path / "tuned")
    assert generator.ends == (256, END, TOOL)
    assert (generator.tokenizer.eos_id, generator.tokenizer.bos_id) == (END, 256)
    # Our own format keeps the same.
    assert exported(tmp_path / "tuned", tmp_path / "ours", "safetensors") == 0
    assert imported(tmp_path / "ours", tmp_path / "again", "safetensors") == 0
    assert exported(tmp_path / "again", tmp_path / "out again") == 0
    check_export(tmp_path / "out again", source, length=32)
    first, second = (Tokenizer.load(tmp_path / n / "tokenizer.json") for n in ("tuned", "again"))
    assert first.fingerprint == second.fingerprint


def test_an_upcycled_and_a_pruned_model_keep_them(tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    source = released_model(tmp_path / "source", "llama3")
    assert imported(source, run) == 0
    experts = {"model.family": "mixtral", "model.placement": "every 1", "model.experts": 4}
    experts |= {"model.top_k": 2, "moe.capacity_factor": "inf", "moe.eval_capacity_factor": "inf"}
    assert tuned(run, tmp_path / "moe", tmp_path, **experts) == 0
    prune = ["prune", f"--workdir={tmp_path / 'moe'}", "--keep=0.5", "--batches=1"]
    assert main([*prune, "--shape=uniform", f"--out={tmp_path / 'pruned'}"]) == 0
    assert exported(tmp_path / "pruned", out, "safetensors") == 0
    assert released.read(out / released.FOLDER) == released.read(source)


@needs_extra("interop", "transformers")
@pytest.mark.parametrize("name", CLASSES)
def test_transformers_talks_to_a_tuned_model(name, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, run = released_model(tmp_path / "source", name), tmp_path / "run"
    assert imported(source, run) == 0
    assert tuned(run, tmp_path / "tuned", tmp_path) == 0
    ours, generated = Generator.restore(run), []
    turn = [{"role": "user", "content": "a"}]
    for number, workdir in enumerate((tmp_path / "tuned", run)):
        assert exported(workdir, out := tmp_path / f"out{number}") == 0
        tokenizer = AutoTokenizer.from_pretrained(out)
        model = AutoModelForCausalLM.from_pretrained(out).eval()
        ids = tokenizer.apply_chat_template(turn, return_dict=True)["input_ids"]
        assert ids == [START, *tokenizer.encode("user\naé"), END]
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (START, END)
        assert (tokenizer.pad_token_id, tokenizer.padding_side) == (TOOL, "left")
        assert model.config.eos_token_id == [END, TOOL]
        assert model.config.max_position_embeddings == 32
        assert model.generation_config.eos_token_id == [TOOL, 256]
        assert model.generation_config.temperature == 0.7
        torch.manual_seed(0)  # a head that prefers the end of a tool's turn
        with torch.inference_mode():
            model.lm_head.weight[TOOL] = 99 * model.lm_head.weight[:256].abs().max()
            for prompt in ([[5, 6]], [[7, 8]], [ids]):
                found = model.generate(torch.tensor(prompt), max_new_tokens=8)
                generated.append(found[0, len(prompt[0]) :].tolist())
    assert any(ids[-1] == TOOL and len(ids) < 8 for ids in generated)
    assert all(TOOL not in ids[:-1] for ids in generated)
    assert ours.ends == (256, END, TOOL)


def test_a_run_without_these_files_is_exported_as_ever(tmp_path):
    source, run = released_model(tmp_path / "source", "llama3"), tmp_path / "run"
    for name in TEXTS:
        (source / name).unlink()
    config = read(source / "config.json")
    for name in IDS:
        del config[name]
    (source / "config.json").write_text(json.dumps(config))
    assert imported(source, run) == 0
    shutil.rmtree(run / released.FOLDER)
    assert (run / "tokenizer.json").read_text() == chat_tokenizer()
    assert tuned(run, tmp_path / "tuned", tmp_path) == 0
    assert not (tmp_path / "tuned" / released.FOLDER).exists()
    assert Generator.restore(tmp_path / "tuned").ends == (256,)
    assert exported(tmp_path / "tuned", tmp_path / "out") == 0
    written = read(tmp_path / "out/config.json")
    assert [written[name] for name in IDS] == [256, 256, None]
    assert written["max_position_embeddings"] == 16
    assert read(tmp_path / "out/tokenizer_config.json") == {
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "model_max_length": 16,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    names = "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
    assert sorted(os.listdir(tmp_path / "out")) == list(names)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"length": 16}, (32, 0)),
        ({"length": 64}, (64, 0)),  # trained with a longer context
        ({"length": 16, "rope_theta": 9.0}, (16, 0)),  # the positions are others
        ({"length": 16, "rope_scaling": ()}, (16, 0)),
        ({"length": 16, "rope_type": "yarn"}, (16, 0)),
        ({"length": 16, "positions": "learned"}, (16, 0)),
        ({"length": 16, "sliding_window": 9}, (16, 9)),
    ],
)
def test_whose_context_an_export_has(settings, expected, tmp_path):
    assert imported(released_model(tmp_path / "source", "llama3"), tmp_path / "run") == 0
    assert in_context(tmp_path / "run", settings) == expected


def in_context(run, settings):
    config, folder = load(run / "config.json"), run / released.FOLDER
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **settings))
    model = with_context(config, released.read(folder), folder).model
    return model.length, model.sliding_window


def test_a_window_that_tuning_could_not_have_comes_back(tmp_path):
    """Below its size a window changes nothing, and `sliding_window` must be 0 in training."""
    assert imported(released_model(tmp_path / "source", "mixtral"), tmp_path / "run") == 0
    for length, window, expected in ((4, 0, (32, 5)), (16, 0, (16, 0)), (16, 5, (32, 5))):
        settings = {"length": length, "sliding_window": window}
        assert in_context(tmp_path / "run", settings) == expected


def test_ends_that_are_no_special_tokens(tmp_path, capsys):
    """The letters of a wrong config.json end nothing, which a warning tells."""
    source = released_model(tmp_path / "source", "llama3")
    config = read(source / "config.json") | {"eos_token_id": [65, 10**30], "bos_token_id": "no"}
    (source / "config.json").write_text(json.dumps(config))
    assert imported(source, tmp_path / "run") == 0
    told = "is no special token of the tokenizer; documents end with <|endoftext|>"
    assert told in capsys.readouterr().err
    assert Generator.restore(tmp_path / "run").ends == (256, TOOL)  # as the other file says
    assert exported(tmp_path / "run", tmp_path / "out") == 0
    written = read(tmp_path / "out/config.json")
    assert [written[name] for name in IDS] == [256, 256, TOOL]


def test_a_template_is_only_text(tmp_path):
    source = released_model(tmp_path / "source", "llama3")
    hostile = "{% for x in range(10**12) %}{{ 1 / 0 }}{{ ''.__class__.__mro__ }}"
    (source / "chat_template.jinja").write_text(hostile)
    assert imported(source, tmp_path / "run") == exported(tmp_path / "run", tmp_path / "out") == 0
    assert (tmp_path / "out/chat_template.jinja").read_text() == hostile


def too_large(path):
    path.unlink()
    with open(path, "wb") as file:
        file.truncate(2**40)


def a_pipe(path):
    path.unlink()
    os.mkfifo(path)


def a_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("chat_template.jinja", too_large, "has more than 16,777,216 bytes"),
        ("chat_template.jinja", a_pipe, "is not a regular file"),
        ("additional_chat_templates/tools.jinja", a_folder, "is not a regular file"),
        ("generation_config.json", a_folder, "is not a regular file"),
        ("chat_template.jinja", lambda path: path.write_bytes(b"\xff"), "cannot be read: "),
        ("tokenizer_config.json", lambda path: path.write_text("[]"), "it holds list, not dict"),
        ("generation_config.json", lambda path: path.write_text("{"), "is damaged: "),
        ("special_tokens_map.json", lambda path: path.write_text("[" * 10**6), "is damaged: "),
    ],
)
def test_damaged_files_are_named(name, damage, message, tmp_path, capsys):
    source = released_model(tmp_path / "source", "llama3")
    damage(source / name)
    assert imported(source, tmp_path / "run") == 2
    line = only_line(capsys.readouterr().err)
    assert line.startswith(f"prmoe: {source / name} ") and message in line
    assert not (tmp_path / "run").exists()
