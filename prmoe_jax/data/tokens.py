"""The token cache: a split's documents as one memory-mapped stream, tokenised once."""

import dataclasses
import json
import logging
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import tqdm

from prmoe_jax.config import DataConfig
from prmoe_jax.data import cache
from prmoe_jax.data.corpora import Corpus
from prmoe_jax.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)

# Enough text for the tokenizer's threads, little enough for memory.
_CHUNK_CHARACTERS = 1 << 20


@dataclasses.dataclass(frozen=True)
class TokenCache:
    """A stream of T tokens: every document is its end-of-text mark followed by its tokens.

    The mark starts a document and so ends the one before; a last mark ends the stream.
    Predicting each token from those before it thus predicts every token of the text and
    every document's end exactly once.
    """

    tokens_T: np.ndarray  # uint16 or uint32
    starts_N: np.ndarray  # int64, where in the stream each of the N documents begins
    bytes: int  # of the text in UTF-8
    fingerprint: str

    @classmethod
    def open(cls, directory: pathlib.Path) -> "TokenCache":
        """Maps the files of a finished cache; nothing is read yet."""
        meta = json.loads((directory / "meta.json").read_text())
        return cls(
            tokens_T=np.load(directory / "tokens.npy", mmap_mode="r"),
            starts_N=np.load(directory / "starts.npy", mmap_mode="r"),
            bytes=meta["bytes"],
            fingerprint=meta["fingerprint"],
        )


def tokenise(
    config: DataConfig,
    corpus: Corpus,
    split: Literal["train", "validation"],
    tokenizer: Tokenizer,
) -> TokenCache:
    """The tokens of one split, from the cache or else computed and cached.

    Raises:
      UserError: the corpus cannot be prepared, or the cache cannot be written.
    """
    fingerprint = cache.fingerprint(corpus.fingerprint, split, tokenizer.fingerprint)
    directory = pathlib.Path(config.cache_dir).expanduser() / "tokens" / fingerprint

    def build(temporary: pathlib.Path) -> None:
        documents = getattr(corpus, split)
        log.info("tokenising %d %s documents of %s", len(documents), split, config.corpus)
        meta = _write(documents, tokenizer, temporary, description=f"tokenising {split}")
        meta["fingerprint"] = fingerprint
        (temporary / "meta.json").write_text(json.dumps(meta))
        log.info("%s: %s", split, meta)

    return TokenCache.open(cache.build_once(directory, build))


def _write(
    documents: Sequence[str], tokenizer: Tokenizer, directory: pathlib.Path, description: str
) -> dict[str, int]:
    dtype = np.uint16 if tokenizer.size <= 1 << 16 else np.uint32
    size = 0
    with (
        _NpyWriter(directory / "tokens.npy", dtype) as tokens,
        _NpyWriter(directory / "starts.npy", np.int64) as starts,
        tqdm.tqdm(
            total=len(documents), desc=description, unit="doc", disable=not sys.stderr.isatty()
        ) as progress,
    ):
        for texts in _chunks(documents):
            for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
                starts.append([tokens.length])
                tokens.append([tokenizer.end_of_text, *ids])
                size += len(text.encode())
            progress.update(len(texts))
        tokens.append([tokenizer.end_of_text])
        return {"documents": starts.length, "tokens": tokens.length, "bytes": size}


def _chunks(documents: Sequence[str]) -> Iterator[list[str]]:
    chunk, characters = [], 0
    for text in documents:
        chunk.append(text)
        characters += len(text)
        if characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


class _NpyWriter:
    """Writes a one-dimensional .npy file whose length is known only at the end."""

    def __init__(self, path: pathlib.Path, dtype: type):
        self._file = open(path, "wb")
        self._dtype = np.dtype(dtype)
        self.length = 0
        self._write_header()

    def append(self, values: list[int]) -> None:
        self._file.write(np.asarray(values, self._dtype).tobytes())
        self.length += len(values)

    def _write_header(self) -> None:
        # NumPy pads the header so that a longer first axis still fits in its place.
        description = np.lib.format.dtype_to_descr(self._dtype)
        header = {"descr": description, "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self._file, header)

    def __enter__(self) -> "_NpyWriter":
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        with self._file:
            if error_type is None:
                self._file.seek(0)
                self._write_header()
