"""Chooses the documents that are held out for validation, by their content alone."""

import hashlib
import logging
import math
from collections.abc import Iterable

from prmoe_jax.errors import UserError

log = logging.getLogger(__name__)


def digest(text: str) -> bytes:
    """The digest that ranks a document."""
    return hashlib.sha256(text.encode()).digest()


def is_empty(text: str) -> bool:
    """Whether a document holds only white space; such documents are left out."""
    return not text.strip()


def held_out(documents: Iterable[str], fraction: float, corpus: str) -> frozenset[bytes]:
    """The digests of the validation documents: the first `fraction` by rank, rounded up.

    Ranking unique documents by digest keeps exact duplicates in one split, and makes the choice
    independent of file names and order. Both splits get at least one document.

    Raises:
      UserError: there are fewer than two different documents.
    """
    digests, total, empty = set(), 0, 0
    for text in documents:
        total += 1
        if is_empty(text):
            empty += 1
        else:
            digests.add(digest(text))
    count = held_out_count(len(digests), total, empty, fraction, corpus)
    return frozenset(sorted(digests)[:count])


def held_out_count(different: int, total: int, empty: int, fraction: float, corpus: str) -> int:
    """The number of validation documents.

    Args:
      different: the number of different documents that are not empty.
      total: the number of all documents.
      empty: the number of empty ones; a warning tells about them.
      fraction: the share that is held out.
      corpus: the name in messages.

    Raises:
      UserError: there are fewer than two different documents.
    """
    if empty:
        log.warning("corpus %s: %d of %d documents are empty; skipped", corpus, empty, total)
    if different < 2:
        raise UserError(
            f"corpus {corpus!r} has {different} different non-empty documents "
            f"(of {total}, {empty} empty); training and validation need at least 2: "
            "split the text into several files or JSON lines"
        )
    return min(math.ceil(fraction * different), different - 1)
