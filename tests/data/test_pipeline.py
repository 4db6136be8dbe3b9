"""Token streams, windows and iterators: every token predicted once, in a known order."""

import dataclasses
import json
import subprocess
import sys
from decimal import Decimal

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prmoe_jax.config.schema import DataConfig
from prmoe_jax.data import chunks, pipeline, streams, tokens
from prmoe_jax.data.corpora import open_corpus
from prmoe_jax.data.pipeline import (
    Batch,
    TopKLogProbs,
    Windows,
    eval_batches,
    evaluated_windows,
    train_iterator,
)
from prmoe_jax.data.tokenizer import Tokenizer, load_tokenizer
from prmoe_jax.errors import UserError
from tests.support.faults import file_size_limit
from tests.support.shards import Stream, Texts
from tests.support.tokenizers import byte_tokenizer, started_tokenizer

DOCUMENTS = ["the first", "é☃", "x", "a longer document than the others " * 3, "<|endoftext|>"]
MARK = 256  # The end of text of the tokenizer 'bytes'.


@pytest.fixture
def config(tmp_path):
    write_lines(tmp_path / "text.jsonl", DOCUMENTS)
    return DataConfig(
        corpus=str(tmp_path / "text.jsonl"), tokenizer="bytes", cache_dir=str(tmp_path / "cache")
    )


def write_lines(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def tokenised(config, tokenizer=None):
    """The training and validation streams of the text."""
    corpus = open_corpus(config)
    tokenizer = tokenizer or load_tokenizer(config, 257, corpus)
    source = tokens.cached_tokens(config, corpus, tokenizer)
    return source.train, source.validation


def ids(streams):
    return [stream.read(0, len(stream)).tolist() for stream in streams]


def synthetic(lengths):
    """A stream whose documents of the given lengths (mark included) hold distinct tokens."""
    starts = np.cumsum([0, *lengths])
    return Stream(np.arange(1, starts[-1] + 2, dtype=np.uint32), starts[:-1])


def stream_of(windows):
    """The stream, put together again from inputs and targets."""
    inputs = np.concatenate([window.tokens_BxL[window.mask_BxL] for window in windows])
    targets = np.concatenate([window.targets_BxL[window.mask_BxL] for window in windows])
    np.testing.assert_array_equal(inputs[1:], targets[:-1])
    return np.concatenate([inputs[:1], targets])


def assert_same(actual, expected):
    for name, a, b in zip(Batch._fields, actual, expected, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


def rows_of(batch, rows):
    return jax.tree.map(lambda field: field[rows], batch)


@pytest.mark.parametrize("length", [1, 7, 13, 1009])
def test_windows_hold_the_exact_text(config, length):
    corpus, tokenizer = open_corpus(config), byte_tokenizer()
    assert sorted([*corpus.train, *corpus.validation]) == sorted(DOCUMENTS)
    expected = [text for text in DOCUMENTS if text in list(corpus.train)], list(corpus.validation)
    for tokenised_split, documents in zip(tokenised(config), expected, strict=True):
        stream = stream_of(Windows(tokenised_split, length, False))
        assert stream[0] == stream[-1] == MARK
        ends = np.flatnonzero(stream == MARK)
        texts = [tokenizer.decode(stream[a + 1 : b]) for a, b in zip(ends, ends[1:], strict=False)]
        assert texts == documents


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(1, 17))
def test_each_token_is_a_target_once_in_its_documents_segment(lengths, window_length):
    cache = synthetic(lengths)
    targets, documents = [], []
    for window in Windows(cache, window_length, False):
        real = window.mask_BxL
        targets.extend(window.targets_BxL[real])
        np.testing.assert_array_equal(window.segments_BxL[~real], 0)
        segments = window.segments_BxL[real]
        assert segments[0] == 1
        offset = documents[-1] if documents else 0
        # A window goes on with the document of the one before, unless a mark starts it.
        offset += window.tokens_BxL[0] - 1 in cache.starts_N
        documents.extend(segments - 1 + offset)
    np.testing.assert_array_equal(targets, cache.tokens_T[1:])
    np.testing.assert_array_equal(documents, np.repeat(np.arange(len(lengths)) + 1, lengths))


def test_segments_by_hand():
    cache = synthetic([3, 1, 5, 2])  # Stream 1..12, documents starting at tokens 1, 4, 5, 10.
    first, second = Windows(cache, 7, False)
    assert_same(first, Batch([1, 2, 3, 4, 5, 6, 7], [2, 3, 4, 5, 6, 7, 8], [True] * 7,
                             [1, 1, 1, 2, 3, 3, 3]))  # fmt: skip
    assert_same(second, Batch([8, 9, 10, 11, 0, 0, 0], [9, 10, 11, 12, 0, 0, 0],
                              [True] * 4 + [False] * 3, [1, 1, 2, 2, 0, 0, 0]))  # fmt: skip
    first, second = Windows(cache, 7, True)
    np.testing.assert_array_equal(first.segments_BxL, [1] * 7)
    np.testing.assert_array_equal(second.segments_BxL, [1] * 4 + [0] * 3)


def test_a_start_of_its_own_by_hand():
    """Documents are read from their start and end with the end: ‹s› a b ‹/s› as a ‹s› b ‹/s›."""
    tokenizer = started_tokenizer()
    start, end = tokenizer.bos_id, tokenizer.eos_id
    stream = np.array([end, 1, 2, end, 3, end], np.uint32)
    cache = Stream(stream, [0, 3])
    first, second = Windows(cache, 4, False, tokenizer=tokenizer)
    assert_same(first, Batch([start, 1, 2, start], [1, 2, end, 3], [True] * 4, [1, 1, 1, 2]))
    assert_same(
        second, Batch([3, 0, 0, 0], [end, 0, 0, 0], [True, False, False, False], [1, 0, 0, 0])
    )
    # Shards of another library may have both: then the end mark predicts nothing.
    stream = np.array([end, start, 1, end, start, 2, end], np.uint32)
    cache = Stream(stream, [0, 3])
    (window,) = Windows(cache, 6, False, tokenizer=tokenizer)
    real = [False, True, True, False, True, True]
    assert_same(window, Batch(stream[:-1], stream[1:], real, [0, 1, 1, 0, 2, 2]))
    (window,) = Windows(cache, 6, True, tokenizer=tokenizer)
    assert_same(window, Batch(stream[:-1], stream[1:], real, [1] * 6))


def test_a_start_of_its_own_in_the_text(config):
    """From the corpus to the windows, which a resumed run compares."""
    tokenizer = started_tokenizer()
    train, _ = tokenised(config, tokenizer)
    windows = Windows(train, 13, False, tokenizer=tokenizer)
    inputs = np.concatenate([window.tokens_BxL[window.mask_BxL] for window in windows])
    targets = np.concatenate([window.targets_BxL[window.mask_BxL] for window in windows])
    assert (inputs == 257).sum() == (targets == MARK).sum() == len(DOCUMENTS) - 1
    assert MARK not in inputs and 257 not in targets
    data = pipeline.Data(tokenizer, windows, windows, "fingerprint")
    known = pipeline.windows_fingerprint(data)
    same = dataclasses.replace(data, tokenizer=byte_tokenizer())
    assert known["start_of_text"] == 257
    assert "start_of_text" not in pipeline.windows_fingerprint(same)


def test_dtypes():
    *fields, taught = Windows(synthetic([5]), 3, False)[0]
    assert [field.dtype for field in fields] == [np.int32, np.int32, np.bool_, np.int32]
    assert taught is None


def test_an_epoch_is_a_permutation_and_each_has_its_own():
    windows = Windows(synthetic([37 * 5]), 5, False)
    assert len(windows) == 37
    iterator = train_iterator(windows, 37, seed=3)
    epochs = [next(iterator).tokens_BxL[:, 0] for _ in range(4)]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), 1 + 5 * np.arange(37))
    # An order that comes back under the next seed would make seeds no independent runs.
    epochs += [next(train_iterator(windows, 37, seed=4)).tokens_BxL[:, 0]]
    assert len({tuple(epoch) for epoch in [*epochs, np.sort(epochs[0])]}) == 6


@pytest.mark.parametrize("rows", [[0], [3, 4, 5], [0, 2, 5]])
def test_a_process_reads_its_rows_of_the_same_batches(rows):
    windows = Windows(synthetic([11, 50, 3, 60]), 11, False)  # 12 windows: an epoch is 2 steps.
    whole, part = train_iterator(windows, 6, seed=5), train_iterator(windows, 6, 5, rows)
    for _ in range(5):
        assert_same(rows_of(next(whole), rows), next(part))
    assert whole.get_state() == part.get_state()


@pytest.mark.parametrize("step", [0, 1, 4, 9])
def test_restored_iterator_goes_on_bit_for_bit(step):
    windows = Windows(synthetic([11, 50, 3, 60]), 7, False)  # 18 windows: steps straddle epochs.
    iterator = train_iterator(windows, 4, seed=5)
    for _ in range(step):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = [next(iterator) for _ in range(7)]
    restored = train_iterator(windows, 4, seed=5)
    next(restored)  # What it did before must not matter.
    restored.set_state(state)
    for batch in expected:
        assert_same(next(restored), batch)
    second_half = train_iterator(windows, 4, 5, rows=[2, 3])
    second_half.set_state(state)
    for batch in expected:
        assert_same(next(second_half), rows_of(batch, slice(2, None)))


@pytest.mark.parametrize("mixed", [False, True])
def test_batches_of_one_have_the_rows_of_larger_ones(mixed):
    windows = Windows(synthetic([11, 50, 3, 60]), 11, False)
    if mixed:
        shares = Decimal(2), Decimal(1)
        windows = pipeline.Mixture([windows, Windows(synthetic([40]), 11, False)], shares)
    one, four = train_iterator(windows, 1, seed=5), train_iterator(windows, 4, seed=5)
    for _ in range(5):
        expected = next(four)
        for row in range(4):
            assert_same(next(one), rows_of(expected, [row]))


def test_bytes_of_a_part_of_the_split():
    """In proportion to tokens in each stream; a mixture has one stream after the other."""
    one = Windows(synthetic([7]), 3, False, text_bytes=70)  # 3 windows, of 3, 3 and 1
    two = Windows(synthetic([4]), 3, False, text_bytes=8)
    assert [round(one.bytes_of(np.arange(count)), 9) for count in range(4)] == [0, 30, 60, 70]
    both = pipeline.Mixture([one, two], [Decimal(1)] * 2)
    some = [], [0, 1], [0, 1, 2], [0, 1, 2, 3], [2, 4]
    assert [round(both.bytes_of(np.array(part, int)), 9) for part in some] == [0, 60, 70, 76, 12]
    assert both.text_bytes == both.bytes_of(np.arange(len(both))) == 78


def test_a_part_of_a_mixture_has_windows_of_every_stream():
    """30 windows of one and 10 of the other; of one stream alone the first windows are taken."""
    one, two = (Windows(synthetic([count * 7 - 1]), 7, False) for count in (30, 10))
    both = pipeline.Mixture([one, two], [Decimal(1)] * 2)
    assert [int((evaluated_windows(both, n) < 30).sum()) for n in (4, 8, 20, 40, 99)] == [
        *(3, 6, 15, 30, 30)
    ]
    assert len(set(evaluated_windows(both, 20))) == 20
    np.testing.assert_array_equal(evaluated_windows(one, 4), range(4))
    np.testing.assert_array_equal(evaluated_windows(both), range(40))
    (batch,) = eval_batches(both, 4, limit=1)
    for row, index in enumerate([0, 10, 20, 30]):
        np.testing.assert_array_equal(batch.tokens_BxL[row], both[index].tokens_BxL)


def test_fewer_windows_than_a_batch_repeat():
    batch = next(train_iterator(Windows(synthetic([9]), 5, False), 7, seed=0))
    assert sorted(set(batch.tokens_BxL[:, 0])) == [1, 6]


def test_what_was_recorded_of_a_window_comes_with_it():
    """Shuffled, batched, and padded at the end of an evaluation."""
    cache, places = synthetic([11, 50, 3, 60]), 18 * 7
    said = np.arange(places * 2, dtype=np.uint16).reshape(18, 7, 2)
    windows = Windows(cache, 7, False, TopKLogProbs(said, -np.float32(said)))
    for batch in [next(train_iterator(windows, 5, seed=1)), *eval_batches(windows, 5)]:
        tokens, log_p = batch.teacher_top_k
        assert (tokens.dtype, log_p.dtype) == (np.int32, np.float32)
        rows = batch.segments_BxL[:, 0] > 0
        first = batch.tokens_BxL[rows, 0] - 1
        np.testing.assert_array_equal(tokens[rows][:, 0, 0], 2 * first)
        np.testing.assert_array_equal(log_p, -tokens)
    assert rows.sum() == 3 and not tokens[3:].any()


@pytest.mark.parametrize("processes", [[[0, 1, 2, 3]], [[0], [1, 2, 3]]])
def test_evaluation_sees_every_window_once_in_order(processes):
    windows = Windows(synthetic([7 * 7 - 2]), 7, False)
    parts = [list(eval_batches(windows, 4, rows=rows)) for rows in processes]
    batches = [
        jax.tree.map(lambda *field: np.concatenate(field), *rows)
        for rows in zip(*parts, strict=True)
    ]
    assert [batch.tokens_BxL.shape for batch in batches] == [(4, 7)] * 2
    np.testing.assert_array_equal(
        np.concatenate([batch.targets_BxL[batch.mask_BxL] for batch in batches]),
        windows.stream.tokens_T[1:],
    )
    assert not batches[-1].mask_BxL[3].any() and not batches[-1].segments_BxL[3].any()
    assert len(list(eval_batches(windows, 4, limit=1))) == 1
    assert len(list(eval_batches(windows, 4, limit=99))) == 2


def test_a_split_without_documents():
    stream = streams.ShardStream([], byte_tokenizer(), 0, 0, (False, True), "")
    windows = Windows(stream, 5, False)
    with pytest.raises(UserError, match="split has 1 tokens, which make 0 windows of 5"):
        train_iterator(windows, 4, 0)
    assert list(eval_batches(windows, 4)) == []


def test_tokenised_once_per_corpus_and_tokenizer(config, tmp_path, monkeypatch):
    bpe = load_tokenizer(dataclasses.replace(config, tokenizer="bpe"), 300, open_corpus(config))
    encoded, encode = [], Tokenizer.encode_batch
    monkeypatch.setattr(
        Tokenizer, "encode_batch", lambda self, texts: encoded.extend(texts) or encode(self, texts)
    )

    first = ids(tokenised(config))
    assert ids(tokenised(config)) == first and encoded.count(DOCUMENTS[3]) == 1
    tokenised(config, bpe)
    assert encoded.count(DOCUMENTS[3]) == 2
    write_lines(tmp_path / "text.jsonl", ["other", "documents"])
    tokenised(config)
    assert {"other", "documents"} <= set(encoded)


def test_counts_and_dtypes(config, tmp_path):
    description = json.loads(byte_tokenizer().description)
    description["model"]["vocab"]["wide"] = 1 << 16
    wide = Tokenizer(json.dumps(description), "wide")
    narrow, wide = (tokenised(config, tokenizer) for tokenizer in (byte_tokenizer(), wide))
    sizes = [
        sum(path.stat().st_size for path in folder.glob("*.tokens"))
        for folder in (tmp_path / "cache" / "tokens").iterdir()
        if folder.is_dir()
    ]
    count = sum(map(len, DOCUMENTS)) + sum(len(text.encode()) - len(text) for text in DOCUMENTS)
    assert sorted(sizes) == [2 * (count + len(DOCUMENTS)), 4 * (count + len(DOCUMENTS))]
    (mark,) = {stream[0] for stream in ids(wide)}
    assert [[MARK if i == mark else i for i in stream] for stream in ids(wide)] == ids(narrow)


def test_a_dataset_is_read_as_it_is(config, monkeypatch):
    """Its own splits, with repeated documents and empty ones; only `prmoe tokenize` drops them."""
    splits = {"train": ["a", "b", "", "b", "c"], "validation": ["c", "e", "e", " "]}
    monkeypatch.setattr(chunks, "_tfds", lambda config: {k: Texts(v) for k, v in splits.items()})
    streams = tokenised(dataclasses.replace(config, corpus="tfds:lm1b"))
    for stream, texts in zip(ids(streams), splits.values(), strict=True):
        decoded = byte_tokenizer().decode(stream)
        assert decoded == "".join(f"<|endoftext|>{text}" for text in texts) + "<|endoftext|>"


def test_chunks_do_not_change_the_stream(config, tmp_path, monkeypatch):
    known = ids(tokenised(config))
    monkeypatch.setattr(tokens, "CHUNK_CHARACTERS", 3)
    monkeypatch.setattr(chunks, "_MIN_BYTES", 50)
    again = dataclasses.replace(config, cache_dir=str(tmp_path / "again"))
    assert ids(tokenised(again)) == known
    assert len(list((tmp_path / "again" / "tokens").glob("*/*.tokens"))) > 3


def test_full_disk_leaves_nothing(config, tmp_path):
    write_lines(tmp_path / "text.jsonl", ["x" * 100_000, "y" * 100_000])
    list(open_corpus(config).train)
    with file_size_limit(50_000):
        with pytest.raises(UserError, match="cannot write the cache .*File too large; make room"):
            tokenised(config)
    assert [path.suffix for path in (tmp_path / "cache" / "tokens").iterdir()] == [".lock"]
    assert [len(stream) for stream in tokenised(config)] == [100_002] * 2


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "corpus").mkdir()
    for i in range(20):
        (tmp_path / "corpus" / f"{i}.txt").write_text(f"document {i} of twenty: {'la ' * i}")
    return str(tmp_path / "corpus")


def test_load_data_from_files_to_batches(config, folder, tmp_path):
    config = dataclasses.replace(config, corpus=folder, tokenizer="bpe")
    data = pipeline.load_data(config, 300, 16)
    text = data.tokenizer.decode(stream_of(data.train))
    held_out = data.tokenizer.decode(stream_of(data.validation))
    documents = text.split("<|endoftext|>")[1:-1]
    assert len(documents) == 19
    assert held_out == f"<|endoftext|>{held_out.split('<|endoftext|>')[1]}<|endoftext|>"
    assert held_out.split("<|endoftext|>")[1] not in documents
    assert data.validation.text_bytes == len(held_out.encode()) - 2 * len("<|endoftext|>")
    assert next(train_iterator(data.train, 4, 0)).tokens_BxL.shape == (4, 16)

    data.tokenizer.save(tmp_path / "tokenizer.json")
    resumed = pipeline.load_data(
        dataclasses.replace(config, tokenizer="gone"), 300, 16, str(tmp_path / "tokenizer.json")
    )
    assert pipeline.pipeline_fingerprint(resumed, 4, 0) == pipeline.pipeline_fingerprint(data, 4, 0)
    with pytest.raises(UserError, match="model.vocab_size=100 is smaller"):
        pipeline.load_data(config, 100, 16, str(tmp_path / "tokenizer.json"))


def test_pipeline_fingerprint_tells_every_change(config, folder):
    config = dataclasses.replace(config, corpus=folder)

    def prints(batch_size=4, seed=0, length=16, **changes):
        data = pipeline.load_data(dataclasses.replace(config, **changes), 300, length)
        return json.dumps(pipeline.pipeline_fingerprint(data, batch_size, seed))

    assert prints() == prints()
    variants = [prints(), prints(batch_size=8), prints(seed=1), prints(length=15),
                prints(cross_document_attention=True), prints(validation_fraction=0.5),
                prints(tokenizer="bpe")]  # fmt: skip
    assert len(set(variants)) == len(variants)


def test_warm_start_needs_no_tfds(config, folder):
    config = dataclasses.replace(config, corpus=folder)
    data = pipeline.load_data(config, 257, 16)
    code = (
        "import sys; from prmoe_jax.data import pipeline\n"
        "from prmoe_jax.config.schema import DataConfig\n"
        f"data = pipeline.load_data({config!r}, 257, 16)\n"
        "assert 'tensorflow_datasets' not in sys.modules\n"
        "print(len(data.train))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) == len(data.train)
