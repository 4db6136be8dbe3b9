"""SmolLM2-135M-Instruct, a released model, from its import to an export of MoEs made from it.

`experiments/smollm2/install.py` makes its folder once, in ~/.cache/prmoe_jax. Training and what
follows have its first four layers, which need less memory.
"""

import json
import os
import runpy
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from prmoe_jax import Generator
from prmoe_jax.cli import main
from prmoe_jax.config.schema import DataConfig
from prmoe_jax.data.corpora import open_corpus
from prmoe_jax.errors import UserError
from prmoe_jax.nn.quantized import InferenceWeight
from tests.support.extras import needs_extra
from tests.support.paths import REPOSITORY
from tests.support.quick import jit

pytestmark = needs_extra("interop", "gguf")
BOS, EOS = 0, 2  # <|endoftext|> begins a document, and <|im_end|> ends it, as config.json says
PROMPTS = ["The capital of France is", "Water boils at 100"]


@pytest.fixture(scope="module")
def source():
    install = runpy.run_path(str(REPOSITORY / "experiments/smollm2/install.py"))["install"]
    try:
        return install()
    except UserError as error:
        if "can't be downloaded" in str(error) and "CI" not in os.environ:
            pytest.skip(str(error))
        raise


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("smollm2")


@pytest.fixture(scope="module")
def run(source, folder):
    assert main(["import", "--kind=hf", f"--source={source}", f"--workdir={folder / 'run'}"]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def corpus(folder):
    """Sixty paragraphs, of which three are held out."""
    documents = open_corpus(DataConfig(cache_dir=str(folder / "cache"))).train
    lines = (line.strip() for text in documents for line in text.splitlines())
    found = [line for line in lines if 500 < len(line) < 700][:60]
    path = folder / "paragraphs.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in found))
    return DataConfig(corpus=str(path), cache_dir=str(folder / "cache"))


@pytest.fixture(scope="module")
def theirs(source):
    return loaded(source)


@pytest.fixture(scope="module")
def tokenizer(source):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source)


@pytest.fixture(scope="module")
def dense(source, folder):
    """The model's first four layers, imported."""
    from transformers import AutoModelForCausalLM

    small = AutoModelForCausalLM.from_pretrained(source, num_hidden_layers=4)
    small.save_pretrained(folder / "small")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(source / name, folder / "small")
    command = ["import", "--kind=hf", f"--source={folder / 'small'}"]
    assert main([*command, f"--workdir={folder / 'dense'}"]) == 0
    return folder / "dense"


@pytest.fixture(scope="module")
def upcycled(dense, folder, corpus):
    """Eight experts in each layer, slices of its MLP, and four of them for each token."""
    settings = {
        "init.workdir": dense,
        "model.family": "mixtral",
        "model.placement": "every 1",
        "model.experts": 8,
        "model.top_k": 4,
        "model.expert_d_ff": 1536 // 4,
        "model.length": 64,
        "moe.capacity_factor": "inf",
        "moe.eval_capacity_factor": "inf",
        "data.corpus": corpus.corpus,
        "data.cache_dir": corpus.cache_dir,
        "train.batch_size": 2,
        "train.accumulate": 1,
        "optimizer.learning_rate": 1e-30,  # so that no weight changes
        "optimizer.min_learning_rate": 0,
        "optimizer.warmup_tokens": 0,
        "eval.every": 0,
        "execution.remat": "full",
    }
    options = [f"--config.{name}={value}" for name, value in settings.items()]
    command = ["train", f"--config={dense}/config.json", f"--workdir={folder / 'upcycled'}"]
    assert main([*command, *options]) == 0
    return folder / "upcycled"


def loaded(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()


def logits_of(model, ids):
    import torch

    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].numpy()


def documents(corpus, tokenizer):
    """The ids of the held-out texts, each from BOS to EOS."""
    return [[BOS, *tokenizer.encode(text), EOS] for text in open_corpus(corpus).validation]


def mean_loss(model, texts):
    """By transformers; each text by itself."""
    nats = []
    for ids in texts:
        logits_LxV = logits_of(model, ids[:-1]).astype(np.float64)
        top_L = logits_LxV.max(-1)
        log_z_L = top_L + np.log(np.exp(logits_LxV - top_L[:, None]).sum(-1))
        nats += [log_z_L - logits_LxV[np.arange(len(ids) - 1), ids[1:]]]
    return np.concatenate(nats).mean()


def answer(capsys, command):
    """What a command prints as JSON, one object a line."""
    capsys.readouterr()
    assert main([*command, "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def evaluated(capsys, run, corpus, *options):
    config = ["eval", f"--workdir={run}", f"--corpus={corpus.corpus}", *options]
    (found,) = answer(capsys, config)
    return found


def continued(model, ids, tokens):
    """The greedy continuation by transformers."""
    import torch

    found = model.generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False)
    return found[0, len(ids) :].tolist()


def test_the_loss_is_that_of_transformers(run, corpus, theirs, tokenizer, capsys):
    """Of three held-out texts, which share one window here."""
    texts = documents(corpus, tokenizer)
    found = evaluated(capsys, run, corpus)
    assert len(texts) == 3
    assert found["tokens"] == sum(len(ids) - 1 for ids in texts)
    assert found["loss"] == pytest.approx(mean_loss(theirs, texts), rel=1e-6)
    assert found["loss"] < 5  # chance has 10.8


def test_greedy_texts_are_those_of_transformers(run, theirs, tokenizer, capsys):
    prompts = [f"--prompt={prompt}" for prompt in PROMPTS]
    command = ["generate", f"--workdir={run}", "--temperature=0", "--tokens=12", *prompts]
    for prompt, found in zip(PROMPTS, answer(capsys, command), strict=True):
        ids = [BOS, *tokenizer.encode(prompt)]
        assert found["text"] == tokenizer.decode(continued(theirs, ids, 12))
    assert tokenizer.tokenize("2026") == list("2026")


def test_the_loss_with_weights_of_8_bits(run, corpus, theirs, tokenizer):
    texts = [ids[:100] for ids in documents(corpus, tokenizer)]
    decoder, score = Generator.restore(run, "int8").decoder, jit(nats)
    assert isinstance(decoder.tokens[...], InferenceWeight)
    loss = np.mean([score(decoder, jnp.array([x[:-1]]), jnp.array(x[1:])) for x in texts])
    assert 0 < abs(loss - mean_loss(theirs, texts)) < 0.003  # measured: 0.0008


def nats(decoder, tokens_1xL, targets_L):
    caches, length_1 = decoder.empty_cache(1, tokens_1xL.shape[1]), jnp.zeros(1, jnp.int32)
    x_1xLxD, _ = decoder(tokens_1xL, jnp.ones_like(tokens_1xL, bool), caches, length_1)
    log_p_LxV = jax.nn.log_softmax(decoder.logits(x_1xLxD[0]))
    return -jnp.take_along_axis(log_p_LxV, targets_L[:, None], -1).mean()


def test_an_export_is_the_source(source, run, folder, tokenizer):
    from transformers import AutoTokenizer

    out = folder / "out"
    assert main(["export", "--kind=hf", f"--workdir={run}", f"--out={out}"]) == 0
    before, after = (load_file(path / "model.safetensors") for path in (source, out))
    assert before.keys() == after.keys() and len(before) == 272
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)
    for name in ("generation_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    config, written = (json.loads((path / "config.json").read_text()) for path in (source, out))
    shared = config.keys() & written.keys()
    assert {"bos_token_id", "eos_token_id", "pad_token_id", "rope_parameters"} < shared
    assert {name: config[name] for name in shared} == {name: written[name] for name in shared}
    text = "It's  1,234 € on 2026-12-03.\n\n\tNaïve?"
    assert AutoTokenizer.from_pretrained(out).encode(text) == tokenizer.encode(text)


def test_a_turn_of_a_chat(run, theirs, tokenizer, capsys):
    """With the released template; the answer ends where the model ends it."""
    turn = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"]
    found = continued(theirs, ids, 24)
    text = tokenizer.decode(found, skip_special_tokens=True)
    command = ["generate", "--chat", f"--workdir={run}", "--temperature=0", "--tokens=24"]
    (told,) = answer(capsys, [*command, f"--prompt={turn[0]['content']}"])
    assert told["text"] == text
    assert "Paris" in text and found[-1] == EOS


def test_upcycling_by_slices_keeps_the_loss(dense, upcycled, corpus, capsys):
    options = "--length=64", "--batch-size=2"
    losses = [evaluated(capsys, run, corpus, *options)["loss"] for run in (dense, upcycled)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_an_upcycled_model_is_a_mixtral_of_transformers(dense, upcycled, folder, tokenizer):
    out = folder / "mixtral"
    assert main(["export", "--kind=hf", f"--workdir={upcycled}", f"--out={out}"]) == 0
    model = loaded(out)
    assert type(model).__name__ == "MixtralForCausalLM"
    assert model.config.max_position_embeddings == 8192
    ids = [BOS, *tokenizer.encode(PROMPTS[0])]
    ours, spread = next_logits(upcycled, ids), 1e-5 * np.ptp(logits := logits_of(model, ids)[-1])
    np.testing.assert_allclose(ours, logits, atol=spread, rtol=0)
    np.testing.assert_allclose(next_logits(dense, ids), logits, atol=spread, rtol=0)
    assert (out / "chat_template.jinja").read_text() == tokenizer.chat_template


def test_a_pruned_model_is_a_smaller_mixtral(upcycled, folder, tokenizer):
    """Four of eight experts, all of which every token has.

    With more, slices of one MLP would have equal scores, and each library its own choice among
    equals.
    """
    pruned, out = folder / "pruned", folder / "pruned_mixtral"
    prune = ["prune", f"--workdir={upcycled}", "--keep=0.5", "--shape=uniform", "--batches=1"]
    assert main([*prune, f"--out={pruned}"]) == 0
    assert main(["export", "--kind=hf", f"--workdir={pruned}", f"--out={out}"]) == 0
    model, ids = loaded(out), [BOS, *tokenizer.encode(PROMPTS[0])]
    assert model.config.num_local_experts == 4
    logits = logits_of(model, ids)[-1]
    ours, spread = next_logits(pruned, ids), 1e-5 * np.ptp(logits)
    np.testing.assert_allclose(ours, logits, atol=spread, rtol=0)


def next_logits(run, ids):
    decoder, tokens_1xL = Generator.restore(run).decoder, jnp.asarray([ids])
    caches, length_1 = decoder.empty_cache(1, len(ids)), jnp.zeros(1, jnp.int32)
    x_1xLxD, _ = decoder(tokens_1xL, jnp.ones_like(tokens_1xL, bool), caches, length_1)
    return np.asarray(decoder.logits(x_1xLxD[:, -1])[0])
