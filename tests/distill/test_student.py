"""What a student inherits: the right layers, experts and channels, and a function kept."""

import contextlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import paper
from prmoe_jax.config.loading import resolve
from prmoe_jax.config.validation import check_same_routing
from prmoe_jax.distill.student import layer_map, magnitudes, prune, source_layers, taylor
from prmoe_jax.distill.teacher import measure_importance
from prmoe_jax.errors import UserError
from prmoe_jax.model.layerwise import dropless
from prmoe_jax.model.loss import forward
from prmoe_jax.model.transformer import init_model
from prmoe_jax.nn.parameters import named_leaves
from tests.support.batches import make_batch
from tests.support.configs import settings
from tests.support.models import layers_of
from tests.support.quick import jit


def part(teacher, student, model=None, chosen="", load=(), importance=magnitudes):
    """The teacher's model and the student cut out of it."""
    model = init_model(teacher) if model is None else model
    layers = layer_map(teacher.model, student.model, chosen)
    shapes = jax.eval_shape(lambda: init_model(student))
    whole = lambda model: prune(model, shapes, layers, dict(load), importance(model))  # noqa: E731
    return model, jit(whole)(model), layers


def activations(model):
    batch = make_batch()
    return np.asarray(jit(dropless(model))(batch.tokens_BxL, batch.segments_BxL)[0])


def test_the_whole_is_a_copy():
    values = settings("6 layers, E=3x2+5, residual")
    model, student, layers = part(values, values)
    assert layers == [0, 1, 2, 3, 4, 5]
    for name, leaf in named_leaves(student).items():
        np.testing.assert_array_equal(leaf, named_leaves(model)[name], err_msg=name)


def test_biases_that_a_teacher_lacks_start_at_0():
    values = settings("4 layers, E=3+5")
    _, student, _ = part(values, settings("2 layers, E=3", moe={"bias_update_rate": 0.1}))
    (bias,) = (x for name, x in named_leaves(student).items() if name.endswith("bias_router"))
    np.testing.assert_array_equal(bias, np.zeros((1, 3)))


@pytest.mark.parametrize(
    ("teacher", "student", "message"),
    [
        ({"router": "expert_choice"}, {}, "moe.router=token_choice, the teacher has expert_choice"),
        ({"scores": "sigmoid"}, {}, "moe.scores=softmax, the teacher has sigmoid; use the same"),
        ({"routed_scale": 2.0}, {}, "moe.routed_scale=1.0, the teacher has 2.0; use the same"),
        (
            {"bias_update_rate": 0.1},
            {},
            "moe.bias_update_rate=0 would lose the biases by which ",
        ),
        ({}, {"bias_update_rate": 0.1}, ""),
        ({"bias_update_rate": 0.1}, {"bias_update_rate": 1e-9}, ""),
    ],
)
def test_experts_are_chosen_as_the_teacher_s(teacher, student, message):
    teacher, student = (settings("4 layers, E=3", moe=moe) for moe in (teacher, student))
    with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
        check_same_routing(student, teacher, "the teacher")
    dense = settings("4 layers")
    check_same_routing(dense, teacher, "the teacher")
    check_same_routing(student, dense, "the run to start as")


def test_experts_that_choose_have_no_weights_to_normalize():
    chosen = {"router": "expert_choice", "capacity_factor": 1.0, "eval_capacity_factor": 1.0}
    two, one = (settings(f"4 layers, E=3{text}", moe=chosen) for text in (", top 2", ""))
    assert two.model.normalizes != one.model.normalizes
    check_same_routing(one, two, "the teacher")


@pytest.mark.parametrize(
    ("teacher", "student", "layers"),
    [
        # A single expert's weight is not divided by itself, unless that is asked for.
        (("4 layers, E=4, top 2", "auto"), ("4 layers, E=4", "always"), [0, 1, 2, 3]),
        (("4 layers, E=4", "auto"), ("4 layers, E=4, top 2", "never"), [0, 1, 2, 3]),
        (("4 layers, E=4, top 2", "never"), ("2 layers", "auto"), [0, 2]),
    ],
)
def test_a_student_with_another_number_of_choices(teacher, student, layers):
    """What counts is whether weights add up to 1, not the setting's name for it."""
    teacher, student = (
        settings(text, model={"normalize_top_k": form}) for text, form in (teacher, student)
    )
    assert source_layers(teacher, student) == layers


def test_experts_of_equal_load_are_not_left_out():
    teacher, same, fewer = (
        settings(f"4 layers, E={experts}", moe={"router": "expert_choice"}) for experts in (3, 3, 2)
    )
    assert source_layers(teacher, same) == [0, 1, 2, 3]
    with pytest.raises(UserError, match="and all have the same load, by which experts are left"):
        source_layers(teacher, fewer)


@pytest.mark.parametrize(
    ("teacher", "student", "expected"),
    [
        # By kind and in order, those of the nearest relative depth.
        ("6 layers, E=4x2+8", "5 layers, E=4+8", [0, 1, 2, 5, 4]),
        ("8 layers, E=4x3+8", "7 layers, E=4x2+8", [0, 1, 2, 3, 4, 7, 6]),
        ("6 layers", "2 layers", [2, 5]),
        ("6 layers, every 1, E=4", "4 layers, every 1, E=4", [0, 2, 3, 5]),
        # Fewer experts: all MoE layers are of one kind.
        ("8 layers, E=4x2+8x2", "6 layers, E=2x2+6", [0, 1, 2, 3, 4, 7]),
    ],
)
def test_layers_by_hand(teacher, student, expected):
    assert layer_map(settings(teacher).model, settings(student).model) == expected


def test_depth_takes_the_layers_named():
    teacher = settings("6 layers, E=3x2+5, residual")
    student = settings("5 layers, E=3+5, residual")
    for chosen in ("", "2 1 0 5 4"):
        model, smaller, layers = part(teacher, student, chosen=chosen)
        assert chosen in ("", " ".join(map(str, layers)))
        theirs = layers_of(model)
        for layer, ours in zip(layers, layers_of(smaller), strict=True):
            assert ours.keys() == theirs[layer].keys()
            for name, leaf in ours.items():
                np.testing.assert_array_equal(leaf, theirs[layer][name], err_msg=name)
        for name in ("tokens", "positions", "norm.scale"):
            np.testing.assert_array_equal(named_leaves(smaller)[name], named_leaves(model)[name])


def with_leaves(model, change):
    """The model with `change(name, array)` in place of each leaf."""
    leaves = [jnp.asarray(change(n, np.array(x))) for n, x in named_leaves(model).items()]
    return jax.tree.unflatten(jax.tree.structure(model), leaves)


def test_hidden_units_that_do_nothing_are_the_ones_left_out():
    """In each MLP and expert others; the function stays."""
    teacher = settings("2 layers, E=3, residual")
    student = settings("2 layers, E=3, residual", model={"d_ff": 7})
    rng = np.random.default_rng(0)

    def silence(name, x):
        if name.endswith("mlp.w_out") or name.endswith("experts.w_out"):
            flat = x.reshape(-1, *x.shape[-2:])
            for matrix in flat:
                matrix[rng.choice(10, 3, replace=False)] = 0
        return x

    model = with_leaves(init_model(teacher), silence)
    _, smaller, _ = part(teacher, student, model)
    assert named_leaves(smaller)["stages.0.blocks.1.mlp.experts.w_in"].shape == (1, 3, 12, 7)
    np.testing.assert_allclose(activations(smaller), activations(model), rtol=1e-5, atol=1e-5)


def test_width_by_hand():
    """A narrower model: the same channels everywhere, whole heads, other experts' units apart."""
    teacher = settings("2 layers, E=3, residual")
    student = settings("2 layers, E=2, residual", model={"d_model": 6, "heads": 1, "d_ff": 4})
    model, smaller, _ = part(teacher, student, load={1: [0.5, 0.1, 0.4]})
    tokens = np.asarray(model.tokens[...])
    channels = np.sort(np.argsort(-(tokens**2).sum(0))[:6])
    np.testing.assert_array_equal(smaller.tokens[...], tokens[:, channels])
    before, after = layers_of(model)[1], layers_of(smaller)[1]
    np.testing.assert_array_equal(
        after["mlp.w_router"], before["mlp.w_router"][channels][:, [0, 2]]
    )
    w_in, w_out = before["mlp.experts.w_in"], before["mlp.experts.w_out"]
    for ours, e in enumerate((0, 2)):
        value = (w_in[e] ** 2).sum(0) * (w_out[e] ** 2).sum(1)
        units = np.sort(np.argsort(-value)[:4])
        np.testing.assert_array_equal(
            after["mlp.experts.w_in"][ours], w_in[e][np.ix_(channels, units)]
        )
        np.testing.assert_array_equal(
            after["mlp.experts.w_out"][ours], w_out[e][np.ix_(units, channels)]
        )
        np.testing.assert_array_equal(
            after["mlp.experts.b_in"][ours], before["mlp.experts.b_in"][e][units]
        )
    w_qkv, out = before["attention.w_qkv"], before["attention.w_out"]
    value = (w_qkv[:, 2] ** 2).sum((0, 2)) * (out**2).sum((1, 2))
    head = [int(value.argmax())]
    np.testing.assert_array_equal(after["attention.w_qkv"], w_qkv[channels][:, :, head])
    np.testing.assert_array_equal(after["attention.w_out"], out[head][:, :, channels])


def test_norms_of_keys_are_cut_like_those_of_queries():
    """Every head has its own weights where a norm is over all heads, as in OLMoE."""
    form = {"family": "olmoe", "head_dim": 4}
    teacher = settings("2 layers, E=3", model=form | {"heads": 3})
    student = settings("2 layers, E=3", model=form | {"heads": 2})

    def numbered(name, x):
        return np.arange(x.size).reshape(x.shape) if name.endswith("by_head") else x

    model = with_leaves(init_model(teacher), numbered)
    _, smaller, _ = part(teacher, student, model)
    whole = named_leaves(jax.eval_shape(lambda: init_model(student)))
    assert {name: x.shape for name, x in named_leaves(smaller).items()} == {
        name: x.shape for name, x in whole.items()
    }
    for before, after in zip(layers_of(model), layers_of(smaller), strict=True):
        value = (before["attention.w_qkv"][:, 2] ** 2).sum((0, 2))
        value *= (before["attention.w_out"] ** 2).sum((1, 2))
        heads = np.sort(np.argsort(-value)[:2])
        for name in "q_norm", "k_norm":
            norm = f"attention.{name}.by_head"
            np.testing.assert_array_equal(after[norm], before[norm][heads])
    assert np.isfinite(activations(smaller)).all()


def test_worth_by_the_loss_is_what_scaling_a_part_away_does():
    """Of a head, a hidden unit of an MLP and of an expert: finite differences; and it chooses."""
    teacher = settings("2 layers, E=3, residual")
    model, batch = init_model(teacher), make_batch()

    def loss(model):
        sums = forward(dropless(model), batch)
        return sums.loss / sums.tokens

    importance = taylor(model, jit(jax.grad(loss))(model))
    loss = jit(loss)
    for name in (
        "stages.0.blocks.0.attention.w_out",
        "stages.0.blocks.0.mlp.w_out",
        "stages.0.blocks.1.mlp.experts.w_out",
    ):
        unit = np.unravel_index(np.argmax(importance[name]), importance[name].shape)

        def scaled(n, x, by):
            if n == name:  # noqa: B023
                x[unit] *= by  # noqa: B023
            return x

        more, less = (with_leaves(model, partial(scaled, by=by)) for by in (1.01, 0.99))
        slope = (loss(more) - loss(less)) / 0.02
        assert float(importance[name][unit]) ** 0.5 == pytest.approx(abs(float(slope)), rel=0.05)
    student = settings("2 layers, E=3, residual", model={"d_ff": 4})
    _, smaller, _ = part(teacher, student, model, importance=lambda model: importance)
    before, after = (named_leaves(m)["stages.0.blocks.0.mlp.w_in"][0] for m in (model, smaller))
    best = np.sort(np.argsort(-importance["stages.0.blocks.0.mlp.w_out"][0])[:4])
    np.testing.assert_array_equal(after, before[:, best])


def test_worth_is_that_of_the_whole_batch_whatever_its_microbatches():
    """Squares of one gradient, not a sum of squares; with less memory, as XLA compiles it."""
    teacher = settings("2 layers, E=3, residual", moe={"group_size": 16})
    model, batch = init_model(teacher), make_batch()
    found, temporaries = [], []
    for microbatches in (1, 4):
        student = settings(
            "2 layers", teacher={"workdir": "any"}, train={"accumulate": microbatches}
        )
        measure = jit(partial(measure_importance, student, teacher)).lower(model, batch).compile()
        temporaries.append(measure.memory_analysis().temp_size_in_bytes)
        found.append(measure(model, batch))

    whole, parts = found
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        scale = np.abs(value).max()
        np.testing.assert_allclose(parts[name] / scale, value / scale, atol=1e-5, err_msg=name)
    assert temporaries[1] < 0.6 * temporaries[0]


def test_importance_that_chooses_nothing():
    """Experts go by their load; a student of its teacher's widths keeps all channels."""
    teacher = settings("2 layers, E=3, residual")
    taught = {"workdir": "any", "inherit": True, "importance": "taylor"}
    with pytest.raises(UserError, match="teacher.importance=taylor has no effect: the student has"):
        source_layers(teacher, settings("2 layers, E=2, residual", teacher=taught))
    narrower = settings("2 layers, E=2, residual", teacher=taught, model={"d_ff": 4})
    assert source_layers(teacher, narrower) == [0, 1]


@pytest.mark.parametrize("size", ["350m", "1.3b"])
def test_the_papers_students_are_parts_of_its_teachers(size):
    """24 layers of 32x10+64x2 to 21 of 32x8+64x2, without a weight allocated."""
    teacher, student = (resolve(paper.get_config(f"{name}_{size}")) for name in ("prmoe", "mos"))
    layers = layer_map(teacher.model, student.model)
    have = teacher.model.schedule.experts
    assert tuple(have[layer] for layer in layers) == student.model.schedule.experts
    assert len(set(layers)) == len(layers) == 21
    model, shapes = (jax.eval_shape(lambda v=v: init_model(v)) for v in (teacher, student))
    found = jax.eval_shape(lambda m: prune(m, shapes, layers, {}, magnitudes(m)), model)
    total = sum(leaf.size for leaf in jax.tree.leaves(found))
    assert total / 1e9 == pytest.approx({"350m": 3.54, "1.3b": 26.94}[size], rel=2e-3)
    for name, leaf in named_leaves(found).items():
        assert leaf.shape == named_leaves(shapes)[name].shape


@pytest.mark.parametrize(
    ("student", "model", "chosen", "message"),
    [
        ("6 layers, E=3x3, residual", {"d_ff": 11}, "", "model.d_ff=11 is more than the teacher's"),
        ("6 layers, E=3x3, residual", {"d_model": 8}, "", "is 4 wide, one of the teacher 6, and"),
        ("6 layers, E=3x3", {}, "", "model.residual=False, the teacher has True; a student that"),
        ("6 layers, E=3x3, residual", {"clip_qkv": 2.0}, "", "model.clip_qkv=2.0, the teacher has"),
        ("8 layers, E=3x2+5x2, residual", {}, "", "the student has 4 dense layers, the teacher 3"),
        ("4 layers, every 1, E=3, residual", {}, "", "4 MoE layers, the teacher 3; use as many"),
        ("4 layers, E=3+7, residual", {}, "", "has 7 experts, layer 5 of the teacher 5; name"),
        ("4 layers, E=3+5, residual", {}, "0 1 2", "must be 4 of the teacher's layers, 0 to 5"),
        ("4 layers, E=3+5, residual", {}, "0 1 2 9", "must be 4 of the teacher's layers, 0 to 5"),
        ("4 layers, E=3+5, residual", {}, "0 -1 1 2 5", "must be 4 of the teacher's layers, 0 to"),
        ("4 layers, E=3+5, residual", {}, "0 2 1 5", "layer 1 of the student has 3 experts, layer"),
    ],
)  # fmt: skip
def test_what_cannot_be_mapped_is_an_error(student, model, chosen, message):
    teacher = settings("6 layers, E=3x2+5, residual").model
    with pytest.raises(UserError) as error:
        layer_map(teacher, settings(student, model=model).model, chosen)
    assert message in str(error.value)
