"""Writes text as shards: the stage `write`, and the shards of a corpus in the cache."""

import contextlib
import hashlib
import json
import logging
import pathlib
from collections.abc import Iterable, Iterator, Sequence
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
            index = write_shards(work, parts, selection, tokenizer, corpus.fingerprint, run)
            work.save(work.folder / shards.INDEX, index)

    cache.build_once(directory, build)
    with cache.reading(directory):
        return streams.of_index(Index.open(directory), tokenizer)


def save_tokenizer(work: Work, tokenizer: Tokenizer) -> None:
    """Writes the tokenizer that `write` uses."""
    work.save(work.folder / shards.TOKENIZER, tokenizer.description.encode())


def write_shards(
    work: Work,
    parts: Sequence[Chunk],
    selection: Selection,
    tokenizer: Tokenizer,
    inputs: str,
    run: Run,
) -> bytes:
    """Writes the shards of all chunks by the stage `write`; returns the content of their index.

    Call `save_tokenizer` first, and save the index last: it marks the shards as complete. `inputs`
    identifies the text and the settings.
    """
    results = run(write, {f"shards-{chunk.number:05}": (chunk, selection) for chunk in parts})
    splits = {}
    for name in shards.SPLITS:
        entries = [result[name] for result in results if name in result]
        splits[name] = {count: sum(entry[count] for entry in entries) for count in shards.COUNTS}
        splits[name]["shards"] = entries
    content = shards.index_content(tokenizer.fingerprint, tokenizer.size, splits, inputs)
    return json.dumps(content, indent=1).encode() + b"\n"


def write(work: Work, chunk: Chunk, selection: Selection) -> None:
    """Writes a chunk's shards, one for each split in which it has documents."""
    tokenizer = Tokenizer.load(work.folder / shards.TOKENIZER)
    writers: dict[str, _ShardWriter] = {}
    with contextlib.ExitStack() as stack:
        for batch in _batches(split.kept(work, chunk, selection)):
            encoded = tokenizer.encode_batch([text for _, text in batch])
            for (name, text), ids in zip(batch, encoded, strict=True):
                if name not in writers:
                    path = work.folder / f"{name}-{chunk.number:05}{shards.SUFFIX}"
                    file = stack.enter_context(work.written(path))
                    writers[name] = _ShardWriter(file, path, tokenizer)
                writers[name].add(text, ids)
    entries = {name: writer.entry() for name, writer in writers.items()}
    work.finish(f"shards-{chunk.number:05}", entries)


def _batches(documents: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Groups (split, text) pairs into batches of about `CHUNK_CHARACTERS`."""
    batch, characters = [], 0
    for name, text in documents:
        batch.append((name, text))
        characters += len(text)
        if characters >= CHUNK_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _ShardWriter:
    """Writes the documents of one shard, each as EOS and its tokens."""

    def __init__(self, file: BinaryIO, path: epath.Path, tokenizer: Tokenizer):
        self._file, self._path = file, path
        self._dtype = shards.smallest_dtype(tokenizer.size)
        self._eos_id = np.uint32(tokenizer.eos_id)
        self._digest = hashlib.sha256()
        self._counts = dict.fromkeys(shards.COUNTS, 0)

    def add(self, text: str, ids: np.ndarray) -> None:
        """Appends a document."""
        content = np.append(self._eos_id, ids).astype(self._dtype).tobytes()
        self._file.write(content)
        self._digest.update(content)
        for name, count in zip(shards.COUNTS, (1, 1 + len(ids), len(text.encode())), strict=True):
            self._counts[name] += count

    def entry(self) -> dict[str, Any]:
        """The shard's entry in the index; its file must be closed."""
        blocks = shards.Shard(self._path, self._dtype, 0, self._counts["tokens"]).digest()
        digests = {"sha256": self._digest.hexdigest(), "blocks": blocks}
        return {"name": self._path.name} | self._counts | digests
