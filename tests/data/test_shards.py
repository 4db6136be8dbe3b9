"""Token shards: other libraries' files by their specification, mixtures, and what is refused."""

import json
import os
import re
import shutil
import struct
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prmoe_jax.cli import main
from prmoe_jax.config.schema import DataConfig
from prmoe_jax.data import pipeline, shards, streams
from prmoe_jax.data.pipeline import (
    TopKLogProbs,
    eval_batches,
    pipeline_fingerprint,
    train_iterator,
)
from prmoe_jax.errors import UserError
from prmoe_jax.run.metrics import read_metrics
from tests.data.test_pipeline import MARK, rows_of, stream_of
from tests.support.runs import NEW
from tests.support.shards import Stream, encoded, reach, write_array, write_ours
from tests.support.tokenizers import byte_tokenizer, started_tokenizer

TEXTS = ["the first", "é☃ of the second", "x", "a longer one " * 5, "last of all"]


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return DataConfig(tokenizer="bytes", cache_dir=str(tmp_path / "cache"), validation_fraction=0.2)


def load(config, corpus, length=7, **changes):
    config = replace(config, corpus=f"tokens:{corpus}", **changes)
    return pipeline.load_data(config, 384, length)


def write_megatron(path, documents, code=8):
    """A pair as Megatron-LM's IndexedDataset describes it, written field by field."""
    kind = {4: "<i4", 8: "<u2"}[code]
    path.with_suffix(".bin").write_bytes(b"".join(ids.astype(kind).tobytes() for ids in documents))
    size, starts = np.dtype(kind).itemsize, np.cumsum([0, *map(len, documents)])
    index = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, len(documents), len(documents) + 1)
    index += b"".join(struct.pack("<i", len(ids)) for ids in documents)
    index += b"".join(struct.pack("<q", size * start) for start in starts[:-1])
    index += b"".join(struct.pack("<q", i) for i in range(len(documents) + 1))
    path.with_suffix(".idx").write_bytes(index)


def texts_of(windows):
    """The documents of windows, of a stream that begins and ends with the mark."""
    stream = stream_of(windows)
    assert stream[0] == stream[-1] == MARK
    ends = np.flatnonzero(stream == MARK)
    tokenizer = byte_tokenizer()
    return [tokenizer.decode(stream[a + 1 : b]) for a, b in zip(ends, ends[1:], strict=False)]


WRITERS = {
    "megatron": lambda folder, parts: [
        write_megatron(folder / f"{i}", encoded(part), code=(8, 4)[i % 2])
        for i, part in enumerate(parts)
    ],
    "olmo": lambda folder, parts: [
        write_array(folder / f"{i}.npy", encoded(part)) for i, part in enumerate(parts)
    ],
    "marks_first": lambda folder, parts: [
        write_array(folder / f"{i}.bin", encoded(part, before=True)) for i, part in enumerate(parts)
    ],
    "npy": lambda folder, parts: [
        np.save(folder / f"{i}.npy", np.concatenate(encoded(part)).astype(np.uint32))
        for i, part in enumerate(parts)
    ],
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("cut", [1, 2, 4])
def test_each_format_gives_the_same_text(config, tmp_path, writer, cut):
    """Split by document: the last fifth of the tokens, from the next document on."""
    (tmp_path / "a").mkdir()
    WRITERS[writer](tmp_path / "a", [TEXTS[:cut], TEXTS[cut:]])
    data = load(config, "a/*")
    assert texts_of(data.train) == TEXTS[:-1]
    assert texts_of(data.validation) == TEXTS[-1:]
    assert data.validation.text_bytes == len(TEXTS[-1].encode())
    # A part that is only evaluated leaves the other one whole.
    (tmp_path / "b").mkdir()
    WRITERS[writer](tmp_path / "b", [TEXTS[:2]])
    data = load(config, "a/*,validation:b/*")
    assert texts_of(data.train) == TEXTS
    assert texts_of(data.validation) == TEXTS[:2]
    assert data.validation.text_bytes == sum(len(text.encode()) for text in TEXTS[:2])


def test_shards_with_both_marks(config, tmp_path):
    """A tokenizer's own start in front of each document is no text, and predicts none."""
    known = started_tokenizer()
    known.save(tmp_path / "tokenizer.json")
    ids = [np.array([257, *known.encode(text), MARK], np.uint32) for text in TEXTS]
    np.save(tmp_path / "a.npy", np.concatenate(ids))
    data = load(config, "a.npy", tokenizer=str(tmp_path / "tokenizer.json"))
    assert data.validation.text_bytes == len(TEXTS[-1].encode())
    targets = np.concatenate([w.targets_BxL[w.mask_BxL] for w in data.train])
    assert 257 not in targets and (targets == MARK).sum() == len(TEXTS) - 1


def test_a_mark_at_the_end_starts_no_document(config, tmp_path):
    """Marks in front of documents and one behind all, of which the last fills the whole part."""
    texts = ["short", "a text that is longer than a fifth of all of them"]
    stream = np.concatenate([*encoded(texts, before=True), [MARK]])
    for found in (stream, stream[:-1]):
        np.save(tmp_path / "a.npy", found)
        with pytest.raises(UserError, match="and the files with it hold no start of a document"):
            load(config, "a.npy")


def test_our_shards(config, tmp_path):
    write_ours(tmp_path / "a", TEXTS)
    for name in ("a", "a/index.json", str(tmp_path / "?")):
        # The shards' own tokenizer is taken where none is set.
        data = load(config, name, tokenizer="bpe")
        assert (texts_of(data.train), texts_of(data.validation)) == (TEXTS, ["held out"])
        assert data.validation.text_bytes == len("held out")
    # Marks in the tokens tell the documents apart as the positions of a token cache do.
    stream = np.concatenate([*encoded(TEXTS, before=True), [MARK]])
    known = Stream(stream, np.flatnonzero(stream == MARK)[:-1])
    for length in (1, 7, 1009):
        expected = pipeline.Windows(known, length, False)
        windows = load(config, "a", length).train
        assert len(windows) == len(expected)
        for window, other in zip(windows, expected, strict=True):
            for field, known_field in zip(window[:4], other[:4], strict=True):
                np.testing.assert_array_equal(field, known_field)
                assert field.dtype == known_field.dtype


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=6))
def test_a_mixture_keeps_to_its_shares_after_every_window(counts):
    total = sum(counts)
    weights = [Decimal(100 * count // total) / 100 for count in counts[1:]]
    weights = [1 - sum(weights), *weights]
    weights = [weight for weight in weights if weight]
    order = streams.schedule(weights)
    drawn = np.cumsum(order[:, None] == np.arange(len(weights)), axis=0)
    due = np.arange(1, len(order) + 1)[:, None] * np.array([float(w) for w in weights])
    assert (np.floor(due + 1e-9) <= drawn).all() and (drawn <= np.ceil(due - 1e-9)).all()
    # It ends where every share is a whole number, so that it can be repeated.
    np.testing.assert_allclose(drawn[-1], due[-1], rtol=1e-12)


def test_the_schedule_by_hand():
    assert streams.schedule([Decimal("0.75"), Decimal("0.25")]).tolist() == [0, 0, 0, 1]
    assert streams.schedule([Decimal("0.5"), Decimal("0.5")]).tolist() == [0, 1]
    order = streams.schedule([Decimal("0.6"), Decimal("0.4")])
    assert order.tolist() == [0, 1, 0, 0, 1]


def test_a_mixture_by_the_step_after_a_resume_and_by_rows(config, tmp_path):
    write_ours(tmp_path / "a", ["a" * 200])
    write_array(tmp_path / "b.npy", encoded(["b" * 300, "b"]))
    data = load(config, "a*0.7,b.npy*0.3,validation:b.npy", length=10)
    assert len(data.train) == 21 + 31  # 201 and 303 predictions in windows of 10
    assert byte_tokenizer().decode(data.train[20].tokens_BxL[:1]) == "a"
    assert byte_tokenizer().decode(data.train[21].tokens_BxL[1:]) == "b" * 9
    iterator = train_iterator(data.train, 10, seed=3)
    (a,) = byte_tokenizer().encode("a")
    batches, of_a = [], lambda batch: (batch.tokens_BxL == a).any(1).sum()
    for step in range(12):
        if step == 5:
            state = json.loads(json.dumps(iterator.get_state()))
        batches.append(next(iterator))
        # The 21st window of a holds its last letter; all 200 are in the others.
        assert of_a(batches[-1]) == 7
    resumed, rows = train_iterator(data.train, 10, 3), train_iterator(data.train, 10, 3, [4, 7])
    resumed.set_state(state), rows.set_state(state)
    for batch in batches[5:]:
        for a, b, c, d in zip(
            batch, next(resumed), rows_of(batch, [4, 7]), next(rows), strict=True
        ):
            np.testing.assert_array_equal(a, b)
            np.testing.assert_array_equal(c, d)
    # Every source has its own epochs: all its windows come once before one comes again.
    other = next(train_iterator(data.train, 10, 4))
    assert any((x != y).any() for x, y in zip(other[:4], batches[0][:4], strict=True))


def test_a_mixture_draws_each_window_once_in_an_epoch(config, tmp_path):
    for name in "ab":
        stream = np.arange(1, 101)
        stream[-1] = MARK
        write_array(tmp_path / f"{name}.npy", [stream])
    data = load(config, "a.npy*0.5,b.npy*0.5,validation:a.npy", length=10)
    batches = train_iterator(data.train, 20, seed=0)
    epochs = [next(batches).tokens_BxL[:, 1] for _ in range(2)]
    for epoch in epochs:
        for source in (0, 1):
            assert sorted(epoch[source::2]) == list(range(1, 101, 10))
    assert epochs[0].tolist() != epochs[1].tolist()
    assert epochs[0][0::2].tolist() != epochs[0][1::2].tolist()
    whole = list(eval_batches(data.train, 20))
    assert len(whole) == 1 and whole[0].mask_BxL.all()


def test_fingerprints_tell_shards_shares_and_splits_apart(config, tmp_path):
    write_ours(tmp_path / "a", TEXTS)
    write_ours(tmp_path / "other", [*TEXTS[:-1], "last of ALL"])
    write_array(tmp_path / "b.npy", encoded(TEXTS))
    write_array(tmp_path / "c.npy", encoded([*TEXTS[:-1], "last of ALL"]))

    def fingerprint(corpus, **changes):
        return json.dumps(pipeline_fingerprint(load(config, corpus, **changes), 4, 0))

    found = [fingerprint(corpus) for corpus in (
        "a", "other", "b.npy", "c.npy", "a*0.5,b.npy*0.5", "a*0.4,b.npy*0.6", "a,validation:b.npy",
    )]  # fmt: skip
    found.append(fingerprint("b.npy", validation_fraction=0.9))
    assert len(set(found)) == len(found)
    (tmp_path / "a").rename(tmp_path / "moved")
    assert fingerprint("moved") == found[0] == fingerprint("moved*1.0")


def change(path, at, content):
    data = bytearray(path.read_bytes())
    data[at : at + len(content)] = content
    path.write_bytes(data)


def edit_index(folder, edit):
    content = json.loads((folder / "index.json").read_text())
    edit(content)
    (folder / "index.json").write_text(json.dumps(content))


MISTAKES = {
    "share": ("a*0.7,m.bin*0.4", None, r"the shares are 0.7, 0.4, in sum 1.1"),
    "no share": ("a*0.7,m.bin", None, r"1 of 2 parts have a share"),
    "fine share": ("a*0.70001,m.bin*0.29999", None, "of at most 4 decimals"),
    "empty part": ("a*0.7,", None, "'' is not a part"),
    "nothing": ("none/*.bin", None, "no token shards match 'none/"),
    "only validation": ("validation:a", None, "only validation"),
    "one of ours": ("a/train*", None, r"give their folder a, whose index.json"),
    "unfinished": ("empty", None, "empty has no index.json"),
    "missing": ("a", lambda: os.remove("a/train-00002.tokens"), "train-00002.tokens: cannot be"),
    "cut": ("a", lambda: os.truncate("a/train-00002.tokens", 20), "has 20 bytes, not the 136"),
    "corrupt": ("a", lambda: change(Path("a/train-00002.tokens"), 4, b"zz"), "is not the shard"),
    "edited": (
        "a",
        lambda: edit_index(Path("a"), lambda index: index.update(vocabulary=5)),
        "index.json is damaged: it is not as it was written",
    ),
    "other index": (
        "a",
        lambda: Path("a/index.json").write_text(Path("o/index.json").read_text()),
        "train-00000.tokens is not the shard that index.json describes",
    ),
    "another tokenizer": ("a", lambda: None, "have the tokenizer"),
    "no tokenizer": ("m.bin", None, "tokens without a tokenizer"),
    "odd size": ("b.npy", lambda: os.truncate("b.npy", 21), "21 bytes, no multiple of the 2 of"),
    "empty": ("b.npy", lambda: os.truncate("b.npy", 0), "b.npy is empty"),
    "large id": (
        "b.npy", lambda: change(Path("b.npy"), 6, b"\1\1"), "has the id 257 at token 3, and the"
    ),
    "no mark": (
        "b.npy", lambda: Path("b.npy").write_bytes(b"a\0" * 9), "has no end-of-text id 256"
    ),
    "one document": (
        "b.npy", lambda: write_array(Path("b.npy"), encoded(["text"])), "hold no start of a doc"
    ),
    "float": ("f.npy", lambda: np.save("f.npy", np.ones(3)), "holds float64"),
    "no magic": ("m.bin", lambda: change(Path("m.idx"), 0, b"N"), "no index of Megatron-LM"),
    "version": ("m.bin", lambda: change(Path("m.idx"), 9, b"\2"), "version 2 and dtype code 8"),
    "cut index": ("m.bin", lambda: os.truncate("m.idx", 99), "m.idx has 99 bytes, not the"),
    "bin of others": ("m.bin", lambda: os.truncate("m.bin", 20), "m.bin has 20 bytes, not the"),
    "offsets": ("m.bin", lambda: change(Path("m.idx"), 62, b"\7"), "its offsets don't follow"),
    "no eod": (
        "m.bin",
        lambda: write_megatron(Path("m"), [ids[:-1] for ids in encoded(TEXTS)]),
        "a document ends with the id 83, not the end of text 256; write it with --append-eod",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_written(mistake, tmp_path, monkeypatch, capsys):
    corpus, damage, message = MISTAKES[mistake]
    monkeypatch.chdir(tmp_path)
    write_ours(tmp_path / "a", TEXTS)
    write_ours(tmp_path / "o", [text.upper() for text in TEXTS])
    write_megatron(tmp_path / "m", encoded(TEXTS))
    write_array(tmp_path / "b.npy", encoded(TEXTS))
    (tmp_path / "empty").mkdir()
    extra = [f"--config.data.corpus=tokens:{corpus}"]
    if damage:
        damage()
    if mistake == "no tokenizer":
        extra += ["--config.data.tokenizer=bpe"]
    if mistake == "another tokenizer":
        text = byte_tokenizer().description.replace('"truncation"', ' "truncation"', 1)
        Path("tokenizer.json").write_text(text)
        extra += ["--config.data.tokenizer=tokenizer.json"]
    assert main([*NEW, *extra]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if line.startswith("prmoe: ")]) == 1
    assert message in lines[-1], lines[-1]
    written = [*Path("new").rglob("*"), *Path("cache").rglob("*")]
    assert not [path for path in written if path.is_file() and ".lock" not in path.name]


def test_an_id_out_of_the_vocabulary_is_found_when_it_is_read(config, tmp_path):
    """Between the blocks that are looked at first."""
    stream = np.full(3_000_000, 97)
    stream[::1000] = MARK
    stream[40_000] = 257
    assert 40_000 not in np.concatenate([
        np.arange(block.start, block.stop)
        for block in shards.Shard(tmp_path, np.dtype("<u2"), 0, 3_000_000).blocks()
    ])  # fmt: skip
    write_array(tmp_path / "b.npy", [stream])
    data = load(config, "b.npy", length=1000)
    with pytest.raises(UserError, match="has the id 257 at token 40000"):
        for _ in range(4):
            next(train_iterator(data.train, 1000, 0))


def test_a_large_shard_is_told_by_its_blocks(tmp_path):
    content = np.random.default_rng(0).integers(0, 50000, 1_500_000).astype("<u2")
    path = tmp_path / "a"
    path.write_bytes(content.tobytes())
    shard = shards.Shard(path, np.dtype("<u2"), 0, len(content))
    assert len(shard.blocks()) == 16
    assert shard.blocks()[0].start == 0 and shard.blocks()[-1].stop == len(content)
    known = shard.digest()
    for block in shard.blocks():
        change(path, 2 * block.stop - 2, b"\0\0")
        changed = shards.Shard(path, np.dtype("<u2"), 0, len(content)).digest()
        assert changed != known
        known = changed


def test_decoded_bytes_are_computed_once(config, tmp_path, monkeypatch):
    write_array(tmp_path / "b.npy", encoded(TEXTS))
    size = load(config, "b.npy").validation.text_bytes
    monkeypatch.setattr(streams, "_documents", None)
    assert load(config, "b.npy").validation.text_bytes == size
    monkeypatch.setattr(streams, "_READ_TOKENS", 3)
    with pytest.raises(TypeError):
        load(config, "b.npy", validation_fraction=0.9)


@pytest.mark.parametrize("read", [1, 2, 3, 1000])
def test_documents_across_reads(config, tmp_path, monkeypatch, read):
    monkeypatch.setattr(streams, "_READ_TOKENS", read)
    write_array(tmp_path / "b.npy", encoded(TEXTS))
    for fraction, held in ((12 / 110, 1), (0.2, 1), (78 / 110, 2), (79 / 110, 2), (0.8, 3)):
        data = load(config, "b.npy", validation_fraction=fraction)
        assert texts_of(data.validation) == TEXTS[-held:]
        assert data.validation.text_bytes == sum(len(text.encode()) for text in TEXTS[-held:])


def test_a_run_on_a_mixture_resumes_bit_for_bit(config, tmp_path, capsys):
    write_ours(tmp_path / "a", ["a text " * 50, "another"])
    write_array(tmp_path / "b.npy", encoded(["some words " * 50, "held out"]))
    corpus = "--config.data.corpus=tokens:a*0.7,b.npy*0.3"

    command = [*NEW, corpus, "--config.train.steps=4", "--config.checkpoint.every=2"]
    assert main([*command, "--workdir=whole"]) == 0
    shutil.copytree("whole", "parts")
    shutil.rmtree("parts/checkpoints/4")  # killed in step 4
    assert main([*command, "--workdir=parts"]) == 0
    whole, parts = (
        {line["step"]: line.get("loss") or line["eval/loss"] for line in read_metrics(Path(name))}
        for name in ("whole/metrics.jsonl", "parts/metrics.jsonl")
    )
    assert whole == parts and 4 in whole
    capsys.readouterr()
    assert main(["eval", "--workdir=whole", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    data = load(config, corpus.partition("tokens:")[2])
    held_out = len("held out") * 2
    assert result["tokens"] == data.validation.tokens == held_out + 2
    per_byte = result["loss"] / np.log(2) * (held_out + 2) / held_out
    assert result["bits_per_byte"] == pytest.approx(per_byte)
    shutil.rmtree("parts/checkpoints/4")
    other = encoded(["OTHER WORDS " * 50, "held out"])
    write_array(tmp_path / "b.npy", other)
    assert main([*command, "--workdir=parts"]) == 2
    assert "corpus was" in capsys.readouterr().err.splitlines()[-1]


@pytest.fixture
def store(tmp_path, monkeypatch):
    return reach(tmp_path / "elsewhere", monkeypatch)


def test_shards_of_a_store_are_copied_once(config, store, caplog):
    caplog.set_level("INFO")
    write_ours(store / "ours", TEXTS)
    (store / "pairs").mkdir()
    write_megatron(store / "pairs" / "b", encoded(TEXTS))
    write_megatron(store / "pairs" / "c", encoded(TEXTS[:2]))
    corpus = "store://ours/index.json*0.5,store://pairs/?.bin*0.5"
    data = load(config, corpus)
    assert [texts_of(part) for part in data.train.parts] == [TEXTS, [*TEXTS, *TEXTS[:1]]]
    copied = [record for record in caplog.records if record.message.startswith("copying")]
    assert len(copied) == 6 + 4
    for path in Path("cache/shards").rglob("train-00002.tokens"):
        path.unlink()  # as if the copy had been killed
    caplog.clear()
    again = load(config, corpus)
    assert pipeline_fingerprint(again, 4, 0) == pipeline_fingerprint(data, 4, 0)
    (copied,) = [record.message for record in caplog.records]
    assert "train-00002.tokens" in copied
    # The names in the store don't matter, and what is there already is not copied.
    (store / "ours").rename(store / "moved")
    caplog.clear()
    assert texts_of(load(config, "store://moved").train) == TEXTS and not caplog.records


def test_a_damaged_store_is_one_line(config, store):
    write_ours(store / "ours", TEXTS)
    change(store / "ours" / "train-00002.tokens", 4, b"zz")
    for corpus, message in (
        ("store://ours", "train-00002.tokens is not the file that its index describes"),
        ("store://ours/none*", "nothing matches 'store://ours/none"),
        ("store://ours/*", "is one of several shards"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            load(config, corpus)
    assert not list(Path("cache").rglob("*index.json"))
    index = store / "ours" / "index.json"
    index.write_text("[]")
    with pytest.raises(UserError, match="elsewhere/ours/index.json is damaged: it holds list"):
        load(config, "store://ours")
    index.unlink()  # as before `prmoe tokenize` has finished
    with pytest.raises(UserError, match=r"ours has no index\.json; give a folder that"):
        load(config, "store://ours")


def test_a_replaced_file_of_a_store_is_copied_again(config, store):
    """Even if it has as many bytes as before, and also if it is an index."""
    (pairs := store / "pairs").mkdir()
    corpus = "store://pairs/*.bin*1.0,validation:store://pairs/*.bin"
    for number, found in enumerate((["abcd", "efgh"], ["ab", "cdefgh"])):
        write_megatron(pairs / "b", encoded(found))
        for file in pairs.iterdir():
            assert file.stat().st_size == {".bin": 20, ".idx": 82}[file.suffix]
            os.utime(file, (number, number))
        assert texts_of(load(config, corpus).validation) == found
    os.utime(pairs / "b.idx", (9, 9))
    load(config, corpus)
    assert len([path for path in Path("cache/shards").iterdir() if path.is_dir()]) == 3


def test_a_teachers_predictions_come_with_their_window_of_a_mixture(config, tmp_path):
    write_array(tmp_path / "a.npy", encoded(["a" * 99]))
    write_array(tmp_path / "b.npy", encoded(["b" * 49]))
    windows = load(config, "a.npy*0.5,b.npy*0.5,validation:a.npy", length=10).train
    assert len(windows) == 10 + 5
    said = np.arange(15 * 10 * 2, dtype=np.uint16).reshape(15, 10, 2)
    taught = replace(windows, teacher_top_k=TopKLogProbs(said, -np.float32(said)))
    tokens = [window.tokens_BxL.tolist() for window in windows]
    for batch in [next(train_iterator(taught, 8, 0)), *eval_batches(taught, 15)]:
        for row, predicted in zip(batch.tokens_BxL, batch.teacher_top_k.tokens_BxLxK, strict=True):
            assert tokens[predicted[0, 0] // 20] == row.tolist()


def test_a_run_goes_on_with_its_own_tokenizer_only(config, tmp_path):
    write_ours(tmp_path / "a", TEXTS)
    stored, config = tmp_path / "a" / "tokenizer.json", replace(config, corpus="tokens:a")
    data = pipeline.load_data(replace(config, tokenizer="gone"), 384, 7, stored)
    assert texts_of(data.train) == TEXTS
    other = byte_tokenizer().description.replace('"truncation"', ' "truncation"', 1)
    (tmp_path / "other.json").write_text(other)
    with pytest.raises(UserError, match=r"have the tokenizer \w+, not \w+ \(this run's\)"):
        pipeline.load_data(config, 384, 7, tmp_path / "other.json")
    with pytest.raises(UserError, match="model.vocab_size=256 is smaller"):
        pipeline.load_data(config, 256, 7, stored)
