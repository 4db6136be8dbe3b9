"""Files of strangers do no harm: none outside is touched, and each lie is one clear line.

docs/security.md says whose files may be what. Mutations of all kinds of files are in
`test_mutations.py`.
"""

import copy
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from prmoe_jax import files
from prmoe_jax.cli import main, parse_config
from prmoe_jax.config.schema import DataConfig
from prmoe_jax.data import cache, pipeline, shards
from prmoe_jax.errors import UserError
from prmoe_jax.run.metrics import read_metrics
from prmoe_jax.stores.lock import locked
from prmoe_jax.training.loop import compile_cache
from tests.support.extras import needs_extra
from tests.support.faults import at_most
from tests.support.literal_store import literal_store
from tests.support.paths import GOLDENS, REPOSITORY
from tests.support.runs import SETTINGS, train_in
from tests.support.shards import encoded, reach, write_array, write_ours

TEXTS = ["the first", "é☃ of the second", "x", "a longer one " * 5, "last of all"]
VICTIM = "what a stranger's files must not touch\n"
RUN = ["train", "--workdir=run", *SETTINGS, "--config.checkpoint.every=1"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working directory, beside a folder with a file that must stay as it is."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "victim").write_text(VICTIM)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path / "here"
    assert os.listdir(tmp_path / "outside") == ["victim"]
    assert (tmp_path / "outside" / "victim").read_text() == VICTIM
    assert set(os.listdir(tmp_path)) <= {"outside", "here", "store"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a corpus, its cache and a run of two steps, each with a checkpoint."""
    return train_in(tmp_path_factory.mktemp("trained"), RUN)


@pytest.fixture
def run(trained, place):
    """A copy of that folder's files in the working directory; the run's folder."""
    shutil.copytree(trained, place, dirs_exist_ok=True)
    return place / "run"


def load(corpus, **changes):
    config = DataConfig(f"tokens:{corpus}", tokenizer="bytes", cache_dir="cache", **changes)
    return pipeline.load_data(config, 384, 7)


def refused(arguments, capsys):
    """The line with which a command ends that fails by its user's input."""
    capsys.readouterr()
    assert main(arguments) == 2
    *log, line = capsys.readouterr().err.splitlines()
    assert line.startswith("prmoe: ") and "prmoe: " not in "".join(log)
    return line


# --- The index of token shards


def at(*keys, value):
    """A change of one value of an index; without `value` the key goes."""

    def change(content):
        for key in keys[:-1]:
            content = content[key]
        if value is GONE:
            del content[keys[-1]]
        else:
            content[keys[-1]] = value

    return change


GONE = object()
FIRST = "splits", "train", "shards", 0
LIES = {
    "a name that leaves the folder": (at(*FIRST, "name", value="../../outside/new.tokens"), "name"),
    "a name of the folder above": (at(*FIRST, "name", value=".."), "name"),
    "an absolute name": (at(*FIRST, "name", value="/tmp/new.tokens"), "name"),
    "the index as a shard": (at(*FIRST, "name", value="index.json"), "name"),
    "a shard twice": (at(*FIRST, "name", value="train-00002.tokens"), "name"),
    "a name with NUL": (at(*FIRST, "name", value="a\0.tokens"), "name"),
    "a name with half of a pair": (at(*FIRST, "name", value="\ud800.tokens"), "name"),
    "a number as name": (at(*FIRST, "name", value=7), "name"),
    "no name": (at(*FIRST, "name", value=GONE), "name"),
    "objects": (at("dtype", value="|O"), "dtype"),
    "floats": (at("dtype", value="<f2"), "dtype"),
    "void": (at("dtype", value="V2"), "dtype"),
    "signed": (at("dtype", value="<i4"), "dtype"),
    "no dtype at all": (at("dtype", value="nonsense"), "dtype"),
    "no train": (at("splits", "train", value=GONE), "train"),
    "no validation": (at("splits", "validation", value=GONE), "validation"),
    "a split too many": (at("splits", "test", value={}), "test"),
    "a list as split": (at("splits", "train", value=[]), "train"),
    "a number as split": (at("splits", "validation", value=3), "validation"),
    "a number as shards": (at("splits", "train", "shards", value=3), "shards"),
    "a text as shard": (at(*FIRST, value="train-00000.tokens"), "not an object but str"),
    "text as bytes": (at("splits", "validation", "bytes", value="8"), "bytes"),
    "negative bytes": (at("splits", "validation", "bytes", value=-8), "bytes"),
    "bytes that are no number": (at("splits", "validation", "bytes", value=float("nan")), "bytes"),
    "bytes of no shard": (at("splits", "validation", "bytes", value=9), "bytes"),
    "negative bytes of a shard": (at(*FIRST, "bytes", value=-8), "bytes"),
    "negative tokens": (at(*FIRST, "tokens", value=-30), "tokens"),
    "a truth as tokens": (at(*FIRST, "tokens", value=True), "tokens"),
    "another digest": (at(*FIRST, "blocks", value="../x"), "blocks"),
    "no digest": (at(*FIRST, "sha256", value=GONE), "sha256"),
}


@pytest.mark.parametrize("reached", ["here", "store"])
@pytest.mark.parametrize("lie", LIES)
def test_an_index_is_checked_before_anything_is_copied(lie, reached, place, monkeypatch):
    """Also one whose fingerprint is right, and in a store whose names are taken as they are."""
    change, named = LIES[lie]
    store = reach(place.parent / "store", monkeypatch)
    ours = (store if reached == "store" else place) / "ours"
    write_ours(ours, TEXTS)
    (place.parent / "store" / "new.tokens").write_bytes(bytes(60))
    content = json.loads((ours / "index.json").read_text())
    change(content)
    content["fingerprint"] = shards.fingerprint(content)
    (ours / "index.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"index.json.* damaged: .*{named}") as caught:
        load("store://ours" if reached == "store" else "ours")
    assert len(str(caught.value).splitlines()) == 1
    assert not list(place.rglob("cache/shards/*"))


READ = """
from prmoe_jax.config.schema import DataConfig
from prmoe_jax.data.pipeline import load_data

load_data(DataConfig("tokens:gs://bucket/shards", cache_dir="cache"), 384, 7)
"""


@needs_extra("gcs", "gcsfs")
def test_an_object_of_any_name_lands_in_no_other_folder(place):
    """The index of a bucket names an object that is there, with its size and digest."""
    write_ours(place / "ours", TEXTS)
    objects = {f"shards/{path.name}": path.read_bytes() for path in (place / "ours").iterdir()}
    shutil.rmtree(place / "ours")
    honest = json.loads(objects["shards/index.json"])

    def read_as(name):
        content = copy.deepcopy(honest)
        content["splits"]["train"]["shards"][0]["name"] = name
        lie = cache.fingerprint(
            *(content[n] for n in ("tokenizer", "vocabulary", "dtype", "splits"))
        )
        index = json.dumps(content | {"fingerprint": lie}).encode()
        moved = {f"shards/{name}": objects["shards/train-00000.tokens"]}
        with literal_store(objects | {"shards/index.json": index} | moved) as address:
            return subprocess.run(
                [sys.executable, "-c", READ],
                env=os.environ | {"STORAGE_EMULATOR_HOST": address, "PYTHONPATH": f"{REPOSITORY}"},
                capture_output=True,
                text=True,
            )

    outside = "../../../../outside/new.tokens"
    done = read_as(outside)
    assert f"name is '{outside}'" in done.stderr and not list(place.rglob("*.tokens"))
    assert read_as("train.tokens").returncode == 0
    assert len(list(place.rglob("*.tokens"))) == 4


# --- .npy files


def npy(shape, kind="<u2", tokens=b"", more=""):
    """A file with a header that says what it likes."""
    head = f"{{'descr': {kind!r}, 'fortran_order': False, 'shape': {shape}{more}, }}".encode()
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(head) + 1) + head + b"\n" + tokens


def two_arrays(path):
    with path.open("wb") as file:
        for _ in range(2):
            np.save(file, np.concatenate(encoded(TEXTS)).astype("<u2"))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_bytes(npy((9,), tokens=bytes(18 + 14))), "it has 100 bytes, and"),
        (two_arrays, "bytes, and an array uint16 .* ends at byte"),
        (lambda path: path.write_bytes(npy((1 << 62,), tokens=bytes(18))), "ends at byte"),
        (lambda path: path.write_bytes(npy((-9,), tokens=bytes(18))), "which can't be mapped"),
        (lambda path: path.write_bytes(npy((9,), "|O", bytes(72))), "which can't be mapped"),
        (lambda path: path.write_bytes(npy((9,), "<f2", bytes(18))), "not a list of token ids"),
        (lambda path: path.write_bytes(npy("(" * 4000, tokens=bytes(18))), "is damaged"),
    ],
)
def test_a_npy_file_is_as_long_as_its_array(write, message, place):
    write(place / "a.npy")
    with pytest.raises(UserError, match=f"^a.npy .*{message}"):
        load("a.npy")


def test_a_npy_file_with_a_longer_header_is_read_from_its_array(place):
    ids = np.concatenate(encoded(TEXTS)).astype("<u2")
    (place / "a.npy").write_bytes(npy((len(ids),), tokens=ids.tobytes(), more=" " * 500))
    write_array(place / "b.npy", encoded(TEXTS))
    a, b = (load(name, validation_fraction=0.2) for name in ("a.npy", "b.npy"))
    assert [w.tokens_BxL.tolist() for w in a.train] == [w.tokens_BxL.tolist() for w in b.train]


# --- Links


def test_a_file_is_written_through_no_link(place):
    """Neither its name nor the one that an unfinished file had before is followed."""
    for name in ("config.json", ".config.json.tmp"):
        (place / name).symlink_to("../outside/victim")
    files.replace(place / "config.json", VICTIM)
    assert not (place / "config.json").is_symlink()
    files.replace(place / "config.json", "new")
    assert (place / "config.json").read_text() == "new"


@pytest.mark.parametrize("kind", ["import", "export", "prune"])
def test_a_folder_is_built_in_no_other_one(kind, place, run, capsys):
    """A link with the hidden name of an unfinished folder does not empty what it leads to."""
    command, option = {
        "import": ("import --kind=gpt2 --source=gpt2", "--workdir"),
        "export": ("export --kind=safetensors --workdir=run", "--out"),
        "prune": ("prune --workdir=moe --keep=0.5 --batches=1", "--out"),
    }[kind]
    shutil.copytree(GOLDENS / "gpt2", place / "gpt2")
    shutil.copy(run / "tokenizer.json", place / "gpt2")
    if kind == "prune":
        moe = ["--config.model.placement=every 1", "--config.model.experts=4"]
        assert main(["train", "--workdir=moe", *SETTINGS, *moe]) == 0
    (place / ".new.tmp").symlink_to("../outside")
    line = refused([*command.split(), f"{option}=new"], capsys)
    assert f".new.tmp is a link to {place.parent / 'outside'}" in line and "remove the link" in line
    assert not (place / "new").exists()


@pytest.mark.parametrize(
    "name", [".lock", "metrics.jsonl", "checkpoints", "tensorboard", "profile", "log.txt"]
)
def test_a_runs_folder_has_no_link_out_of_it(name, run, capsys):
    if (run / name).is_dir():
        shutil.rmtree(run / name)
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to("../../outside" + "/victim" * ("." in name))
    line = refused(RUN, capsys)
    assert f"--workdir=run has the link {name}, through which this command would write" in line


def test_a_link_in_place_of_an_unfinished_checkpoint_is_not_emptied(run):
    shutil.rmtree(run / "checkpoints" / "2")
    (run / "checkpoints" / "2.orbax-checkpoint-tmp").symlink_to("../../../outside")
    with at_most(60):  # Orbax has threads that wait for that folder much longer
        done = subprocess.run(
            [sys.executable, "-m", "prmoe_jax", *RUN],
            env=os.environ | {"PYTHONPATH": f"{REPOSITORY}"},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 2 and "a checkpoint could not be written" in done.stderr


def test_a_link_within_a_runs_folder_and_the_folder_as_a_link_stay_allowed(run, place, capsys):
    (run / "newest").symlink_to("checkpoints/2")
    (place / "again").symlink_to("run")
    assert main([*RUN[:1], "--workdir=again", *RUN[2:]]) == 0
    assert "the run is complete" in capsys.readouterr().err


def test_locks_follow_no_link(place):
    for name in ("cache.lock", "a"):
        (place / name).symlink_to("../outside/victim")
    with pytest.raises(UserError, match="it is a link, which is not followed; remove it"):
        with cache.locked(place / "cache"):
            raise AssertionError
    (place / "x").mkdir()
    (place / "x" / ".lock").symlink_to("../nowhere")
    with pytest.raises(UserError, match="has the link .lock"):
        locked(place / "x").__enter__()
    assert not (place / "nowhere").exists()


def sweep(place, names, steps=2):
    settings = {
        "model": {"layers": 1, "d_model": 16, "d_ff": 32, "heads": 2, "length": 32}
        | {"vocab_size": 384, "dtype": "float32"},
        "data": {"corpus": "corpus", "cache_dir": "cache", "tokenizer": "bytes"},
        "train": {"steps": steps, "batch_size": 4},
        "optimizer": {"warmup_tokens": 0},
    }
    (place / "sweep").mkdir()
    runs = "".join(f"    yield {name!r}, {settings!r}\n" for name in names)
    (place / "sweep" / "sweep.py").write_text(f"def runs():\n{runs}")
    return ["sweep", "sweep", "--workdir=runs"]


def test_a_sweep_appends_to_no_link(place, trained, capsys):
    shutil.copytree(trained / "corpus", place / "corpus")
    command = sweep(place, ["a"])
    (place / "runs" / "a").mkdir(parents=True)
    (place / "runs" / "a" / "log.txt").symlink_to("../../../outside/victim")
    assert main(command) == 1
    assert "log.txt cannot be written: it is a link" in capsys.readouterr().err


# --- Checkpoints


def data_record(run, step):
    return run / "checkpoints" / str(step) / "data" / "metadata"


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (at("iterator", value=GONE), "its data record has no iterator"),
        (at("fingerprint", value=GONE), "its data record has no fingerprint"),
        (at("iterator", "next_index", value=7), "its position in the data is {'next_index': 7}"),
        (at("checksums", value=[]), "its data record is not as it was written"),
        (
            at("checksums", "model", value=3),
            "the numbers of its model are not those that were",
        ),
    ],
)
def test_a_damaged_data_record_is_set_aside(change, message, signed, run, capsys):
    """As other damage is: training goes on with the checkpoint before, to the same end."""
    whole = read_metrics(run / "metrics.jsonl")
    record = json.loads(data_record(run, 2).read_text())
    if not signed:  # as records were written before they had a digest
        del record["checksums"]["record"]
    change(record)
    data_record(run, 2).write_text(json.dumps(record))
    assert main(RUN) == 0
    err = capsys.readouterr().err
    assert any(
        f"checkpoint 2 cannot be read: {line}" in err
        for line in (message, *["its data record is not as it was written"] * signed)
    )
    assert (run / "damaged-2").is_dir()
    for before, after in zip(whole, read_metrics(run / "metrics.jsonl"), strict=True):
        for name in {"loss", "eval/loss"} & before.keys():
            assert after[name] == pytest.approx(before[name], rel=1e-5), before["step"]


def test_an_old_record_without_a_digest_must_be_of_its_step(run, capsys):
    record = json.loads(data_record(run, 2).read_text())
    del record["checksums"]["record"]
    data_record(run, 2).write_text(json.dumps(record))
    assert main(["eval", "--workdir=run"]) == 0
    (run / "checkpoints" / "2").rename(run / "checkpoints" / "8")
    capsys.readouterr()
    line = refused(["eval", "--workdir=run"], capsys)
    assert "its position in the data is {'next_index': 2}, not {'next_index': 8}" in line


@pytest.mark.parametrize(
    "command",
    [
        "export --kind=safetensors --workdir=run --out=run/checkpoints/9",
        "import --kind=gpt2 --source=run --workdir=run/checkpoints/9",
        "prune --workdir=run --keep=0.5 --out=run/checkpoints/9",
    ],
)
def test_nothing_is_written_among_a_runs_checkpoints(command, run, capsys):
    line = refused(command.split(), capsys)
    assert "run/checkpoints/9 lies among the checkpoints of the run" in line
    workdir = [RUN[0], "--workdir=run/checkpoints/9", *RUN[2:]]
    assert "lies among the checkpoints of the run" in refused(workdir, capsys)
    assert main(["eval", "--workdir=run"]) == 0


def test_runs_of_a_sweep_do_not_lie_in_one_another(place, trained, capsys):
    shutil.copytree(trained / "corpus", place / "corpus")
    line = refused(sweep(place, ["a/checkpoints/5", "ab", "a"]), capsys)
    assert "the folder of 'a/checkpoints/5' would lie in that of 'a'" in line
    assert not (place / "runs").exists()


# --- Programs


def test_no_program_comes_with_a_run(run, monkeypatch, caplog):
    """JAX runs the compiled programs that it finds: none are looked for in a run's folder."""
    (run / "compile_cache").mkdir()
    config = json.loads((run / "config.json").read_text())
    config["train"]["compile_cache"] = str(run / "compile_cache")
    (run / "config.json").write_text(json.dumps(config))
    given = parse_config(["--config=run/config.json"])
    assert given.execution.compile_cache == "auto"
    assert "is left out, since JAX runs the programs" in caplog.text
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with compile_cache(given, run):
        used = jax.config.values["jax_compilation_cache_dir"]
        assert used == str(Path("~/.cache/prmoe_jax/compile_cache").expanduser())
    own = parse_config(["--config=run/config.json", "--config.execution.compile_cache=mine"])
    assert own.execution.compile_cache == "mine"
