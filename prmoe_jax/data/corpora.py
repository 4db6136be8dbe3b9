"""Opens a corpus: computes its fingerprint at once, and its split on first use."""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterator, Sequence

from prmoe_jax import files, stores
from prmoe_jax.config.schema import DataConfig
from prmoe_jax.data import cache, chunks, sources, split
from prmoe_jax.data.chat import plain
from prmoe_jax.data.chunks import Chunk
from prmoe_jax.data.split import Selection
from prmoe_jax.data.stages import in_this_process
from prmoe_jax.errors import UserError

# Increase this when changed code makes other documents or another split of the same source.
_RECIPE = 1
_SPLIT = "split.json"
TOKENS = "tokens:"  # prefix of a corpus of token shards; see `streams.py`


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Training and validation documents, which are read from their source each time.

    `fingerprint` is known before anything is prepared. Data that was derived from the corpus and
    cached under this fingerprint can therefore be used without preparing the corpus. Local files
    must still exist, since the fingerprint is computed from their content.
    """

    fingerprint: str
    config: DataConfig
    files: Sequence[pathlib.Path] = ()  # none for a dataset of TFDS

    @functools.cached_property
    def chunks(self) -> list[Chunk]:
        """The text in chunks; the first use prepares a TFDS dataset."""
        if self.files:
            return chunks.of_files(self.files, self.config)
        return chunks.of_tfds(self.config)

    @functools.cached_property
    def selection(self) -> Selection:
        """The split, computed once and cached; duplicates are kept."""
        if not self.files:
            return Selection(b"")
        directory = cache.root(self.config) / "splits" / self.fingerprint
        cache.build_once(directory, self._find_split)
        with cache.reading(directory):
            known = files.parse_json(files.read(directory / _SPLIT))
            threshold = bytes.fromhex(known["threshold"])
            if len(threshold) != split.RANK_BYTES:
                raise ValueError(f"{_SPLIT} is not as it was written")
            return Selection(threshold, chats=known.get("chats", 0))

    def _find_split(self, folder: pathlib.Path) -> None:
        with in_this_process(folder, self.config, len(self.chunks)) as (work, run):
            found = split.select(work, self.chunks, run)
        known = {"threshold": found.threshold.hex(), "chats": found.chats}
        (folder / _SPLIT).write_text(json.dumps(known))

    @property
    def train(self) -> Iterator[str]:
        """The training documents, as plain text."""
        return self._documents("train")

    @property
    def validation(self) -> Iterator[str]:
        """The held-out documents, as plain text."""
        return self._documents("validation")

    def _documents(self, name: str) -> Iterator[str]:
        for chunk in self.chunks:
            if chunk.split in ("", name):
                found = split.selected(chunk, self.config, self.selection)
                yield from (plain(text) for part, text in found if part == name)


def open_corpus(config: DataConfig) -> Corpus:
    """Opens `config.corpus`; see DataConfig for its forms.

    Local files are read and fingerprinted by their content, so that a moved corpus stays the same.
    A TFDS dataset is fingerprinted by its name.
    """
    if config.corpus.startswith(TOKENS):
        raise UserError(f"data.corpus={config.corpus} holds tokens, and text is needed here")
    check_on_disk(config)
    found, content = [], config.corpus
    if not config.corpus.startswith("tfds:"):
        found = sources.files(config.corpus, cache.root(config))
        content = _content(found)
    fingerprint = cache.fingerprint(_RECIPE, content, config.text_field, config.validation_fraction)
    return Corpus(fingerprint, config, found)


def check_on_disk(config: DataConfig) -> None:
    """Raises UserError if the corpus is text in an object store."""
    if stores.scheme(config.corpus):
        raise UserError(
            f"data.corpus={config.corpus}: text is read from disks only; prmoe tokenize makes "
            "shards of it, for tokens:…, or copy it to a disk"
        )


def _content(files: Sequence[pathlib.Path]) -> list[list[str]]:
    """Suffix and digest of each file, in reading order; the names do not matter."""
    content = []
    for file in files:
        with sources.reading(file), open(file, "rb") as stream:
            content.append([file.suffix, hashlib.file_digest(stream, "sha256").hexdigest()])
    return content
