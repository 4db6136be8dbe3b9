"""prmoe tokenize: the same shards by any workers and after any kill, and those of today's path."""

import errno
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from prmoe_jax.cli import main
from prmoe_jax.config.schema import DataConfig
from prmoe_jax.data import chunks, pipeline, shards, sources, split, stages, template, tokens
from prmoe_jax.data import tokenize as tokenize_module
from prmoe_jax.data.chunks import Chunk, Piece
from prmoe_jax.errors import UserError
from prmoe_jax.stores.lock import locked
from tests.support import chats
from tests.support.extras import needs_extra
from tests.support.faults import file_size_limit
from tests.support.paths import REPOSITORY
from tests.support.shards import Texts
from tests.support.tokenizers import byte_tokenizer

beam = needs_extra("beam", "apache_beam")
# Beam's runner in this process.
IN_PROCESS = ["--", "--runner=FnApiRunner", "--direct_num_workers=1"]
SETTINGS = ["--config=tiny:prmoe", "--config.model.vocab_size=384", "--config.data.cache_dir=cache"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def texts(count, seed=0, words=40):
    """Documents of different lengths, with repetitions near and far, and empty ones."""
    draw = random.Random(seed)
    vocabulary = "the expert of é token ☃ is chosen by its router and so on".split()
    found = [" ".join(draw.choices(vocabulary, k=draw.randint(1, words))) for _ in range(count)]
    found += draw.choices(found, k=count // 5) + ["  ", ""]
    draw.shuffle(found)
    return found


def write_lines(path, documents):
    path.parent.mkdir(exist_ok=True)
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wb") as file:
        file.write(b"".join(json.dumps({"text": t}).encode() + b"\n" for t in documents))


def table(path, **columns):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=7)


def no_utf8():
    import pyarrow

    return pyarrow.array([b"\xff"]).view(pyarrow.string())


def damaged_table(path):
    """Its footer is whole, the compressed text is not."""
    table(path, text=[f"{i} {i}" for i in range(100)])
    content = bytearray(Path(path).read_bytes())
    content[20:60] = bytes(40)
    Path(path).write_bytes(content)


def tokenize(*extra, out="out", corpus="text", tokenizer="bytes"):
    settings = [f"--config.data.corpus={corpus}", f"--config.data.tokenizer={tokenizer}"]
    return main(["tokenize", *SETTINGS, *settings, f"--out={out}", *extra])


def content(folder):
    """The bytes of all files of a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def documents(out, name):
    """The documents of a split, read without the package."""
    index = json.loads(Path(out, "index.json").read_text())
    entries = index["splits"][name]["shards"]
    ids = np.concatenate([np.fromfile(Path(out, entry["name"]), "<u2") for entry in entries])
    assert sum(entry["tokens"] for entry in entries) == len(ids) == index["splits"][name]["tokens"]
    decode = byte_tokenizer().decode
    return decode(ids).removeprefix("<|endoftext|>").split("<|endoftext|>")


def expected(everything, fraction=0.05):
    """Both splits as lists: first occurrences, in order."""
    once = list(dict.fromkeys(text for text in everything if text.strip()))
    ranked = sorted(once, key=lambda text: hashlib.sha256(text.encode()).digest())
    held_out = set(ranked[: math.ceil(fraction * len(once))])
    return {
        "train": [text for text in once if text not in held_out],
        "validation": [text for text in once if text in held_out],
    }


@pytest.mark.parametrize("size", [1, 2, 7, 30, 31, 1000, 10**6])
@pytest.mark.parametrize("end", [b"\n", b""])
def test_json_lines_in_any_ranges_of_bytes(size, end, tmp_path):
    lines = [{"text": text} for text in ["one", "é☃", "", "x" * 40, "last"]]
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + "\n\n".join(map(json.dumps, lines)).encode() + end)
    found = []
    for piece, _ in chunks._pieces(file, file.stat().st_size, size):
        found += chunks.documents(Chunk(0, "", (piece,)), DataConfig())
    assert found == [line["text"] for line in lines]


def test_a_mistake_is_named_by_its_line_or_by_its_byte(tmp_path):
    """A reader that begins within a file doesn't know the number of a line."""
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one"}\nno JSON\n')
    for first, place in ((0, "a.jsonl:2"), (5, "a.jsonl, line at byte 16")):
        with pytest.raises(UserError, match=f"{place}: not a line of UTF-8 JSON"):
            list(sources.json_lines(file, "text", first))


def test_json_lines_of_a_store_are_read_in_large_blocks(tmp_path):
    """Its files read anew for each line; see fsspec's AbstractBufferedFile."""
    file, reads = tmp_path / "a.jsonl", []
    file.write_text('{"text": "one"}\n' * 200_000)

    class Stored(io.RawIOBase):
        def __init__(self):
            self._file = file.open("rb", buffering=0)

        def readable(self):
            return True

        def seekable(self):
            return True

        def seek(self, *place):
            return self._file.seek(*place)

        def readinto(self, buffer):
            reads.append(len(buffer))
            return self._file.readinto(buffer)

    stored = SimpleNamespace(exists=lambda: True, is_file=lambda: True, open=lambda _: Stored())
    size = file.stat().st_size
    found = sources.json_lines(stored, "text")
    assert sum(1 for _ in found) == 200_000
    assert len(reads) <= size / 2**20 + 2


@pytest.mark.parametrize(
    ("count", "least", "most"),
    [(chunks._CHUNKS, 100, 1000), (6, 30, 1000), (2, 30, 100)],  # 615 bytes: of 0, 102 and 307
)
def test_chunks_follow_from_names_and_sizes(count, least, most, tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "_CHUNKS", count)
    monkeypatch.setattr(chunks, "_MIN_BYTES", least)
    monkeypatch.setattr(chunks, "_MAX_BYTES", most)
    (tmp_path / "text").mkdir()
    for name, size in (("a.txt", 40), ("b.txt", 50), ("c.jsonl", 220), ("d.jsonl.gz", 300),
                       ("e.txt", 0), ("f.txt", 5)):  # fmt: skip
        (tmp_path / "text" / name).write_bytes(b"x" * size)
    found, listed, _ = chunks.find_chunks(DataConfig(corpus="text"))
    size = 102 if count == 6 else 100
    plan = [[(Path(p.path).name, p.first, p.last) for p in chunk.pieces] for chunk in found]
    assert plan == [
        [("a.txt", 0, 40), ("b.txt", 0, 50)],
        [("c.jsonl", 0, size)],
        [("c.jsonl", size, 2 * size)],
        [("c.jsonl", 2 * size, 220)],
        [("d.jsonl.gz", 0, 300)],
        [("e.txt", 0, 0), ("f.txt", 0, 5)],
    ]
    assert [chunk.number for chunk in found] == list(range(6))
    assert listed[2] == ["c.jsonl", 220]


@pytest.mark.parametrize("step", [1, 256, 4096])
def test_stages_find_repetitions_and_the_split_by_brute_force(step, tmp_path):
    """By hand what tokenize has Beam do, with digests in one group of ranges or in many."""
    work = stages.Work(str(tmp_path / "out"), DataConfig(tokenizer="bytes"), 3)
    work.staging.mkdir(parents=True)
    everything = texts(300)
    parts = everything[:100], everything[100:101], everything[101:]
    plan = []
    for i, part in enumerate(parts):
        write_lines(tmp_path / "text" / f"{i}.jsonl", part)
        size = (tmp_path / "text" / f"{i}.jsonl").stat().st_size
        plan.append(Chunk(i, "", (Piece(str(tmp_path / "text" / f"{i}.jsonl"), 0, size),)))
        split.digest(work, plan[-1])
    if step == 1:  # the ranges that are not empty; an empty one is among them
        used = sorted({int.from_bytes(split.rank(t)[:2]) >> 4 for t in everything if t.strip()})
        groups = [(i, i + 1) for i in [*used, next(i for i in range(4096) if i not in used)]]
    else:
        groups = [(i, i + step) for i in range(0, 4096, step)]
    for group in groups:
        split.compare(work, group)
    different = [work.done(split._repeated_name(group))["different"] for group in groups]
    once = sorted({split.rank(text) for text in everything if text.strip()})
    assert sum(different) == len(once)
    if step == 4096:
        assert [split._largest_of(work, groups[0], n + 1) for n in range(len(once))] == once
    threshold = once[len(once) // 3]
    selection = split.Selection(threshold, groups)
    kept = [text for chunk in plan for text in split.kept(work, chunk, selection)]
    assert [text for _, text in kept] == list(dict.fromkeys(t for t in everything if t.strip()))
    assert all((name == "validation") == (split.rank(t) <= threshold) for name, t in kept)


def test_a_digest_that_ends_with_zeros_keeps_them(tmp_path, monkeypatch):
    monkeypatch.setattr(split, "rank", lambda text: text.encode().ljust(32, b"\0"))
    work = stages.Work(str(tmp_path / "out"), DataConfig(), 1)
    work.staging.mkdir(parents=True)
    write_lines(tmp_path / "text" / "a.jsonl", ["b", "a", "ab", "b", "a\0"])
    split.digest(work, Chunk(0, "", (Piece("text/a.jsonl", 0, 10**6),)))
    split.compare(work, (0, 4096))
    found = [split._largest_of(work, (0, 4096), n) for n in (1, 2, 3)]
    assert found == [text.ljust(32, b"\0") for text in (b"a", b"ab", b"b")]


@beam
def test_chats_as_in_training(tmp_path, capsys):
    """Windows, template and loss are those of the text itself, also in a mixture."""
    chats.write_model(tmp_path / "model")
    lines = [{"messages": chats.turns(f"{i}<|im_end|>", f"{i}!")} for i in range(30)]
    lines += [{"prompt": str(i), "completion": f"{i}!"} for i in range(30)]
    lines += [{"text": f"Text {i}"} for i in range(30)]
    (tmp_path / "text").mkdir()
    chats.write_lines(tmp_path / "text" / "a.jsonl", *lines, *lines[:9])
    known = "model/tokenizer.json"
    assert tokenize(*IN_PROCESS, tokenizer=known) == 0
    chats.write_lines(tmp_path / "text" / "a.jsonl", *lines)
    config = DataConfig(corpus="text", tokenizer=known, cache_dir="cache")
    text = pipeline.load_data(config, 384, 13)
    shard = pipeline.load_data(DataConfig(corpus="tokens:out", cache_dir="other"), 384, 13)
    assert shard.validation.text_bytes == text.validation.text_bytes > 0
    for name in ("train", "validation"):
        for a, b in zip(getattr(shard, name), getattr(text, name), strict=True):
            for field, other in zip(a[:4], b[:4], strict=True):
                np.testing.assert_array_equal(field, other)
    assert template.find(tmp_path / "out/tokenizer.json").source == chats.CHATML
    # Beside shards of plain text: each part has its own marks, or none.
    write_lines(tmp_path / "plain" / "a.jsonl", [f"Plain {i}" for i in range(90)])
    assert tokenize(*IN_PROCESS, tokenizer=known, corpus="plain", out="plain_out") == 0
    mixed = DataConfig(corpus="tokens:out*0.5,plain_out*0.5", cache_dir="other")
    found, plain = pipeline.load_data(mixed, 384, 13).train.parts
    targets = [sum(int(window.mask_BxL.sum()) for window in part) for part in (found, plain)]
    assert targets == [sum(int(x.mask_BxL.sum()) for x in text.train), len(plain.stream) - 1]
    # Another template makes other tokens of chats, and the same of plain text.
    (tmp_path / "model/chat_template.jinja").write_text(" " + chats.CHATML)
    chats.write_lines(tmp_path / "text" / "a.jsonl", *lines, *lines[:9])
    assert tokenize(*IN_PROCESS, tokenizer=known, corpus="plain", out="plain_out") == 0
    capsys.readouterr()
    assert tokenize(*IN_PROCESS, tokenizer=known) == 2
    assert "out has shards of other text or settings" in capsys.readouterr().err


@beam
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_the_windows_of_todays_path(tokenizer, tmp_path):
    """With no repetition in the text, windows, tokenizer and split are those of the text itself."""
    once = list(dict.fromkeys(texts(200)))
    write_lines(tmp_path / "text" / "a.jsonl", once)
    assert tokenize(*IN_PROCESS, tokenizer=tokenizer) == 0
    config = DataConfig(corpus="text", tokenizer=tokenizer, cache_dir="cache")
    text = pipeline.load_data(config, 384, 13)
    shard = pipeline.load_data(DataConfig(corpus="tokens:out", cache_dir="other"), 384, 13)
    assert shard.tokenizer.fingerprint == text.tokenizer.fingerprint
    assert shard.validation.text_bytes == text.validation.text_bytes
    for name in ("train", "validation"):
        ours, theirs = getattr(shard, name), getattr(text, name)
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            for field, other in zip(a[:4], b[:4], strict=True):
                np.testing.assert_array_equal(field, other)
    ours, theirs = (pipeline.train_iterator(data.train, 4, seed=0) for data in (shard, text))
    for a, b in itertools.islice(zip(ours, theirs, strict=True), 3):
        np.testing.assert_array_equal(a.tokens_BxL, b.tokens_BxL)


@beam
def test_all_kinds_of_files_in_order(tmp_path, monkeypatch, capsys):
    """In small chunks, whose texts are tokenised some at a time, and compared in many groups."""
    monkeypatch.setattr(chunks, "_MIN_BYTES", 1000)
    monkeypatch.setattr(tokens, "CHUNK_CHARACTERS", 300)
    monkeypatch.setattr(split, "_COMPARED", 1)
    everything = texts(150)
    parts = [everything[i::5] for i in range(5)]
    write_lines(tmp_path / "text" / "0.jsonl", parts[0])
    write_lines(tmp_path / "text" / "1.jsonl.gz", parts[1])
    table("text/2.parquet", other=[1] * len(parts[2]), text=parts[2])
    for i, text in enumerate(parts[3]):
        (tmp_path / "text" / f"3-{i:03}.txt").write_text(text)
    write_lines(tmp_path / "text" / "4.jsonl", parts[4])
    assert tokenize("--json", *IN_PROCESS) == 0
    result = json.loads(capsys.readouterr().out)
    wanted = expected([text for part in parts for text in part])
    for name, known in wanted.items():
        assert documents("out", name) == known
        assert result[f"{name}/documents"] == len(known)
        assert result[f"{name}/bytes"] == sum(len(text.encode()) for text in known)
    assert len(list(Path("out").glob("train-*"))) > 8
    assert not Path("out/work").exists()
    # Once more: it is complete, and nothing is done.
    before = content("out")
    assert tokenize(*IN_PROCESS) == 0
    assert "out is complete" in capsys.readouterr().err and content("out") == before
    index = json.loads(before["index.json"])
    assert shards.fingerprint(index) == index["fingerprint"] == result["fingerprint"]


@beam
def test_a_tfds_dataset_keeps_its_splits(monkeypatch):
    """A document that is in both is held out."""
    splits = {"train": ["a", "b", "c", "b", "d"], "validation": ["c", "e", "e", " "]}
    monkeypatch.setattr(chunks, "_tfds", lambda config: {k: Texts(v) for k, v in splits.items()})
    assert tokenize(*IN_PROCESS, corpus="tfds:lm1b") == 0
    assert documents("out", "validation") == ["c", "e"]
    assert documents("out", "train") == ["a", "b", "d"]


@beam
def test_flags_of_clusters_are_known():
    flags = """
        --runner=DataflowRunner --project=p --region=r --temp_location=gs://b/t
        --max_num_workers=9 --sdk_container_image=i --experiments=x --flink_master=f
    """.split()
    known = tokenize_module._options(flags).get_all_options()
    assert known["runner"] == "DataflowRunner"
    assert (known["project"], known["flink_master"]) == ("p", "f")


def started(out, *flags):
    """`prmoe tokenize` in a process of its own, with small chunks."""
    code = (
        "import sys; from prmoe_jax.cli import main; from prmoe_jax.data import chunks\n"
        "chunks._MIN_BYTES = 200_000; sys.exit(main(sys.argv[1:]))"
    )
    own = ["tokenize", *SETTINGS, "--config.data.corpus=text", f"--out={out}"]
    # Beam leaves a temporary folder after a kill.
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "TMPDIR": os.getcwd()}
    return subprocess.Popen(
        [sys.executable, "-c", code, *own, "--config.data.tokenizer=bytes", "--", *flags],
        env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


@beam
def test_workers_and_a_kill_change_no_byte(tmp_path, monkeypatch):
    everything = texts(12_000, words=60)
    write_lines(tmp_path / "text" / "a.jsonl", everything)
    monkeypatch.setattr(chunks, "_MIN_BYTES", 200_000)
    assert tokenize(*IN_PROCESS, out="one") == 0
    assert documents("one", "train") == expected(everything)["train"]

    process = started("killed", "--direct_num_workers=2")
    while len(list(Path("killed").glob("train-*"))) < 2:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)  # its workers go on for a while
    process.wait()
    assert not Path("killed/index.json").exists()
    with pytest.raises(UserError, match="killed has no index.json"):
        pipeline.load_data(DataConfig(corpus="tokens:killed", cache_dir="cache"), 384, 13)

    process = started("killed", "--direct_num_workers=2")
    _, printed = process.communicate()
    assert process.returncode == 0, printed
    left, total = re.search(r"write: (\d+) of (\d+) tasks", printed).groups()
    assert int(left) < int(total) and "digest: " not in printed
    assert content("killed") == content("one")


@beam
def test_a_killed_worker_ends_the_command(tmp_path, monkeypatch):
    """As by the kernel, for lack of memory; Beam itself would wait for ever."""
    monkeypatch.setattr(chunks, "_MIN_BYTES", 200_000)
    everything = texts(12_000, words=60)
    write_lines(tmp_path / "text" / "a.jsonl", everything)
    process = started("out", "--direct_num_workers=2")
    while not list(Path("out").glob("train-*")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    started_by = Path(f"/proc/{process.pid}/task").glob("*/children")  # by each of its threads
    worker = next(number for file in started_by for number in file.read_text().split())
    os.kill(int(worker), signal.SIGKILL)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 1
    (line,) = (line for line in printed.splitlines() if line.startswith("prmoe: "))
    assert "signal 9 ended a worker process" in line
    assert tokenize(*IN_PROCESS) == 0
    assert documents("out", "train") == expected(everything)["train"]


@beam
def test_a_mistake_in_a_worker_is_one_line(tmp_path, monkeypatch, capsys):
    write_lines(tmp_path / "text" / "a.jsonl", texts(50))
    with open("text/a.jsonl", "a") as file:
        file.write("no JSON\n")
    process = started("out", "--direct_num_workers=2")
    _, printed = process.communicate()
    assert process.returncode == 2
    assert "a.jsonl:63: not a line of UTF-8 JSON" in printed.splitlines()[-1], printed
    assert not Path("out/index.json").exists()
    # After it is mended the command is told that the text is another one.
    write_lines(tmp_path / "text" / "a.jsonl", texts(50))
    assert tokenize(*IN_PROCESS) == 2
    assert "was begun with other text or settings" in capsys.readouterr().err.splitlines()[-1]


MISTAKES = {
    "a flag": ({}, [*IN_PROCESS, "--direct_num_worker=2"], None, "no option '--direct_num_worker"),
    "a value": ({}, [*IN_PROCESS, "--direct_num_workers=x"], None, "argument --direct_num_workers"),
    "fewer than no workers": (
        {}, ["--", "--direct_num_workers=-3"], None, "--direct_num_workers=-3 must be 0, one for ea"
    ),
    **{
        runner: ({}, ["--", f"--runner={runner}"], None, message)
        for runner, message in {
            "Nonsense": "--runner=Nonsense: Unexpected pipeline runner: Nonsense. Valid values",
            "nowhere.Runner": "Beam refuses --runner=nowhere.Runner: No module named 'nowhere'",
            "os.path": "Apache Beam refuses --runner=os.path: ",
            "DataflowRunner": "Missing required option: project.",
            "PortableRunner": "You must specify a --job_endpoint",
        }.items()
    },
    "tokens": ({"corpus": "tokens:out"}, IN_PROCESS, None, "holds tokens already"),
    "no text": ({"corpus": "none"}, IN_PROCESS, None, "corpus 'none' does not exist"),
    "kind": ({"corpus": "other.csv"}, IN_PROCESS, lambda: Path("other.csv").touch(), "use .txt"),
    "folder": (
        {"out": "text"}, IN_PROCESS, None, "text holds other files; give a new --out"
    ),
    "one document": (
        {"corpus": "one"}, IN_PROCESS, lambda: write_lines(Path("one/a.jsonl"), ["a", "a"]),
        "has 1 different non-empty documents",
    ),
    "tokenizer": ({"tokenizer": "none.json"}, IN_PROCESS, None, "not an existing file"),
    "vocabulary": (
        {"tokenizer": "gpt2"}, ["--config.model.vocab_size=50257", "--config.model.vocab_size=384",
                                *IN_PROCESS], None, "model.vocab_size=384 is too small"
    ),
    "a column": (
        {}, IN_PROCESS, lambda: table("text/a.parquet", body=["a"]), "no column 'text'; it has body"
    ),
    "a null": (
        {}, IN_PROCESS, lambda: table("text/a.parquet", text=["a", None]), "has NoneType in the"
    ),
    "no parquet": (
        {}, IN_PROCESS, lambda: Path("text/b.parquet").write_text("no"), "not a Parquet file"
    ),
    "damaged pages": (
        {}, IN_PROCESS, lambda: damaged_table("text/a.parquet"), "a.parquet: cannot be read: "
    ),
    "other bytes": (
        {}, IN_PROCESS, lambda: table("text/a.parquet", text=no_utf8()), "not UTF-8 text"
    ),
    "empty files": (
        {}, IN_PROCESS, lambda: Path("text/a.jsonl").write_text(""), "of data.corpus=text are empty"
    ),
    "a store": ({"corpus": "none://a/*.jsonl"}, IN_PROCESS, None, "there is no store none://"),
    "unwritable": (
        {"out": "text/a.jsonl/b"}, IN_PROCESS, None, "text/a.jsonl/b cannot be written"
    ),
}  # fmt: skip


@beam
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(mistake, tmp_path, capsys):
    settings, extra, prepare, message = MISTAKES[mistake]
    write_lines(tmp_path / "text" / "a.jsonl", texts(20))
    if prepare:
        prepare()
    assert tokenize(*extra, **settings) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("prmoe: ")]
    assert len(lines) == 1 and message in lines[0], lines
    assert not Path("out/index.json").exists()


@beam
def test_a_full_disk_is_one_line_and_the_rest_is_made_later(tmp_path, capsys):
    write_lines(tmp_path / "text" / "a.jsonl", texts(2000))
    with file_size_limit(100_000):
        assert tokenize(*IN_PROCESS) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "cannot be written: File too large" in last
    assert not Path("out/index.json").exists()
    assert tokenize(*IN_PROCESS) == 0
    assert documents("out", "train") == expected(texts(2000))["train"]


@beam
def test_a_file_that_cannot_be_read_is_not_called_unwritable(tmp_path, monkeypatch, capsys):
    def fail(*arguments):
        raise PermissionError(errno.EACCES, "Permission denied", "text/a.jsonl")

    write_lines(tmp_path / "text" / "a.jsonl", texts(20))
    monkeypatch.setattr(split, "select", fail)
    assert tokenize(*IN_PROCESS) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "prmoe: text/a.jsonl: Permission denied"


@beam
def test_two_commands_with_one_folder(tmp_path, capsys):
    write_lines(tmp_path / "text" / "a.jsonl", texts(20))
    with locked(Path("out"), "--out"):
        assert tokenize(*IN_PROCESS) == 2
    line = f"--out=out is in use by another run (process {os.getpid()}); wait for it, or give anot"
    assert line in capsys.readouterr().err
    assert content("out") == {}


@beam
def test_a_folder_named_work_is_not_taken_for_ours(tmp_path, capsys):
    write_lines(tmp_path / "text" / "a.jsonl", texts(20))
    (tmp_path / "out" / "work").mkdir(parents=True)
    (tmp_path / "out" / "work" / "precious").touch()
    assert tokenize(*IN_PROCESS) == 2
    assert "out holds other files" in capsys.readouterr().err
    assert (tmp_path / "out" / "work" / "precious").exists()


@beam
def test_finished_shards_leave_a_folder_named_work_alone(tmp_path):
    """The command removed it as if it were its own."""
    write_lines(tmp_path / "text" / "a.jsonl", texts(20))
    assert tokenize(*IN_PROCESS) == 0
    assert not (tmp_path / "out" / "work").exists()
    (tmp_path / "out" / "work").mkdir()
    (tmp_path / "out" / "work" / "mine").write_text("mine")
    assert tokenize(*IN_PROCESS) == 0
    assert (tmp_path / "out" / "work" / "mine").read_text() == "mine"


@beam
def test_another_text_needs_another_folder(tmp_path, capsys):
    write_lines(tmp_path / "text" / "a.jsonl", texts(20))
    assert tokenize(*IN_PROCESS) == 0
    before = content("out")
    write_lines(tmp_path / "text" / "b.jsonl", texts(20, seed=1))
    assert tokenize(*IN_PROCESS) == 2
    assert "out has shards of other text or settings" in capsys.readouterr().err
    assert content("out") == before
    # Other text of the same size under the same name, too.
    (tmp_path / "text" / "b.jsonl").unlink()
    assert tokenize(*IN_PROCESS) == 0
    file, written = tmp_path / "text" / "a.jsonl", (tmp_path / "out" / "index.json").stat().st_mtime
    file.write_bytes(file.read_bytes().replace(b"expert", b"excerp"))
    os.utime(file, (written + 1, written + 1))
    assert tokenize(*IN_PROCESS) == 0
    line = "is newer than its shards; if its text changed, give a new --out"
    assert line in capsys.readouterr().err and content("out") == before


def test_without_beam_it_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "apache_beam.options.pipeline_options", None)
    write_lines(tmp_path / "text" / "a.jsonl", texts(20))
    assert tokenize() == 2
    assert "needs Apache Beam; pip install 'prmoe_jax[beam]'" in capsys.readouterr().err
    assert not Path("out").exists()


def test_other_verbs_pass_nothing_on(capsys):
    assert main(["params", "--config=tiny:prmoe", "--", "--runner=x"]) == 2
    assert "'--' is not understood; see prmoe params --help" in capsys.readouterr().err
