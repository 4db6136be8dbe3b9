"""A task that needs no network: the last word of passages that the model has not seen.

As in LAMBADA (arXiv 1606.06031), the word stands earlier in the passage, so that who has followed
it can know. Passages come from the run's own validation documents.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from prmoe_jax.config import DataConfig
from prmoe_jax.data import cache
from prmoe_jax.data.corpora import open_corpus
from prmoe_jax.errors import UserError

PASSAGES = 1000
WORDS = 50  # of the context, at least, with the whole sentences that hold them
RECIPE = 1  # of this file: other passages need another number

YAML = """\
task: cloze
dataset_path: json
dataset_kwargs:
  data_files:
    test: {path}
output_type: loglikelihood
test_split: test
doc_to_text: "{{{{context}}}}"
doc_to_target: " {{{{word}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: {recipe}
"""


def prepare(config: DataConfig) -> Path:
    """A folder with the task 'cloze' for the harness, made once for each corpus.

    Raises:
      UserError: the corpus can't be read, or has no such passage.
    """
    corpus = open_corpus(config)
    key = cache.fingerprint("cloze", RECIPE, corpus.fingerprint)
    folder = Path(config.cache_dir).expanduser() / "tasks" / key

    def build(temporary: Path) -> None:
        rows = []
        for text in corpus.validation:
            rows += [{"context": c, "word": w} for c, w in passages(text)]
        if not rows:
            raise UserError(f"corpus {config.corpus!r} has no passage to make a cloze task of")
        # Evenly from all documents.
        rows = rows[:: -(-len(rows) // PASSAGES)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (temporary / "cloze.jsonl").write_text(lines)
        path = json.dumps(str(folder / "cloze.jsonl"))
        (temporary / "cloze.yaml").write_text(YAML.format(path=path, recipe=RECIPE))

    return cache.build_once(folder, build)


def passages(text: str) -> Iterator[tuple[str, str]]:
    """Passages of a document, one after the other: all but the last word, and the last word."""
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
