"""Generation: cached decoding is the whole forward, whoever shares a batch; weights of few bits."""

import math
import os.path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from jax.sharding import Mesh
from tokenizers import decoders as token_decoders
from tokenizers import models, normalizers, pre_tokenizers

from prmoe_jax.data.tokenizer import Tokenizer
from prmoe_jax.errors import UserError
from prmoe_jax.inference import decoder as decoders
from prmoe_jax.inference import generate
from prmoe_jax.inference.generate import Generator, Sampling, TextStream
from prmoe_jax.moe.experts import Local
from prmoe_jax.nn.parameters import from_named, named_leaves
from prmoe_jax.nn.quantized import InferenceWeight
from tests.support.models import build
from tests.support.quick import forward, jit
from tests.support.tokenizers import byte_tokenizer, started_tokenizer


def held(model, weights="float32"):
    return decoders.decoder(model, weights, MESH)


def generator(model, weights="float32", tokenizer=None):
    return Generator(held(model, weights), tokenizer or byte_tokenizer(), MESH)


def sentencepiece(byte_fallback=False):
    """Letters and pairs, where a space is the first character of the word behind it.

    With `byte_fallback`, as Llama's: other characters are one token a byte.
    """
    pairs = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "e")]
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz"] + ["".join(pair) for pair in pairs]
    pieces = ["<unk>"] + [f"<0x{i:02X}>" for i in range(256 * byte_fallback)] + letters
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    model = models.BPE(vocabulary, pairs, unk_token="<unk>", byte_fallback=byte_fallback)
    tokenizer = tokenizers.Tokenizer(model)
    if byte_fallback:
        replaced = normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")
        tokenizer.normalizer = normalizers.Sequence(list(replaced))
        spaced, joined = token_decoders.Replace("▁", " "), token_decoders.Strip(" ", 1, 0)
        parts = [spaced, token_decoders.ByteFallback(), token_decoders.Fuse(), joined]
        tokenizer.decoder = token_decoders.Sequence(parts)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = token_decoders.Metaspace()
    tokenizer.add_special_tokens(["</s>"])
    return Tokenizer(tokenizer.to_str(), "sentencepiece")


TOKENIZERS = {
    "bytes": byte_tokenizer,
    "metaspace": sentencepiece,
    "llama": lambda: sentencepiece(byte_fallback=True),
}


MESH = Mesh(
    np.array(jax.devices()[:1]).reshape(1, 1, 1, 1, 1),
    ("data", "fsdp", "expert_0", "slice", "tensor"),
)
ARCHITECTURES = (
    "3 layers",
    "3 layers, E=3",
    "3 layers, E=3, top 2",
    "5 layers, E=2+7, residual",  # of 7 experts, 3 sequences read the chosen ones alone
)


@pytest.mark.parametrize(
    ("text", "group_size"),
    [(text, size) for text in ARCHITECTURES for size in (0, 8) if "E" in text or not size],
)
def test_decoding_equals_the_whole_forward_at_every_place(text, group_size):
    """Prompts of different lengths, padded, then one token at a time."""
    check_decoding(build(text, {"group_size": group_size} if group_size else {}, length=16))


@pytest.mark.parametrize("text", ["5 layers", "5 layers, every 1, E=4, top 2"])
def test_decoding_with_windows_in_some_layers_and_sinks(text):
    """As above; without the window, without sinks and with a window everywhere it is another."""
    form = {"family": "gpt_oss", "sliding_window": 4, "full_attention": "every 2", "length": 16}
    drop_nothing = {"capacity_factor": math.inf, "eval_capacity_factor": math.inf}
    found = []
    for changes in (
        {}, {"sliding_window": 0, "full_attention": "none"},
        {"attention_sinks": "none"}, {"full_attention": "none"},
    ):  # fmt: skip
        model = build(text, drop_nothing, **form | changes)
        names = named_leaves(model)
        for n, (name, leaf) in enumerate(names.items()):
            if name.endswith(("sinks", "b_gate", "b_router")):
                names[name] = jax.random.normal(jax.random.key(n), leaf.shape)
        model = from_named(names, model)
        found.append(check_decoding(model))
    for other in found[1:]:
        assert np.abs(other - found[0]).max() > 0.01


def check_decoding(model):
    """Returns the final activations of the whole forward."""
    tokens_BxL = jax.random.randint(jax.random.key(1), (3, 16), 0, 384)
    expected_BxLxD, _ = forward(model, tokens_BxL, jnp.ones((3, 16), jnp.int32))
    length_B = jnp.array([5, 1, 3])
    valid_BxQ = jnp.arange(5) < length_B[:, None]
    decoder = held(model)
    decode = jit(lambda decoder, *arguments: decoder(*arguments))
    past = decoder.empty_cache(3, 16)
    x_BxQxD, past = decode(decoder, tokens_BxL[:, :5], valid_BxQ, past, jnp.zeros(3, jnp.int32))
    np.testing.assert_allclose(
        jnp.where(valid_BxQ[..., None], x_BxQxD - expected_BxLxD[:, :5], 0), 0, atol=1e-5
    )
    rows = jnp.arange(3)
    for _ in range(11):
        x_Bx1xD, past = decode(
            decoder, tokens_BxL[rows, length_B][:, None], jnp.ones((3, 1), bool), past, length_B
        )
        np.testing.assert_allclose(x_Bx1xD[:, 0], expected_BxLxD[rows, length_B], atol=1e-5)
        length_B += 1
    np.testing.assert_allclose(
        decoder.logits(x_Bx1xD[:, 0]), model.logits(x_Bx1xD)[:, 0], rtol=1e-5, atol=1e-5
    )
    return expected_BxLxD


@pytest.mark.parametrize("text", ["3 layers, E=3, top 2", "5 layers, E=2+7, residual"])
def test_greedy_text_is_the_likeliest_token_by_token(text, monkeypatch):
    """Against the whole forward of every prefix; prompts longer and shorter than a piece."""
    monkeypatch.setattr(generate, "PREFILL_CHUNK", 8)
    monkeypatch.setattr(generate, "STEPS", 5)
    jax.clear_caches()  # the constants are part of what is compiled
    model = build(text)
    prompts = ["a sentence of 22 bytes", "", "the 8 by"]
    texts = generator(model)(prompts, 12, Sampling(temperature=0))
    tokenizer = byte_tokenizer()
    for prompt, found in zip(prompts, texts, strict=True):
        ids = [tokenizer.eos_id, *tokenizer.encode(prompt)]
        new = []
        for _ in range(12):
            tokens_1xL = np.zeros((1, 40), np.int32)
            tokens_1xL[0, : len(ids)] = ids
            valid_1xL = np.int32(np.arange(40) < len(ids))[None]
            logits_V = forward(model, tokens_1xL, valid_1xL)[1][0, len(ids) - 1]
            ids.append(int(logits_V[: tokenizer.size].argmax()))
            if ids[-1] == tokenizer.eos_id:
                break
            new.append(ids[-1])
        assert found == tokenizer.decode(new)
    jax.clear_caches()


def test_a_text_begins_with_the_start_of_its_tokenizer():
    """The start of 257, not the end of 256, is what the first token is drawn after."""
    model, tokenizer = build("3 layers, E=3, top 2"), started_tokenizer()
    logits = []
    for first in (tokenizer.bos_id, tokenizer.eos_id):
        tokens_1xL = np.array([[first, *tokenizer.encode("a")]], np.int32)
        logits.append(forward(model, tokens_1xL, np.ones_like(tokens_1xL))[1][0, -1])
    likeliest = [int(found_V[: tokenizer.size].argmax()) for found_V in logits]
    assert likeliest[0] != likeliest[1]
    texts = generator(model, tokenizer=tokenizer)(["a"], 1, Sampling(temperature=0))
    assert texts == [tokenizer.decode([likeliest[0]])]


def test_a_text_ends_at_any_end_mark():
    """At the first of three ids that the model draws, which its text leaves out."""
    model, tokenizer = build("1 layers", init_std=0.3), byte_tokenizer()
    drawn, decode = [], generate.decode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "decode", lambda *a: drawn.append(decode(*a)) or drawn[-1])
        generator(model)(["a"], 24, Sampling(1.0))
    ids = drawn[-1].tokens_BxT[0, 2 : drawn[-1].length_B[0]].tolist()
    marks = set(ids[9:17:3])
    first = next(n for n, token in enumerate(ids) if token in marks)
    run = Generator(held(model), tokenizer, MESH, marks)
    assert run.ends == tuple(sorted({*marks, tokenizer.eos_id}))
    pieces = []
    texts = run(["a"], 24, Sampling(1.0), on_text=lambda _, text: pieces.append(text))
    assert texts == ["".join(pieces)] == [tokenizer.decode(ids[:first])]


def test_a_text_does_not_depend_on_what_shares_its_batch():
    """Other prompts, of other lengths, that end sooner or later: the same to the last bit."""
    run = generator(build("5 layers, E=2+7, residual", init_std=0.1))
    ours, others = "who shares", (["x", "y"], ["a much longer prompt", "by the other"], ["", "z"])
    states = []
    decode = generate.decode

    def watched(*arguments):
        states.append(decode(*arguments))
        return states[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "decode", watched)
        for companions in others:
            run([companions[0], ours, companions[1]], 16, Sampling(1.0), [5, 6, 7])
    assert len(states) == 3
    ends = {int(state.length_B[1]) for state in states}
    assert len(ends) == 1
    for state in states[1:]:
        np.testing.assert_array_equal(state.x_BxD[1], states[0].x_BxD[1])
        np.testing.assert_array_equal(state.tokens_BxT[1], states[0].tokens_BxT[1])
    assert len({state.tokens_BxT[0].tobytes() for state in states}) == 3


def test_seeds_and_samples():
    run = generator(build("3 layers, E=3", init_std=0.1))
    texts = run(["a", "a", "a"], 10, Sampling(1.0), [1, 2, 1])
    assert texts[0] == texts[2] != texts[1]
    assert run(["a"], 10, Sampling(1.0), [1]) == texts[:1]


def draws(logits_V, sampling, count=2000):
    keys_B = jax.random.split(jax.random.key(0), count)
    logits_BxV = jnp.broadcast_to(jnp.asarray(logits_V), (count, len(logits_V)))
    return np.bincount(generate._draw(logits_BxV, sampling, keys_B), minlength=len(logits_V))


def test_what_is_drawn_by_hand():
    """p = 0.5, 0.25, 0.125, 0.125 at temperature 1, in another order, and one id that isn't."""
    logits_V = np.log([0.125, 0.5, 0.125, 0.25, 1e-30])
    share = draws(logits_V, Sampling(1.0)) / 2000
    np.testing.assert_allclose(share, [0.125, 0.5, 0.125, 0.25, 0], atol=0.04)
    np.testing.assert_allclose(
        draws(logits_V, Sampling(0.5))[[1, 3]] / 2000, [8 / 11, 2 / 11], atol=0.04
    )
    np.testing.assert_allclose(
        draws(logits_V, Sampling(1.0, top_k=2)) / 2000, [0, 2 / 3, 0, 1 / 3, 0], atol=0.04
    )
    for top_p, kept in ((0.4, [1]), (0.5, [1]), (0.51, [1, 3]), (0.76, [0, 1, 2, 3])):
        assert np.flatnonzero(draws(logits_V, Sampling(1.0, top_p=top_p))).tolist() == kept
    assert draws(logits_V, Sampling(0)).tolist() == [0, 2000, 0, 0, 0]
    assert draws(logits_V, Sampling(1.0, top_p=1e-46)).tolist() == [0, 2000, 0, 0, 0]
    assert np.flatnonzero(draws(logits_V, Sampling(1.0, top_k=3, top_p=0.3))).tolist() == [1]


@pytest.mark.parametrize("temperature", [1e-46, 1e-40, 1e-38, 1e-31, 1e-29])
def test_next_to_temperature_0_is_greedy(temperature):
    """Where float32 has no such number, or no quotient; also for logits that are equal."""
    sampling = Sampling(temperature)
    assert draws([90.0, -80.0, 91.0, 90.5], sampling, 50).tolist() == [0, 0, 50, 0]
    assert draws([-1e3, -np.inf, -1e3, -1e3 + 1], sampling, 50).tolist() == [0, 0, 0, 50]
    if temperature < generate.COLDEST:
        assert draws([1.0, 3.0, 3.0, 2.0], sampling, 50).tolist() == [0, 50, 0, 0]


@pytest.mark.parametrize("temperature", [1e30, 3e38, 1e39, 1e308])
def test_the_hottest_temperatures_draw_no_padding(temperature):
    count_V = draws([5.0, -5.0, -np.inf], Sampling(temperature), 500)
    assert count_V[2] == 0 and count_V[:2].min() > 200


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("size", [1, 3, 7, 50])
def test_a_continuation_is_decoded_after_its_prompt(kind, size):
    """Prompt and continuation are the whole text, wherever it is cut into them and into pieces."""
    tokenizer = TOKENIZERS[kind]()
    texts = ["the expert the", " e  the", "", "x"]
    if kind != "metaspace":  # the others have tokens for every character
        texts += ["thé “expert” 日本語 😀€", "日本語"]
    for text in texts:
        ids = tokenizer.encode(text)
        for cut in range(len(ids) + 1):
            written, new, pieces = TextStream(tokenizer, [], ids[:cut]), ids[cut:], []
            for i in range(0, len(new) or 1, size):
                pieces.append(written.add(new[i : i + size], i + size >= len(new)))
            whole = tokenizer.decode(ids)
            prompt = os.path.commonprefix([tokenizer.decode(ids[:cut]), whole])
            assert "".join(pieces) == written.text == whole[len(prompt) :], (text, cut)


def test_spaces_between_prompt_and_continuation_by_hand():
    tokenizer = sentencepiece()
    the, e, space = (tokenizer.encode(text) for text in ("the", "e", " "))
    assert [len(ids) for ids in (the, e, space)] == [1, 1, 1]
    for prompt, new, expected in (
        (the, the, " the"), ([], the, "the"), (the, e + the, " e the"), (the, space, " "),
        (the + space, the, " the"),
    ):  # fmt: skip
        written = TextStream(tokenizer, [], prompt)
        assert written.add(new, True) == expected


def test_a_prompt_that_was_cut_within_a_character():
    """Its first bytes are no text, which must not spoil what comes after them."""
    tokenizer = sentencepiece(byte_fallback=True)
    prompt, new = tokenizer.encode("日本語を話す")[1:], tokenizer.encode("日本語")[1:]
    for lost in range(4):
        written = TextStream(tokenizer, [], prompt[lost:])
        assert written.add(new[:4], False) == "日" and written.add(new[4:], True) == "本語"


def test_random_bytes_are_decoded_as_at_once():
    tokenizer, rng = byte_tokenizer(), np.random.default_rng(0)
    for _ in range(100):
        ids = rng.integers(0, 256, rng.integers(1, 40)).tolist()
        size = int(rng.integers(1, 9))
        written = TextStream(tokenizer, [])
        for i in range(0, len(ids), size):
            written.add(ids[i : i + size], i + size >= len(ids))
        assert written.text == tokenizer.decode(ids)


def test_each_token_is_decoded_a_few_times(monkeypatch):
    """However long the text is: what was decoded stays so."""
    tokenizer, decoded = byte_tokenizer(), []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids: decoded.append(len(ids)) or decode(ids))
    ids = tokenizer.encode("“Déjà vu”, said the expert. " * 200)
    written = TextStream(tokenizer, ["never there"], ids[:100])
    for i in range(0, len(ids), generate.STEPS):
        written.add(ids[i : i + generate.STEPS], i + generate.STEPS >= len(ids))
    assert written.text == decode(ids)
    assert sum(decoded) < 10 * len(ids)


def test_prompts_of_ids_and_of_text_are_the_same():
    """With a tokenizer whose words begin with their space, which the continuation keeps."""
    tokenizer = sentencepiece()
    run = generator(build("1 layers", init_std=0.1), tokenizer=tokenizer)
    prompts, seeds = ["", "e the", *["the"] * 29], range(31)
    states, decode = [], generate.decode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "decode", lambda *a: states.append(decode(*a)) or states[-1])
        texts = run(prompts, 20, Sampling(1.0), seeds)
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    assert run(ids, 20, Sampling(1.0), seeds) == texts
    for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        whole = states[-1].tokens_BxT[row, 1 : states[-1].length_B[row]].tolist()
        whole = [i for i in whole if i != tokenizer.eos_id]
        assert prompt + text == tokenizer.decode(whole)
    assert not texts[0].startswith(" ") and any(text.startswith(" ") for text in texts)
    with pytest.raises(UserError, match="token 33 is out of range; the tokenizer's are from 0 to"):
        run([[5, tokenizer.size]], 3)
    with pytest.raises(UserError, match="the prompt's token -1 is out of range"):
        run([[-1]], 3)
    with pytest.raises(UserError, match="1 seeds for 2 prompts; give one for each"):
        run(["the", "e"], 3, seeds=[1])
    assert run([], 3) == []
    with pytest.raises(UserError, match="prompts is one text, not a list of texts"):
        run("the", 3)


def test_text_as_it_comes():
    """Stop texts, ends of documents and characters of several bytes, whatever the pieces."""
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("déjà vu STOP after")
    for size in (1, 2, 3, 5, 40):
        written, pieces = TextStream(tokenizer, ["STOP", "vux"]), []
        for i in range(0, len(ids), size):
            pieces.append(written.add(ids[i : i + size], i + size >= len(ids)))
        assert "".join(pieces) == written.text == "déjà vu "
        assert written.ended and not any("�" in piece or "S" in piece for piece in pieces)
    written = TextStream(tokenizer, [])
    assert written.add([*ids[:3], tokenizer.eos_id, *ids], False) == "dé"
    assert written.ended
    written = TextStream(tokenizer, ["STOP"])
    assert written.add(tokenizer.encode("a ST"), False) == "a "
    assert written.add(tokenizer.encode("ILL"), True) == "STILL"


def test_streaming_and_stops_in_a_batch():
    run = generator(build("3 layers, E=3", init_std=0.1))
    told = {0: "", 1: ""}

    def on_text(i, piece):
        assert piece
        told[i] += piece

    whole = run(["a", "b"], 30, Sampling(1.0), [1, 2])
    stop = whole[0][5:7]
    texts = run(["a", "b"], 30, Sampling(1.0), [1, 2], [stop], on_text)
    assert list(told.values()) == texts
    assert texts[0] == whole[0][: whole[0].index(stop)]
    assert texts[1] == whole[1][: whole[1].find(stop) if stop in whole[1] else None]


@pytest.mark.parametrize(("batch", "calls"), [(1, 2), (3, 1), (8, 0)])
def test_steps_of_few_sequences_read_the_chosen_experts_alone(batch, calls, monkeypatch):
    """Layers of 2 and of 7 experts: where there are no more choices than experts."""
    counts, chosen = [], Local.of_few

    def watched(experts, *arguments):
        counts.append(experts.count)
        return chosen(experts, *arguments)

    monkeypatch.setattr(Local, "of_few", watched)
    decoder = held(build("4 layers, E=2+7, residual"))
    ones = jnp.ones((batch, 1), jnp.int32)
    jax.eval_shape(decoder, ones, ones > 0, decoder.empty_cache(batch, 9), ones[:, 0])
    assert len(counts) == calls


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_a_model_of_narrow_weights(kind):
    """Its large weights alone are held so, and it says nearly the same."""
    model = build("5 layers, E=2+7, residual", init_std=0.1)
    wide, narrow = (held(model, weights) for weights in ("float32", kind))
    tokens_BxQ = jax.random.randint(jax.random.key(1), (2, 9), 0, 256)
    scored = []
    for decoder in (wide, narrow):
        arguments = tokens_BxQ, jnp.ones((2, 9), bool), decoder.empty_cache(2, 9)
        run = jit(lambda decoder, *arguments: decoder.logits(decoder(*arguments)[0][:, -1]))
        scored.append(run(decoder, *arguments, jnp.zeros(2, jnp.int32)))
    spread = float(jnp.std(scored[0]))
    assert 0 < float(jnp.abs(scored[0] - scored[1]).max()) < 0.1 * spread
    few_bits = {name for name, leaf in named_leaves(narrow).items() if leaf.dtype != jnp.float32}
    assert {name.removesuffix(".values").rpartition(".")[2] for name in few_bits} == {
        "tokens", "w_qkv", "w_out", "w_in"
    }  # fmt: skip
    assert isinstance(narrow.tokens[...], InferenceWeight)
