"""Files of token ids: our shards, Megatron-LM's .bin/.idx pairs, .npy files and bare arrays."""

import dataclasses
import functools
import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from prmoe_jax import files
from prmoe_jax.data import cache
from prmoe_jax.data.arrays import read_header
from prmoe_jax.data.sources import reading
from prmoe_jax.errors import UserError, refusing

INDEX, TOKENIZER = "index.json", "tokenizer.json"
SUFFIX = ".tokens"  # of our shards
_FORMATS = "prmoe_jax tokens 1", "prmoe_jax tokens 2"  # without and with marks
_DTYPES = "<u2", "<u4"
SPLITS = "train", "validation"
COUNTS = "documents", "tokens", "bytes"  # of a split, and of each of its shards
_DIGESTS = "sha256", "blocks"
# Marks: bits beside an id, in uint32, in shards of text that has chats. A token is an id without
# marks, or with them.
SILENT = 1 << 31  # the next token carries no loss
INSIDE = 1 << 30  # an EOS that begins no document, such as the end of a turn
APART = 1 << 29  # an EOS before a document that brings a start of its own
ID = APART - 1
_MOST = 1 << 62
_FIX = "write the shards again by prmoe tokenize"
# A shard is identified by its size and the digest of some evenly spaced blocks, which are its whole
# content if it has at most 1 MiB.
_BLOCKS, _BLOCK_BYTES = 16, 1 << 16
_MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
_MEGATRON_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_CHECKED_ENDS = 1000  # of the documents of a .bin file
Split = Literal["train", "validation"]


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file that holds `tokens` ids of one dtype, from the byte `offset` on."""

    path: Path
    dtype: np.dtype
    offset: int
    tokens: int
    ends: Sequence[int] = ()  # after the last token of some documents, from an .idx file
    marked: bool = False  # whether there are marks beside the ids

    @functools.cached_property
    def ids_T(self) -> np.ndarray:
        """The ids, mapped into memory at the first use."""
        with reading(self.path):
            mapped = np.memmap(self.path, self.dtype, "r", self.offset, (self.tokens,))
        return np.asarray(mapped)  # slicing a np.memmap costs more than the read

    def blocks(self) -> list[slice]:
        """The slices of `ids_T` that `digest` reads: all, or `_BLOCKS` evenly spaced ones."""
        size = _BLOCK_BYTES // self.dtype.itemsize
        firsts: Iterable[int] = range(0, self.tokens, size)
        if self.tokens > _BLOCKS * size:
            firsts = [i * (self.tokens - size) // (_BLOCKS - 1) for i in range(_BLOCKS)]
        return [slice(first, min(first + size, self.tokens)) for first in firsts]

    def digest(self) -> str:
        """The SHA-256 of `blocks`; the file may be in an object store."""
        digest = hashlib.sha256()
        with reading(self.path), self.path.open("rb") as file:
            for block in self.blocks():
                file.seek(self.offset + block.start * self.dtype.itemsize)
                digest.update(file.read((block.stop - block.start) * self.dtype.itemsize))
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Index:
    """The `index.json` of a folder of our shards."""

    folder: Path
    tokenizer: str  # the tokenizer's fingerprint
    dtype: np.dtype
    splits: dict[str, dict]  # documents, tokens, bytes and shards of train and validation
    fingerprint: str
    inputs: Any  # identifies the text and the settings of `prmoe tokenize`
    marked: bool  # whether the shards have marks

    @classmethod
    def open(cls, folder: Path) -> "Index":
        """Reads and checks the index of a folder, which may be in an object store."""
        path = folder / INDEX
        content = files.read_json(path, fix=_FIX)
        kinds = {"format": str, "tokenizer": str, "vocabulary": int, "dtype": str, "splits": dict}
        files.require(content, kinds | {"fingerprint": str}, str(path), _FIX)
        marked = content["format"] == _FORMATS[True]
        for name, known in {"format": _FORMATS, "dtype": _DTYPES[marked:]}.items():
            if content[name] not in known:
                found = f"{name} is {content[name]!r:.60}, not {' or '.join(known)}"
                raise UserError(f"{path} is damaged: {found}; {_FIX}")
        _check_splits(content["splits"], str(path))
        if content["fingerprint"] != fingerprint(content):
            raise UserError(f"{path} is damaged: it is not as it was written; {_FIX}")
        return cls(
            *(folder, content["tokenizer"], np.dtype(content["dtype"])),
            *(content["splits"], content["fingerprint"], content.get("inputs"), marked),
        )

    def shards(self, split: Split) -> list[Shard]:
        """The shards of a split; checks the size and the block digest of each."""
        found = []
        for entry in self.splits[split]["shards"]:
            path, size = self.folder / entry["name"], entry["tokens"]
            shard = Shard(path, self.dtype, 0, size, marked=self.marked)
            with reading(shard.path):
                size = shard.path.stat().st_size
            expected = shard.tokens * self.dtype.itemsize
            if size != expected:
                raise UserError(
                    f"{shard.path} has {size} bytes, not the {expected} that {INDEX} says; {_FIX}"
                )
            if shard.digest() != entry["blocks"]:
                raise UserError(f"{shard.path} is not the shard that {INDEX} describes; {_FIX}")
            found.append(shard)
        return found


def _check_splits(splits: dict, path: str) -> None:
    """Checks the splits and shards of an index, since a stranger may have written it."""

    def check(part: Any, kinds: dict[str, type], where: str) -> None:
        files.require(part, kinds, where, _FIX)
        if unknown := part.keys() - kinds.keys():
            raise UserError(f"{where} is damaged: {min(unknown)!r:.60} is unknown; {_FIX}")

    counts, names = dict.fromkeys(COUNTS, int), set()
    kinds = {"name": str, **counts} | dict.fromkeys(_DIGESTS, str)
    check(splits, dict.fromkeys(SPLITS, dict), path)
    for split, where in ((splits[name], f"{path}: {name}") for name in SPLITS):
        check(split, counts | {"shards": list}, where)
        for entry in split["shards"]:
            check(entry, kinds, where)
            name = entry["name"]
            least = {"documents": 1, "tokens": 1, "bytes": 0}
            good = {count: least[count] <= entry[count] <= _MOST for count in COUNTS}
            good |= {digest: re.fullmatch("[0-9a-f]{64}", entry[digest]) for digest in _DIGESTS}
            good["name"] = files.is_plain(name) and name.endswith(SUFFIX) and name not in names
            for key in (key for key in good if not good[key]):
                raise UserError(f"{where} is damaged: {key} is {entry[key]!r:.60}; {_FIX}")
            names.add(name)
        for count in COUNTS:
            found = sum(entry[count] for entry in split["shards"])
            if split[count] != found:
                raise UserError(
                    f"{where} is damaged: {count} is {split[count]!r:.60}, and its shards have "
                    f"{found}; {_FIX}"
                )


def check_whole(paths: Iterable[Path]) -> None:
    """Refuses a single shard of ours, which needs its index, and a folder without an index."""
    for path in paths:
        if path.is_dir() and not (path / INDEX).exists():
            raise UserError(
                f"{path} has no {INDEX}; give a folder that prmoe tokenize has finished, or a glob "
                "of .bin or .npy files"
            )
        if path.suffix == SUFFIX:
            raise UserError(
                f"{path} is one of several shards; give their folder {path.parent}, whose "
                f"{INDEX} lists them"
            )


def index_content(
    tokenizer: str, vocabulary: int, splits: dict[str, dict], inputs: str, marked: bool = False
) -> dict:
    """The content of an `index.json`, for a tokenizer's fingerprint and its size.

    `inputs` identifies the text and the settings; `marked` says whether the shards have marks. A
    split has the numbers of its documents, tokens and bytes of text, and a list of shards in order.
    Each shard has a name, these three numbers, the SHA-256 of its file, and `blocks` (see
    `Shard.digest`).
    """
    content = {
        "format": _FORMATS[marked],
        "tokenizer": tokenizer,
        "vocabulary": vocabulary,
        "dtype": smallest_dtype(vocabulary, marked).str,
        "inputs": inputs,
        "splits": splits,
    }
    return content | {"fingerprint": fingerprint(content)}


def fingerprint(content: dict) -> str:
    """A digest of what determines an index's tokens: tokenizer, shards and splits."""
    names = "tokenizer", "vocabulary", "dtype", "splits"
    return cache.fingerprint(*(content[name] for name in names))


def open_array(path: Path, vocabulary: int) -> Shard:
    """Opens a token file that another library wrote.

    A `.bin` file with an `.idx` file of the same name is Megatron-LM's. A file with NumPy's magic
    bytes is read as `.npy`. Any other file is an array without a header, of `smallest_dtype`.
    """
    with reading(path):
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(6)
    if not size:
        raise UserError(f"{path} is empty; leave it out")
    if path.suffix == ".bin" and path.with_suffix(".idx").exists():
        return _open_megatron(path, size)
    if start == b"\x93NUMPY":
        return _open_npy(path)
    dtype = smallest_dtype(vocabulary)
    if size % dtype.itemsize:
        raise UserError(
            f"{path} has {size} bytes, no multiple of the {dtype.itemsize} of {dtype.name}; it is "
            "cut, or data.tokenizer is not its tokenizer"
        )
    return Shard(path, dtype, 0, size // dtype.itemsize)


def smallest_dtype(vocabulary: int, marked: bool = False) -> np.dtype:
    """The little-endian dtype of stored ids: uint16 or, for more ids or for marks, uint32."""
    return np.dtype(_DTYPES[marked or vocabulary > 1 << 16])


def document(ids: Sequence[int], eos_id: int, loss: Sequence[bool], apart: bool) -> np.ndarray:
    """A document with marks, after an EOS.

    `loss` says for each id, and for the document's end behind them, whether it carries loss;
    `apart`, whether the document brings a start of its own.
    """
    tokens = np.append(np.uint32(eos_id), np.asarray(ids, np.uint32))
    tokens[1:][tokens[1:] == eos_id] |= INSIDE
    tokens[0] |= APART * apart
    return tokens | np.where(loss, np.uint32(0), np.uint32(SILENT))


def begins(tokens_T: np.ndarray, eos_id: int) -> np.ndarray:
    """Whether a document begins at each token, as bool."""
    return tokens_T.astype(np.int64) & (ID | INSIDE) == eos_id


def _open_npy(path: Path) -> Shard:
    with reading(path), refusing(f"{path} is damaged", ValueError, fix="copy it again"):
        dtype, shape, offset = read_header(path)
    if len(shape) != 1 or dtype.kind not in "iu" or not shape[0]:
        raise UserError(f"{path} holds {dtype} {shape}, not a list of token ids")
    return Shard(path, dtype, offset, shape[0])


def _open_megatron(path: Path, size: int) -> Shard:
    """Opens a `.bin` file and checks it against its `.idx` file."""
    index = path.with_suffix(".idx")
    with reading(index):
        content = index.read_bytes()
    head = len(_MEGATRON_MAGIC) + 25
    if not content.startswith(_MEGATRON_MAGIC) or len(content) < head:
        raise UserError(f"{index} is no index of Megatron-LM: it doesn't start with MMIDIDX")
    fields = np.frombuffer(content, "<u8,u1,<u8,<u8", 1, len(_MEGATRON_MAGIC))[0]
    version, code, sequences, documents = map(int, fields)
    if version != 1 or code not in _MEGATRON_DTYPES:
        raise UserError(
            f"{index} has version {version} and dtype code {code}; version 1 and a code of "
            f"{', '.join(map(str, _MEGATRON_DTYPES))} can be read"
        )
    expected = head + 12 * sequences + 8 * documents
    if len(content) != expected:
        raise UserError(
            f"{index} has {len(content)} bytes, not the {expected} of {sequences} sequences and "
            f"{documents} document indices; copy it again"
        )
    dtype = np.dtype(_MEGATRON_DTYPES[code])
    lengths = np.frombuffer(content, "<i4", sequences, head).astype(np.int64)
    offsets = np.frombuffer(content, "<i8", sequences, head + 4 * sequences)
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if sequences else 0
    if (lengths < 0).any() or ((ends - lengths) * dtype.itemsize != offsets).any():
        raise UserError(f"{index} is damaged: its offsets don't follow from its lengths")
    if size != total * dtype.itemsize:
        raise UserError(
            f"{path} has {size} bytes, not the {total * dtype.itemsize} that {index.name} says; "
            "the two don't belong together, or a copy is cut"
        )
    bounds = np.frombuffer(content, "<i8", documents, head + 12 * sequences)
    if documents and (bounds.min() < 0 or bounds.max() > sequences):
        raise UserError(f"{index} is damaged: a document index is out of range")
    checked = bounds[:: math.ceil(documents / _CHECKED_ENDS) or 1]
    return Shard(path, dtype, 0, total, np.concatenate([[0], ends])[checked].tolist())


def check_ends(shards: Sequence[Shard], eos_id: int) -> None:
    """Checks that EOS separates the documents in shards of other libraries."""
    for shard in shards:
        found = shard.ids_T[[end - 1 for end in shard.ends if end]]
        if (found != eos_id).any():
            raise UserError(
                f"{shard.path}: a document ends with the id {found[found != eos_id][0]}, "
                f"not the end of text {eos_id}; write it with --append-eod, or set "
                "--config.data.tokenizer to its tokenizer"
            )
    looked_at = (shard.ids_T[block] for shard in shards for block in shard.blocks())
    if not any((ids == eos_id).any() for ids in looked_at):
        raise UserError(
            f"{shards[0].path} has no end-of-text id {eos_id} where it was looked for, which "
            "tells documents apart; set --config.data.tokenizer to its tokenizer"
        )


def check_ids(shard: Shard, first: int, ids_T: np.ndarray, vocabulary: int) -> None:
    """Raises UserError if ids read at token `first` of a shard are not in the vocabulary."""
    ids_T = ids_T & np.uint32(ID) if shard.marked else ids_T
    if not len(ids_T) or (0 <= ids_T.min() and ids_T.max() < vocabulary):
        return
    index = int(np.flatnonzero((ids_T < 0) | (ids_T >= vocabulary))[0])
    raise UserError(
        f"{shard.path} has the id {ids_T[index]} at token {first + index}, and the tokenizer has "
        f"{vocabulary} ids; the shard is damaged or of another tokenizer (data.tokenizer)"
    )
