"""The decoder: an independent NumPy forward, causality, documents, stages, kernels, remat."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prmoe_jax.config import architecture
from prmoe_jax.config.loading import resolve
from prmoe_jax.config.schema import Config, ExecutionConfig, ModelConfig, MoeConfig
from prmoe_jax.errors import UserError
from prmoe_jax.model import attention_kernels
from prmoe_jax.model.attention import KVCache, attend_to_cache, rotary_frequencies, rotate
from prmoe_jax.model.attention_kernels import attend, resolve_attention, splash
from prmoe_jax.model.backends import check_backends
from prmoe_jax.model.batch import Batch
from prmoe_jax.model.layerwise import unstacked_blocks
from prmoe_jax.model.loss import forward
from prmoe_jax.model.transformer import Transformer, dropout, positions, resolve_remat
from prmoe_jax.moe.layer import MoE
from prmoe_jax.nn.parameters import named_leaves
from prmoe_jax.parallel.mesh import make_mesh
from prmoe_jax.training.evaluate import with_experts
from tests.support.models import layers_of
from tests.support.quick import jit

SIZES: dict = {"vocab_size": 31, "length": 13, "layers": 3, "d_model": 10, "heads": 2, "d_ff": 11}
SIZES |= {"dtype": "float32", "init_std": 0.3}
SMALL = ModelConfig(**SIZES)
MOE = MoeConfig(min_capacity=1)


def build(model, moe=MOE):
    model = Transformer(model, moe, jax.random.key(0))
    # Biases and norms start at constants that hide mistakes: move them.
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), model)


def small(text="3 layers", **changes):
    schedule = architecture.parse_fields(text)
    return ModelConfig(**SIZES | schedule | changes)


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_initialisation(family):
    """Weights N(0, σ), those that are added to the stream σ/√(2·layers); layers all different."""
    sizes = {"d_model": 64, "heads": 4, "d_ff": 64, "vocab_size": 512, "length": 64}
    model = small("8 layers", family=family, **sizes, kv_heads=0 if family == "gpt2" else 2)
    named = named_leaves(Transformer(model, MOE, jax.random.key(0)))
    weights = {name: x for name, x in named.items() if np.std(x)}
    kinds = {name.rpartition(".")[2] for name in weights}
    assert (
        kinds
        == {
            "gpt2": {"tokens", "positions", "w_qkv", "w_in", "w_out"},
            "qwen3": {"tokens", "output", "w_q", "w_kv", "w_in", "w_gate", "w_out"},
        }[family]
    )
    for name, x in weights.items():
        std = 0.3 / 4 if name.endswith("w_out") else 0.3
        np.testing.assert_allclose(np.std(x), std, rtol=0.05, err_msg=name)
        np.testing.assert_allclose(np.mean(x), 0, atol=std / 20, err_msg=name)
        if name.startswith("stages"):
            assert len(np.unique(x.reshape(8, -1)[:, 0])) == 8, name


@jit
def logits(model, tokens_BxL, segments_BxL):
    return model.logits(model(tokens_BxL, segments_BxL)[0])


@pytest.fixture(scope="module")
def batch():
    tokens_BxL = jax.random.randint(jax.random.key(3), (2, 13), 0, 31)
    segments_BxL = jnp.array([[1] * 5 + [2] * 8, [1] * 11 + [0] * 2])
    return tokens_BxL, segments_BxL


def numpy_forward(model, tokens_L):
    """GPT-2 with the same weights, one document, loops and float64."""
    config = model.config
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), model)

    def norm(n, x):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * n.scale[...] + n.shift[...]

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    x_LxD = p.tokens[...][tokens_L] + p.positions[...][: len(tokens_L)]
    for stage, plan in zip(p.stages, config.stages, strict=True):
        for n in range(plan.repeats):
            for stacked in stage.blocks:
                block = jax.tree.map(lambda x: x[n], stacked)  # noqa: B023
                a, y_LxD = block.attention, norm(block.norm_attention, x_LxD)
                out_LxD = np.zeros_like(x_LxD)
                for h in range(config.heads):
                    q, k, v = (y_LxD @ a.w_qkv[...][:, i, h] + a.b_qkv[...][i, h] for i in range(3))
                    for t in range(len(tokens_L)):
                        score = np.exp(q[t] @ k[: t + 1].T / np.sqrt(q.shape[1]))
                        out_LxD[t] += score / score.sum() @ v[: t + 1] @ a.w_out[...][h]
                x_LxD = x_LxD + out_LxD + a.b_out[...]
                m, y_LxD = block.mlp, norm(block.norm_mlp, x_LxD)
                hidden = gelu(y_LxD @ m.w_in[...] + m.b_in[...])
                x_LxD = x_LxD + hidden @ m.w_out[...] + m.b_out[...]
    return norm(p.norm, x_LxD) @ p.tokens[...].T


def test_dense_equals_an_independent_forward(batch):
    model = build(small())
    tokens_BxL, _ = batch
    got = logits(model, tokens_BxL, jnp.ones_like(tokens_BxL))
    for b in range(2):
        expected = numpy_forward(model, np.asarray(tokens_BxL[b]))
        np.testing.assert_allclose(got[b], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("text", ["3 layers", "3 layers, E=3, top 2", "3 layers, E=3, residual"])
def test_causality(text):
    """No logit up to position t depends on the embeddings after t: the gradient is exactly 0."""
    model = build(small(text))
    tokens_L = jnp.arange(13)  # each token once, so that its embedding stands for its position

    def early_logits(table):
        changed = jax.tree.unflatten(jax.tree.structure(model), jax.tree.leaves(model))
        changed.tokens = type(model.tokens)(table)
        x, _ = changed(tokens_L[None], jnp.ones((1, 13), jnp.int32))
        return jnp.square(x[0, :7]).sum()  # activations, since every logit sees the whole table

    gradient_VxD = np.asarray(jit(jax.grad(early_logits))(model.tokens[...]))
    assert (gradient_VxD[7:] == 0).all()
    assert (np.abs(gradient_VxD[:7]).max(1) > 0).all()


def test_documents_do_not_see_each_other(batch):
    """Without drops, a document gives the same logits packed as alone, padded or not."""
    model = build(small("3 layers, E=3, residual"), dataclasses.replace(MOE, min_capacity=13))
    tokens_BxL, segments_BxL = batch
    packed = logits(model, tokens_BxL, segments_BxL)
    for row, start, stop in ((0, 0, 5), (0, 5, 13), (1, 0, 11)):
        width = stop - start
        alone_1xL = jnp.zeros((1, 13), jnp.int32).at[0, :width].set(tokens_BxL[row, start:stop])
        ones_1xL = (jnp.arange(13) < width).astype(jnp.int32)[None]
        alone = logits(model, alone_1xL, ones_1xL)
        np.testing.assert_allclose(packed[row, start:stop], alone[0, :width], rtol=1e-4, atol=1e-4)


def test_padding_tokens_change_nothing(batch):
    model = build(small("3 layers, E=3"))
    tokens_BxL, segments_BxL = batch
    other_BxL = jnp.where(segments_BxL == 0, (tokens_BxL + 1) % 31, tokens_BxL)
    real = np.asarray(segments_BxL > 0)
    np.testing.assert_array_equal(
        np.asarray(logits(model, tokens_BxL, segments_BxL))[real],
        np.asarray(logits(model, other_BxL, segments_BxL))[real],
    )


def test_positions():
    segments = jnp.array([[1, 1, 1, 2, 2, 3, 0, 0], [1] * 8])
    assert positions(segments).tolist() == [[0, 1, 2, 0, 1, 0, 0, 1], list(range(8))]


@pytest.mark.parametrize(
    ("kind", "truncate", "expected_F"),
    [
        # 100, 10, 1 and 0.1 periods fit into the length before.
        ("llama3", True, [1, 0.1, 0.002, 0.0002]),
        ("yarn", True, [1, 0.06, 0.002, 0.0002]),  # half of 0.1, and half of a fifth of it
        ("yarn", False, [1, 0.1, 0.002, 0.0002]),
    ],
)
def test_frequencies_of_a_longer_context_by_hand(kind, truncate, expected_F):
    model = ModelConfig(
        **{"family": "llama", "d_model": 8, "heads": 1, "rope_scaling": (5, 1, 10, 628)},
        **{"rope_type": kind, "rope_truncate": truncate},
    )
    np.testing.assert_allclose(rotary_frequencies(model), expected_F, rtol=1e-3)
    assert math.isclose(model.rotary_scale, 1.16094 if kind == "yarn" else 1, rel_tol=1e-5)
    assert dataclasses.replace(model, rope_scaling=()).rotary_scale == 1


def test_only_what_rotates_is_scaled():
    x_BxLxHxK = jax.random.normal(jax.random.key(0), (1, 5, 2, 7))
    arguments = x_BxLxHxK, jnp.arange(5)[None], jnp.array([1.0, 0.1])
    once, twice = rotate(*arguments), rotate(*arguments, scale=2.0)
    np.testing.assert_allclose(twice[..., :4], 2 * once[..., :4], rtol=1e-6)
    np.testing.assert_array_equal(twice[..., 4:], x_BxLxHxK[..., 4:])


def test_experts_of_one_layer_are_changed():
    """In a pyramid of three stages, one of them repeated: no other layer and no other parameter."""
    schedule = {"layers": 8, "placement": "every 2", "experts": (2, 2, 3, 5)}
    model = build(dataclasses.replace(SMALL, **schedule))
    before = layers_of(model)
    for layer in (1, 3, 5, 7):
        after = layers_of(with_experts(model, layer, functools.partial(jnp.roll, shift=1, axis=0)))
        for number, (old, new) in enumerate(zip(before, after, strict=True)):
            for name, x in old.items():
                own = number == layer and ".experts." in f".{name}"
                np.testing.assert_array_equal(new[name], np.roll(x, 1, 0) if own else x)


def test_the_norm_of_the_stream_that_experts_add_to(batch):
    """That after attention and before the MLP; padding counts nowhere."""
    tokens_BxL, segments_BxL = batch
    segments_BxL = segments_BxL.at[:, -3:].set(0)
    model = build(small("1 layers, every 1, E=2"))
    (block,) = unstacked_blocks(model)
    x_BxLxD = model.tokens[...][tokens_BxL] + model.positions[...][positions(segments_BxL)]
    y_BxLxD, _ = block.attention(block.norm_attention(x_BxLxD), segments_BxL)
    expected = (jnp.square(x_BxLxD + y_BxLxD).sum(-1)[segments_BxL > 0]).sum()
    _, (router,) = jit(model)(tokens_BxL, segments_BxL)
    np.testing.assert_allclose(router.stream_square, expected, rtol=1e-4)


@pytest.mark.parametrize("remat", ["auto", "dots"])  # unrolled, and as a loop
def test_stages_equal_the_layers_one_by_one(batch, remat):
    """The scan over a pyramid's stages is the plain sequence of its blocks."""
    model, execution = build(small("7 layers, E=2x2+5, residual")), ExecutionConfig(remat=remat)
    tokens_BxL, segments_BxL = batch
    x_BxLxD = model.tokens[...][tokens_BxL] + model.positions[...][positions(segments_BxL)]
    apply = jit(lambda block, x_BxLxD: block(x_BxLxD, segments_BxL))
    experts = []
    for stage, plan in zip(model.stages, model.config.stages, strict=True):
        for n in range(plan.repeats):
            for stacked in stage.blocks:
                block = jax.tree.map(lambda x: x[n], stacked)  # noqa: B023
                x_BxLxD, metrics, _ = apply(block, x_BxLxD)
                experts.append(0 if metrics is None else len(metrics.assigned_E))
    got, routers = jit(functools.partial(model, execution=execution))(tokens_BxL, segments_BxL)
    np.testing.assert_allclose(got, model.norm(x_BxLxD), rtol=1e-4, atol=1e-4)
    assert tuple(experts) == model.config.schedule.experts == (0, 2, 0, 2, 0, 5, 0)
    assert [len(router.assigned_E) for router in routers] == [2, 2, 5]


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_recomputes_and_changes_no_gradient(batch, remat):
    def gradient(remat):
        def loss(model):
            x_BxLxD, _ = model(*batch, execution=ExecutionConfig(remat=remat))
            return jnp.square(model.logits(x_BxLxD)).mean()

        return jax.grad(loss)

    model = build(small("4 layers, E=3"))  # a loop of two repeats
    plain, thrifty = gradient("none"), gradient(remat)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        jit(plain)(model),
        jit(thrifty)(model),
    )
    count = [str(jax.make_jaxpr(g)(model)).count(" tanh ") for g in (plain, thrifty)]
    assert count[1] > count[0]  # the activations are computed again


@pytest.mark.parametrize(
    ("remat", "layers", "platform", "expected"),
    [
        ("auto", 8, "cpu", ("none", True)),
        ("auto", 9, "cpu", ("dots", False)),
        ("auto", 8, "tpu", ("dots", False)),
        ("none", 8, "cpu", ("none", True)),
        ("none", 9, "cpu", ("none", False)),
        ("none", 8, "gpu", ("none", False)),
        ("dots", 2, "cpu", ("dots", False)),
        ("full", 2, "tpu", ("full", False)),
    ],
)
def test_remat_choice(remat, layers, platform, expected):
    assert resolve_remat(remat, layers, platform) == expected


def test_bfloat16_on_a_cpu_in_training_and_evaluation(batch):
    """Training is close to float32, or equal without such products; evaluation is equal."""
    exact, rough = build(small()), build(small(dtype="bfloat16"))
    keys_B = jax.random.split(jax.random.key(0), len(batch[0]))

    def outputs(model, keys_B=None, products="auto"):
        return model(*batch, keys_B, ExecutionConfig(cpu_products=products))[0]

    np.testing.assert_array_equal(outputs(rough), outputs(exact))
    expected = outputs(exact, keys_B)
    np.testing.assert_array_equal(outputs(rough, keys_B, "float32"), expected)
    ours = outputs(rough, keys_B, "bfloat16")
    assert ours.dtype == jnp.bfloat16
    error = np.abs(ours.astype(jnp.float32) - expected).max()
    assert 0 < error < 0.05 * np.abs(expected).max()


def test_a_step_in_bfloat16_on_a_cpu_multiplies_only_bfloat16():
    """All products with weights and in attention do; every result is float32."""
    values = small("2 layers, E=3, residual", dtype="bfloat16", length=64, d_model=32)
    model = Transformer(values, MoeConfig(capacity_factor=math.inf), jax.random.key(0))
    tokens_BxL = jnp.ones((4, 64), jnp.int32)
    batch = Batch(tokens_BxL, tokens_BxL, tokens_BxL > 0, tokens_BxL)
    keys_B = jax.random.split(jax.random.key(0), 4)
    execution = ExecutionConfig(cpu_products="bfloat16")
    step = jax.jit(jax.grad(lambda model: forward(model, batch, keys_B, None, execution).loss))
    products = re.findall(
        r"dot_general.*: \(tensor<([x\d]+)x(\w+)>, tensor<([x\d]+)x(\w+)>\) -> tensor<.*x(\w+)>",
        step.lower(model).as_text(),
    )
    assert len(products) > 20
    for first, kind, second, other, result in products:
        assert (kind, other, result) in {("bf16", "bf16", "f32"), ("f32", "f32", "f32")}
        if kind == "f32":  # the router, the residual's coefficient, sums for the biases
            assert min(map(int, f"{first}x{second}".split("x"))) <= 3


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("2 layers, E=3, residual", {}),
        ("2 layers, E=3", {"family": "qwen2_moe", "biases": "all", "kv_heads": 1}),
    ],
)
def test_gradients_in_bfloat16_are_summed_in_float32(text, changes):
    """Over 8,192 tokens; some go to another expert than in float32."""
    tokens_BxL = jax.random.categorical(jax.random.key(1), -jnp.arange(31) / 9.0, shape=(128, 65))
    segments_BxL = jnp.ones((128, 64), jnp.int32)
    mask_BxL = segments_BxL.astype(bool)
    batch = Batch(tokens_BxL[:, :-1], tokens_BxL[:, 1:], mask_BxL, segments_BxL)

    keys_B = jax.random.split(jax.random.key(0), 128)
    execution = ExecutionConfig(cpu_products="bfloat16")

    def gradient(dtype):
        model = small(text, **{"length": 64, "d_model": 32, "init_std": 0.02} | changes)
        model = Transformer(dataclasses.replace(model, dtype=dtype), MoeConfig(), jax.random.key(0))
        loss = lambda model: forward(model, batch, keys_B, None, execution).loss  # noqa: E731
        return named_leaves(jit(jax.grad(loss))(model))

    exact, rounded = map(gradient, ("float32", "bfloat16"))
    for name, expected in exact.items():
        ours, expected = rounded[name][...], expected[...]
        exactly = ".b_" in name and "experts" not in name and "mix" not in name
        error = np.linalg.norm(ours - expected) / np.linalg.norm(expected)
        assert error < (0.01 if exactly else 0.05), name


@pytest.mark.parametrize("length", [37, 193])  # one block of queries, or four, the last one short
@pytest.mark.parametrize(
    ("dtype", "heads", "window", "sinks"),
    [
        ("float32", 3, 0, False),
        ("bfloat16", 3, 0, False),
        ("float32", 1, 67, False),
        ("float32", 3, 5, False),
        ("float32", 1, 67, True),
        ("bfloat16", 3, 0, True),
    ],
)
def test_blocks_equal_xla(length, dtype, heads, window, sinks):
    """Value and gradients, with documents across blocks, padding, shared keys, window and sinks."""
    q, k, v, dy = jax.random.normal(jax.random.key(0), (4, 2, length, 3, 5), dtype)
    sinks_H = jnp.array([0.5, 4.0, -2.0]) if sinks else None
    k, v = k[:, :, :heads], v[:, :, :heads]
    cut = length // 3
    segments = jnp.array([[1] * cut + [2] * (length - cut), [1] * (length - 9) + [0] * 9])

    def gradients(implementation):
        def product(q, k, v, sinks_H):
            y = attend(q, k, v, segments, implementation, window, sinks_H)
            return (y * dy).astype(jnp.float32).sum(), y

        of = (0, 1, 2, 3) if sinks else (0, 1, 2)
        (_, y), found = jax.value_and_grad(product, of, has_aux=True)(q, k, v, sinks_H)
        return y, *found

    tolerance = 2e-6 if dtype == "float32" else 0.03
    found = [jit(gradients, static_argnums=0)(name) for name in ("blocks", "xla")]
    for got, expected in zip(*found, strict=True):
        assert got.dtype == expected.dtype == (dtype if got.ndim > 1 else "float32")
        got, expected = (np.asarray(x, np.float32) for x in (got, expected))
        np.testing.assert_allclose(got, expected, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize(
    ("window", "key_heads", "sinks"),
    [(0, 4, None), (41, 4, None), (0, 2, None), (41, 1, None), (41, 2, [0.5, 4.0, -2.0, 1.0])],
)
def test_splash_equals_xla(window, key_heads, sinks, monkeypatch):
    """The TPU kernel, interpreted, with documents, padding, a window, shared keys and sinks."""
    sinks_H = None if sinks is None else jnp.array(sinks)
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 256, 4, 16))
    monkeypatch.setattr(attention_kernels, "splash", functools.partial(splash, interpret=True))
    k, v = k[:, :, :key_heads], v[:, :, :key_heads]
    segments = jnp.array([[1] * 100 + [2] * 156, [1] * 200 + [0] * 56])
    got = attend(q, k, v, segments, "splash", window, sinks_H)
    expected = attend(q, k, v, segments, "xla", window, sinks_H)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_gradients_of_splash_equal_those_of_xla(monkeypatch):
    """Interpreted as above; the kernel has a backward pass of its own."""
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 130, 4, 16))
    dy = jax.random.normal(jax.random.key(1), q.shape)
    monkeypatch.setattr(attention_kernels, "splash", functools.partial(splash, interpret=True))
    k, v = k[:, :, :2], v[:, :, :2]
    segments = jnp.array([[1] * 100 + [2] * 30, [1] * 90 + [0] * 40])

    def gradients(implementation):
        def loss(q, k, v, sinks_H):
            return (attend(q, k, v, segments, implementation, 41, sinks_H) * dy).sum()

        return jax.grad(loss, (0, 1, 2, 3))(q, k, v, jnp.array([0.5, 4.0, -2.0, 1.0]))

    for got, expected in zip(gradients("splash"), gradients("xla"), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_splash_at_a_length_that_is_padded_equals_xla(monkeypatch):
    monkeypatch.setattr(attention_kernels, "splash", functools.partial(splash, interpret=True))
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 61, 1, 8))
    segments = jnp.array([[1] * 61, [1] * 20 + [2] * 30 + [0] * 11])
    got, expected = (
        jit(functools.partial(attend, implementation=kind))(q, k, v, segments)
        for kind in ("splash", "xla")
    )
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def cudnn(monkeypatch):
    """Lets JAX find the cuDNN that this machine lacks, so that it checks shapes as on a GPU."""
    module = "jax._src.cudnn.fused_attention_stablehlo"
    monkeypatch.setattr(f"{module}.check_cudnn_version", lambda: 91000)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"d_model": 16}, ""),
        ({"d_model": 256, "length": 14}, ""),
        ({"d_model": 10}, "multiple of 8, but got 5"),
        ({"d_model": 272}, "<= 128 and a multiple of 8, but got 136"),
    ],
)
def test_cudnn_only_where_it_accepts_the_shape(changes, expected, cudnn, caplog):
    caplog.set_level("INFO")
    model = dataclasses.replace(SMALL, dtype="bfloat16", **changes)
    assert resolve_attention("auto", model, "gpu") == ("xla" if expected else "cudnn")
    check_backends(
        dataclasses.replace(Config(), model=model), "gpu", make_mesh(Config(), jax.devices()[:1])
    )
    why = [text for text in caplog.messages if "cuDNN's attention cannot run this" in text]
    assert [expected in text for text in why] == [True] * bool(expected)
    if expected:
        with pytest.raises(UserError, match=f"attention=cudnn cannot run .*{expected}"):
            resolve_attention("cudnn", model, "gpu")
    else:
        assert resolve_attention("cudnn", model, "gpu") == "cudnn"


def test_cudnn_on_older_and_newer_gpus(cudnn, monkeypatch):
    """Heads of up to 256 from Hopper on; none before Ampere; none where cuDNN is missing."""
    wide = dataclasses.replace(SMALL, dtype="bfloat16", d_model=512)
    narrow = dataclasses.replace(wide, d_model=16)

    class Device:
        compute_capability = "9.0"

    monkeypatch.setattr(jax, "local_devices", lambda: [Device])
    module = "jax._src.cudnn.fused_attention_stablehlo"
    monkeypatch.setattr(f"{module}.check_compute_capability", lambda least: least <= "9.0")
    assert resolve_attention("auto", wide, "gpu") == "cudnn"
    monkeypatch.setattr(f"{module}.check_compute_capability", lambda least: False)
    assert resolve_attention("auto", wide, "gpu") == "xla"
    Device.compute_capability = "7.5"
    assert resolve_attention("auto", narrow, "gpu") == "xla"
    with pytest.raises(UserError, match="needs compute capability 8.0, this GPU has 7.5"):
        resolve_attention("cudnn", narrow, "gpu")
    Device.compute_capability = "8.0"
    assert resolve_attention("auto", narrow, "gpu") == "cudnn"
    monkeypatch.undo()
    assert resolve_attention("auto", narrow, "gpu") == "xla"


SINKS = {"dtype": "bfloat16", "d_model": 48, "attention_sinks": "learned"}


@pytest.mark.parametrize(
    ("attention", "platform", "changes", "expected"),
    [
        ("auto", "cpu", {}, "blocks"),
        ("xla", "cpu", {}, "xla"),
        ("blocks", "cpu", {}, "blocks"),
        ("auto", "gpu", {"dtype": "bfloat16", "d_model": 16}, "cudnn"),
        ("auto", "gpu", {"dtype": "float32"}, "xla"),
        ("auto", "tpu", {"length": 256}, "splash"),
        ("auto", "tpu", {"length": 250}, "xla"),
        ("xla", "tpu", {"length": 256}, "xla"),
        ("splash", "cpu", {"length": 256}, "needs a tpu, this is a cpu"),
        ("splash", "tpu", {"length": 250}, "divisible by 128; use 256"),
        ("cudnn", "cpu", {}, "needs a gpu, this is a cpu"),
        ("cudnn", "gpu", SINKS, "heads of 24: it has no attention sinks; use auto"),
        ("auto", "gpu", SINKS, "xla"),
    ],
)
def test_attention_choice(attention, platform, changes, expected, cudnn):
    model = dataclasses.replace(SMALL, **changes)
    if " " not in expected:
        assert resolve_attention(attention, model, platform) == expected
    else:
        with pytest.raises(UserError, match=expected):
            resolve_attention(attention, model, platform)


def test_dropout():
    """Keeps the mean, drops the stated share, each row by its own key, nothing in evaluation."""
    x = jnp.ones((2, 200, 300))
    keys = jax.random.split(jax.random.key(0), 2)
    y = dropout(x, 0.25, keys)
    assert abs(float((y == 0).mean()) - 0.25) < 0.01
    np.testing.assert_allclose(y[y > 0], 1 / 0.75, rtol=1e-6)
    assert (y[0] != y[1]).any()
    np.testing.assert_array_equal(y[1:], dropout(x[1:], 0.25, keys[1:]))
    assert dropout(x, 0.25, None) is x


def test_dropout_differs_by_layer_and_repeat(batch):
    """Two repeats of a stage and two layers of a cell draw different masks."""
    model = build(small("4 layers, E=1", dropout=0.5))
    tokens_BxL, segments_BxL = batch
    keys_B = jax.random.split(jax.random.key(5), 2)
    run = jit(model)
    training = run(tokens_BxL, segments_BxL, keys_B=keys_B)[0]
    evaluation = run(tokens_BxL, segments_BxL)[0]
    assert np.abs(training - evaluation).max() > 0.01
    # With identical blocks and a residual of 0, equal masks would give equal updates.
    same = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), model.stages[0])
    for block in same.blocks:
        block.attention = jax.tree.map(jnp.zeros_like, block.attention)
        block.mlp = jax.tree.map(jnp.zeros_like, block.mlp)
        mlp = block.mlp.experts if isinstance(block.mlp, MoE) else block.mlp
        mlp.b_out = type(mlp.b_out)(jnp.ones(mlp.b_out.shape))
    keys_NxB = jax.vmap(jax.random.split, (0, None), 1)(keys_B, 2)
    x_BxLxD = jnp.zeros((2, 13, 10))
    y_BxLxD, _ = same(x_BxLxD, segments_BxL, keys_NxB)
    draws = np.unique(np.asarray(y_BxLxD)[np.asarray(segments_BxL) > 0])
    assert draws.tolist() == [0, 2, 4, 6, 8]  # 4 independent draws of 0 or 2


def test_compiled_size_does_not_grow_with_depth():
    """A stage is compiled once: 24 layers and 10 layers give programs of equal length."""

    def operations(layers):
        settings = {
            "model": {"layers": layers, "placement": "every 2", "experts": (4,), "attention": "xla"}
        }
        config = resolve(settings | {"train": {"steps": 1}})
        model = jax.eval_shape(lambda: Transformer(config.model, MOE, jax.random.key(0)))
        ids = jax.ShapeDtypeStruct((2, 256), jnp.int32)

        def loss(model, ids):
            return model(ids, ids)[0].astype(jnp.float32).sum()

        text = jit(jax.grad(loss)).lower(model, ids).as_text()
        return text.count("dot_general")

    assert operations(24) == operations(10) > 0


@pytest.mark.parametrize("queries", [1, 3])
def test_decoding_on_a_tpu_is_attention_as_elsewhere(queries, monkeypatch):
    """Its own ways to add keys and to multiply a single query give the same numbers."""
    batch, heads, width, room = 2, 3, 5, 7
    q, k, v = jax.random.normal(jax.random.key(0), (3, batch, queries, heads, width))
    old = KVCache(
        jax.random.normal(jax.random.key(1), (batch, heads, width, room)),
        jax.random.normal(jax.random.key(2), (batch, heads, room, width)),
    )
    # One sequence is behind the other, and the last tokens are past the cache's end.
    position_BxQ = jnp.array([[1], [room - 1]]) + jnp.arange(queries)

    def step():
        cache = old.extended(k, v, position_BxQ)
        return attend_to_cache(q, cache, position_BxQ), cache

    expected = step()
    monkeypatch.setattr("prmoe_jax.model.attention.platform", lambda: "tpu")
    found = step()
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, found[1], expected[1])


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("heads", [6, 2, 1])
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("sinks", [False, True])
def test_attention_to_a_cache_by_hand(sinks, queries, heads, platform, monkeypatch):
    """Heads of queries that share keys, a window of four tokens, and sinks."""
    monkeypatch.setattr("prmoe_jax.model.attention.platform", lambda: platform)
    rng = np.random.default_rng(0)
    q_BxQxHxK = rng.normal(size=(2, queries, 6, 4)).astype(np.float32)
    k_BxJxKxT, v_BxJxTxK = (
        rng.normal(size=shape).astype(np.float32)
        for shape in ((2, heads, 4, 11), (2, heads, 11, 4))
    )
    position_BxQ = np.array([[2], [5]]) + np.arange(queries)
    sinks_H = rng.normal(size=6).astype(np.float32) if sinks else None
    cache = KVCache(k_BxJxKxT, v_BxJxTxK)
    y = attend_to_cache(q_BxQxHxK, cache, position_BxQ, 4, sinks_H)
    for b, q, h in np.ndindex(2, queries, 6):
        last, j = position_BxQ[b, q], h // (6 // heads)
        seen = slice(max(0, last - 3), last + 1)
        weight = np.exp(q_BxQxHxK[b, q, h] @ k_BxJxKxT[b, j, :, seen] / 2)
        total = weight.sum() + (np.exp(sinks_H[h]) if sinks else 0)
        expected = weight / total @ v_BxJxTxK[b, j, seen]
        np.testing.assert_allclose(y[b, q, h], expected, rtol=1e-5, atol=1e-6)
