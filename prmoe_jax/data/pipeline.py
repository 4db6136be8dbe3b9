"""From a corpus to batches: windows of fixed length over the tokens, and Grain's iterator.

Axes of this file: N windows, K tokens that a teacher predicts at a position.
"""

import bisect
import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path

import grain
import jax
import numpy as np

from prmoe_jax.config.schema import DataConfig
from prmoe_jax.data import cache, shards, streams, template
from prmoe_jax.data.corpora import TOKENS, open_corpus
from prmoe_jax.data.streams import ShardStream
from prmoe_jax.data.template import ChatTemplate
from prmoe_jax.data.tokenizer import Tokenizer, check_fits, load_tokenizer
from prmoe_jax.data.tokens import cached_tokens
from prmoe_jax.errors import UserError
from prmoe_jax.model.batch import Batch, TopKLogProbs
from prmoe_jax.stores import expand

_DTYPES = np.int32, np.int32, np.bool_, np.int32


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """A token stream as a random-access source of windows of `length` predictions.

    Window i reads stream[i*length : (i+1)*length + 1]; only the last one is padded. The stream has
    one EOS between documents. If the tokenizer's BOS and EOS differ, EOS stays as a target and
    becomes BOS as an input.
    """

    stream: ShardStream
    length: int
    cross_document_attention: bool  # all tokens of a window are one segment
    teacher_top_k: TopKLogProbs | None = None  # a teacher's recorded predictions for all windows
    tokenizer: Tokenizer | None = None
    text_bytes: int = 0  # UTF-8 bytes of the stream's text, 0 if unknown

    @property
    def tokens(self) -> int:
        """The number of predictions in all windows together."""
        return len(self.stream) - 1

    def __len__(self) -> int:
        return math.ceil(self.tokens / self.length)

    def bytes_of(self, indices_N: np.ndarray) -> float:
        """The UTF-8 bytes of these windows, estimated from their share of the tokens."""
        tokens = np.minimum(self.length, self.tokens - indices_N * self.length).sum()
        return float(self.text_bytes * (tokens / max(self.tokens, 1)))

    def documents(self) -> np.ndarray:
        """For each place of all windows, one after the other, the number of its document.

        Documents count from 0. A document's end is its own, padding is the last document's, and a
        place without a target is the document's that ends before it or begins at it.
        """
        tokens = self.stream.read(0, self.tokens)
        padding = len(self) * self.length - len(tokens)
        return np.pad(self.stream.documents(0, tokens), (0, padding), "edge")

    def __getitem__(self, index: int) -> Batch:
        """Window `index` as a Batch of arrays of shape L."""
        index = range(len(self))[operator.index(index)]
        first = index * self.length
        tokens = self.stream.read(first, first + self.length + 1).astype(np.int64)
        ids, real = tokens & shards.ID, len(tokens) - 1
        window = Batch(*(np.zeros(self.length, dtype) for dtype in _DTYPES))
        window.tokens_BxL[:real] = ids[:-1]
        window.targets_BxL[:real] = ids[1:]
        window.mask_BxL[:real] = tokens[:-1] < shards.SILENT
        window.segments_BxL[:real] = 1
        if not self.cross_document_attention:
            documents = self.stream.documents(first, tokens[:-1])
            window.segments_BxL[:real] += documents.astype(np.int32)
        if self.tokenizer:
            self._start_documents(window, tokens[:-1])
        return _with_teacher(window, self.teacher_top_k, index)

    def _start_documents(self, window: Batch, tokens: np.ndarray) -> None:
        """Makes each document begin with BOS, in place.

        If a document has a start of its own, the EOS before it is masked instead: after a chat
        template, or where BOS already follows EOS, as in shards of other libraries.
        """
        start, end = self.tokenizer.bos_id, self.tokenizer.eos_id
        begins_L, apart_L = np.zeros((2, self.length), bool)
        begins_L[: len(tokens)] = shards.begins(tokens, end)
        apart_L[: len(tokens)] = tokens & shards.APART != 0
        if start != end:
            apart_L |= begins_L & (window.targets_BxL == start)
            window.tokens_BxL[begins_L & ~apart_L] = start
        window.mask_BxL[apart_L] = False
        if not self.cross_document_attention:
            window.segments_BxL[apart_L] = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
    """The windows of several token streams, concatenated, with the interface of `Windows`.

    `shares` holds each stream's share of the training windows that `train_iterator` draws.
    """

    parts: Sequence[Windows]
    shares: Sequence[Decimal]
    teacher_top_k: TopKLogProbs | None = None

    @functools.cached_property
    def starts(self) -> list[int]:
        """The index of each part's first window, and the number of all windows."""
        return [0, *itertools.accumulate(map(len, self.parts))]

    @property
    def length(self) -> int:
        return self.parts[0].length

    @property
    def cross_document_attention(self) -> bool:
        return self.parts[0].cross_document_attention

    @property
    def tokens(self) -> int:
        return sum(part.tokens for part in self.parts)

    @property
    def text_bytes(self) -> int:
        return sum(part.text_bytes for part in self.parts)

    def bytes_of(self, indices_N: np.ndarray) -> float:
        part_N = np.searchsorted(self.starts, indices_N, side="right") - 1
        parts = enumerate(zip(self.parts, self.starts, strict=False))
        return sum(part.bytes_of(indices_N[part_N == i] - start) for i, (part, start) in parts)

    def documents(self) -> np.ndarray:
        """As of `Windows`; documents of a later part count on from those of the part before."""
        found: list[np.ndarray] = []
        for part in filter(len, self.parts):
            found.append(part.documents() + (found[-1][-1] + 1 if found else 0))
        return np.concatenate(found)

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> Batch:
        index = range(len(self))[operator.index(index)]
        i = bisect.bisect_right(self.starts, index) - 1
        return _with_teacher(self.parts[i][index - self.starts[i]], self.teacher_top_k, index)


def _with_teacher(window: Batch, teacher_top_k: TopKLogProbs | None, index: int) -> Batch:
    if teacher_top_k is None:
        return window
    tokens_LxK, log_p_LxK = (part[index] for part in teacher_top_k)
    return window._replace(teacher_top_k=TopKLogProbs(tokens_LxK.astype(np.int32), log_p_LxK))


@dataclasses.dataclass(frozen=True)
class Data:
    """A run's tokenizer and its windows of text."""

    tokenizer: Tokenizer
    train: Windows | Mixture
    validation: Windows | Mixture
    corpus_fingerprint: str
    teacher_cache_fingerprint: str | None = None  # identifies a teacher's recorded predictions
    chat_template: ChatTemplate | None = None  # of text that has chats


def load_data(
    config: DataConfig, vocab_size: int, length: int, tokenizer_path: Path | None = None
) -> Data:
    """Loads corpus, tokenizer and windows of `length` tokens, from the caches if possible.

    `tokenizer_path` is the stored tokenizer of a run that is resumed or evaluated. Chats are
    encoded by the template beside the tokenizer.
    """
    fingerprint, chat_template = None, None  # then the streams identify the corpus
    if config.corpus.startswith(TOKENS):
        tokenizer, sources = streams.open_sources(config, vocab_size, tokenizer_path)
    else:
        corpus = open_corpus(config)
        fingerprint = corpus.fingerprint
        if tokenizer_path is None:
            tokenizer = load_tokenizer(config, vocab_size, corpus)
        else:
            tokenizer = Tokenizer.load(tokenizer_path)
            check_fits(tokenizer, vocab_size)
        if corpus.selection.chats:
            chat_template = template.find(tokenizer_path or expand("tokenizer", config.tokenizer))
        sources = [cached_tokens(config, corpus, tokenizer, chat_template)]

    identity, splits = [], {}
    for name in ("train", "validation"):
        having = [source for source in sources if getattr(source, name)]
        found = [
            Windows(
                *(getattr(source, name), length, config.cross_document_attention),
                tokenizer=tokenizer,
                text_bytes=source.validation_bytes if name == "validation" else 0,
            )
            for source in having
        ]
        shares = [source.weight or Decimal(1) for source in having]
        weights = [str(share.normalize()) for share in shares] if name == "train" else []
        identity.append([[part.stream.fingerprint for part in found], weights])
        splits[name] = found[0] if len(found) == 1 else Mixture(found, shares)
    fingerprint = fingerprint or cache.fingerprint("tokens", identity)
    found = tokenizer, splits["train"], splits["validation"], fingerprint
    return Data(*found, chat_template=chat_template)


def windows_fingerprint(data: Data) -> dict[str, str | int]:
    """All values that determine the content of window i of the training split."""
    found = {
        "corpus": data.corpus_fingerprint,
        "tokenizer": data.tokenizer.fingerprint,
        "length": data.train.length,
        "cross_document_attention": int(data.train.cross_document_attention),
        "windows": len(data.train),
    }
    if data.tokenizer.bos_id != data.tokenizer.eos_id:
        found["start_of_text"] = data.tokenizer.bos_id
    if data.chat_template:
        found["chat_template"] = data.chat_template.fingerprint
    return found


def fingerprint_changes(saved: dict, current: dict) -> str:
    """Names the values of a fingerprint that differ from saved ones; '' if none does."""
    return ", ".join(
        f"{name} was {saved.get(name)}, is {value}"
        for name, value in current.items()
        if saved.get(name) != value
    )


def pipeline_fingerprint(data: Data, batch_size: int, seed: int) -> dict[str, str | int]:
    """All values that determine the rows of step i; compare them before restoring an iterator.

    An iterator's state is only the number of the next step. If one of these values changed, this
    step would have other rows. The numbers of processes and devices do not matter.
    """
    found = windows_fingerprint(data) | {"batch_size": batch_size, "seed": seed}
    if data.teacher_cache_fingerprint:
        found["lessons"] = data.teacher_cache_fingerprint  # the key in existing checkpoints
    return found


def train_iterator(
    windows: Windows | Mixture, batch_size: int, seed: int, rows: Sequence[int] | None = None
) -> grain.DatasetIterator:
    """Iterates for ever over shuffled batches, as Batch.

    Every epoch has its own order, and a batch can hold the end of one epoch and the start of the
    next. `get_state()` is the next step, the same on every process. Each source of a mixture has
    its own epochs. After any number of rows it has given its share of them, rounded down or up.

    Args:
      windows: the training split.
      batch_size: rows of a step on all processes together.
      seed: the seed of the order.
      rows: the rows of each batch that this process needs (`axes.local_rows`); all by default.
    """
    mixture = windows if isinstance(windows, Mixture) else Mixture([windows], [Decimal(1)])
    for part in mixture.parts:
        if not len(part):
            raise UserError(
                f"the training split has {len(part.stream)} tokens, which make 0 windows of "
                f"{part.length}"
            )
    rows = range(batch_size) if rows is None else rows
    source = _Rows(mixture, batch_size, rows, seed)
    dataset = grain.MapDataset.source(source).batch(len(rows))
    # Threads, not processes: memory maps are cheap to read, and threads work in notebooks.
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)))


def evaluated_windows(windows: Windows | Mixture, limit: int = 0) -> np.ndarray:
    """The indices of all windows, or of `limit` of them, in the order of evaluation.

    With a limit these are the first windows of a single stream. In a mixture they are evenly
    spaced, so that each stream takes part in proportion to its size.
    """
    count = len(windows)
    part = min(limit, count) if limit else count
    return np.arange(part) * count // part if isinstance(windows, Mixture) else np.arange(part)


def eval_batches(
    windows: Windows | Mixture, batch_size: int, limit: int = 0, rows: Sequence[int] | None = None
) -> Iterator[Batch]:
    """Yields the `evaluated_windows` in batches: all, or `limit` batches.

    All batches have the same number of rows; rows beyond the last window are masked. `rows` is as
    in `train_iterator`.
    """
    rows = range(batch_size) if rows is None else rows
    indices = evaluated_windows(windows, limit * batch_size)
    padding = jax.tree.map(np.zeros_like, windows[0]) if len(windows) else None
    for start in range(0, len(indices), batch_size):
        offsets = (start + row for row in rows)
        batch = [windows[indices[i]] if i < len(indices) else padding for i in offsets]
        yield jax.tree.map(lambda *field: np.stack(field), *batch)


class _Rows:
    """The given rows of every batch, batch by batch, endlessly, in the order of training.

    Each part of a mixture is shuffled and repeated alone; a periodic schedule interleaves them.
    """

    def __init__(self, mixture: Mixture, batch_size: int, rows: Sequence[int], seed: int):
        # Grain shuffles epoch e with seed + e: unhashed, seed 1 would begin with seed 0's epoch 1.
        seeds = map(int, np.random.SeedSequence(seed).generate_state(len(mixture.parts)))
        whole, ranges = grain.MapDataset.source(mixture), itertools.pairwise(mixture.starts)
        self._parts = [
            whole[start:end].shuffle(seed=part_seed).repeat()
            for (start, end), part_seed in zip(ranges, seeds, strict=True)
        ]
        self._schedule = streams.schedule(mixture.shares)
        draws = self._schedule[:, None] == np.arange(len(self._parts))
        self._per_period = draws.sum(0)
        self._drawn = draws.cumsum(0) - draws  # earlier draws of each part in the period
        self._batch_size, self._rows = batch_size, rows

    def __len__(self) -> int:
        # Endless in practice, but far below 2**63: Grain computes with the length as a float.
        return (1 << 40) * len(self._rows)

    def __getitem__(self, index: int) -> Batch:
        step, row = divmod(index, len(self._rows))
        window = step * self._batch_size + self._rows[row]
        period, offset = divmod(window, len(self._schedule))
        i = self._schedule[offset]
        return self._parts[i][int(period * self._per_period[i] + self._drawn[offset, i])]
