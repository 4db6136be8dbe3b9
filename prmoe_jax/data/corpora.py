"""Opens a corpus: its text is identified at once, but prepared only when it is read."""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable, Sequence

from prmoe_jax import stores
from prmoe_jax.config.schema import DataConfig
from prmoe_jax.data import cache, sources
from prmoe_jax.errors import UserError

# Increase this when the same source gives other documents or another split than before.
_RECIPE = 1
TOKENS = "tokens:"  # starts a corpus of token shards; see `streams.py`


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Training and validation documents, as random-access sequences of str.

    `fingerprint` changes with the text and the split, and is known before anything is prepared.
    Data that was derived from the corpus, and cached under its fingerprint, can therefore be used
    without preparing the corpus. Local files must still exist, since the fingerprint is computed
    from their content.
    """

    fingerprint: str
    prepare: Callable[[], dict[str, Sequence[str]]]

    @functools.cached_property
    def _splits(self) -> dict[str, Sequence[str]]:
        return self.prepare()

    @property
    def train(self) -> Sequence[str]:
        """The training documents; the first use prepares the corpus (UserError if that fails)."""
        return self._splits["train"]

    @property
    def validation(self) -> Sequence[str]:
        """The held-out documents; the first use prepares the corpus (UserError if that fails)."""
        return self._splits["validation"]


def open_corpus(config: DataConfig) -> Corpus:
    """Opens `config.corpus`; see DataConfig for its forms.

    Every local file is read once: its content makes the fingerprint, so that a moved or copied
    corpus is the same corpus. A TFDS dataset is fingerprinted by its name.

    Raises:
      UserError: the corpus does not exist or is not installed.
    """
    if config.corpus.startswith(TOKENS):
        raise UserError(f"data.corpus={config.corpus} holds tokens, and text is needed here")
    check_on_disk(config)
    if config.corpus.startswith("tfds:"):
        content = config.corpus
    else:
        content = _content(sources.files(config.corpus, cache.root(config)))
    fingerprint = cache.fingerprint(_RECIPE, content, config.text_field, config.validation_fraction)
    return Corpus(fingerprint, functools.partial(_prepare, config, fingerprint))


def check_on_disk(config: DataConfig) -> None:
    """Raises UserError if the corpus is text in an object store."""
    if stores.scheme(config.corpus):
        raise UserError(
            f"data.corpus={config.corpus}: text is read from disks only; prmoe tokenize makes "
            "shards of it, for tokens:…, or copy it to a disk"
        )


def _prepare(config: DataConfig, fingerprint: str) -> dict[str, Sequence[str]]:
    # Importing TFDS takes a second; if the tokens are cached, this is never called.
    from prmoe_jax.data import builders

    cache_dir = cache.root(config)
    if config.corpus.startswith("tfds:"):
        return builders.prepare_named(config, cache_dir / "tfds")
    return builders.prepare_files(config, cache_dir, cache_dir / "corpora" / fingerprint)


def _content(files: list[pathlib.Path]) -> list[list[str]]:
    """Format and digest of each file, in reading order; the names do not matter."""
    content = []
    for file in files:
        with sources.reading(file), open(file, "rb") as stream:
            content.append([file.suffix, hashlib.file_digest(stream, "sha256").hexdigest()])
    return content
