"""Other libraries' models: the same logits, the same bits back, and nothing executed."""

import importlib.util
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from prmoe_jax.cli import main
from prmoe_jax.data.tokenizer import _bytes
from prmoe_jax.evaluate import restore_run
from prmoe_jax.tree import named_leaves
from tests.quick import forward
from tests.test_train import arguments, logged, text  # noqa: F401

GOLDENS = Path(__file__).parent / "goldens"


@pytest.fixture
def source(tmp_path):
    """Hugging Face's folder of a GPT-2, with a tokenizer."""
    folder = tmp_path / "source"
    shutil.copytree(GOLDENS / "gpt2", folder)
    _bytes().save(folder / "tokenizer.json")
    return folder


def imported(source, workdir, kind="gpt2"):
    return main(["import", f"--kind={kind}", f"--source={source}", f"--workdir={workdir}"])


def logits_of(workdir):
    _, _, model, _ = restore_run(workdir)
    golden = np.load(GOLDENS / "gpt2" / "logits.npz")
    ids = golden["ids"].astype(np.int32)
    return np.asarray(forward(model, ids, np.ones_like(ids))[1]), golden["logits"]


def test_gpt2_in_and_out_again(source, tmp_path, capsys):
    """Logits as transformers', every tensor back to the last bit, and text from it."""
    assert imported(source, tmp_path / "run") == 0
    assert "40 tensors read, none missing, 0 of no meaning left out" in capsys.readouterr().err
    ours, theirs = logits_of(tmp_path / "run")
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    command = [
        "export",
        "--kind=gpt2",
        f"--workdir={tmp_path / 'run'}",
        f"--out={tmp_path / 'out'}",
    ]
    assert main(command) == 0
    before, after = (load_file(f / "model.safetensors") for f in (source, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array, err_msg=name)
    assert imported(tmp_path / "out", tmp_path / "again") == 0
    np.testing.assert_array_equal(logits_of(tmp_path / "again")[0], ours)
    capsys.readouterr()
    generate = ["generate", f"--workdir={tmp_path / 'run'}", "--tokens=9", "--json"]
    assert main(generate) == 0
    assert json.loads(capsys.readouterr().out)["text"]
    assert main(command) == 2
    assert f"--out={tmp_path / 'out'} exists; give" in capsys.readouterr().err


@pytest.mark.skipif(
    not importlib.util.find_spec("transformers"), reason="needs the extra [interop]"
)
def test_goldens_made_anew(tmp_path):
    script = GOLDENS / "generate_gpt2.py"
    subprocess.run([sys.executable, script, "--out", tmp_path], check=True)
    for name, load in (("model.safetensors", load_file), ("logits.npz", np.load)):
        stored, anew = load(GOLDENS / "gpt2" / name), load(tmp_path / name)
        assert set(stored) == set(anew)
        for key in stored:
            np.testing.assert_allclose(anew[key], stored[key], atol=1e-5, err_msg=key)


def test_files_in_parts_with_old_names(source, tmp_path):
    """An index of several files, no 'transformer.' before the names, buffers, the output matrix."""
    tensors = load_file(source / "model.safetensors")
    tensors = {name.removeprefix("transformer."): x for name, x in tensors.items()}
    tensors["h.0.attn.bias"] = np.ones((1, 1, 20, 20), np.float32)
    tensors["lm_head.weight"] = tensors["wte.weight"]
    (source / "model.safetensors").unlink()
    names, places = sorted(tensors), {}
    for number, part in enumerate((names[:7], names[7:])):
        file = f"part-{number}.safetensors"
        save_file({name: tensors[name] for name in part}, source / file)
        places |= dict.fromkeys(part, file)
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    assert imported(source, tmp_path / "run") == 0
    ours, theirs = logits_of(tmp_path / "run")
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


class Payload:
    """Whoever unpickles this runs it."""

    def __reduce__(self):
        return (Path("executed").touch, ())


def change(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def tensors_changed(change):
    def changed(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return changed


def truncated(folder):
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(50_000)


def only_a_pickle(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))


def pickle_in_disguise(folder):
    (folder / "model.safetensors").write_bytes(pickle.dumps(Payload()))


def index_elsewhere(folder):
    index = {"weight_map": {"wte.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


NAME = "transformer.h.1.mlp.c_fc.weight"
HOSTILE = {
    "truncated": (truncated, "model.safetensors can't be read as safetensors: "),
    "pickle": (only_a_pickle, "model.safetensors is missing; pytorch_model.bin may run code"),
    "disguise": (pickle_in_disguise, "model.safetensors can't be read as safetensors: "),
    "elsewhere": (index_elsewhere, "names '../model.safetensors', which isn't beside it"),
    "missing": (tensors_changed(lambda t: t.pop(NAME)), "lacks h.1.mlp.c_fc.weight"),
    "extra": (
        tensors_changed(lambda t: t.update(extra=t[NAME], more=t[NAME])),
        "has what this architecture doesn't: extra, more",
    ),
    "shape": (
        tensors_changed(lambda t: t.update({NAME: t[NAME][:, :-1].copy()})),
        "h.1.mlp.c_fc.weight has shape (24, 95), not (24, 96)",
    ),
    "untied": (
        tensors_changed(lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"] + 1})),
        "lm_head.weight is not wte.weight; ours are one matrix",
    ),
    "activation": (
        lambda folder: change(folder, activation_function="relu"),
        "activation_function='relu', our dense model has 'gelu_new'",
    ),
    "kind": (lambda folder: change(folder, model_type="llama"), "model_type='llama', our dense"),
    "sizes": (lambda folder: change(folder, n_head=None), "config.json: no usable "),
    "heads": (lambda folder: change(folder, n_head=5), "model.d_model=24 is not divisible by mo"),
    "no json": (lambda folder: (folder / "config.json").write_text("{"), "config.json is not JSON"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json can't be read"),
    "no tokenizer": (
        lambda folder: (folder / "tokenizer.json").unlink(),
        "has no tokenizer.json, nor vocab.json with merges.txt",
    ),
    "vocabulary": (
        lambda folder: (change(folder, vocab_size=200), tensors_changed(
            lambda t: t.update({"transformer.wte.weight": t["transformer.wte.weight"][:200].copy()})
        )(folder)),
        "tokenizer has 257 entries, model.vocab_size=200 is smaller",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(name, source, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    prepare, message = HOSTILE[name]
    prepare(source)
    assert imported(source, "run") == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert message in line
    assert not Path("executed").exists()
    assert not Path("run/config.json").exists()


RESIDUAL = "2 layers, E=8, residual"


@pytest.fixture(scope="module")
def runs(text, tmp_path_factory):  # noqa: F811
    """Trained runs by name."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("dense", RESIDUAL):
        assert main(arguments(text, folder / name, name)) == 0
    return folder


def test_our_own_tensors_with_a_card(runs, tmp_path, capsys):
    """A model with experts, out and in again: every parameter; and what the card says."""
    command = ["export", "--kind=safetensors", f"--workdir={runs / RESIDUAL}"]
    assert main([*command, f"--out={tmp_path / 'out'}"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    loss = logged(runs / RESIDUAL)[-1]["eval/loss"]
    assert card.startswith(f"# {RESIDUAL}\n")
    assert f"Validation loss {loss:.4f} nats a token" in card
    assert imported(tmp_path / "out", tmp_path / "run", "safetensors") == 0
    (_, step, ours, _), (_, _, theirs, _) = map(restore_run, (tmp_path / "run", runs / RESIDUAL))
    assert step == 0
    for name, leaf in named_leaves(theirs).items():
        np.testing.assert_array_equal(named_leaves(ours)[name], leaf, err_msg=name)
    command = [
        "export",
        "--kind=gpt2",
        f"--workdir={runs / RESIDUAL}",
        f"--out={tmp_path / 'no'}",
    ]
    assert main(command) == 2
    assert "GPT-2 has no experts, and this run is 2 layers" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
    assert imported(tmp_path / "out", tmp_path / "run", "safetensors") == 2
    assert "holds a run; give another folder" in capsys.readouterr().err


def test_no_training_goes_on_with_a_model_alone(runs, text, tmp_path, capsys):  # noqa: F811
    """It is refused, and the model stays; another run starts as it."""
    out, run = tmp_path / "out", tmp_path / "run"
    command = ["export", "--kind=safetensors", f"--workdir={runs / 'dense'}", f"--out={out}"]
    assert main(command) == 0
    assert imported(out, run, "safetensors") == 0
    again = {"data.tokenizer": run / "tokenizer.json"}
    assert main(arguments(text, run, "dense", **again)) == 2
    assert "holds a model alone; train another run" in capsys.readouterr().err
    settings = {"init.workdir": run, "train.steps": 2, "optimizer.warmup_tokens": 10**5}
    assert main(arguments(text, tmp_path / "more", "dense", **settings)) == 0
    trained = logged(runs / "dense")
    assert logged(tmp_path / "more")[0]["loss"] < trained[0]["loss"] - 0.5
