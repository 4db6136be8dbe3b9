"""Finds files in object stores, and copies token shards and teacher caches to the local cache."""

import contextlib
import glob
import hashlib
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from etils import epath

from prmoe_jax import files, stores
from prmoe_jax.data import cache, shards
from prmoe_jax.data.shards import Index
from prmoe_jax.errors import UserError, refusing

log = logging.getLogger(__name__)

_BLOCK_BYTES = 1 << 24


def find(pattern: str) -> list[epath.Path]:
    """The files and folders that a store's path or glob matches, sorted by path."""
    stores.as_path(pattern)  # checks the store's name, and registers its client
    with _reaching(pattern):
        base = re.split(r"[*?[]", pattern, maxsplit=1)[0].rpartition("/")[0]
        if glob.has_magic(pattern):
            found = list(epath.Path(base).glob(pattern.removeprefix(base).lstrip("/")))
        else:
            found = [path for path in [epath.Path(pattern)] if path.exists()]
    if not found:
        raise UserError(f"nothing matches {pattern!r}")
    return sorted(found, key=lambda path: path.parts)  # the order of local paths


def local_copy(pattern: str, cache_dir: Path) -> str:
    """Copies token shards, a folder or a glob in a store, into the cache, once.

    Shards of `prmoe tokenize` are verified by the SHA-256 in their index. Other files are verified
    by size, and copied again after their modification time changed. After an interruption the
    next call copies only the missing files. Returns a glob, or a folder, of the copies.
    """
    found = find(pattern)
    with _reaching(pattern):
        shards.check_whole(found)
        found = [path.parent if path.name == shards.INDEX else path for path in found]
        ours = len(found) == 1 and (found[0] / shards.INDEX).exists()
    if ours:
        return str(_copy_ours(found[0], cache_dir))
    return glob.escape(str(_copy_arrays(found, pattern, cache_dir))) + "/*"


def sealed(folder: epath.Path, names: Sequence[str], cache_dir: Path) -> Path:
    """Copies files of a folder in a store that has `cache.seal`'s record into the cache, once.

    Each file's SHA-256 is verified. After an interruption the next call copies only the missing
    files. Returns the folder of the copies, which is sealed.
    """
    with _reaching(str(folder)):
        record = files.parse_json((folder / cache.DIGESTS).read_bytes())
        wanted = {name: str(record[name]["sha256"]) for name in names}
    target = cache_dir / "copies" / cache.fingerprint(wanted)
    with _copying(target):
        for name, sha256 in wanted.items():
            _copy(folder / name, target / name, sha256)
        if not (target / cache.DIGESTS).exists():
            cache.seal(target)
    return target


def _copy_ours(folder: epath.Path, cache_dir: Path) -> Path:
    with _reaching(str(folder)):
        index = Index.open(folder)
    target = cache_dir / "shards" / index.fingerprint
    with _copying(target):
        for split in shards.SPLITS:
            for entry in index.splits[split]["shards"]:
                _copy(folder / entry["name"], target / entry["name"], entry["sha256"])
        _copy(folder / shards.TOKENIZER, target / shards.TOKENIZER)
        _copy(folder / shards.INDEX, target / shards.INDEX)  # last: it marks the copy as complete
    return target


def _copy_arrays(found: list[epath.Path], pattern: str, cache_dir: Path) -> Path:
    with _reaching(pattern):
        indices = {path: path.with_suffix(".idx") for path in found if path.suffix == ".bin"}
        indices = {path: index for path, index in indices.items() if index.exists()}
        stats = [(path, path.stat()) for path in (*found, *indices.values())]
    versions = [[os.fspath(path), stat.length, stat.mtime] for path, stat in stats]
    target = cache_dir / "shards" / cache.fingerprint(versions)
    with _copying(target):
        for i, path in enumerate(path for path in found if path.suffix != ".idx"):
            # The number keeps the order of the paths, and tells equal names of two folders apart.
            copy = target / f"{i:05}-{path.name}"
            if not files.is_plain(copy.name):
                raise UserError(f"{os.fspath(path)!a} has no usable name; copy it to another one")
            if path in indices:
                _copy(indices[path], copy.with_suffix(".idx"))
            _copy(path, copy)
    return target


@contextlib.contextmanager
def _copying(target: Path) -> Iterator[None]:
    """Holds the lock of a folder of copies; creates the folder if needed."""
    with cache.locked(target):
        target.mkdir(exist_ok=True)
        files.remove_unfinished(target)
        yield


def _copy(source: epath.Path, target: Path, sha256: str | None = None) -> None:
    """Copies a file, unless a copy of the same size exists."""
    with _reaching(os.fspath(source)):
        size = source.stat().length
    if target.exists() and target.stat().st_size == size:
        return
    log.info("copying %s (%d bytes) to %s", source, size, target)
    digest, copied = hashlib.sha256(), 0
    with files.whole(target) as file:
        for block in _blocks(source):
            file.write(block)
            digest.update(block)
            copied += len(block)
        if copied != size or (sha256 and digest.hexdigest() != sha256):
            raise UserError(
                f"{source} is not the file that its index describes; copy it there again"
            )


def _blocks(source: epath.Path) -> Iterator[bytes]:
    with _reaching(os.fspath(source)):
        file = source.open("rb")
    with file:
        while True:
            with _reaching(os.fspath(source)):
                block = file.read(_BLOCK_BYTES)
            if not block:
                return
            yield block


def _reaching(name: str):
    return refusing(f"{name} can't be read")  # a store's client may raise anything
