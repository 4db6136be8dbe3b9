"""Caches: known again when they are used, refused when they changed, and whole on a full disk."""

import errno
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from prmoe_jax.cli import main
from prmoe_jax.config.schema import DataConfig
from prmoe_jax.data import cache, pipeline
from prmoe_jax.data.arrays import ArrayWriter, open_array
from prmoe_jax.data.corpora import open_corpus
from prmoe_jax.errors import UserError
from prmoe_jax.tasks import local
from tests.support.faults import altered, at_most, file_size_limit
from tests.support.runs import NEW

# One file of each kind in a cache.
FILES = (
    "tokens/*/train-00000.tokens",
    "tokens/*/validation-00000.tokens",
    "tokens/*/index.json",
    "tokens/*/tokenizer.json",
    "tokenizers/*/tokenizer.json",
    "splits/*/split.json",
    "tasks/*/examples.jsonl",
    "tasks/*/cloze.yaml",
)


def config_in(folder):
    return DataConfig(corpus=str(folder / "corpus"), cache_dir=str(folder / "cache"))


def ids(windows):
    return windows.stream.read(0, len(windows.stream)).tolist()


def use(folder):
    """Reads all that a cache holds; its numbers."""
    config = config_in(folder)
    data = pipeline.load_data(config, 300, 16)
    corpus = open_corpus(config)
    task = local.prepare("cloze", config)
    return (
        data.tokenizer.fingerprint,
        [ids(windows) for windows in (data.train, data.validation)],
        [*corpus.train, *corpus.validation],
        (task / "examples.jsonl").read_text(),
    )


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """A folder with a corpus and every kind of cache of it; and what it holds."""
    folder = tmp_path_factory.mktemp("warm")
    (folder / "corpus").mkdir()
    for i in range(17):
        text = f"Document {i}. " + "There is a castle on a hill. " * 20
        (folder / "corpus" / f"{i}.txt").write_text(text)
    return folder, use(folder)


@pytest.fixture
def here(warm, tmp_path):
    """A copy of it to spoil, and what it holds."""
    source, content = warm
    folder = copied(source, tmp_path / "here", copy_function=shutil.copy2)
    assert use(folder) == content
    return folder, content


def copied(source, target, copy_function=shutil.copyfile):
    """A copy without tasks: a task names the place of its examples, so another place makes it."""
    ignore = shutil.ignore_patterns("tasks")
    return shutil.copytree(source, target, ignore=ignore, copy_function=copy_function)


def refused(folder, *expected):
    """Reads a cache that has to be refused; the folder of it that the message tells to delete."""
    with pytest.raises(UserError) as error:
        use(folder)
    message = str(error.value)
    assert "\n" not in message and len(message) < 500
    for text in expected:
        assert text in message
    damaged = re.fullmatch(
        r"the cache (\S+) can't be read \(.*\); delete the folder, it is made again", message
    )
    assert damaged, message
    return Path(damaged[1])


@pytest.mark.parametrize("pattern", FILES)
def test_a_damaged_file_is_refused_and_made_again(here, pattern):
    folder, content = here
    files = sorted((folder / "cache").glob(pattern))
    assert files
    for file in files:
        before = file.read_bytes()
        damages = {
            "is not as it was written": altered(before),
            f"has {len(before) - 1} bytes, not {len(before)}": before[:-1],
            f"has 0 bytes, not {len(before)}": b"",
        }
        for reason, damage in damages.items():
            file.write_bytes(damage)
            refused(folder, file.name, reason)
        file.unlink()
        shutil.rmtree(refused(folder, file.name, "No such file"))
        assert use(folder) == content


def test_other_files_are_ignored(here):
    folder, content = here
    for made in [path.parent for path in (folder / "cache").rglob(cache.DIGESTS)]:
        (made / "notes.txt").write_text("mine")
        (made / "more").mkdir()
    assert use(folder) == content


def records(folder, tasks=1):
    paths = sorted((folder / "cache").rglob(cache.DIGESTS))
    assert len(paths) == 3 + tasks  # tokens, a tokenizer, a split, perhaps a task
    return paths


def test_a_copy_is_read_once(here, tmp_path, monkeypatch):
    """Its files have other times; so content decides, and the times are recorded."""
    folder, content = here
    copy = copied(folder, tmp_path / "copy")
    assert use(copy) == content
    for path in records(copy):
        for name, known in json.loads(path.read_text()).items():
            assert (path.parent / name).stat().st_mtime_ns == known["mtime_ns"]
    digested = []
    monkeypatch.setattr(cache, "_digest", digested.append)
    assert use(copy) == content and not digested


def test_a_copy_that_cannot_be_written_is_read_each_time(here, tmp_path, monkeypatch):
    folder, content = here
    copy = copied(folder, tmp_path / "copy")
    copies = records(copy, tasks=0)
    before = [path.read_bytes() for path in copies]

    def fail(path, content):
        raise UserError("read-only")

    monkeypatch.setattr(cache.files, "replace", fail)
    assert use(copy) == content and use(copy) == content
    assert [path.read_bytes() for path in copies] == before


def test_a_cache_from_before_is_sealed_by_its_first_use(here):
    folder, content = here
    before = [path.read_bytes() for path in records(folder)]
    for path in records(folder):
        path.unlink()
    assert use(folder) == content
    assert [path.read_bytes() for path in records(folder)] == before
    file = next((folder / "cache").glob("tokens/*/train-00000.tokens"))
    file.write_bytes(altered(file.read_bytes()))
    refused(folder, "train-00000.tokens is not as it was written")


def test_caches_of_earlier_versions_are_not_read(here):
    """They had an array for each split, and a copy of the text."""
    folder, content = here
    config = config_in(folder)
    corpus, tokenizer = open_corpus(config), pipeline.load_data(config, 300, 16).tokenizer
    for name in ("train", "validation"):
        before = cache.fingerprint(corpus.fingerprint, name, tokenizer.fingerprint)
        (folder / "cache" / "tokens" / before).mkdir()
        (folder / "cache" / "tokens" / before / "tokens.npy").write_bytes(b"old")
    (folder / "cache" / "corpora" / corpus.fingerprint).mkdir(parents=True)
    assert use(folder) == content


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b'{"meta.json": 3}', b'{"meta.json": {}}', b"\xff", b"[" * 9999]
)
def test_a_damaged_record_is_refused(here, damage):
    folder, content = here
    path = next((folder / "cache").glob(f"tokens/*/{cache.DIGESTS}"))
    path.write_bytes(damage)
    shutil.rmtree(refused(folder))
    assert use(folder) == content


def replaced(**changes):
    """The same JSON object with other values."""
    return lambda content: json.dumps(json.loads(content) | changes).encode()


INDEX, SHARD, SPLIT = "tokens/*/index.json", "tokens/*/train-00000.tokens", "splits/*/split.json"
# Damage in caches that hold no digests: the kind of file, and what happens to its content.
BEFORE = {
    "no index": (INDEX, lambda content: b""),
    "garbage": (INDEX, lambda content: b"\xff\xfe"),
    "half": (INDEX, lambda content: content[:-9]),
    "list": (INDEX, lambda content: b"[]"),
    "nothing in it": (INDEX, lambda content: b"{}"),
    "splits as text": (INDEX, replaced(splits="many")),
    "fingerprint as number": (INDEX, replaced(fingerprint=3)),
    "other fingerprint": (INDEX, replaced(fingerprint="3")),
    "other dtype": (INDEX, replaced(dtype="<i2")),
    "empty": (SHARD, lambda content: b""),
    "cut": (SHARD, lambda content: content[:-2]),
    "other tokens": (SHARD, lambda content: content[:-2] + b"\0\0"),
    "tokenizer": ("tokenizers/*/tokenizer.json", lambda content: content[:-99]),
    "tokenizer's type": ("tokenizers/*/tokenizer.json", lambda content: b'{"model": 3}'),
    "tokenizer's encoding": ("tokenizers/*/tokenizer.json", lambda content: b"\xff"),
    "no split": (SPLIT, lambda content: b""),
    "split's encoding": (SPLIT, lambda content: b"\xff"),
    "split as list": (SPLIT, lambda content: b"[]"),
    "nothing in the split": (SPLIT, lambda content: b"{}"),
    "threshold as number": (SPLIT, replaced(threshold=3)),
    "threshold as text": (SPLIT, replaced(threshold="low")),
    "short threshold": (SPLIT, replaced(threshold="00")),
}


@pytest.mark.parametrize("name", BEFORE)
def test_damage_is_found_without_digests(here, name, monkeypatch):
    folder, _ = here
    monkeypatch.chdir(folder)
    pattern, damage = BEFORE[name]
    for path in records(folder):
        path.unlink()
    file = next((folder / "cache").glob(pattern))
    file.write_bytes(damage(file.read_bytes()))
    with at_most(60):
        refused(folder)


def test_a_file_without_permission_is_not_called_damaged(here, monkeypatch):
    """To delete it would not help."""
    folder, _ = here

    def closed(directory):
        raise PermissionError(errno.EACCES, "Permission denied", "index.json")

    monkeypatch.setattr(cache, "check", closed)
    with pytest.raises(UserError, match=r"can't be read \(.*Permission denied: 'index.json'\)$"):
        use(folder)


def test_the_command_line_tells_of_altered_tokens_and_does_not_train(here, monkeypatch, capsys):
    folder, _ = here
    monkeypatch.chdir(folder)
    config = DataConfig("corpus", tokenizer="bytes", cache_dir="cache")  # as NEW has it
    before = set(Path("cache").glob(SHARD))
    pipeline.load_data(config, 384, 32)
    for file in set(Path("cache").glob(SHARD)) - before:
        file.write_bytes(altered(file.read_bytes()))
    assert main(NEW) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("prmoe: the cache cache/tokens/")
    assert "train-00000.tokens is not as it was written); delete the folder" in message
    assert not list(Path("new").rglob("metrics.jsonl"))


@pytest.mark.parametrize("tokenizer", ["bpe", "bytes"])
@pytest.mark.parametrize("prepared", [False, True])
def test_every_write_to_a_full_disk_is_one_line_and_leaves_nothing_half(
    warm, tmp_path, tokenizer, prepared, capfd
):
    source, _ = warm
    config = DataConfig(str(source / "corpus"), tokenizer=tokenizer, cache_dir=str(tmp_path / "c"))
    if prepared:
        list(open_corpus(config).train)
    stopped = set()
    for size in (1, 50, 113, 307, 1009, 4099, 5003):  # bytes that a file may have
        with file_size_limit(size), pytest.raises(UserError) as error:
            pipeline.load_data(config, 300, 16)
        message = str(error.value)
        kind = re.fullmatch(
            r"cannot write the cache .*/(\w+)/\w+: .*; make room or set .*", message
        )
        stopped.add(kind[1])
        assert not list(tmp_path.glob("c/*/*.tmp"))
    assert stopped == (
        {"splits"}
        if not prepared
        else {"tokens"} | ({"tokenizers"} if tokenizer == "bpe" else set())
    )
    out, err = capfd.readouterr()
    assert out == "" and "Traceback" not in err
    tokens = ids(pipeline.load_data(config, 300, 16).train)
    shutil.rmtree(tmp_path / "c")
    assert ids(pipeline.load_data(config, 300, 16).train) == tokens


def test_a_disk_that_is_full_when_the_digests_are_written(tmp_path):
    def build(temporary):
        (temporary / "small").write_text("it fits")

    with (
        file_size_limit(97),
        pytest.raises(UserError, match="cannot write the cache .*/thing: Fil"),
    ):
        cache.build_once(tmp_path / "thing", build)
    assert [path.name for path in tmp_path.iterdir()] == ["thing.lock"]
    cache.build_once(tmp_path / "thing", build)
    assert (tmp_path / "thing" / "small").read_text() == "it fits"


def test_an_array_is_what_was_appended(tmp_path):
    rows_NxAxB = np.arange(7 * 3 * 5, dtype=np.int64).reshape(7, 3, 5)
    with ArrayWriter(tmp_path / "a.npy", np.uint16, (7, 3, 5)) as writer:
        assert (tmp_path / "a.npy").stat().st_size >= 7 * 3 * 5 * 2
        written = [writer.append(rows_NxAxB[:2]), writer.append(rows_NxAxB[2:])]
    assert writer.rows == 7
    assert b"".join(written) == rows_NxAxB.astype(np.uint16).tobytes()
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), rows_NxAxB)
    assert (tmp_path / "a.npy").stat().st_size == 128 + 7 * 3 * 5 * 2
    found = open_array(tmp_path / "a.npy", np.uint16, (7, 3, 5))
    np.testing.assert_array_equal(found, rows_NxAxB)
    with pytest.raises(ValueError, match=r"holds uint16 \(7, 3, 5\), not uint32 \(7, 3, 5\)"):
        open_array(tmp_path / "a.npy", np.uint32, (7, 3, 5))
    with pytest.raises(ValueError, match=r"holds uint16 \(7, 3, 5\), not uint16 \(3, 7, 5\)"):
        open_array(tmp_path / "a.npy", np.uint16, (3, 7, 5))


@pytest.mark.parametrize("error", [errno.EOPNOTSUPP, errno.EINVAL, None])
def test_a_file_system_that_cannot_reserve_is_written_to(tmp_path, monkeypatch, error):
    def fail(*arguments):
        raise OSError(error, os.strerror(error))

    if error:
        monkeypatch.setattr(os, "posix_fallocate", fail)
    else:
        monkeypatch.delattr(os, "posix_fallocate")
    with ArrayWriter(tmp_path / "a.npy", np.uint16, (3,)) as writer:
        writer.append([5, 7, 11])
    assert np.load(tmp_path / "a.npy").tolist() == [5, 7, 11]


def test_room_for_all_rows_is_taken_before_the_first(tmp_path):
    with file_size_limit(1000):
        ArrayWriter(tmp_path / "a.npy", np.uint16, (436,)).__exit__(None, None, None)
        with pytest.raises(OSError, match="File too large"):  # behind a header of 128 bytes
            ArrayWriter(tmp_path / "a.npy", np.uint16, (437,))


def test_an_array_with_too_few_rows_is_refused(tmp_path):
    with ArrayWriter(tmp_path / "a.npy", np.uint16, (3,)) as writer:
        writer.append([5, 7])
    with pytest.raises(ValueError, match="it has 132 bytes, and"):
        open_array(tmp_path / "a.npy", np.uint16, (3,))


def test_a_cache_in_an_unknown_home_directory(monkeypatch, tmp_path):
    """As for a user that no password file knows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    for changes, name in (
        ({"cache_dir": "~/cache"}, "data.cache_dir=~/cache"),
        ({"corpus": "~/text"}, "data.corpus=~/text"),
        ({"corpus": "tfds:lm1b", "cache_dir": "~/cache"}, "data.cache_dir=~/cache"),
        ({"corpus": __file__, "tokenizer": "~/a.json"}, "data.tokenizer=~/a.json"),
    ):
        Path("text.txt").write_text("a text")
        if changes.get("corpus") == __file__:
            changes |= {"corpus": "text.txt"}
        with pytest.raises(UserError) as error:
            pipeline.load_data(DataConfig(**{"cache_dir": "cache"} | changes), 300, 16)
        assert str(error.value) == (
            f"{name}: Could not determine home directory; set HOME or give a path without ~"
        )
