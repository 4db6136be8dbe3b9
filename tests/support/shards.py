"""Token shards as `prmoe tokenize` writes them, and a folder that stands for an object store."""

import hashlib
import json
import os
from types import SimpleNamespace

import numpy as np
from etils import epath

from prmoe_jax import stores
from prmoe_jax.data import copies, shards
from tests.support.tokenizers import byte_tokenizer


def encoded(texts, before=False):
    """The ids of texts, each with the mark behind it, or before it."""
    tokenizer = byte_tokenizer()
    mark = [tokenizer.eos_id]
    marked = [mark * before + tokenizer.encode(text) + mark * (not before) for text in texts]
    return [np.array(ids) for ids in marked]


def write_array(path, documents, kind="<u2"):
    path.write_bytes(np.concatenate(documents).astype(kind).tobytes())


def write_ours(folder, train, validation=("held out",), per_shard=2):
    """A folder as prmoe tokenize leaves it."""
    folder.mkdir()
    tokenizer, splits = byte_tokenizer(), {}
    tokenizer.save(folder / "tokenizer.json")
    for split, texts in (("train", train), ("validation", validation)):
        entries = []
        for first in range(0, len(texts), per_shard):
            part = texts[first : first + per_shard]
            path = folder / f"{split}-{first:05}.tokens"
            write_array(path, encoded(part, before=True))
            tokens = path.stat().st_size // 2
            blocks = shards.Shard(path, np.dtype("<u2"), 0, tokens).digest()
            sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
            size = sum(len(text.encode()) for text in part)
            entry = {"name": path.name, "documents": len(part), "tokens": tokens, "bytes": size}
            entries.append(entry | {"blocks": blocks, "sha256": sha256})
        splits[split] = {
            count: sum(entry[count] for entry in entries)
            for count in ("documents", "tokens", "bytes")
        } | {"shards": entries}
    content = shards.index_content(tokenizer.fingerprint, tokenizer.size, splits, "")
    (folder / "index.json").write_text(json.dumps(content))


class Texts(list):
    """A split of a dataset of TFDS."""

    def read(self, first, last):
        return iter(self[first:last])


class Stream:
    """A token stream in memory, whose documents begin at `starts` whatever the tokens are."""

    fingerprint = "fingerprint"

    def __init__(self, tokens_T, starts_N):
        self.tokens_T, self.starts_N = np.asarray(tokens_T), np.asarray(starts_N, np.int64)

    def __len__(self):
        return len(self.tokens_T)

    def read(self, first, last):
        return self.tokens_T[first:last]

    def documents(self, first, tokens_T):
        positions = np.arange(first, first + len(tokens_T))
        documents = np.searchsorted(self.starts_N, positions, side="right")
        return documents - documents[:1]


def reach(folder, monkeypatch):
    """Has a new folder be reached as store://."""
    folder.mkdir()

    def opened(path):
        return epath.Path(os.fspath(path).replace("store://", f"{folder}/"))

    monkeypatch.setattr(stores.paths, "KNOWN", ("store",))
    monkeypatch.setattr(copies, "stores", SimpleNamespace(as_path=opened))
    monkeypatch.setattr(copies, "epath", SimpleNamespace(Path=opened))
    return folder
