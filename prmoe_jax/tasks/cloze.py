"""A task that needs no network: predict the last word of passages that the model has not seen.

The word also occurs earlier in the passage, as in most passages of LAMBADA (arXiv 1606.06031), so
that the passage makes it predictable. Passages come from the run's own validation documents.
"""

import re
from collections.abc import Iterable, Iterator

from prmoe_jax.data.corpora import Corpus

WORDS = 50  # the context is whole sentences with at least this many words


def rows(corpus: Corpus) -> Iterator[dict]:
    """The passages of all validation documents: each has its context and its last word."""
    for text in corpus.validation:
        yield from ({"context": context, "word": word} for context, word in passages(text))


def passages(text: str) -> Iterator[tuple[str, str]]:
    """Yields a document's passages as (all but the last word, the last word)."""
    held: list[str] = []
    for sentence in _sentences(text):
        words = sum(len(s.split()) for s in held)
        match = re.fullmatch(r"(.*\s)?([a-z]{4,})[.?!]", sentence, re.S)
        if words >= WORDS and match and re.search(rf"\b{match[2]}\b", " ".join(held)):
            yield " ".join([*held, (match[1] or "").strip()]).strip(), match[2]
            held = []
        else:
            held.append(sentence)
            while len(held) > 1 and sum(len(s.split()) for s in held[1:]) >= WORDS:
                held.pop(0)


def _sentences(text: str) -> Iterable[str]:
    return (" ".join(s.split()) for s in re.findall(r"[^.?!]+[.?!]+", text))
