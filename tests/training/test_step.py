"""One update: accumulation changes nothing, AdamW against NumPy, schedule, decay rule, loss."""

import dataclasses
import math
from decimal import Decimal
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prmoe_jax.data.pipeline import Data, Mixture, Windows
from prmoe_jax.errors import UserError
from prmoe_jax.model.layerwise import dropless, unstacked_blocks
from prmoe_jax.model.loss import Sums, forward, token_losses, totals, training_loss
from prmoe_jax.model.transformer import init_model, positions
from prmoe_jax.nn.parameters import named_leaves
from prmoe_jax.parallel.mesh import make_mesh
from prmoe_jax.parallel.microbatches import add_up
from prmoe_jax.run.metrics import loss_parts, to_python
from prmoe_jax.training import evaluate
from prmoe_jax.training.evaluate import evaluate_model
from prmoe_jax.training.optimizer import decay_mask, learning_rate, make_optimizer
from prmoe_jax.training.step import init_state, make_train_step
from tests.support.batches import make_batch
from tests.support.configs import GENTLE, settings
from tests.support.quick import jit
from tests.support.shards import Stream


@pytest.mark.parametrize(
    ("text", "model", "moe"),
    [
        ("2 layers, E=3, residual", {"dropout": 0.3}, {"overflow": "random", "noise": "jitter"}),
        ("2 layers, E=3, top 2", {}, {"second_expert_sampling": True, "group_size": 4}),
        (
            "4 layers, E=2+3, residual",
            {"residual_mix": "sum"},
            {"bias_update_rate": 0.1, "overflow": "probability", "z_loss_weight": 0.01},
        ),
        ("2 layers, E=3", {}, {"router": "expert_choice", "group_size": 16}),
        (
            "2 layers, every 1, E=3+5, top 2",
            {"dropout": 0.3},
            {"balance": "batch", "aux_loss_weight": 0.5, "overflow": "random"},
        ),
    ],
)
def test_accumulation_changes_nothing(text, model, moe):
    """Parameters and every metric, with padding, dropout and random routing, in 1 and 4 parts."""
    results = []
    for microbatches in (1, 4):
        train = {"accumulate": microbatches, "z_loss": 0.01}
        values = settings(text, model=model, moe=moe, train=train, optimizer=GENTLE)
        state = init_state(values)
        step = jit(make_train_step(values))
        for seed in range(2):
            state, metrics = step(state, make_batch(seed))
        results.append((named_leaves(state.model), metrics))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)  # noqa: E731
    jax.tree.map(close, *results)


def test_noise_differs_by_step_row_and_seed():
    """The loss of one of eight equal rows, under dropout with the same weights."""
    values = settings("1 layers", model={"dropout": 0.5})
    state = init_state(values)
    batch = jax.tree.map(lambda x: np.repeat(x[:1], 8, axis=0), make_batch())

    def losses(seed):
        step = jit(make_train_step(dataclasses.replace(values, seed=seed)))

        def loss(number, row):
            alone = batch._replace(mask_BxL=batch.mask_BxL & (np.arange(8) == row)[:, None])
            return float(step(state._replace(step=jnp.int32(number)), alone)[1]["loss"])

        return [loss(0, 0), loss(0, 1), loss(1, 0), loss(0, 0)]

    *different, again = losses(0)
    assert again == different[0]
    *others, _ = losses(1)
    assert len({round(loss, 5) for loss in different + others}) == 6


def test_adamw_equals_numpy():
    """Two updates, clipped by the whole gradient's norm, decayed by name."""
    values = settings(optimizer={"clip_norm": 0.5, "weight_decay": 0.3, "warmup_tokens": 200})
    state = init_state(values)
    update, rate = jit(make_optimizer(values).update), learning_rate(values)
    params = {k: np.asarray(v, np.float64) for k, v in named_leaves(state.model).items()}
    first = {k: np.zeros_like(v) for k, v in params.items()}
    second = {k: np.zeros_like(v) for k, v in params.items()}
    model, opt = state.model, state.optimizer
    rng = np.random.default_rng(0)
    for step in range(2):
        gradient = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), model)
        updates, opt = update(gradient, opt, model)
        model = jax.tree.map(jnp.add, model, updates)
        named = {k: np.asarray(v, np.float64) for k, v in named_leaves(gradient).items()}
        norm = np.sqrt(sum((g**2).sum() for g in named.values()))
        for name, g in named.items():
            g = g * min(1, 0.5 / norm)
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.95 * second[name] + 0.05 * g**2
            m = first[name] / (1 - 0.9 ** (step + 1))
            v = second[name] / (1 - 0.95 ** (step + 1))
            decays = not name.rsplit(".", 1)[-1].startswith(("b_", "scale", "shift"))
            change = m / (np.sqrt(v) + 1e-8) + 0.3 * decays * params[name]
            params[name] = params[name] - float(rate(step)) * change
    for name, leaf in named_leaves(model).items():
        np.testing.assert_allclose(leaf, params[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_decay_rule_names_every_parameter():
    """Stacked biases and norms are matrices and yet don't decay; an unknown name is an error."""
    model = init_model(settings("4 layers, E=2+3, residual"))
    decided = named_leaves(decay_mask(model))
    assert decided.keys() == named_leaves(model).keys()
    spared = {name.rsplit(".", 1)[-1] for name, decays in decided.items() if not decays}
    assert spared == {"b_qkv", "b_in", "b_out", "b_mix", "scale", "shift"}
    with pytest.raises(KeyError, match="w_new"):
        decay_mask({"w_new": jnp.zeros((3, 3))})


def test_learning_rate_by_hand():
    """Warm-up over 4 steps of 64 tokens, cosine to step 12, then flat."""
    optimizer = {"warmup_tokens": 256, "decay_tokens": 12 * 64}
    optimizer |= {"learning_rate": 1e-2, "min_learning_rate": 2e-3}
    rate = learning_rate(settings(optimizer=optimizer, train={"steps": 30}))
    assert [round(float(rate(s)), 6) for s in (0, 1, 3, 7, 11, 25)] == pytest.approx(
        [0.0025, 0.005, 0.01, 0.006, 0.002, 0.002]
    )


def test_learning_rate_that_is_constant_and_then_decays_by_hand():
    """Warm-up over 4 steps of 64 tokens; 20 steps decay in the last 5, 40 in the last 10."""
    optimizer = {"schedule": "wsd", "decay_fraction": 0.25, "warmup_tokens": 256}
    optimizer |= {"learning_rate": 1e-2, "min_learning_rate": 2e-3}
    config = settings(optimizer=optimizer, train={"steps": 20})
    assert (config.decay_start, config.decay_end) == (15, 20)
    rate = jax.jit(learning_rate(config))
    assert [float(rate(s)) for s in (0, 1, 3, 14, 15, 18, 19, 30)] == pytest.approx(
        [0.0025, 0.005, 0.01, 0.01, 0.0084, 0.0036, 0.002, 0.002], rel=1e-6
    )
    longer = jax.jit(learning_rate(settings(optimizer=optimizer, train={"steps": 40})))
    assert [rate(s) for s in range(15)] == [longer(s) for s in range(15)]
    assert longer(15) == longer(29) == np.float32(1e-2) > longer(30)
    # The decay may end before the run does, and a run may end before its decay.
    fixed = settings(optimizer=optimizer | {"decay_tokens": 640}, train={"steps": 20})
    assert (fixed.decay_start, fixed.decay_end) == (8, 10)  # 7.5 of 10 steps, rounded to even
    assert settings(optimizer={"schedule": "wsd"}, train={"steps": 1}).decay_start == 0


def test_learning_rate_ends_with_the_run_by_default():
    rate = learning_rate(settings(train={"steps": 7}))
    assert float(rate(6)) == pytest.approx(1e-4)
    assert float(rate(5)) > 1.1e-4


def test_loss_free_balancing_moves_each_bias_towards_even_load():
    """By hand, over stages and repeats; the bias changes who is chosen, and nothing else."""
    moe = {"bias_update_rate": 0.25, "aux_loss_weight": 0.0}
    values = settings("6 layers, E=2x2+5, residual", moe=moe)
    state = init_state(values)
    step = jit(make_train_step(values))
    biases = {layer: np.zeros(2 if layer < 5 else 5) for layer in (1, 3, 5)}
    for seed in range(3):
        state, metrics = step(state, make_batch(seed))
        metrics = to_python(metrics, values)
        for layer, bias in biases.items():
            load = np.asarray(metrics[f"layers/{layer:02d}/expert_load"])
            bias += 0.25 * np.sign(load.mean() - load)
            bias -= bias.mean()
    first, second = (stage.blocks[1].mlp.bias_router[...] for stage in state.model.stages)
    np.testing.assert_allclose(first, [biases[1], biases[3]], atol=1e-6)
    np.testing.assert_allclose(second, [biases[5]], atol=1e-6)
    assert first.any()
    assert second.any()


def test_balance_over_the_whole_batch():
    """The share of all choices, and the mean probability, of every routed token of the batch."""
    moe, batch = {"balance": "batch", "aux_loss_weight": 0.5}, make_batch()
    values = settings("2 layers, every 1, E=3+5, top 2", moe=moe)
    model = init_model(values)
    _, metrics = jit(make_train_step(values))(init_state(values), batch)
    metrics = to_python(metrics, values)
    assert metrics["loss"] == pytest.approx(metrics["lm_loss"] + 0.5 * metrics["aux_loss"])
    routed = batch.segments_BxL > 0
    x_BxLxD = model.tokens[...][batch.tokens_BxL]
    x_BxLxD += model.positions[...][positions(batch.segments_BxL)]
    block = unstacked_blocks(model)[0]
    y_BxLxD, _ = block.attention(block.norm_attention(x_BxLxD), batch.segments_BxL)
    logits_BxLxE = block.norm_mlp(x_BxLxD + y_BxLxD) @ block.mlp.w_router[...]
    probs_TxE = np.asarray(jax.nn.softmax(logits_BxLxE))[routed]
    chosen_Tx2 = np.argsort(-probs_TxE, 1)[:, :2]
    share_E = np.bincount(chosen_Tx2.ravel(), minlength=3) / chosen_Tx2.size
    expected = 3 * (share_E * probs_TxE.mean(0)).sum()
    assert metrics["layers/00/aux_loss"] == pytest.approx(expected, rel=1e-5)


def test_loss_is_the_sum_of_its_parts():
    values = settings(train={"z_loss": 0.01}, moe={"aux_loss_weight": 0.5, "z_loss_weight": 0.1})
    state = init_state(values)
    _, metrics = jit(make_train_step(values))(state, make_batch())
    metrics = to_python(metrics, values)
    parts = metrics["lm_loss"] + 0.01 * metrics["z_loss"] + 0.5 * metrics["aux_loss"]
    parts += 0.1 * metrics["layers/01/router_z_loss"]
    assert metrics["loss"] == pytest.approx(parts, rel=1e-6)
    assert metrics["aux_loss"] == pytest.approx(metrics["layers/01/aux_loss"])
    assert sum(metrics["layers/01/expert_load"]) == pytest.approx(1)
    assert 0 < metrics["layers/01/residual_coefficient"] < 1
    assert metrics["grad_norm"] > 0


def test_cross_entropy_and_mask_by_hand():
    """Nats of the unmasked targets; what is masked, tokens and targets, doesn't matter."""
    values = settings("2 layers")
    model, batch = init_model(values), make_batch()
    x, _ = model(batch.tokens_BxL, batch.segments_BxL)
    log_probs = jax.nn.log_softmax(model.logits(x).astype(np.float32))
    rows, columns = np.nonzero(batch.mask_BxL)
    nats = -np.asarray(log_probs)[rows, columns, batch.targets_BxL[rows, columns]]
    sums = forward(model, batch)
    np.testing.assert_allclose(sums.lm_loss, nats.sum(), rtol=1e-5)
    assert sums.tokens == len(nats) == batch.mask_BxL.sum() < batch.mask_BxL.size
    other = batch._replace(targets_BxL=np.where(batch.mask_BxL, batch.targets_BxL, 7))
    assert forward(model, other).lm_loss == sums.lm_loss
    total = totals(batch, values)
    np.testing.assert_allclose(training_loss(sums, total, values), nats.mean(), rtol=1e-5)


@pytest.mark.parametrize("balance", ["group", "batch"])
def test_parts_of_the_loss_add_up(balance):
    """What the log shows beside the language model's loss; a part without a weight is left out."""
    weights = {"aux_loss_weight": 0.5, "z_loss_weight": 0.25, "balance": balance}
    train = {"z_loss": 0.125, "accumulate": 2}
    values = settings("4 layers, E=2+3, residual", moe=weights, train=train)
    _, metrics = jit(make_train_step(values))(init_state(values), make_batch())
    metrics = to_python(metrics, values)
    parts = loss_parts(metrics, values)
    assert list(parts) == ["balance", "router z-loss", "z-loss"] and min(parts.values()) > 0.01
    assert metrics["lm_loss"] + sum(parts.values()) == pytest.approx(metrics["loss"], rel=1e-5)
    plain = settings("4 layers, E=2+3, residual", moe={"aux_loss_weight": 0.0})
    assert loss_parts(metrics, plain) == {}


def test_evaluation_uses_its_own_capacity():
    values = settings("2 layers, E=3", moe={"capacity_factor": 0.3})
    batch, model = make_batch(), init_model(values)
    keys_B = jax.random.split(jax.random.key(0), len(batch.tokens_BxL))
    tight, ample = forward(model, batch, keys_B), forward(dropless(model), batch)
    assert tight.routers[0].dropped_E.sum() > forward(model, batch).routers[0].dropped_E.sum() > 0
    assert ample.routers[0].dropped_E.sum() == 0


@pytest.mark.parametrize(("microbatches", "together"), [(1, 1), (3, 1), (2, 3), (5, 2)])
def test_a_batch_is_cut_into_microbatches(microbatches, together):
    """Every row is in one microbatch, beside its neighbours; each reaches over the batch."""
    rows, seen = jnp.arange(30), []

    def measure(row_B):
        jax.debug.callback(lambda row_B: seen.append(row_B.tolist()), row_B)
        return row_B.sum(), (row_B**2).sum()

    assert [int(x) for x in add_up(measure, rows, microbatches, together)] == [435, 8555]
    jax.effects_barrier()
    assert sorted(sum(seen, [])) == list(range(30))
    assert len(seen) == microbatches
    for microbatch in seen:
        starts = microbatch[::together]
        assert microbatch == [start + i for start in starts for i in range(together)]
        assert all(start % together == 0 for start in starts)
        assert max(microbatch) - min(microbatch) >= 30 - microbatches * together


def validation(windows, length=8, seed=0):
    """Data whose validation split has so many windows, the last one half full."""
    tokens = windows * length - length // 2
    stream = np.random.default_rng(seed).integers(0, 384, tokens + 1).astype(np.uint16)
    stream = Stream(stream, np.arange(0, tokens, 11))
    return Data(None, None, Windows(stream, length, False, text_bytes=tokens), "")


def evaluated(values, data, run, model=None, limit=0):
    """`evaluate_model` on one device."""
    return evaluate_model(run, model, values, data, make_mesh(values, jax.devices()[:1]), limit)


@pytest.mark.parametrize("limit", [0, 1])
def test_evaluation_in_portions_measures_the_same_with_less_memory(limit):
    """As XLA compiles it; routing groups of two windows stay what they are."""
    found, temporaries, model = [], [], init_model(settings())
    for microbatches in (1, 4):
        values = settings(train={"accumulate": microbatches}, moe={"group_size": 16})
        step = jit(forward)

        def run(model, batch):
            memory = step.lower(model, batch).compile().memory_analysis()  # noqa: B023
            temporaries.append(memory.temp_size_in_bytes)
            return step(model, batch)  # noqa: B023

        found.append(evaluated(values, validation(11), run, model, limit))
    assert max(temporaries[-4:]) < 0.5 * temporaries[0]
    whole, parts = found
    assert whole.keys() == parts.keys()
    assert whole["tokens"] == parts["tokens"] == (64 if limit else 84)
    assert whole["drop_fraction"] > 0.05
    for name, value in whole.items():
        np.testing.assert_allclose(parts[name], value, rtol=1e-6, atol=1e-7, err_msg=name)


@pytest.mark.parametrize(
    ("text", "moe", "length"),
    [
        ("2 layers", {}, 13),
        ("2 layers, E=3", {}, 64),  # padding decides the capacity
        ("2 layers, E=3", {"eval_capacity_factor": math.inf}, 13),
        ("2 layers, E=3", {"group_size": 8}, 16),
        ("2 layers, E=3", {"group_size": 8, "eval_capacity_factor": math.inf}, 16),
        ("2 layers, E=3", {"group_size": 64}, 64),
        ("2 layers, E=3", {"group_size": 128}, 64),
        ("2 layers, E=3", {"router": "expert_choice"}, 64),
    ],
)
def test_windows_are_cut_to_a_short_text(text, moe, length, monkeypatch):
    """A window of 64 and a text of 13 tokens: no metric differs from that of whole windows."""
    values = settings(text, moe=moe, model={"length": 64}, batch_size=6)
    stream = np.random.default_rng(0).integers(0, 384, 14).astype(np.uint16)
    data = Data(None, None, Windows(Stream(stream, [0, 6]), 64, False, text_bytes=13), "")
    shapes, found, model = [], [], init_model(values)
    step = jit(forward)

    def run(model, batch):
        shapes.append(batch.tokens_BxL.shape)
        return step(model, batch)

    for cut in (evaluate._cut, lambda data, config: data):
        monkeypatch.setattr(evaluate, "_cut", cut)
        found.append(evaluated(values, data, run, model))
    rows = max(1, moe.get("group_size", 0) // 64)  # as many windows as a group needs
    assert shapes == [(rows, length), (rows, 64)]
    short, whole = found
    assert short.keys() == whole.keys() and short["tokens"] == 13
    for name, value in whole.items():
        if "position_drop" not in name:  # it has one place for each of a few tokens
            np.testing.assert_allclose(short[name], value, rtol=1e-5, atol=1e-7, err_msg=name)


@pytest.mark.parametrize(
    ("free", "fixed", "group", "tried", "rows"),
    [
        (1100, 0, 0, [11], 11),  # all windows, though training's batch has 16
        (1099, 0, 0, [11, 10], 10),
        (850, 500, 0, [11, 5, 4, 3], 3),
        (850, 0, 16, [12, 8], 8),  # groups of two windows
        (399, 0, 16, [12], 2),
        (0, 0, 0, [11], 1),
    ],
)
def test_portions_fit_the_free_memory(free, fixed, group, tried, rows, monkeypatch):
    """By hand: a window needs 100 bytes, and three quarters of the free memory may be used."""
    monkeypatch.setattr(evaluate, "free_bytes", lambda: -(-free * 4 // 3))
    seen = []

    def lower(batch):
        seen.append(len(batch.tokens_BxL))
        needed = SimpleNamespace(temp_size_in_bytes=100 * seen[-1] + fixed)
        program = SimpleNamespace(memory_analysis=lambda: needed)
        return SimpleNamespace(compile=lambda: program)

    values = settings(batch_size=16, moe={"group_size": group})
    mesh = make_mesh(values, jax.devices()[:1])
    train = evaluate._fitting(lower, values, validation(11), mesh).train
    assert (seen, train.batch_size, train.accumulate) == (tried, rows, 1)


def test_bits_per_byte_of_a_part_of_the_split():
    """Places without a target hold no text, and each part of a mixture has a ratio of its own."""
    values = settings("2 layers", batch_size=2)

    def run(model, batch):
        """Seven of eight places are targets, and each costs one bit."""
        count = np.float32(14)
        return Sums(np.int32(14), count * np.log(2), count * np.log(2), np.float32(0), [])

    data = validation(4)
    few = Windows(data.validation.stream, 8, False, text_bytes=56)
    many = Windows(data.validation.stream, 8, False, text_bytes=5600)
    mixed = dataclasses.replace(data, validation=Mixture([few, many], [Decimal(1)] * 2))
    bytes_read = 56 * 8 / few.tokens + 5600 * 8 / many.tokens  # a window of each
    found = evaluated(values, mixed, run, limit=1)
    assert found["bits_per_byte"] == pytest.approx(14 / bytes_read, rel=1e-6)
    whole = evaluated(values, mixed, run)
    assert whole["bits_per_byte"] == pytest.approx(4 * 14 / 5656, rel=1e-6)


@pytest.mark.parametrize("across", [False, True])
def test_the_loss_of_each_document_is_that_of_its_tokens(across):
    """Documents of 11 tokens in windows of 8, token by token; a mixture; parts of a batch."""
    values, model = settings("2 layers, E=3", batch_size=4), init_model(settings("2 layers, E=3"))
    data = validation(5)
    source = dataclasses.replace(data.validation, cross_document_attention=across)
    other = Windows(Stream(np.arange(1, 16), [0, 3]), 8, across, text_bytes=14)
    expected = []
    for windows, starts in ((source, range(0, 36, 11)), (other, (0, 3))):
        first = len(expected)
        expected += [[0.0, 0] for _ in starts]
        for i, window in enumerate(windows):
            batch = jax.tree.map(lambda x: x[None], window)
            x_BxLxD, _ = model(batch.tokens_BxL, batch.segments_BxL)
            log_p = jax.nn.log_softmax(model.unembedding(x_BxLxD.dtype).logits(x_BxLxD))[0]
            for place in np.flatnonzero(window.mask_BxL):
                document = sum(start <= 8 * i + place for start in starts) - 1
                expected[first + document][0] -= float(log_p[place, window.targets_BxL[place]])
                expected[first + document][1] += 1
    assert [count for _, count in expected] == [11, 11, 11, 3, 3, 11]
    for windows, part in ((source, expected[:4]), (Mixture([source, other], [1, 1]), expected)):
        data = dataclasses.replace(data, validation=windows)
        mesh = make_mesh(values, jax.devices()[:1])
        measure = jit(partial(forward, measure=token_losses))
        found = evaluate_model(measure, model, values, data, mesh, documents=True)
        np.testing.assert_allclose(found["documents"], part, rtol=0, atol=0.0051)
        assert found["tokens"] == sum(count for _, count in part)
        nats = sum(nats for nats, _ in part)
        assert found["loss"] == pytest.approx(nats / found["tokens"], rel=1e-5)
        usual = evaluate_model(jit(forward), model, values, data, mesh)
        del found["documents"]
        assert usual.keys() == found.keys()
        for name, value in usual.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-7, err_msg=name)


def test_sums_of_an_evaluation_have_64_bits():
    """Three batches of 2,147,483,647 targets each, of which int32 holds one."""
    values = settings("2 layers", batch_size=2)
    count, loss = np.int32(2**31 - 1), np.float32(2**31)

    def run(model, batch):
        return Sums(jnp.asarray(count), jnp.asarray(loss), jnp.asarray(loss), jnp.zeros(()), [])

    found = evaluated(values, validation(5), run)
    assert found["tokens"] == 3 * (2**31 - 1)
    assert found["loss"] == pytest.approx(1.0, rel=1e-7)


def test_the_next_batch_runs_while_the_sums_of_the_one_before_are_fetched():
    events = []

    class Later:
        """A number that a device is computing."""

        def __init__(self, batch):
            self.batch = batch

        def __array__(self, dtype=None, copy=None):
            events.append(f"fetched {self.batch}")
            return np.asarray(1, np.int32)

    def run(model, batch):
        number = sum("ran" in event for event in events)
        events.append(f"ran {number}")
        return Sums(Later(number), *[np.float32(1)] * 3, [])

    assert evaluated(settings("2 layers", batch_size=2), validation(5), run)["tokens"] == 3
    assert events == ["ran 0", "ran 1", "fetched 0", "ran 2", "fetched 1", "fetched 2"]


@pytest.mark.parametrize("stream", [[256], [256, 256]])
def test_a_validation_split_without_text(stream):
    """No document, and one that is empty."""
    data = Data(None, None, Windows(Stream(stream, np.arange(len(stream) - 1)), 8, False), "")
    with pytest.raises(UserError, match=rf"=sotu has no text \({len(stream) - 1} tokens"):
        evaluated(settings("2 layers"), data, run=None)


def test_seed_decides_the_model():
    values = settings()
    same, other = init_model(values), init_model(dataclasses.replace(values, seed=1))
    leaves = named_leaves(init_model(values))
    for name, leaf in named_leaves(same).items():
        np.testing.assert_array_equal(leaf, leaves[name])
    assert (other.tokens[...] != same.tokens[...]).any()
