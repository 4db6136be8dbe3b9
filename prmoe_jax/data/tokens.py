"""Writes text as shards: the stage `write`, and the shards of a corpus in the cache."""

import contextlib
import hashlib
import json
import logging
import pathlib
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np
from etils import epath

from prmoe_jax.config.schema import DataConfig
from prmoe_jax.data import cache, shards, split, streams
from prmoe_jax.data.chunks import Chunk
from prmoe_jax.data.corpora import Corpus
from prmoe_jax.data.shards import Index
from prmoe_jax.data.split import Selection
from prmoe_jax.data.stages import Run, Work, in_this_process
from prmoe_jax.data.streams import Source
from prmoe_jax.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)

# Documents are encoded and written in batches of about this many characters.
CHUNK_CHARACTERS = 1 << 20


def cached_tokens(config: DataConfig, corpus: Corpus, tokenizer: Tokenizer) -> Source:
    """The tokens of a corpus, from the cache or computed by this process."""
    # Caches of earlier versions, without shards, have other keys.
    key = cache.fingerprint("shards", corpus.fingerprint, tokenizer.fingerprint)
    directory = cache.root(config) / "tokens" / key

    def build(temporary: pathlib.Path) -> None:
        parts, selection = corpus.chunks, corpus.selection
        log.info("tokenising %s in %d chunks", config.corpus, len(parts))
        with in_this_process(temporary, config, len(parts)) as (work, run):
            save_tokenizer(work, tokenizer)
            content = write_shards(work, parts, selection, tokenizer, corpus.fingerprint, run)
            save_index(work, content)

    cache.build_once(directory, build)
    with cache.reading(directory):
        return streams.of_index(Index.open(directory), tokenizer)


def save_tokenizer(work: Work, tokenizer: Tokenizer) -> None:
    """Writes the tokenizer that `write` uses."""
    with work.written(work.folder / shards.TOKENIZER) as file:
        file.write(tokenizer.description.encode())


def load_saved(work: Work) -> Tokenizer:
    """Reads the tokenizer that `save_tokenizer` wrote."""
    path = work.folder / shards.TOKENIZER
    return Tokenizer(path.read_text(encoding="utf-8"), str(path))


def write_shards(
    work: Work,
    parts: Sequence[Chunk],
    selection: Selection,
    tokenizer: Tokenizer,
    inputs: str,
    run: Run,
) -> dict[str, Any]:
    """Writes the shards of all chunks by the stage `write`; returns the content of their index.

    Call `save_tokenizer` first. `inputs` identifies the text and the settings.
    """
    results = run(write, {f"shards-{chunk.number:05}": (chunk, selection) for chunk in parts})
    splits = {}
    for name in shards.SPLITS:
        entries = [result[name] for result in results if name in result]
        splits[name] = {count: sum(entry[count] for entry in entries) for count in shards.COUNTS}
        splits[name]["shards"] = entries
    return shards.index_content(
        tokenizer.fingerprint, tokenizer.size, dtype_of(tokenizer), splits, inputs
    )


def save_index(work: Work, content: dict[str, Any]) -> None:
    """Writes the index, which marks the shards as complete."""
    with work.written(work.folder / shards.INDEX) as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")


def write(work: Work, chunk: Chunk, selection: Selection) -> None:
    """Writes a chunk's shards, one for each split in which it has documents."""
    tokenizer = load_saved(work)
    writers: dict[str, ShardWriter] = {}
    with contextlib.ExitStack() as stack:
        for name, text in split.kept(work, chunk, selection):
            if name not in writers:
                path = work.folder / f"{name}-{chunk.number:05}{shards.SUFFIX}"
                writers[name] = ShardWriter(
                    stack.enter_context(work.written(path)), path, tokenizer
                )
            writers[name].add(text)
        for writer in writers.values():
            writer.flush()
    work.finish(
        f"shards-{chunk.number:05}", {name: writer.entry() for name, writer in writers.items()}
    )


class ShardWriter:
    """Writes the documents of one shard, each as EOS and its tokens."""

    def __init__(self, file: BinaryIO, path: epath.Path, tokenizer: Tokenizer):
        self._file, self._path, self._tokenizer = file, path, tokenizer
        self._dtype = dtype_of(tokenizer)
        self._eos_id = np.uint32(tokenizer.eos_id)
        self._digest = hashlib.sha256()
        self._texts: list[str] = []
        self._characters = self._documents = self._tokens = self._bytes = 0

    def add(self, text: str) -> None:
        """Appends a document, to be encoded and written in a batch."""
        self._texts.append(text)
        self._characters += len(text)
        if self._characters >= CHUNK_CHARACTERS:
            self.flush()

    def flush(self) -> None:
        """Encodes and writes the pending documents."""
        for text, ids in zip(self._texts, self._tokenizer.encode_batch(self._texts), strict=True):
            content = np.append(self._eos_id, ids).astype(self._dtype).tobytes()
            self._file.write(content)
            self._digest.update(content)
            self._documents += 1
            self._tokens += 1 + len(ids)
            self._bytes += len(text.encode())
        self._texts, self._characters = [], 0

    def entry(self) -> dict[str, Any]:
        """The shard's entry in the index; its file must be closed."""
        with self._path.open("rb") as file:
            blocks = shards.block_digest(file, self._dtype, self._tokens)
        return {
            "name": self._path.name,
            "documents": self._documents,
            "tokens": self._tokens,
            "bytes": self._bytes,
            "sha256": self._digest.hexdigest(),
            "blocks": blocks,
        }


def dtype_of(tokenizer: Tokenizer) -> np.dtype:
    """The dtype in which a tokenizer's ids are stored: uint16 or uint32, little-endian."""
    return np.dtype("<u2" if tokenizer.size <= 1 << 16 else "<u4")
