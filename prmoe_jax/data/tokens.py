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
from prmoe_jax.data import cache, shards, split, streams, template
from prmoe_jax.data.chat import Chat
from prmoe_jax.data.chunks import Chunk
from prmoe_jax.data.corpora import Corpus
from prmoe_jax.data.shards import Index
from prmoe_jax.data.split import Selection
from prmoe_jax.data.stages import Run, Work, in_this_process
from prmoe_jax.data.streams import Source
from prmoe_jax.data.template import ChatTemplate
from prmoe_jax.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)

# Documents are encoded and written in batches of about this many characters.
CHUNK_CHARACTERS = 1 << 20


def cached_tokens(
    config: DataConfig,
    corpus: Corpus,
    tokenizer: Tokenizer,
    chat_template: ChatTemplate | None = None,
) -> Source:
    """The tokens of a corpus, from the cache or computed by this process."""
    # Caches of earlier versions, without shards, have other keys.
    also = [chat_template.fingerprint] if chat_template else []
    key = cache.fingerprint("shards", corpus.fingerprint, tokenizer.fingerprint, *also)
    directory = cache.root(config) / "tokens" / key

    def build(temporary: pathlib.Path) -> None:
        parts, selection = corpus.chunks, corpus.selection
        log.info("tokenising %s in %d chunks", config.corpus, len(parts))
        with in_this_process(temporary, config, len(parts)) as (work, run):
            save_tokenizer(work, tokenizer, chat_template)
            index = write_shards(work, parts, selection, tokenizer, corpus.fingerprint, run)
            work.save(work.folder / shards.INDEX, index)

    cache.build_once(directory, build)
    with cache.reading(directory):
        return streams.of_index(Index.open(directory), tokenizer)


def save_tokenizer(work: Work, tokenizer: Tokenizer, chat_template: ChatTemplate | None) -> None:
    """Writes the tokenizer and the template that `write` uses."""
    for name, text in (chat_template.files if chat_template else {}).items():
        work.save(work.folder / name, text.encode())
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
    known = tokenizer.fingerprint, tokenizer.size
    content = shards.index_content(*known, splits, inputs, marked=selection.chats > 0)
    return json.dumps(content, indent=1).encode() + b"\n"


def write(work: Work, chunk: Chunk, selection: Selection) -> None:
    """Writes a chunk's shards, one for each split in which it has documents."""
    path, marked = work.folder / shards.TOKENIZER, selection.chats > 0
    tokenizer, chat_template = Tokenizer.load(path), template.find(path) if marked else None
    writers: dict[str, _ShardWriter] = {}
    with contextlib.ExitStack() as stack:
        for batch in _batches(split.kept(work, chunk, selection)):
            found = _encoded([text for _, text in batch], tokenizer, chat_template)
            for (name, _), (tokens, size) in zip(batch, found, strict=True):
                if name not in writers:
                    path = work.folder / f"{name}-{chunk.number:05}{shards.SUFFIX}"
                    file = stack.enter_context(work.written(path))
                    dtype = shards.smallest_dtype(tokenizer.size, marked)
                    writers[name] = _ShardWriter(file, path, dtype)
                writers[name].add(tokens, size)
    entries = {name: writer.entry() for name, writer in writers.items()}
    work.finish(f"shards-{chunk.number:05}", entries)


def _encoded(
    texts: Sequence[str], tokenizer: Tokenizer, chat_template: ChatTemplate | None
) -> Iterator[tuple[np.ndarray, int]]:
    """Each document's tokens after EOS, and the UTF-8 bytes of its text that carries loss."""
    plain = [text for text in texts if not isinstance(text, Chat)]
    encoded, eos_id = iter(tokenizer.encode_batch(plain)), tokenizer.eos_id
    for text in texts:
        if isinstance(text, Chat):
            found = template.encode(text, tokenizer, chat_template)
            yield shards.document(found.ids, eos_id, found.loss, found.apart), found.text_bytes
        else:
            yield np.append(np.uint32(eos_id), next(encoded)), len(text.encode())


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

    def __init__(self, file: BinaryIO, path: epath.Path, dtype: np.dtype):
        self._file, self._path, self._dtype = file, path, dtype
        self._digest = hashlib.sha256()
        self._counts = dict.fromkeys(shards.COUNTS, 0)

    def add(self, tokens: np.ndarray, text_bytes: int) -> None:
        """Appends a document."""
        content = tokens.astype(self._dtype).tobytes()
        self._file.write(content)
        self._digest.update(content)
        for name, count in zip(shards.COUNTS, (1, len(tokens), text_bytes), strict=True):
            self._counts[name] += count

    def entry(self) -> dict[str, Any]:
        """The shard's entry in the index; its file must be closed."""
        blocks = shards.Shard(self._path, self._dtype, 0, self._counts["tokens"]).digest()
        digests = {"sha256": self._digest.hexdigest(), "blocks": blocks}
        return {"name": self._path.name} | self._counts | digests
