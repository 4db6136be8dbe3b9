"""Fewer experts: importance against its definition, choices by hand, and functions kept."""

import dataclasses
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prmoe_jax.cli import main
from prmoe_jax.config.loading import load, save
from prmoe_jax.config.schema import MeshConfig
from prmoe_jax.distill.budget import choose, ranked
from prmoe_jax.distill.importance import _microbatches, measure, prices
from prmoe_jax.distill.prune import pruned, pruned_config
from prmoe_jax.errors import UserError
from prmoe_jax.model.layerwise import moe_inputs, routing
from prmoe_jax.model.layout import places
from prmoe_jax.model.loss import forward
from prmoe_jax.model.transformer import Transformer, init_model
from prmoe_jax.moe.layer import ExpertSums
from prmoe_jax.nn.parameters import named_leaves
from prmoe_jax.run.restore import restore_run
from tests.support.batches import make_batch
from tests.support.configs import settings
from tests.support.lines import only_line
from tests.support.quick import forward as run
from tests.support.quick import jit
from tests.support.runs import arguments

DROPLESS = {"capacity_factor": math.inf, "eval_capacity_factor": math.inf}
TEXT = "4 layers, E=4+6, top 2, residual"


def with_leaves(model: Transformer, change) -> Transformer:
    """The model after `change` of its leaves by name, in place."""
    named = dict(named_leaves(model))
    change(named)
    return jax.tree.unflatten(jax.tree.structure(model), list(named.values()))


class Batches:
    """Training text that is these batches, of windows of one length."""

    def __init__(self, batches):
        self.train = self
        self.batches, self.length = batches, batches[0].tokens_BxL.shape[1]


@pytest.fixture
def by_batches(monkeypatch):
    """Training text is `Batches`."""
    monkeypatch.setattr(
        "prmoe_jax.distill.importance.train_iterator", lambda text, *_: iter(text.batches)
    )


@pytest.fixture
def measured(by_batches):
    """A config, its model, a batch, and the importance on it."""
    values = settings(TEXT, moe=DROPLESS)
    model, batch = init_model(values), make_batch()
    return values, model, batch, measure(values, model, Batches([batch, make_batch(1)]), 2)


def name_of(model: Transformer, layer: int) -> str:
    """The start of the names of a layer's MLP; each layer of these models is a stage of its own."""
    stage, block, _ = places(model.config)[layer]
    return f"stages.{stage}.blocks.{block}"


def scaled(model: Transformer, layer: int, expert: int, factor: float) -> Transformer:
    """The model with an expert whose output is scaled."""

    def scale(named):
        for name in ("w_out", "b_out"):
            name = f"{name_of(model, layer)}.mlp.experts.{name}"
            named[name] = named[name].at[0, expert].multiply(factor)

    return with_leaves(model, scale)


def sums_by_hand(model: Transformer, batch, layer: int) -> ExpertSums:
    """Each expert's tokens, norms, squared norms, and norms times weights, token by token."""
    decisions = routing(model, batch.tokens_BxL, batch.segments_BxL)
    inputs = moe_inputs(model, batch.tokens_BxL, batch.segments_BxL)
    moe, x_BxLxD = next((moe, x) for number, moe, x in inputs if number == layer)
    mix_NxP = np.ones((x_BxLxD[..., 0].size, 1))
    if moe.mlp is not None:  # the share of the experts and of the MLP
        scores_NxP = x_BxLxD.reshape(-1, x_BxLxD.shape[-1]) @ moe.w_mix + moe.b_mix
        mix_NxP = np.exp(scores_NxP) / np.exp(scores_NxP).sum(-1, keepdims=True)
    sums = np.zeros((4, moe.experts.count))
    chosen = jax.tree.map(lambda x: x.reshape(-1, moe.top_k), decisions[layer])
    x_NxD = x_BxLxD.reshape(-1, x_BxLxD.shape[-1])
    y_ExNxD = np.stack([moe.experts.expert(e)(x_NxD) for e in range(moe.experts.count)])
    for token, k in itertools.product(range(len(x_NxD)), range(moe.top_k)):
        if chosen.kept_GxSxK[token, k]:
            e = int(chosen.expert_GxSxK[token, k])
            norm = np.linalg.norm(y_ExNxD[e, token])
            gate = mix_NxP[token, 0] * chosen.weight_GxSxK[token, k]
            sums[:, e] += 1, norm, norm**2, gate * norm
    return ExpertSums(*sums)


def test_more_experts_than_channels():
    model, batch = init_model(settings("2 layers, E=29, top 2", moe=DROPLESS)), make_batch()

    @jit
    def sums(model):
        ((_, moe, x_BxLxD),) = moe_inputs(model, batch.tokens_BxL, batch.segments_BxL)
        return moe.expert_sums(x_BxLxD, batch.segments_BxL > 0)

    found = sums(model)
    for ours, expected in zip(found, sums_by_hand(model, batch, 1), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4)
        assert ours.shape == (29,) and (ours > 0).sum() > 12


def test_importance_is_what_it_says(measured):
    """Loads, norms token by token, and the loss by finite differences."""
    values, model, batch, found = measured
    batches = batch, make_batch(1)
    assert {kind: list(of) for kind, of in found.items()} == dict.fromkeys(found, [1, 3])
    loads = sum(forward(model, one).routers[1].assigned_E for one in batches)
    np.testing.assert_allclose(found["load"][3], loads / loads.sum(), rtol=1e-6)
    by_batch = [sums_by_hand(model, one, 3) for one in batches]
    tokens, norms, squares, added = (sum(of) for of in zip(*by_batch, strict=True))
    assert tokens.min() > 1 and np.ptp(tokens) > 1
    expected = {"activation": added, "ean": norms}
    expected |= {"reap": added / tokens, "man": norms / tokens, "msan": squares / tokens}
    for kind, of_E in expected.items():
        np.testing.assert_allclose(found[kind][3], of_E, rtol=1e-4, err_msg=kind)

    @jit
    def mean(model, batch):
        sums = forward(model, batch)
        return sums.loss / sums.tokens

    for layer, expert in ((1, 0), (1, 3), (3, 5)):
        change = 0
        for one in batches:
            up, down = (mean(scaled(model, layer, expert, 1 + h), one) for h in (0.05, -0.05))
            change += ((up - down) / 0.1) ** 2
        assert found["loss"][layer][expert] == pytest.approx(float(change), rel=0.05)


@pytest.mark.parametrize(
    ("batch_size", "length", "accumulate", "group_size", "microbatches"),
    [
        (16, 64, 1, 0, 1),
        (16, 1024, 1, 0, 4),
        (12, 1024, 1, 0, 3),  # of four rows
        (16, 4096, 1, 0, 16),
        (16, 8192, 1, 0, 16),
        (16, 64, 4, 0, 4),  # the run's own
        (16, 1024, 1, 8192, 2),  # groups of eight rows stay whole
    ],
)
def test_microbatches_by_hand(batch_size, length, accumulate, group_size, microbatches):
    train = {"batch_size": batch_size, "accumulate": accumulate}
    moe = DROPLESS | {"group_size": group_size}
    values = settings("2 layers, E=3", model={"length": length}, train=train, moe=moe)
    assert _microbatches(values, length) == microbatches


def test_portions_change_nothing(measured, monkeypatch):
    """Row by row, the importance is that of whole batches."""
    values, model, batch, found = measured
    monkeypatch.setattr("prmoe_jax.distill.importance.MICROBATCH_TOKENS", batch.tokens_BxL.shape[1])
    rows = dataclasses.replace(values.train, batch_size=len(batch.tokens_BxL))
    values = dataclasses.replace(values, train=rows)
    assert _microbatches(values, batch.tokens_BxL.shape[1]) == len(batch.tokens_BxL) > 1
    again = measure(values, model, Batches([batch, make_batch(1)]), 2)
    for kind, of in found.items():
        for layer, of_E in of.items():
            np.testing.assert_allclose(again[kind][layer], of_E, rtol=1e-4, atol=1e-7)


def test_choices_by_hand():
    importance = {1: np.array([5.0, 1, 4, 2]), 3: np.array([9.0, 8, 7, 6])}

    def chosen(keep, shape, least=1):
        return {i: e.tolist() for i, e in choose(importance, keep, shape, least).items()}

    assert chosen(0.5, "uniform") == {1: [0, 2], 3: [0, 1]}
    assert chosen(0.5, "pyramid") == {1: [0], 3: [0, 1, 2]}
    assert chosen(0.5, "inverse") == {1: [0, 2, 3], 3: [0]}
    assert chosen(0.5, "pyramid", least=2) == {1: [0, 2], 3: [0, 1]}
    assert chosen(0.75, "pyramid") == {1: [0, 2], 3: [0, 1, 2, 3]}
    assert chosen((1, 3), "pyramid") == {1: [0], 3: [0, 1, 2]}
    assert chosen((2,), "pyramid") == {1: [0, 2], 3: [0, 1]}
    with pytest.raises(UserError, match="--experts=1,2,3 has 3 numbers, and the run has 2 MoE lay"):
        chosen((1, 2, 3), "pyramid")
    with pytest.raises(UserError, match="layer 3 cannot keep 5; give from 1 .model.top_k. to 4"):
        chosen((4, 5), "pyramid")
    with pytest.raises(UserError, match="--keep=0.3 leaves 2 experts for 2 layers, and each needs"):
        chosen(0.3, "pyramid", least=2)
    with pytest.raises(
        UserError, match="needs 4 experts for model.top_k=4, and the smallest has 4"
    ):
        chosen(0.5, "pyramid", least=4)
    for keep, shape in (0.95, "uniform"), (0.97, "pyramid"), ((4,), "pyramid"):
        with pytest.raises(UserError, match=" keeps all 8 experts; give less"):
            chosen(keep, shape)
    with pytest.raises(UserError, match="needs 18 experts for model.top_k=17, and the smallest ha"):
        choose({0: np.arange(17.0), 1: np.arange(64.0)}, 0.9, "pyramid", 17)
    # Numbers are multiples of an eighth of the smallest layer's.
    wide = {0: np.arange(16.0), 1: np.arange(32.0)}
    assert {i: len(e) % 2 for i, e in choose(wide, 0.4, "pyramid", 1).items()} == {0: 0, 1: 0}
    uneven = {0: np.arange(16.0)} | {i: np.arange(19.0) for i in (1, 2, 3)}
    for shape in ("uniform", "pyramid"):
        kept = choose(uneven, 0.99, shape, 1)
        assert [len(e) for e in kept.values()] == [16, 18, 18, 18]
    # A power of two, where an eighth is none; layers that are full take no more.
    sixty = {i: np.arange(60.0) + 20 * i for i in range(4)}
    assert {len(e) % 4 for e in choose(sixty, 0.6, "pyramid", 4).values()} == {0}
    dead = {0: np.ones(2), 1: np.repeat([1.0, 0.0], 4)}
    assert [len(e) for e in choose(dead, 0.8, "pyramid", 2).values()] == [2, 6]
    lower = {0: np.ones(4), 1: 9 * np.ones(8)}
    with pytest.raises(UserError, match="--shape=inverse gives layer 0 8 experts, and it has 4"):
        choose(lower, 0.75, "inverse", 1)


def test_prices_are_divergences_of_pruned_models(by_batches):
    """KL(whole ‖ pruned), where a pruned model is built; also with a bias of routers."""
    moe = DROPLESS | {"scores": "sigmoid", "bias_update_rate": 0.01}
    values = settings(TEXT, moe=moe)
    model, batch = init_model(values), make_batch()

    def biases(named):
        for name in filter(lambda name: "bias_router" in name, named):
            named[name] = named[name] + jnp.arange(named[name].shape[-1])

    model = with_leaves(model, biases)
    order = {1: np.array([2, 0, 3, 1]), 3: np.array([5, 3, 1, 0, 2, 4])}
    found = prices(values, model, Batches([batch]), order, step=2, least=2)
    assert {layer: price.shape for layer, price in found.items()} == {1: (3,), 3: (4,)}
    for layer, kept in ((1, 2), (3, 2), (3, 4)):
        stay = {i: np.sort(of[: kept if i == layer else len(of)]) for i, of in order.items()}
        small = pruned(values, model, stay)
        logits = [run(m, batch.tokens_BxL, batch.segments_BxL)[1] for m in (model, small)]
        log_p, log_q = (jax.nn.log_softmax(each) for each in logits)
        kl_BxL = (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
        expected = (kl_BxL * batch.mask_BxL).sum() / batch.mask_BxL.sum()
        price = found[layer][(len(order[layer]) - kept) // 2]
        assert price == pytest.approx(float(expected), rel=1e-3) and price > 1e-5
    assert found[1][0] == found[3][0] == 0 and np.isinf([found[1][2], found[3][3]]).all()


def test_the_cheapest_numbers_by_hand():
    """Against every other way to remove as many, with prices that are not convex."""
    rng = np.random.default_rng(0)
    importance = {layer: rng.random(size) for layer, size in ((0, 8), (2, 16), (3, 11))}
    for keep in (0.3, 0.5, 0.9):
        price = {i: np.r_[0, rng.random(len(of))] for i, of in importance.items()}
        for of in price.values():
            of[-2:] = np.inf  # at least two stay
        kept = choose(importance, keep, "measured", 2, price)
        counts = {i: len(experts) for i, experts in kept.items()}
        assert sum(counts.values()) == round(keep * 35)
        sizes = {i: len(of) for i, of in importance.items()}
        every = [
            sum(price[i][sizes[i] - n] for i, n in zip(sizes, way, strict=True))
            for way in itertools.product(*(range(2, size + 1) for size in sizes.values()))
            if sum(way) == round(keep * 35)
        ]
        assert sum(price[i][sizes[i] - n] for i, n in counts.items()) == pytest.approx(min(every))
        for layer, experts in kept.items():
            assert set(experts) == set(ranked(importance)[layer][: counts[layer]])


def only(model, kept):
    """The model whose routers choose no other experts: theirs have scores far below."""

    def silence(named):
        for layer, experts in kept.items():
            name = f"{name_of(model, layer)}.mlp.w_router"
            w = named[name]
            gone = np.setdiff1d(np.arange(w.shape[-1]), experts)
            named[name] = w.at[..., gone].set(0)
            shift = f"{name_of(model, layer)}.norm_mlp.shift"
            # The last channel is a constant 50, and the kept experts' routers read it.
            named[shift] = named[shift].at[..., -1].set(50.0)
            scale = shift.replace("shift", "scale")
            named[scale] = named[scale].at[..., -1].set(0.0)
            named[name] = named[name].at[:, -1, experts].set(1.0)

    return with_leaves(model, silence)


def test_experts_that_nobody_chooses_leave_no_trace():
    values = settings(TEXT, moe=DROPLESS | {"bias_update_rate": 0.01})
    kept = {1: np.array([0, 3]), 3: np.array([1, 2, 5])}
    model, batch = only(init_model(values), kept), make_batch()

    def biases(named):
        for layer in kept:
            name = f"{name_of(model, layer)}.mlp.bias_router"
            named[name] = named[name] + jnp.arange(named[name].shape[-1]) / 1000

    model = with_leaves(model, biases)
    small = pruned(values, model, kept)
    assert small.config.schedule.experts == (0, 2, 0, 3)
    assert small.config == pruned_config(values, kept).model
    for layer, experts in kept.items():
        bias = named_leaves(small)[f"{name_of(small, layer)}.mlp.bias_router"]
        np.testing.assert_allclose(bias[0], experts / 1000, rtol=1e-6)
    expected, found = (run(m, batch.tokens_BxL, batch.segments_BxL)[1] for m in (model, small))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_copies_merge_into_their_originals():
    """An expert whose hidden units stand in another order, and whose router is the same."""
    values = settings("2 layers, E=4", moe=DROPLESS)

    def copy(named):
        rng, stage = np.random.default_rng(0), "stages.0.blocks.1.mlp"
        for name in ("w_in", "b_in", "w_out", "b_out"):
            leaf = named[f"{stage}.experts.{name}"]
            named[f"{stage}.experts.{name}"] = leaf + rng.normal(size=leaf.shape)
        order = rng.permutation(10)
        for name, axis in (("w_in", 1), ("b_in", 0), ("w_out", 0), ("b_out", None)):
            leaf = named[f"{stage}.experts.{name}"]
            one = leaf[0, 1] if axis is None else jnp.take(leaf[0, 1], order, axis)
            named[f"{stage}.experts.{name}"] = leaf.at[0, 2].set(one)
        router = named[f"{stage}.w_router"]
        named[f"{stage}.w_router"] = router.at[0, :, 2].set(router[0, :, 1])

    model = with_leaves(init_model(values), copy)
    kept, load = {1: np.array([0, 1, 3])}, {1: np.array([0.3, 0.1, 0.4, 0.2])}
    merged, dropped = pruned(values, model, kept, load), pruned(values, model, kept)
    for name, leaf in named_leaves(merged).items():
        other = named_leaves(dropped)[name]
        np.testing.assert_allclose(leaf, other, rtol=1e-5, atol=1e-6, err_msg=name)
    # Other experts are averaged by load.
    halves = pruned(values, model, {1: np.array([1])}, load)
    bias = halves.stages[0].blocks[1].mlp.experts.b_out[...][0, 0]
    every = model.stages[0].blocks[1].mlp.experts.b_out[...][0]
    np.testing.assert_allclose(bias, load[1] @ every, rtol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_merged_units_are_matched(family):
    """Two experts, one like the other in another order: the mean by load, unit by unit."""
    model = {"family": family, "d_model": 12, "heads": 2}
    values = settings("2 layers, E=2", model=model, moe=DROPLESS)
    stage, rng = "stages.0.blocks.1.mlp.experts", np.random.default_rng(0)
    order = rng.permutation(10)
    noise = {}

    def like(named):
        for name in ("w_in", "w_gate", "b_in", "w_out", "b_out"):
            if f"{stage}.{name}" not in named:
                continue
            leaf = np.array(named[f"{stage}.{name}"])
            leaf[0, 0] = rng.normal(size=leaf[0, 0].shape)
            noise[name] = 0.01 * rng.normal(size=leaf[0, 0].shape)
            other = leaf[0, 0] + noise[name]
            axis = {"w_in": 1, "w_gate": 1, "b_in": 0, "w_out": 0}.get(name)
            leaf[0, 1] = other if axis is None else np.take(other, order, axis)
            named[f"{stage}.{name}"] = jnp.asarray(leaf)

    model = with_leaves(init_model(values), like)
    load = {1: np.array([0.75, 0.25])}
    merged = named_leaves(pruned(values, model, {1: np.array([0])}, load))
    for name, change in noise.items():
        expected = named_leaves(model)[f"{stage}.{name}"][0, 0] + 0.25 * change
        np.testing.assert_allclose(merged[f"{stage}.{name}"][0, 0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_run_is_pruned_and_learns_from_what_it_was(text, tmp_path, capsys, monkeypatch):
    """The plan, the run, its evaluation, and training with its teacher."""
    full, half = tmp_path / "full", tmp_path / "half"
    overrides = {"moe.capacity_factor": "inf", "moe.eval_capacity_factor": "inf"}
    moe = "2 layers, every 1, E=4+8"
    assert main(arguments(text, full, moe, **overrides)) == 0
    capsys.readouterr()
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.txt").write_text("Another text, to measure on. " * 500)
    (other / "b.txt").write_text("And a second document of it. " * 500)
    prune = ["prune", f"--workdir={full}", "--keep=0.5", "--batches=2", "--json"]
    prune.append(f"--corpus={other}")
    assert main(prune) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["architecture"][0] == moe
    assert sum(len(row["kept"]) for row in plan["layers"]) == 6
    assert not half.exists()
    assert main([*prune, f"--out={half}", "--merge"]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out) == plan
    assert "layer  experts  kept" in output.err
    written = load(half / "config.json")
    assert written.data == load(full / "config.json").data
    assert written.mesh == MeshConfig()
    model = written.model
    assert str(model.schedule) == plan["architecture"][1]
    before, after = plan["total_params"]
    leaves = named_leaves(restore_run(half)[2])
    assert sum(leaf.size for leaf in leaves.values()) == after < before
    assert main(["eval", f"--workdir={half}", "--json"]) == 0
    assert math.isfinite(json.loads(capsys.readouterr().out)["loss"])
    # What the whole run was trained on is the pruned one's text, too.
    saved = (half / "config.json").read_text()
    settings = json.loads(saved)
    settings["data"]["corpus"] = str(other)
    (half / "config.json").write_text(json.dumps(settings))
    assert main(["eval", f"--workdir={half}", "--json"]) == 2
    assert f"data.corpus={other} is not the text that the run" in capsys.readouterr().err
    (half / "config.json").write_text(saved)
    taught = {"init.workdir": half, "teacher.workdir": full, "train.steps": 2}
    student = arguments(text, tmp_path / "taught", str(model.schedule), **overrides | taught)
    assert main(student) == 0
    assert main([*prune, "--experts=2"]) == 2
    assert "not allowed with argument --keep" in capsys.readouterr().err
    counts = ["prune", f"--workdir={full}", "--batches=1", "--json", "--experts=1,5"]
    assert main(counts) == 0
    found = json.loads(capsys.readouterr().out)["layers"]
    assert [len(row["kept"]) for row in found] == [1, 5]
    assert main([*counts, "--shape=uniform"]) == 2
    assert "--shape=uniform has no effect with --experts" in capsys.readouterr().err
    assert main([*prune, f"--out={half}"]) == 2
    assert f"--out={half} exists" in capsys.readouterr().err
    # A file of scores serves any share and kind, without another look at the text.
    scores = f"--scores={tmp_path}/scores.json"
    assert main([*prune, scores]) == 0
    assert json.loads(capsys.readouterr().out) == plan
    with monkeypatch.context() as patch:
        patch.setattr("prmoe_jax.distill.prune.measure", pytest.fail)
        assert main([*prune, scores]) == 0
        assert json.loads(capsys.readouterr().out) == plan
        assert main([*prune, scores, "--batches=3"]) == 2
        assert "is of other batches (2, here 3); give another file" in capsys.readouterr().err
        # Another run of the same architecture and step.
        twin = tmp_path / "twin"
        assert main(arguments(text, twin, moe, **overrides | {"seed": 1})) == 0
        capsys.readouterr()
        other_run = [option.replace(f"={full}", f"={twin}") for option in prune]
        assert main([*other_run, scores]) == 2
        assert "is of other routers (" in capsys.readouterr().err
        assert main([*prune, scores, "--shape=measured", "--importance=man"]) == 0
    found = json.loads(capsys.readouterr().out)["layers"]
    assert sum(len(row["kept"]) for row in found) == 6
    assert [len(row["prices"]) for row in found] == [5, 9]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep=1"], "--keep=1.0 must be between 0 and 1, exclusive; 0.5 keeps half"),
        (["--keep=nan"], "--keep=nan must be between 0 and 1"),
        (["--keep=0.5", "--batches=0"], "--batches=0 must be 1 or more"),
    ],
)
def test_options_that_make_no_sense(options, message, tmp_path, capsys):
    from prmoe_jax.distill.prune import prune_run

    given = dict(option.removeprefix("--").split("=") for option in options)
    with pytest.raises(UserError, match=message):
        prune_run(
            tmp_path, None, float(given["keep"]), "load", "pyramid", False, None,
            int(given.get("batches", 1)),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "moe", "message"),
    [
        ("2 layers", {}, "this run is 2 layers; it has no experts"),
        ("2 layers, E=3", {"router": "expert_choice"}, "moe.router=expert_choice; experts that ch"),
    ],
)
def test_a_run_that_cannot_be_pruned_is_not_restored(text, moe, message, tmp_path, capsys):
    save(settings(text, moe=moe), tmp_path / "config.json")  # without any checkpoint
    assert main(["prune", f"--workdir={tmp_path}", "--keep=0.5"]) == 2
    assert message in only_line(capsys.readouterr().err)
