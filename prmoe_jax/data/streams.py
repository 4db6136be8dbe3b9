"""The corpus 'tokens:…': tokenised shards as streams of tokens, alone or mixed."""

import bisect
import dataclasses
import glob
import itertools
import json
import math
import re
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path

import numpy as np

from prmoe_jax import files, stores
from prmoe_jax.config.schema import DataConfig
from prmoe_jax.data import cache, copies, shards, tokenizer
from prmoe_jax.data.corpora import TOKENS
from prmoe_jax.data.shards import Index, Shard
from prmoe_jax.data.tokenizer import Tokenizer
from prmoe_jax.errors import UserError
from prmoe_jax.stores import expand

_VALIDATION = "validation:"
_WEIGHT = re.compile(r"(.+)\*(\d*\.\d+)")
_READ_TOKENS = 1 << 20
_DECODED_DOCUMENTS = 1000


@dataclasses.dataclass(frozen=True)
class Part:
    """One of the comma-separated parts of 'tokens:…'."""

    pattern: str
    weight: Decimal | None = None  # share of the training windows
    validation: bool = False  # a part that is only evaluated


class ShardStream:
    """Tokens [first, last) of concatenated shards: EOS before each document, and EOS at the end.

    Next-token prediction over the stream therefore covers every token of the text, and the end of
    every document, exactly once. `has_eos` says whether EOS is added before the first document and
    after the last, where the shards have none. `fingerprint` identifies the tokens. Only what is
    read is loaded, and checked against the vocabulary.
    """

    def __init__(
        self,
        parts: Sequence[Shard],
        tokenizer: Tokenizer,
        first: int,
        last: int,
        has_eos: tuple[bool, bool],
        fingerprint: str,
    ):
        self._shards = parts
        self._ends = list(itertools.accumulate(shard.tokens for shard in parts))
        self._first, self._last = first, last
        self._before, self._behind = map(int, has_eos)
        self._eos_id, self._vocabulary = tokenizer.eos_id, tokenizer.size
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return self._before + (self._last - self._first) + self._behind

    def read(self, first: int, last: int) -> np.ndarray:
        """Tokens [first, last) of the stream, with their marks; fewer at its end."""
        last = min(last, len(self))
        eos = np.array([self._eos_id])
        parts = [eos] if first < self._before else []
        shift = self._first - self._before
        parts += self._within(max(first + shift, self._first), min(last + shift, self._last))
        if self._behind and first < len(self) == last:
            parts.append(eos)
        return np.concatenate(parts) if parts else eos[:0]

    def documents(self, first: int, tokens_T: np.ndarray) -> np.ndarray:
        """For each token that `read` returned: how many documents began after the first token."""
        begins_T = shards.begins(tokens_T, self._eos_id)
        return np.cumsum(begins_T) - begins_T[:1]

    def _within(self, first: int, last: int) -> Iterator[np.ndarray]:
        """Tokens [first, last) of the shards, one array per shard."""
        i = bisect.bisect_right(self._ends, first)
        while first < last:
            shard = self._shards[i]
            start = self._ends[i] - shard.tokens
            ids = shard.ids_T[first - start : min(last - start, shard.tokens)]
            shards.check_ids(shard, first - start, ids, self._vocabulary)
            yield ids
            first, i = first + len(ids), i + 1


@dataclasses.dataclass(frozen=True)
class Source:
    """The training and validation streams of one part of the corpus; either may be None."""

    train: ShardStream | None
    validation: ShardStream | None
    validation_bytes: int  # UTF-8 bytes of the validation text
    weight: Decimal | None


def open_sources(
    config: DataConfig, vocab_size: int, tokenizer_path: str | None = None
) -> tuple[Tokenizer, list[Source]]:
    """The tokenizer of 'tokens:…', and a source for each part; arguments as in `load_data`."""
    parts = parse(config.corpus)
    found = [_find(part.pattern, config) for part in parts]
    indices = [index for index, _ in found if index]
    known = _tokenizer(config, vocab_size, indices, tokenizer_path)
    separate = any(part.validation for part in parts)
    sources = []
    for part, (index, paths) in zip(parts, found, strict=True):
        if index:
            sources.append(_ours(index, part, known, separate))
        else:
            sources.append(_foreign(paths, part, known, separate, config))
    return known, sources


def parse(corpus: str) -> list[Part]:
    """The parts of 'tokens:A', 'tokens:A*0.7,B*0.3' or 'tokens:A,validation:B'."""
    parts = []
    for text in corpus.removeprefix(TOKENS).split(","):
        pattern = text.strip().removeprefix(_VALIDATION)
        validation = pattern != text.strip()
        weighted = _WEIGHT.fullmatch(pattern)
        if not pattern or (weighted and validation):
            raise UserError(
                f"data.corpus={corpus}: {text!r} is not a part; give tokens:GLOB, "
                "tokens:GLOB*0.7,GLOB*0.3, and validation:GLOB without a share"
            )
        if weighted:
            parts.append(Part(weighted[1], Decimal(weighted[2])))
        else:
            parts.append(Part(pattern, None, validation))
    train = [part for part in parts if not part.validation]
    weights = [part.weight for part in train if part.weight is not None]
    if not train:
        raise UserError(f"data.corpus={corpus} has only validation; give a GLOB to train on")
    if not weights and len(train) == 1:
        return parts
    if len(weights) < len(train):
        raise UserError(
            f"data.corpus={corpus}: {len(weights)} of {len(train)} parts have a share; give "
            "each one its own, such as tokens:A*0.7,B*0.3"
        )
    wrong = any(weight != round(weight, 4) for weight in weights)
    if wrong or sum(weights) != 1 or not all(weights):
        raise UserError(
            f"data.corpus={corpus}: the shares are {', '.join(map(str, weights))}, in sum "
            f"{sum(weights)}; they must be above 0, of at most 4 decimals, and add up to 1"
        )
    return parts


def schedule(weights: Sequence[Decimal]) -> np.ndarray:
    """For each window of a period, the index of its source.

    Among the first n windows, for any n, each source has its share of n, rounded down or up. This
    is the earliest-deadline-first schedule of periodic tasks.
    """
    ratios = [weight.as_integer_ratio() for weight in weights]
    period = math.lcm(*(denominator for _, denominator in ratios))
    counts = [numerator * period // denominator for numerator, denominator in ratios]
    drawn, order = [0] * len(counts), []
    for n in range(period):
        ready = [i for i, count in enumerate(counts) if drawn[i] * period // count <= n]
        best = min(ready, key=lambda i: -(-(drawn[i] + 1) * period // counts[i]))
        drawn[best] += 1
        order.append(best)
    return np.array(order)


def _find(pattern: str, config: DataConfig) -> tuple[Index | None, list[Path]]:
    """What a glob matches: the index of our shards, or files of other libraries."""
    if stores.scheme(pattern):
        pattern = copies.local_copy(pattern, cache.root(config))
    path = expand("data.corpus", pattern)
    names = [path] if path.exists() else glob.glob(str(path), recursive=True)
    matched = sorted(map(Path, names))
    shards.check_whole(matched)
    folders = [path.parent if path.name == shards.INDEX else path for path in matched]
    ours = [path for path in folders if (path / shards.INDEX).exists()]
    files = [path for path in matched if path.is_file() and path.suffix != ".idx"]
    paths = [path for path in files if path.parent not in ours]
    if not (ours or paths):
        raise UserError(f"no token shards match {pattern!r}; give a folder or a glob of files")
    if ours and paths:
        raise UserError(f"{pattern!r} matches {ours[0]} and {paths[0]}; give two parts with shares")
    if len(ours) > 1:
        raise UserError(f"{pattern!r} matches {len(ours)} folders; give each one with its share")
    return Index.open(ours[0]) if ours else None, paths


def _tokenizer(
    config: DataConfig, vocab_size: int, indices: Sequence[Index], path: str | None
) -> Tokenizer:
    if path is not None:
        known, whose = Tokenizer.load(path), "this run's"
    elif config.tokenizer != "bpe":
        known = tokenizer.load_given(config)
        whose = f"data.tokenizer={config.tokenizer}"
    elif indices:
        stored = indices[0].folder / shards.TOKENIZER
        known, whose = Tokenizer.load(stored), str(stored)
    else:
        raise UserError(
            f"data.corpus={config.corpus} has tokens without a tokenizer; set data.tokenizer to "
            "'gpt2', 'bytes' or their tokenizer.json"
        )
    for index in indices:
        if index.tokenizer != known.fingerprint:
            fix = "write them again with this tokenizer"
            if whose.startswith("data."):
                fix = f"set --config.data.tokenizer={index.folder / shards.TOKENIZER}"
            raise UserError(
                f"the shards in {index.folder} have the tokenizer {index.tokenizer}, not "
                f"{known.fingerprint} ({whose}); {fix}"
            )
    tokenizer.check_fits(known, vocab_size)
    return known


def of_index(index: Index, known: Tokenizer) -> Source:
    """The source of both splits of our shards."""

    def stream(split: shards.Split) -> ShardStream:
        name = cache.fingerprint(index.fingerprint, split)
        total = index.splits[split]["tokens"]
        return ShardStream(index.shards(split), known, 0, total, (False, True), name)

    size = index.splits["validation"]["bytes"]
    return Source(stream("train"), stream("validation"), size, None)


def _ours(index: Index, part: Part, known: Tokenizer, separate: bool) -> Source:
    found = dataclasses.replace(of_index(index, known), weight=part.weight)
    if part.validation:
        return dataclasses.replace(found, train=None)
    if separate:
        return dataclasses.replace(found, validation=None, validation_bytes=0)
    return found


def _foreign(
    paths: Sequence[Path], part: Part, known: Tokenizer, separate: bool, config: DataConfig
) -> Source:
    found = [shards.open_array(path, known.size) for path in paths]
    for shard in found:
        for block in shard.blocks():
            shards.check_ids(shard, block.start, shard.ids_T[block], known.size)
    shards.check_ends(found, known.eos_id)
    content = [[shard.tokens, shard.dtype.str, shard.digest()] for shard in found]
    total = sum(shard.tokens for shard in found)
    plain = ShardStream(found, known, 0, total, (False, False), "")

    def stream(first: int, last: int) -> ShardStream:
        name = cache.fingerprint("arrays", content, known.fingerprint, first, last)
        ends = plain.read(first, first + 1)[0], plain.read(last - 1, last)[0]
        has_eos = bool(ends[0] != known.eos_id), bool(ends[1] != known.eos_id)
        return ShardStream(found, known, first, last, has_eos, name)

    if part.validation:
        cut = 0
    else:
        cut = total if separate else _cut(plain, known.eos_id, config, paths[0])
    train = stream(0, cut) if cut else None
    validation = stream(cut, total) if cut < total else None
    size = _text_bytes(validation, known, config) if validation else 0
    return Source(train, validation, size, part.weight)


def _cut(plain: ShardStream, eos_id: int, config: DataConfig, path: Path) -> int:
    """Where the first document begins in the last `validation_fraction` of the shards' tokens."""
    fraction, last = config.validation_fraction, len(plain) - 1
    ahead = int(plain.read(0, 1)[0] != eos_id)  # 1 if EOS ends documents, 0 if it begins them
    start = max(math.floor((1 - fraction) * len(plain)), 1) - ahead
    for first in range(start, last, _READ_TOKENS):  # an EOS at the very end starts no document
        tokens = plain.read(first, min(first + _READ_TOKENS, last))
        if (tokens == eos_id).any():
            return first + int(np.argmax(tokens == eos_id)) + ahead
    raise UserError(
        f"the last {fraction:.2%} of {path} and the files with it hold no start of a document; "
        "raise data.validation_fraction, or name validation shards: tokens:…,validation:GLOB"
    )


def _text_bytes(stream: ShardStream, known: Tokenizer, config: DataConfig) -> int:
    """The number of UTF-8 bytes of a stream's text, computed once and cached."""
    special = list({known.eos_id, known.bos_id})
    also = ["without BOS and EOS"] if len(special) > 1 else []
    key = cache.fingerprint("bytes", stream.fingerprint, known.fingerprint, *also)

    def build(temporary: Path) -> None:
        texts = (ids[~np.isin(ids, special)] for ids in _documents(stream, known.eos_id))
        size = 0
        while batch := list(itertools.islice(texts, _DECODED_DOCUMENTS)):
            size += sum(len(text.encode()) for text in known.decode_batch(batch))
        (temporary / "bytes.json").write_text(json.dumps(size))

    folder = cache.build_once(cache.root(config) / "tokens" / key, build)
    with cache.reading(folder):
        return int(files.parse_json(files.read(folder / "bytes.json")))


def _documents(stream: ShardStream, end: int) -> Iterator[np.ndarray]:
    """Splits a stream before each EOS."""
    rest: list[np.ndarray] = []
    for first in range(0, len(stream), _READ_TOKENS):
        tokens = stream.read(first, first + _READ_TOKENS)
        *ended, last = np.split(tokens, np.flatnonzero(tokens == end))
        for piece in ended:
            yield np.concatenate([*rest, piece])
            rest = []
        rest.append(last)
    yield np.concatenate(rest)
