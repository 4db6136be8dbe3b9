"""Tasks that need no network, written in the format of lm-evaluation-harness."""

import json
from functools import partial
from pathlib import Path

from prmoe_jax.config.schema import DataConfig
from prmoe_jax.data import cache
from prmoe_jax.data.corpora import open_corpus
from prmoe_jax.errors import UserError
from prmoe_jax.tasks import choices, cloze

EXAMPLES = 1000  # a task has at most this many examples, evenly spaced
RECIPE = 2  # version of the tasks; increase it when their examples change

MEAN = {"aggregation": "mean", "higher_is_better": True}
CLOZE = {
    "output_type": "loglikelihood",
    "doc_to_text": "{{context}}",
    "doc_to_target": " {{word}}",
    "metric_list": [{"metric": "acc", **MEAN}],
}
CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc", **MEAN}, {"metric": "acc_norm", **MEAN}],
}
NAMES = "cloze", *choices.SOURCES


def prepare(name: str, config: DataConfig) -> Path:
    """The folder of a task in `NAMES`; it is made once for each corpus or package."""
    if name == "cloze":
        corpus = open_corpus(config)
        source, rows = corpus.fingerprint, partial(cloze.rows, corpus)
    else:
        path = choices.find(name)
        source, rows = path.stat().st_size, partial(choices.rows, name, path)
    tasks = cache.root(config) / "tasks"
    # The path is part of the fingerprint, since the .yaml holds the path of the examples.
    folder = tasks / cache.fingerprint(name, RECIPE, source, str(tasks))

    def build(temporary: Path) -> None:
        found = list(rows())
        if not found:
            if name != "cloze":
                raise UserError(f"--tasks={name}: its package has no example; install it again")
            raise UserError(f"corpus {config.corpus!r} has no passage to make a cloze task of")
        found = found[:: -(-len(found) // EXAMPLES)]
        lines = "".join(json.dumps(row) + "\n" for row in found)
        (temporary / "examples.jsonl").write_text(lines)
        task = (CLOZE if name == "cloze" else CHOICE) | {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / "examples.jsonl")}},
            "test_split": "test",
            "metadata": {"version": RECIPE},
        }
        (temporary / f"{name}.yaml").write_text(json.dumps(task, indent=1))  # JSON is YAML

    return cache.build_once(folder, build)
