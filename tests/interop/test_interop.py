"""Other libraries' models: the same logits, the same bits back, and nothing executed."""

import contextlib
import fcntl
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from prmoe_jax.cli import main
from prmoe_jax.data.tokenizer import Tokenizer
from prmoe_jax.errors import UserError
from prmoe_jax.interop import tensors as safetensors_files
from prmoe_jax.interop.run import export_run, import_run
from prmoe_jax.nn.parameters import named_leaves
from prmoe_jax.run import new
from prmoe_jax.run.checkpoint import Checkpoints
from prmoe_jax.run.restore import restore_run
from tests.support.extras import needs_extra
from tests.support.faults import file_size_limit
from tests.support.paths import GOLDENS
from tests.support.quick import forward
from tests.support.runs import arguments, logged
from tests.support.tokenizers import byte_tokenizer, started_tokenizer


@pytest.fixture
def source(tmp_path):
    """Hugging Face's folder of a GPT-2, with a tokenizer."""
    folder = tmp_path / "source"
    shutil.copytree(GOLDENS / "gpt2", folder)
    byte_tokenizer().save(folder / "tokenizer.json")
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
    assert "40 tensors read, none missing" in capsys.readouterr().err
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
    exported = json.loads((tmp_path / "out" / "config.json").read_text())
    assert exported["bos_token_id"] == exported["eos_token_id"] == 256
    original = json.loads((source / "config.json").read_text())
    other = {name for name in exported if exported[name] != original.get(name)}
    # The tokenizer's id; no n_inner means 4 times the width; dropout isn't imported; the name that
    # transformers 4 has for dtype.
    dropouts = {"attn_pdrop", "embd_pdrop", "resid_pdrop"}
    assert other == {"bos_token_id", "eos_token_id", "n_inner", "torch_dtype"} | dropouts
    capsys.readouterr()
    generate = ["generate", f"--workdir={tmp_path / 'run'}", "--tokens=9", "--json"]
    assert main(generate) == 0
    assert json.loads(capsys.readouterr().out)["text"]
    assert main(command) == 2
    assert f"--out={tmp_path / 'out'} exists; give" in capsys.readouterr().err


def test_gpt2_with_a_start_of_its_own(source, tmp_path):
    started_tokenizer().save(source / "tokenizer.json")
    assert imported(source, tmp_path / "run") == 0
    folders = [f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'out'}"]
    assert main(["export", "--kind=gpt2", *folders]) == 0
    exported = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (exported["bos_token_id"], exported["eos_token_id"]) == (257, 256)


@needs_extra("interop", "transformers")
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
    tensors["h.0.attn.bias"] = np.ones((1, 1, 20, 20), np.bool_)
    tensors["h.0.attn.masked_bias"] = np.array(-np.inf, np.float32)
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


def index_of(places):
    """A change that writes an index, with or without a weight_map."""
    index = {} if places is None else {"weight_map": places}

    def changed(folder):
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return changed


def in_place(name, make):
    """A change that makes something else where a file of this name is expected."""

    def changed(folder):
        (folder / name).unlink()
        make(folder / name)

    return changed


def stored_as(dtype):
    """A change of what the first tensor's bytes are said to be."""

    def changed(folder):
        data = (folder / "model.safetensors").read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        first = next(tensor for name, tensor in header.items() if name != "__metadata__")
        width = {"F4": 0.5, "F8_E4M3": 1, "F8_E5M2": 1}[dtype]
        first["dtype"] = dtype
        first["shape"] = [int((first["data_offsets"][1] - first["data_offsets"][0]) / width)]
        head = json.dumps(header).encode()
        body = data[8 + int.from_bytes(data[:8], "little") :]
        (folder / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + body)

    return changed


def holding(value, dtype=np.float32):
    """A change of one tensor to another type, with one other value in it."""

    def changed(tensors):
        tensors[NAME] = tensors[NAME].astype(dtype)
        tensors[NAME][3, 5] = value

    return tensors_changed(changed)


def twice(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({NAME: tensors[NAME]}, folder / "more.safetensors")
    index_of({"a": "model.safetensors", NAME: "more.safetensors"})(folder)


NAME = "transformer.h.1.mlp.c_fc.weight"
HOSTILE = {
    "truncated": (truncated, "model.safetensors can't be read as safetensors: "),
    "pickle": (only_a_pickle, "model.safetensors is missing; pytorch_model.bin may run code"),
    "disguise": (pickle_in_disguise, "model.safetensors can't be read as safetensors: "),
    "elsewhere": (index_elsewhere, "names '../model.safetensors', which isn't beside it"),
    "missing": (tensors_changed(lambda t: t.pop(NAME)), f"lacks {NAME}"),
    "extra": (
        tensors_changed(lambda t: t.update(extra=t[NAME], more=t[NAME])),
        "has what this architecture doesn't: 'extra', 'more'",
    ),
    "shape": (
        tensors_changed(lambda t: t.update({NAME: t[NAME][:, :-1].copy()})),
        f"{NAME} has shape (24, 95), not (24, 96)",
    ),
    "untied": (
        tensors_changed(lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"] + 1})),
        "lm_head.weight is not transformer.wte.weight",
    ),
    "activation": (
        lambda folder: change(folder, activation_function="relu"),
        "activation_function='relu', our model has 'gelu_new'",
    ),
    "kind": (lambda folder: change(folder, model_type="llama"), "model_type='llama' is not gpt2; "),
    "sizes": (lambda folder: change(folder, n_head=None), "config.json: no usable "),
    "heads": (lambda folder: change(folder, n_head=5), "model.d_model=24 is not divisible by mo"),
    "no json": (lambda folder: (folder / "config.json").write_text("{"), "config.json is damaged:"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    "no tokenizer": (
        lambda folder: (folder / "tokenizer.json").unlink(),
        "has no tokenizer.json, nor vocab.json with merges.txt",
    ),
    "vocabulary": (
        lambda folder: (change(folder, vocab_size=200), tensors_changed(
            lambda t: t.update({"transformer.wte.weight": t["transformer.wte.weight"][:200].copy()})
        )(folder)),
        "the tokenizer has 257 entries and the model only 200; remove the added ones from its",
    ),
    # Sizes.
    **{
        f"{size}={value!r:.20}": (
            lambda folder, size=size, value=value: change(folder, **{size: value}),
            f"config.json: no usable {size}: it is ",
        )
        for size, values in {
            "n_layer": (10**9, 0, "3", [3], True),
            "n_embd": (-24, None, 24.5, float("nan")),
            "n_head": (float("inf"), "four", {}),
            "n_positions": (10**400, 0),
            "vocab_size": (10**20, False),
            "n_inner": ("x", 0, 96.5),
        }.items()
        for value in values
    },
    "one layer too many": (lambda folder: change(folder, n_layer=4), "lacks transformer.h.3.attn."),
    "width": (lambda folder: change(folder, n_embd=10**9), "config.json: model.d_ff=4000000000 is"),
    "hidden width": (lambda folder: change(folder, n_inner=97), "has shape (96,), not (97,)"),
    "context": (lambda folder: change(folder, n_positions=10**6), "(20, 24), not (1000000, 24)"),
    "all heads": (lambda folder: change(folder, n_head=10**9), "is not divisible by model.heads=1"),
    "list": (lambda folder: change(folder, model_type=["gpt2"]), "model_type=['gpt2'] is not gpt2"),
    "null": (lambda folder: change(folder, scale_attn_weights=None), "scale_attn_weights=None, ou"),
    # JSON of another shape.
    "deep": (
        lambda folder: (folder / "config.json").write_text("[" * 10**5 + "]" * 10**5),
        "config.json is damaged: it is nested too deeply",
    ),
    "array": (lambda folder: (folder / "config.json").write_text("[]"), "it holds list, not dict"),
    "no map": (index_of(None), "index.json has no weight_map from names of tensors to names of fi"),
    "map of a list": (index_of(["model.safetensors"]), "index.json has no weight_map"),
    "map of numbers": (index_of({"wte.weight": 1}), "index.json has no weight_map"),
    "map to a long name": (index_of({"a": "x" * 300}), "xxx', which isn't beside it"),
    "map to nothing": (index_of({"a": ""}), "names '', which isn't beside it"),
    "map to a NUL": (index_of({"a": "x\0"}), "which isn't beside it"),
    # Tensors.
    "NaN": (holding(np.nan), f"model.safetensors: '{NAME}' holds NaN, "),
    "infinity": (holding(-np.inf), "holds NaN, infinity or numbers too large for float32"),
    "infinity of half": (holding(np.inf, np.float16), "holds NaN, infinity or numbers too large"),
    "beyond float32": (holding(1e39, np.float64), "holds NaN, infinity or numbers too large for f"),
    "int64": (holding(1, np.int64), "holds I64; weights are F16, BF16, F32, F64"),
    "int8": (holding(1, np.int8), "holds I8; weights are F16, BF16, F32, F64"),
    "bool": (holding(True, np.bool_), "holds BOOL; weights are F16, BF16, F32, F64"),
    "complex": (holding(1, np.complex64), "holds C64; weights are F16, BF16, F32, F64"),
    "fp8": (stored_as("F8_E4M3"), "holds F8_E4M3; weights are F16, BF16, F32, F64"),
    "fp4": (stored_as("F4"), "holds F4; weights are F16, BF16, F32, F64"),
    "scalar": (
        tensors_changed(lambda t: t.update({NAME: np.array(1, np.float32)})),
        f"{NAME} has shape (), not (24, 96)",
    ),
    "with and without": (
        tensors_changed(lambda t: t.update({NAME.removeprefix("transformer."): t[NAME]})),
        "has what this architecture doesn't: 'h.1.mlp.c_fc.weight'",
    ),
    "in two files": (twice, f"more.safetensors holds '{NAME}', as another"),
    # Other things than files.
    "pipe for the config": (in_place("config.json", os.mkfifo), "is not a regular file"),
    "pipe for the tensors": (in_place("model.safetensors", os.mkfifo), "is not a regular file"),
    "pipe for the tokenizer": (in_place("tokenizer.json", os.mkfifo), "has no tokenizer.json, nor"),
    "folder for the config": (in_place("config.json", Path.mkdir), "is not a regular file"),
    "folder for the tensors": (in_place("model.safetensors", Path.mkdir), "is not a regular file"),
    "device for the tensors": (
        in_place("model.safetensors", lambda path: path.symlink_to("/dev/zero")),
        "is not a regular file",
    ),
    "pipe for the index": (
        lambda folder: os.mkfifo(folder / "model.safetensors.index.json"), "is not a regular file"
    ),
    "symlink to itself": (
        in_place("config.json", lambda path: path.symlink_to(path.name)), "config.json is missing"
    ),
    "not a tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text('{"version": "1.0"}'),
        "tokenizer.json: not a tokenizer.json: ",
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
    assert os.listdir() == ["source"]


def test_weights_of_other_precision(source, tmp_path):
    """float16, bfloat16 and float64 are weights, too: each value as it is stored."""
    import ml_dtypes

    tensors = load_file(source / "model.safetensors")
    stored = {}
    types = np.float16, ml_dtypes.bfloat16, np.float64
    for number, name in enumerate(sorted(tensors)):
        stored[name] = tensors[name].astype(types[number % 3])
    save_file(stored, source / "model.safetensors")
    assert imported(source, tmp_path / "run") == 0
    _, _, model, _ = restore_run(tmp_path / "run")
    leaves = named_leaves(model)
    for theirs, ours in (("wte.weight", "tokens"), ("wpe.weight", "positions")):
        expected = stored[f"transformer.{theirs}"].astype(np.float32)
        np.testing.assert_array_equal(leaves[ours], expected)


class Killed(BaseException):
    """What stands for a signal that no program can handle."""


def killed(*args, **kwargs):
    raise Killed


def doubled(source):
    """Another model: the same one with twice the weights."""
    other = source.with_name("other")
    shutil.copytree(source, other)
    tensors_changed(lambda t: t.update({name: 2 * x for name, x in t.items()}))(other)
    return other


def positions(source, run):
    """The position embeddings of a source, and of the run that was made of it."""
    _, _, model, _ = restore_run(run)
    expected = load_file(source / "model.safetensors")["transformer.wpe.weight"]
    return np.asarray(named_leaves(model)["positions"]), expected


def test_an_import_killed_half_way(source, tmp_path, monkeypatch):
    """Between checkpoint and config: no run, and the next import is all of the second model."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(new, "save", killed)
        patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # nobody tidies up
        with pytest.raises(Killed):
            import_run("gpt2", source, run)
    left = set(tmp_path.iterdir()) - {source}
    assert left
    other = doubled(source)
    assert imported(other, run) == 0
    np.testing.assert_array_equal(*positions(other, run))
    assert set(tmp_path.iterdir()) == {source, other, run}
    assert left != {run}


KILLED = """
import os, sys
from prmoe_jax.cli import main
from prmoe_jax.run import new
save = new.save
def save_and_die(*args):
    save(*args)
    os.kill(os.getpid(), 9)
new.save = save_and_die
main(sys.argv[1:])
"""


def test_an_import_killed_at_its_last_file(source, tmp_path):
    """A real kill when all is written and nothing is renamed."""
    run, other = tmp_path / "run", doubled(source)
    command = ["import", "--kind=gpt2", f"--source={source}", f"--workdir={run}"]
    done = subprocess.run([sys.executable, "-c", KILLED, *command], timeout=300)
    assert done.returncode == -signal.SIGKILL
    assert not run.exists()
    assert imported(other, run) == 0
    np.testing.assert_array_equal(*positions(other, run))
    assert set(tmp_path.iterdir()) == {source, other, run}


def test_where_something_is_already(source, tmp_path, monkeypatch, capsys):
    """An empty folder is taken; whatever else is there stays as it is."""
    monkeypatch.chdir(tmp_path)
    for name in ("full", "empty", "here"):
        Path(name).mkdir()
    Path("full/notes").write_text("mine")
    Path("file").write_text("mine")
    for name in ("full", "file"):
        assert imported(source, name) == 2
        assert f"--workdir={name} exists; give another folder" in capsys.readouterr().err
    assert Path("full/notes").read_text() == Path("file").read_text() == "mine"
    assert os.listdir("full") == ["notes"]
    monkeypatch.chdir("here")
    assert imported(source, ".") == 2
    assert "--workdir=. is the current folder" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    Path(".empty.tmp").mkdir()
    with open(".empty.tmp/.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert imported(source, "empty") == 2
    assert "another process is writing" in capsys.readouterr().err
    assert imported(source, "empty") == 0
    np.testing.assert_array_equal(*positions(source, Path("empty")))


def test_a_model_that_was_not_saved(source, tmp_path):
    """A second model of the same step isn't passed over without a word."""
    assert imported(source, tmp_path / "run") == 0
    _, _, model, _ = restore_run(tmp_path / "run")
    with contextlib.closing(Checkpoints(tmp_path / "run", keep=1)) as checkpoints:
        with pytest.raises(UserError, match="checkpoint 0 was not written to "):
            checkpoints.save_model(0, model, {})


def test_the_record_of_the_tokenizer(source, tmp_path):
    """A checkpoint knows its tokenizer; one of before there was a record is read as well."""
    run = tmp_path / "run"
    assert imported(source, run) == 0
    (record,) = (run / "checkpoints" / "0" / "data").rglob("metadata")
    fingerprint = Tokenizer.load(run / "tokenizer.json").fingerprint
    assert json.loads(record.read_text())["fingerprint"] == {"tokenizer": fingerprint}
    shutil.rmtree(run / "checkpoints" / "0" / "data")
    np.testing.assert_array_equal(*positions(source, run))


def test_importing_onto_a_full_disk(source, tmp_path, capsys):
    run = tmp_path / "run"
    with file_size_limit(20_000):
        assert imported(source, run) == 2
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith("prmoe: a checkpoint could not be written to ")
    assert not run.exists()
    assert imported(source, run) == 0
    assert set(tmp_path.iterdir()) == {source, run}
    np.testing.assert_array_equal(*positions(source, run))


RESIDUAL = "2 layers, E=8, residual"


@pytest.fixture(scope="module")
def runs(text, tmp_path_factory):
    """Trained runs by name."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("dense", RESIDUAL):
        assert main(arguments(text, folder / name, name)) == 0
    return folder


def test_our_own_tensors_with_a_card(runs, tmp_path, monkeypatch, capsys):
    """A model with experts, out and in again: every parameter in several files, and the card."""
    monkeypatch.setattr(safetensors_files, "SHARD_BYTES", 10_000)
    command = ["export", "--kind=safetensors", f"--workdir={runs / RESIDUAL}"]
    assert main([*command, f"--out={tmp_path / 'out'}"]) == 0
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
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
    assert (
        f"this run is {RESIDUAL}, and GPT2LMHeadModel of transformers has none; use --kind=sa"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "no").exists()
    assert imported(tmp_path / "out", tmp_path / "run", "safetensors") == 2
    assert "holds a run; give another folder" in capsys.readouterr().err


# The kind, and the bytes a file may have: too few for the weights, for the tokenizer.
@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("gpt2", 9_000),
        ("safetensors", 9_000),
        ("safetensors", 900),
        pytest.param("deepspeed", 9_000, marks=needs_extra("interop", "torch")),
    ],
)
def test_exporting_onto_a_full_disk(kind, size, runs, tmp_path, capsys):
    """One line and nothing left, so that the same command works when there is room."""
    command = [
        "export",
        f"--kind={kind}",
        f"--workdir={runs / 'dense'}",
        f"--out={tmp_path / 'out'}",
    ]
    with file_size_limit(size):
        assert main(command) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith(f"prmoe: --out={tmp_path / 'out'} cannot be written: ")
    assert "File too large" in line
    assert not list(tmp_path.iterdir())
    assert main(command) == 0
    assert not (tmp_path / "out" / ".lock").exists()


def test_an_export_killed_half_way(runs, tmp_path, monkeypatch):
    """A folder in the way of the retry would have to be removed by hand."""
    command = [
        "export",
        "--kind=safetensors",
        f"--workdir={runs / 'dense'}",
        f"--out={tmp_path / 'out'}",
    ]
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "save", killed)
        patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
        with pytest.raises(Killed):
            export_run("safetensors", runs / "dense", tmp_path / "out")
    assert list(tmp_path.iterdir())
    assert main(command) == 0
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


# Damage to what `export` wrote, as a change of its config.
OURS = {
    "layers": ({"layers": 10**9}, "config.json: model.layers=1000000000, the tensors are of 2 la"),
    "layers in words": ({"layers": "two"}, "config.json: model.layers='two', the tensors are of 2"),
    "hidden width": ({"d_ff": 10**9}, "mlp.b_in has shape (1, 32), not (1, 1000000000)"),
    "hidden width beside experts of their own": (
        {"d_ff": 10**9, "expert_d_ff": 32},
        "mlp.b_in has shape (1, 32), not (1, 1000000000)",
    ),
    "hidden width of 10^18": ({"d_ff": 10**18}, "config.json: model.d_ff=1000000000000000000 is o"),
    "vocabulary": ({"vocab_size": -1}, "config.json: model.vocab_size=-1 is out of range"),
    "type": ({"dropout": "x"}, "config.json: config.model.dropout='x' must be of type float"),
    "heads": ({"heads": 3}, "config.json: model.d_model=16 is not divisible by model.heads=3"),
    "experts": ({"experts": [7]}, "experts.b_in has shape (1, 8, 32), not (1, 7, 32)"),
}


@pytest.mark.parametrize("name", OURS)
def test_a_damaged_config_of_ours(name, runs, tmp_path, capsys):
    changes, message = OURS[name]
    out = tmp_path / "out"
    shutil.copytree(exported(runs), out)
    settings = json.loads((out / "config.json").read_text())
    settings["model"] |= changes
    (out / "config.json").write_text(json.dumps(settings))
    assert imported(out, tmp_path / "run", "safetensors") == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == [out]


def exported(runs):
    """The folder of an export of the run with experts; made once."""
    out = runs / "exported"
    if not out.exists():
        command = ["export", "--kind=safetensors", f"--workdir={runs / RESIDUAL}", f"--out={out}"]
        assert main(command) == 0
    return out


def test_no_training_goes_on_with_a_model_alone(runs, text, tmp_path, capsys):
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
