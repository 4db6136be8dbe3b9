"""The token cache: each split is tokenised once, and kept as one memory-mapped stream."""

import dataclasses
import json
import logging
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import tqdm

from prmoe_jax import files
from prmoe_jax.config.schema import DataConfig
from prmoe_jax.data import cache
from prmoe_jax.data.arrays import ArrayWriter, open_array
from prmoe_jax.data.corpora import Corpus
from prmoe_jax.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)

# Documents are encoded and written in batches of about so many characters.
CHUNK_CHARACTERS = 1 << 20


@dataclasses.dataclass(frozen=True)
class TokenCache:
    """A stream of T tokens: every document is an end-of-text mark followed by its tokens.

    The mark starts a document and ends the one before it; a last mark ends the stream. Predicting
    each token from those before it therefore predicts every token of the text and the end of
    every document exactly once.
    """

    tokens_T: np.ndarray  # uint16 or uint32
    starts_N: np.ndarray  # int64, the position in the stream where each of the N documents begins
    bytes: int  # size of the text in UTF-8
    fingerprint: str

    def __len__(self) -> int:
        return len(self.tokens_T)

    @property
    def described(self) -> str:
        """The size, for messages."""
        return f"{len(self.starts_N)} documents and {len(self)} tokens"

    def read(self, first: int, last: int) -> np.ndarray:
        """The tokens `first` to `last`, fewer at the end of the stream."""
        return self.tokens_T[first:last]

    def documents(self, first: int, tokens_T: np.ndarray) -> np.ndarray:
        """For each token that was read at `first`: how many documents began since the first one."""
        positions = np.arange(first, first + len(tokens_T))
        documents = np.searchsorted(self.starts_N, positions, side="right")
        return documents - documents[:1]

    @classmethod
    def open(cls, directory: pathlib.Path, tokenizer: Tokenizer) -> "TokenCache":
        """Maps the files of a finished cache of this tokenizer; reads no token yet.

        Raises:
          UserError: a file is missing or damaged.
        """
        with cache.reading(directory):
            meta = files.parse_json(files.read(directory / "meta.json"))
            if type(meta["bytes"]) is not int or type(meta["fingerprint"]) is not str:
                raise ValueError("meta.json is not as it was written")
            dtype = dtype_of(tokenizer)
            return cls(
                tokens_T=open_array(directory / "tokens.npy", dtype, (meta["tokens"],)),
                starts_N=open_array(directory / "starts.npy", np.int64, (meta["documents"],)),
                bytes=meta["bytes"],
                fingerprint=meta["fingerprint"],
            )


def cached_tokens(
    config: DataConfig,
    corpus: Corpus,
    split: Literal["train", "validation"],
    tokenizer: Tokenizer,
) -> TokenCache:
    """The tokens of one split, read from the cache or computed and cached.

    Raises:
      UserError: the corpus cannot be prepared, or the cache cannot be written.
    """
    fingerprint = cache.fingerprint(corpus.fingerprint, split, tokenizer.fingerprint)
    directory = cache.root(config) / "tokens" / fingerprint

    def build(temporary: pathlib.Path) -> None:
        documents = getattr(corpus, split)
        log.info("tokenising %d %s documents of %s", len(documents), split, config.corpus)
        meta = _write(documents, tokenizer, temporary, description=f"tokenising {split}")
        meta["fingerprint"] = fingerprint
        (temporary / "meta.json").write_text(json.dumps(meta))
        log.info("%s: %s", split, meta)

    return TokenCache.open(cache.build_once(directory, build), tokenizer)


def _write(
    documents: Sequence[str], tokenizer: Tokenizer, directory: pathlib.Path, description: str
) -> dict[str, int]:
    size = 0
    with (
        ArrayWriter(directory / "tokens.npy", dtype_of(tokenizer)) as tokens,
        ArrayWriter(directory / "starts.npy", np.int64) as starts,
        tqdm.tqdm(
            total=len(documents), desc=description, unit="doc", disable=not sys.stderr.isatty()
        ) as progress,
    ):
        for texts in _chunks(documents):
            for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
                starts.append([tokens.rows])
                tokens.append([tokenizer.end_of_text])
                tokens.append(ids)
                size += len(text.encode())
            progress.update(len(texts))
        tokens.append([tokenizer.end_of_text])
        return {"documents": starts.rows, "tokens": tokens.rows, "bytes": size}


def dtype_of(tokenizer: Tokenizer) -> np.dtype:
    """The type in which a tokenizer's ids are stored: uint16 or uint32, little-endian."""
    return np.dtype("<u2" if tokenizer.size <= 1 << 16 else "<u4")


def _chunks(documents: Sequence[str]) -> Iterator[list[str]]:
    chunk, characters = [], 0
    for text in documents:
        chunk.append(text)
        characters += len(text)
        if characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk
