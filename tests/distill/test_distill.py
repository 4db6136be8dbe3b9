"""Distillation: the loss against Megatron-DeepSpeed's, a teacher nothing changes, and its end."""

import dataclasses
import gc
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prmoe_jax.cli import main
from prmoe_jax.config.loading import save
from prmoe_jax.config.schema import KdConfig, TeacherConfig
from prmoe_jax.config.teacher import adapt_teacher, teacher_of
from prmoe_jax.distill import predictions
from prmoe_jax.distill import teacher as teachers
from prmoe_jax.distill.loss import (
    Distiller,
    TeacherOutput,
    divergence,
    run_teacher,
    token_sums,
)
from prmoe_jax.distill.predictions import agreement, record_top_k
from prmoe_jax.errors import UserError
from prmoe_jax.model import chunks
from prmoe_jax.model.batch import Batch
from prmoe_jax.model.layerwise import dropless
from prmoe_jax.model.loss import forward, totals, training_loss
from prmoe_jax.model.transformer import Unembedding, init_model
from prmoe_jax.nn.parameters import named_leaves
from prmoe_jax.parallel.mesh import make_mesh
from prmoe_jax.run.metrics import loss_parts, read_metrics, to_python
from prmoe_jax.run.restore import restore_run
from prmoe_jax.training import loop as train
from prmoe_jax.training.loop import Run
from prmoe_jax.training.step import (
    compile_train_step,
    init_state,
    make_train_step,
    sharded_state,
)
from tests.support.batches import make_batch
from tests.support.configs import GENTLE, settings
from tests.support.extras import needs_extra
from tests.support.paths import GOLDENS
from tests.support.quick import jit
from tests.support.runs import arguments, assert_same_run, finish, logged, start, wait_for_lines


@pytest.fixture(scope="module", autouse=True)
def quickly():
    """Much is compiled here, and little run; in processes of their own, too."""
    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        yield
    jax.config.update("jax_disable_most_optimizations", False)


def batch_of(rows, length, vocabulary, masked=0.0):
    rng = np.random.default_rng(1)
    tokens, targets = rng.integers(0, vocabulary, (2, rows, length)).astype(np.int32)
    mask = rng.random((rows, length)) >= masked
    return Batch(tokens, targets, mask, np.ones((rows, length), np.int32))


ALONE = 0.0, 0.0, 1.0  # the loss is the distance from the teacher


def random_lesson(rows=3, length=11, vocabulary=37, masked=0.0, seed=0):
    """Activations and maps to logits of a student and a teacher, and a batch."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    lesson = TeacherOutput(draw(rows, length, 7), Unembedding(draw(vocabulary, 7)))
    ours = draw(rows, length, 6), Unembedding(draw(vocabulary, 6))
    return *ours, lesson, batch_of(rows, length, vocabulary, masked)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk", [256, 11, 4])
def test_loss_and_gradients_equal_megatron_deepspeed(temperature, chunk, monkeypatch):
    """Without a mask; for whole sequences and for chunks that don't divide them."""
    monkeypatch.setattr(chunks, "CPU_CHUNK", chunk)
    golden = np.load(GOLDENS / "mos.npz")
    theirs = Unembedding(jnp.asarray(golden["teacher_table"]))
    lesson = TeacherOutput(jnp.asarray(golden["teacher_x"]), theirs)
    batch = batch_of(*golden["x"].shape[:2], len(golden["table"]))
    kd = KdConfig(temperature=temperature)

    def loss(x_BxLxD, table_VxD):
        sums = token_sums(x_BxLxD, Unembedding(table_VxD), lesson, batch, kd, ALONE)
        return sums["loss"] / batch.mask_BxL.size

    found, gradients = jax.value_and_grad(loss, (0, 1))(golden["x"], golden["table"])
    np.testing.assert_allclose(found, golden[f"loss_{temperature}"], rtol=1e-6)
    for gradient, name in zip(gradients, ("d_x", "d_table"), strict=True):
        np.testing.assert_allclose(gradient, golden[f"{name}_{temperature}"], atol=1e-6)


def test_agreement_with_a_teacher(monkeypatch):
    """Sums by NumPy over targets that count; in chunks that don't divide the sequence."""
    monkeypatch.setattr(predictions, "CHUNK", 4)
    x_BxLxD, unembedding, lesson, batch = random_lesson(masked=0.3)
    found = agreement(x_BxLxD, unembedding, lesson, batch)
    ours, theirs = unembedding.logits(x_BxLxD), lesson.unembedding.logits(lesson.x_BxLxD)
    expected = np.zeros(4)
    for place in np.argwhere(batch.mask_BxL):
        ours_V, theirs_V = (np.asarray(logits[tuple(place)]) for logits in (ours, theirs))
        expected += (
            1,
            expected_divergence(theirs_V, ours_V, KdConfig()),
            ours_V.argmax() == theirs_V.argmax(),
            -jax.nn.log_softmax(theirs_V)[batch.targets_BxL[tuple(place)]],
        )
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert 0 < found.same < found.tokens < batch.mask_BxL.size


@needs_extra("interop", "torch")
def test_goldens_made_anew(tmp_path):
    script = GOLDENS / "generate_mos.py"
    subprocess.run([sys.executable, script, "--out", tmp_path / "mos.npz"], check=True)
    stored, anew = np.load(GOLDENS / "mos.npz"), np.load(tmp_path / "mos.npz")
    assert set(stored) == set(anew)
    for name in stored:
        np.testing.assert_allclose(anew[name], stored[name], rtol=1e-9, err_msg=name)


def expected_divergence(teacher, student, kd):
    """By NumPy in float64, outcome by outcome."""

    def probabilities(logits):
        e = np.exp(np.float64(logits) / kd.temperature)
        return e / e.sum()

    p, q = probabilities(teacher), probabilities(student)
    if kd.kind == "reverse":
        p, q = q, p
    if kd.kind == "top_k":
        likeliest = np.argsort(-p)[: kd.top_k]
        p, q = (np.append(x[likeliest], 1 - x[likeliest].sum()) for x in (p, q))
    return kd.temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("vocabulary", [3, 37])
@pytest.mark.parametrize("confidence", [5.0, 15.0, 40.0])
def test_a_sure_student_still_learns_of_the_rest(confidence, vocabulary):
    """The gradient of kind 'top_k' beside the same formula in float64 that never subtracts."""
    kd, rng = KdConfig(kind="top_k", top_k=2), np.random.default_rng(0)
    teacher, student = rng.normal(size=(2, vocabulary)).astype(np.float32)
    likeliest = np.argsort(-teacher)[: kd.top_k]
    student[likeliest] += confidence

    def loss(student):
        return divergence(teacher[None, None], student[None, None], kd).sum()

    p, q = (np.exp(np.float64(x)) / np.exp(np.float64(x)).sum() for x in (teacher, student))
    others = np.setdiff1d(np.arange(vocabulary), likeliest)
    expected = q.copy()  # d/dz of -Σ p log q: q - p, where the rest is shared as the student has it
    expected[likeliest] -= p[likeliest]
    expected[others] -= p[others].sum() * q[others] / q[others].sum()
    np.testing.assert_allclose(jax.grad(loss)(student), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "kd",
    [
        KdConfig(),
        KdConfig(kind="reverse", temperature=0.7),
        KdConfig(kind="top_k", top_k=5, temperature=1.5),
        KdConfig(kind="top_k", top_k=1),
        KdConfig(kind="top_k", top_k=36),
    ],
)
def test_divergences_by_hand(kd):
    x, table, lesson, batch = random_lesson(masked=0.3)
    sums = token_sums(x, table, lesson, batch, kd, (1.0, 0.1, 0.5))
    student, teacher = table.logits(x), lesson.unembedding.logits(lesson.x_BxLxD)
    places = np.argwhere(batch.mask_BxL)
    expected = sum(expected_divergence(teacher[b, i], student[b, i], kd) for b, i in places)
    np.testing.assert_allclose(sums["kd_loss"], expected, rtol=2e-5)
    log_probs = jax.nn.log_softmax(student)
    nats = -sum(log_probs[b, i, batch.targets_BxL[b, i]] for b, i in places)
    np.testing.assert_allclose(sums["lm_loss"], nats, rtol=1e-5)
    weighted = sums["lm_loss"] + 0.1 * sums["z_loss"] + 0.5 * sums["kd_loss"]
    np.testing.assert_allclose(sums["loss"], weighted, rtol=1e-6)


@pytest.mark.parametrize("chunk", [256, 4])
def test_recorded_predictions_teach_the_same(chunk, monkeypatch):
    """Loss and gradient, of all that was kept and of less, equal the teacher's own."""
    x, table, lesson, batch = random_lesson(masked=0.3)
    settings = KdConfig(kind="top_k", top_k=9, temperature=1.5)
    whole = record_top_k(lesson, settings)
    monkeypatch.setattr(predictions, "CHUNK", chunk)
    kept = record_top_k(lesson, settings)
    for a, b in zip(kept, whole, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert (np.diff(kept.log_p_BxLxK) <= 0).all()
    monkeypatch.setattr(chunks, "CPU_CHUNK", chunk)
    for top_k in (9, 4):
        kd = KdConfig(kind="top_k", top_k=top_k, temperature=1.5)
        part = jax.tree.map(lambda values: values[..., :top_k], kept)  # noqa: B023

        def loss(x, lesson):
            return token_sums(x, table, lesson, batch, kd, ALONE)["loss"]  # noqa: B023

        ours, theirs = (jax.value_and_grad(loss)(x, taught) for taught in (part, lesson))
        np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-6)
        np.testing.assert_allclose(ours[1], theirs[1], atol=1e-6)


@pytest.mark.parametrize("kind", ["forward", "reverse", "top_k"])
def test_masked_tokens_contribute_nothing(kind):
    """Whatever student and teacher say of them: the sums are the same to the last bit."""
    x, table, lesson, batch = random_lesson(masked=0.5)
    kd = KdConfig(kind=kind, top_k=3 if kind == "top_k" else 0)
    keep = batch.mask_BxL[..., None]
    other_lesson = lesson._replace(x_BxLxD=jnp.where(keep, lesson.x_BxLxD, 9.0))
    sums = token_sums(x, table, lesson, batch, kd, ALONE)
    other = token_sums(jnp.where(keep, x, -3.0), table, other_lesson, batch, kd, ALONE)
    assert jax.tree.map(float, sums) == jax.tree.map(float, other)
    gradient = jax.grad(lambda x: token_sums(x, table, lesson, batch, kd, ALONE)["loss"])(x)
    assert not np.where(keep, 0, gradient).any()
    assert np.where(keep, gradient, 1).all()


def test_chunks_save_memory(monkeypatch):
    """At GPT-2's vocabulary and the paper's context, forward and backward, as XLA compiles it."""
    jax.config.update("jax_disable_most_optimizations", False)
    x = jax.ShapeDtypeStruct((1, 2048, 64), jnp.float32)
    table = Unembedding(jax.ShapeDtypeStruct((50_304, 64), jnp.float32))
    batch = batch_of(1, 2048, 50_304)
    temporaries = []
    for chunk in (chunks.CPU_CHUNK, 2048):
        monkeypatch.setattr(chunks, "CPU_CHUNK", chunk)

        def loss(x, table, lesson):
            return token_sums(x, table, lesson, batch, KdConfig(), (1.0, 0.0, 1.0))["loss"]

        compiled = (
            jax.jit(jax.grad(loss, (0, 1))).lower(x, table, TeacherOutput(x, table)).compile()
        )
        temporaries.append(compiled.memory_analysis().temp_size_in_bytes)
    jax.config.update("jax_disable_most_optimizations", True)
    assert temporaries[0] <= 0.4 * temporaries[1]


STUDENT = dict(text="2 layers, E=2, residual", teacher={"workdir": "any"})


def classroom(student=(), **teacher):
    """Configs of a student and a teacher, and the teacher's model."""
    values = settings(**STUDENT | dict(student))
    taught_by = settings("4 layers, E=3+5, residual", seed=7, **teacher)
    return values, taught_by, init_state(taught_by).model


def test_a_weight_that_falls_falls_to_0_at_stop():
    """After the end of the run, too: half of it is left at the end of a run of half as long."""
    kd = {"decay": "linear", "stop": 20.0 * 64}
    student = settings(**STUDENT, kd=kd)
    assert (student.kd_steps, student.kd_stop) == (10, 20)
    assert float(Distiller(student).weight(10)) == 0.5


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_step_adds_the_weighted_divergence(mode):
    """Its metrics add up to the loss; microbatches of the batch change nothing, noise included."""
    student = {
        "teacher": {"workdir": "any", "mode": mode},
        "kd": {"weight": 0.5, "decay": "linear", "stop": 1.0},
        "train": {"accumulate": 4, "z_loss": 0.25},
        "optimizer": GENTLE,
    }
    noisy = {"model": {"dropout": 0.2}, "moe": {"overflow": "random"}}
    values, taught_by, model = classroom(student=student, **noisy)
    step = jit(make_train_step(values, Distiller(values, taught_by)))
    state = init_state(values)
    for number in range(3):
        state, metrics = step(state, make_batch(number), model)
        weight = 0.5 * (1 - number / 10)
        metrics = to_python(metrics, values)
        assert metrics["kd_weight"] == pytest.approx(weight)
        parts = metrics["lm_loss"] + weight * metrics["kd_loss"] + 0.01 * metrics["aux_loss"]
        parts += 0.25 * metrics["z_loss"]
        assert metrics["loss"] == pytest.approx(parts, rel=1e-5)
        assert metrics["kd_loss"] > 0.01
        shown = loss_parts(metrics, values)
        assert shown["distillation"] == pytest.approx(weight * metrics["kd_loss"])
        assert sum(shown.values()) == pytest.approx(metrics["loss"] - metrics["lm_loss"], rel=1e-4)
    whole = dataclasses.replace(values, train=dataclasses.replace(values.train, accumulate=1))
    _, expected = jit(make_train_step(whole, Distiller(whole, taught_by)))(
        init_state(whole), make_batch(0), model
    )
    _, first = step(init_state(values), make_batch(0), model)
    first, expected = to_python(first, values), to_python(expected, values)
    for name, tolerance in (("kd_loss", 1e-5), ("grad_norm", 1e-4)):
        assert first[name] == pytest.approx(expected[name], rel=tolerance)


def test_portions_keep_the_teachers_routing_groups_whole():
    """They span three windows, the student's two: six are computed together."""
    taught = {"text": "1 layers, every 1, E=3", "batch_size": 12}
    taught_by = settings(**taught, seed=7, moe={"group_size": 24})
    taught |= {"teacher": {"workdir": "any"}, "moe": {"group_size": 16}}
    state, model = jit(lambda: (init_state(settings(**taught)), init_model(taught_by)))()
    found = []
    for microbatches in (1, 2):
        values = settings(**taught, train={"accumulate": microbatches})
        _, metrics = jit(make_train_step(values, Distiller(values, taught_by)))(
            state, make_batch(rows=12), model
        )
        found.append(to_python(metrics, values))
    whole, parts = found
    assert whole["kd_loss"] > 0.01
    for name in ("kd_loss", "loss", "aux_loss", "drop_fraction"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-5), name


def test_modes_of_the_teacher():
    """Evaluation's is the teacher's evaluation; training's has its noise and its capacity."""
    moe = {"capacity_factor": 0.5, "eval_capacity_factor": 1.0}
    values, taught_by, model = classroom(moe=moe)
    batch, keys = make_batch(), jax.random.split(jax.random.key(0), 8)

    def activations(**choices):
        """Of a teacher whose config is adapted to its student's as for a run."""
        teacher = TeacherConfig("any", **choices)
        adapted = adapt_teacher(taught_by, dataclasses.replace(values, teacher=teacher))
        structure = jax.tree.structure(jax.eval_shape(lambda: init_model(adapted)))
        same = jax.tree.unflatten(structure, jax.tree.leaves(model))
        return run_teacher(same, batch, dataclasses.replace(values, teacher=teacher), keys).x_BxLxD

    evaluated = model(batch.tokens_BxL, batch.segments_BxL)[0]
    np.testing.assert_array_equal(activations(), evaluated)
    ample = dropless(model)(batch.tokens_BxL, batch.segments_BxL)[0]
    np.testing.assert_array_equal(activations(capacity_factor=math.inf), ample)
    assert (ample != evaluated).any()
    tight = model(batch.tokens_BxL, batch.segments_BxL, keys)[0]
    np.testing.assert_array_equal(activations(mode="train"), tight)
    assert (tight != evaluated).any()


def test_no_gradient_reaches_the_teacher_and_no_step_changes_it():
    values, taught_by, model = classroom()
    student, batch = init_state(values).model, make_batch()
    keys = jax.random.split(jax.random.key(0), 8)

    def loss(teacher_model):
        measure = Distiller(values, taught_by).measure(teacher_model, keys, 1.0)
        sums = forward(student, batch, keys, measure)
        return training_loss(sums, totals(batch, values), values)

    for name, gradient in named_leaves(jit(jax.grad(loss))(model)).items():
        assert not np.asarray(gradient).any(), name
    before = {name: np.array(leaf) for name, leaf in named_leaves(model).items()}
    mesh = make_mesh(values)
    with jax.set_mesh(mesh):
        step = compile_train_step(values, mesh, Distiller(values, taught_by))
        state = sharded_state(values, mesh)
        for seed in range(3):
            state, _ = step(state, make_batch(seed), model)
    for name, leaf in named_leaves(model).items():
        np.testing.assert_array_equal(leaf, before[name])


def test_a_copy_of_the_teacher_has_nothing_to_learn_from_it():
    values = settings(**STUDENT, train={"accumulate": 2})
    state = init_state(values)
    _, metrics = jit(make_train_step(values, Distiller(values, values)))(
        state, make_batch(), state.model
    )
    assert abs(to_python(metrics, values)["kd_loss"]) < 1e-6


TEACHER, LEARNER = "4 layers, E=4+8, residual", "2 layers, E=8, residual"
# A run: taught for the first half of 200 steps.
TAUGHT = {
    "train.steps": 200,
    "kd.stop": 0.5,
    "checkpoint.every": 20,
    "model.dropout": 0.1,
}


@pytest.fixture(scope="module")
def teacher(text, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("teacher") / "run"
    assert main(arguments(text, workdir, TEACHER)) == 0
    return workdir


@pytest.fixture(scope="module")
def student(text, teacher, tmp_path_factory):
    """A run that nothing interrupts."""
    workdir = tmp_path_factory.mktemp("student") / "run"
    settings = TAUGHT | {"teacher.workdir": teacher}
    assert main(arguments(text, workdir, LEARNER, **settings)) == 0
    return workdir


@pytest.mark.slow
def test_the_teacher_goes_when_it_has_taught(text, teacher, tmp_path, monkeypatch):
    """The arrays that live, and what the steps are given, before and after."""
    live, given = {}, {}
    report, compile_train_step = Run.report, train.compile_train_step

    def measured(run, step, metrics):
        report(run, step, metrics)
        gc.collect()
        live[step] = sum(array.nbytes for array in jax.live_arrays())

    def watched(*arguments):
        step = compile_train_step(*arguments)

        def run(*inputs):
            if step not in given:
                analysis = step.lower(*inputs).compile().memory_analysis()
                given[step] = analysis.argument_size_in_bytes
            return step(*inputs)

        return run

    monkeypatch.setattr(Run, "report", measured)
    monkeypatch.setattr(train, "compile_train_step", watched)
    settings = TAUGHT | {"teacher.workdir": teacher, "train.steps": 16}
    assert main(arguments(text, tmp_path / "run", LEARNER, **settings)) == 0
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines if "kd_loss" in line] == list(range(1, 9))
    _, _, model, _ = restore_run(Path(teacher))
    teacher_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    del model
    assert live[6] - live[12] == pytest.approx(teacher_bytes, rel=0.02)
    taught, alone = given.values()
    assert taught - alone == pytest.approx(teacher_bytes, rel=0.02)


@pytest.mark.slow
def test_killed_on_both_sides_of_the_stop_equals_undisturbed(text, teacher, student, tmp_path):
    command = arguments(text, tmp_path / "run", LEARNER, **TAUGHT | {"teacher.workdir": teacher})
    for line in (50, 170):
        process = start(*command)
        wait_for_lines(tmp_path / "run", line, process)
        process.kill()
        _, _, err = finish(process)
        assert "teacher: step 12" in err
        assert ("resumed at step" in err) == (line == 170)
    code, _, err = finish(start(*command))
    assert code == 0, err
    assert "resumed at step" in err
    assert "teacher: step 12" not in err
    assert_same_run(tmp_path / "run", student)


@pytest.mark.slow
def test_a_teacher_spread_over_devices_teaches_the_same(text, teacher, student, tmp_path):
    settings = TAUGHT | {"teacher.workdir": teacher, "mesh.expert": 4, "mesh.fsdp": 2}
    settings["train.steps"] = 12
    command = arguments(text, tmp_path / "run", LEARNER, **settings)
    code, _, err = finish(start(*command, JAX_NUM_CPU_DEVICES="8"))
    assert code == 0, err
    ours, alone = logged(tmp_path / "run")[:6], logged(student)[:6]
    for name in ("loss", "kd_loss"):
        values = [[line[name] for line in run] for run in (ours, alone)]
        assert values[0] == pytest.approx(values[1], rel=1e-4)


@pytest.fixture(scope="module")
def recorded_teacher(text, teacher, tmp_path_factory):
    """A folder by `prmoe teacher-cache`: the six likeliest tokens at each place."""
    folder = tmp_path_factory.mktemp("lessons") / "top6"
    settings = {"teacher.workdir": teacher, "kd.kind": "top_k", "kd.top_k": 6}
    _, *overrides, _, _ = arguments(text, "", LEARNER, **settings)
    assert main(["teacher-cache", *overrides, f"--out={folder}"]) == 0
    return folder


def test_a_recorded_teacher_takes_the_portions_of_training(
    text,
    teacher,
    recorded_teacher,
    tmp_path,
    monkeypatch,
):
    """Two windows at a time instead of eight: the same folder but for rounding."""
    rows, run_teacher = [], teachers.run_teacher

    def watched(model, batch, *more):
        rows.append(len(batch.tokens_BxL))
        return run_teacher(model, batch, *more)

    monkeypatch.setattr(teachers, "run_teacher", watched)
    changes = {"teacher.workdir": teacher, "kd.kind": "top_k", "kd.top_k": 6, "train.accumulate": 4}
    _, *overrides, _, _ = arguments(text, "", LEARNER, **changes)
    assert main(["teacher-cache", *overrides, f"--out={tmp_path / 'top6'}"]) == 0
    assert rows == [2]
    ours, theirs = (
        np.load(folder / "log_p.npy") for folder in (tmp_path / "top6", recorded_teacher)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


OFFLINE = {"kd.kind": "top_k", "kd.top_k": 5, "kd.stop": 0.5, "train.steps": 12}


def test_a_recorded_teacher_teaches_the_same(text, teacher, recorded_teacher, tmp_path):
    """Step by step, killed and resumed in the middle, and without the teacher's run."""
    online = OFFLINE | {"teacher.workdir": teacher}
    offline = OFFLINE | {"teacher.workdir": "", "teacher.cache": recorded_teacher}
    assert main(arguments(text, tmp_path / "online", LEARNER, **online)) == 0
    assert main(arguments(text, tmp_path / "offline", LEARNER, **offline)) == 0
    ours, theirs = logged(tmp_path / "offline"), logged(tmp_path / "online")
    assert [sorted(line) for line in ours] == [sorted(line) for line in theirs]
    for name in ("loss", "kd_loss", "kd_weight"):
        values = [[line[name] for line in run if name in line] for run in (ours, theirs)]
        assert len(values[0]) == (12 if name == "loss" else 6)
        assert values[0] == pytest.approx(values[1], rel=1e-5)
    changes = offline | {"checkpoint.every": 2}
    with pytest.MonkeyPatch.context() as patch:

        def stopped(run, step):
            raise KeyboardInterrupt

        patch.setattr(Run, "stop_distillation", stopped)
        assert main(arguments(text, tmp_path / "again", LEARNER, **changes)) == 130
    assert main(arguments(text, tmp_path / "again", LEARNER, **changes)) == 0
    assert_same_run(tmp_path / "again", tmp_path / "offline")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kd.top_k": 7}, "kd.top_k=7 exceeds the 6 tokens that"),
        ({"kd.temperature": 2}, "kd.temperature=2.0 is not that of"),
        ({"model.length": 16}, "is about other windows: length was 32, is 16, windows was"),
        ({"data.cross_document_attention": "true"}, "cross_document_attention was 0, is 1"),
        ({"model.vocab_size": 512}, "vocab_size was 384, is 512"),
        ({"teacher.cache": "nowhere"}, "teacher.cache=nowhere can't be read"),
    ],
)  # fmt: skip
def test_caches_that_do_not_fit(text, recorded_teacher, tmp_path, changes, message, capsys):
    settings = OFFLINE | {"teacher.workdir": "", "teacher.cache": recorded_teacher} | changes
    assert main(arguments(text, tmp_path / "run", LEARNER, **settings)) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_damaged_cache(text, recorded_teacher, tmp_path, capsys):
    folder = tmp_path / "lessons"
    shutil.copytree(recorded_teacher, folder)
    with (folder / "log_p.npy").open("r+b") as file:
        file.truncate(1000)
    settings = OFFLINE | {"teacher.workdir": "", "teacher.cache": folder}
    command = arguments(text, tmp_path / "run", LEARNER, **settings)
    assert main(command) == 2
    assert "can't be read (" in capsys.readouterr().err.splitlines()[-1]
    (folder / "meta.json").write_text("{}")
    assert main(command) == 2
    assert "can't be read (KeyError: 'windows')" in capsys.readouterr().err.splitlines()[-1]


def test_a_cache_is_written_once(text, teacher, recorded_teacher, capsys):
    settings = {"teacher.workdir": teacher, "kd.kind": "top_k", "kd.top_k": 6}
    for changes, message in (
        ({}, f"--out={recorded_teacher} exists"),
        ({"kd.kind": "forward", "kd.top_k": 0}, "use --config.kd.kind=top_k"),
        ({"teacher.workdir": ""}, "no run teaches; name one by"),
    ):
        if changes.get("teacher.workdir") == "":
            changes |= {"kd.kind": "forward", "kd.top_k": 0}
        _, *overrides, _, _ = arguments(text, "", LEARNER, **settings | changes)
        assert main(["teacher-cache", *overrides, f"--out={recorded_teacher}"]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_teacher_whose_groups_do_not_fit(tmp_path):
    """What can be said from the configs alone is said before anything is read."""
    values = settings("2 layers, E=3", moe={"group_size": 16, "dispatch": "gather"})
    save(values, tmp_path / "config.json")
    taught = {"teacher": {"workdir": str(tmp_path)}}
    assert teacher_of(settings("2 layers, E=3", **taught)).moe.group_size == 16
    with pytest.raises(UserError, match="on its student's batches: moe.group_size=16 does not div"):
        teacher_of(settings("2 layers, E=3", batch_size=3, **taught))
    with pytest.raises(UserError, match="moe.group_size=16 neither divides nor is a multiple of m"):
        teacher_of(settings("2 layers, E=3", model={"length": 7}, **taught))


@pytest.mark.parametrize(
    ("changes", "group", "fix"),
    [
        ({"train": {"accumulate": 8}}, 16, "train.batch_size=16"),
        # The student's groups are three windows, the teacher's four.
        (
            {"batch_size": 18, "train": {"accumulate": 3}, "moe": {"group_size": 24}},
            32,
            "train.batch_size=36",
        ),
        ({"model": {"length": 7}}, 16, "model.length=4"),
    ],
)
def test_what_to_change_for_a_teachers_groups(tmp_path, changes, group, fix):
    """The group size of a trained run is given: the fix is a setting of the student, and works."""
    moe = {"group_size": group, "dispatch": "gather"}
    save(settings("2 layers, E=3", batch_size=12, moe=moe), tmp_path / "config.json")
    student = settings("2 layers, E=3", teacher={"workdir": str(tmp_path)}, **changes)
    with pytest.raises(UserError, match="the teacher, on its student's batches") as error:
        teacher_of(student)
    assert str(error.value).endswith(f"; use {fix}")
    group_of, name, value = re.split("[.=]", fix)
    part = dataclasses.replace(getattr(student, group_of), **{name: int(value)})
    assert teacher_of(dataclasses.replace(student, **{group_of: part})).moe.group_size == group


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher.workdir": "nowhere"}, "no run in nowhere: config.json is missing; --config"),
        ({"data.tokenizer": "bpe"}, "the teacher has another tokenizer"),
        ({"model.vocab_size": 512}, "model.vocab_size=512 is not the teacher's; use 384"),
        ({"model.length": 64}, "model.length=64 exceeds the teacher's context; use 32 or less"),
    ],
)  # fmt: skip
def test_mistakes(text, teacher, tmp_path, changes, message, capsys):
    settings = TAUGHT | {"teacher.workdir": teacher} | changes
    assert main(arguments(text, tmp_path / "run", LEARNER, **settings)) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert message in line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_checkpoint_that_taught_is_the_one_that_teaches_on(text, teacher, tmp_path, capsys):
    """A teacher trained further in the meantime is read where it was; if that is gone, say so."""
    command = arguments(text, tmp_path / "run", LEARNER, **TAUGHT | {"teacher.workdir": teacher})
    process = start(*command)
    wait_for_lines(tmp_path / "run", 60, process)
    process.kill()
    finish(process)
    record = next((tmp_path / "run" / "checkpoints").glob("[0-9]*/data/metadata"), None)
    assert record and json.loads(record.read_text())["teacher_step"] == 12
    hidden = Path(teacher).parent / "hidden"
    (Path(teacher) / "checkpoints" / "12").rename(hidden)
    try:
        assert main(command) == 2
    finally:
        hidden.rename(Path(teacher) / "checkpoints" / "12")
    err = capsys.readouterr().err
    assert "checkpoint 12 is not in" in err
    assert "put a copy of it back, or let another run start as this one, by --config.init" in err


def test_a_student_starts_where_its_teacher_is(text, teacher, student, tmp_path, capsys):
    """From the command line: the plan, and less to learn than for a student from scratch."""
    changes = TAUGHT | {"teacher.workdir": teacher, "teacher.inherit": "true", "train.steps": 3}
    changes |= {"model.experts": "7", "model.d_ff": 24, "teacher.importance": "taylor"}
    _, *overrides, _, _ = arguments(text, "", LEARNER, **changes)
    assert main(["distill-plan", *overrides, "--json"]) == 0
    found = capsys.readouterr().out
    assert main(["distil-plan", *overrides, "--json"]) == 0  # the verb's earlier name
    assert capsys.readouterr().out == found
    plan = json.loads(found)
    assert [row["from"] for row in plan["layers"]] == [0, 3]
    assert 0.1 < plan["saved"] < 0.5
    assert main(arguments(text, tmp_path / "run", LEARNER, **changes)) == 0
    assert "the student starts as layers 0 3 of its teacher" in capsys.readouterr().err
    assert logged(tmp_path / "run")[0]["kd_loss"] < logged(student)[0]["kd_loss"] / 2
    metrics, hidden = Path(teacher) / "metrics.jsonl", Path(teacher) / "hidden.jsonl"
    metrics.rename(hidden)
    try:
        assert main(arguments(text, tmp_path / "again", LEARNER, **changes)) == 2
    finally:
        hidden.rename(metrics)
    assert "has no layers/03/expert_load, by which experts are" in capsys.readouterr().err


def test_evaluation_beside_a_teacher(teacher, student, tmp_path, capsys):
    """Teacher and student agree in part; the teacher's loss is the one its own run logged."""
    assert main(["eval", f"--workdir={student}", f"--teacher={teacher}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    logs = [logged(run)[-1]["eval/loss"] for run in (student, teacher)]
    assert found["loss"] == logs[0] != logs[1]
    assert found["teacher/loss"] == pytest.approx(logs[1], rel=1e-6)
    assert 0 < found["teacher/agreement"] < 1 and found["teacher/kl"] > 0.01
    assert main(["eval", f"--workdir={student}", f"--teacher={tmp_path}"]) == 2
    assert "no run in" in capsys.readouterr().err
    assert main(["eval", f"--workdir={student}", "--teacher=x", "--tasks=cloze"]) == 2
    assert "leave it or --tasks out" in capsys.readouterr().err


# Every setting of today's decoders and experts that differs from GPT-2's, and Muon.
TODAY = {
    "model.family": "qwen2_moe",
    "model.kv_heads": 1,
    "model.head_dim": 6,
    "model.expert_d_ff": 12,
    "model.residual_d_ff": 20,
    "model.qk_norm": "whole",
    "model.clip_qkv": 1.0,
    "model.sliding_window": 9,
    "model.normalize_top_k": "always",
    "execution.remat": "full",
    "moe.scores": "sigmoid",
    "moe.routed_scale": 2.5,
    "moe.balance": "batch",
    "moe.bias_update_rate": 0.01,
    "moe.capacity_factor": "inf",
    "moe.eval_capacity_factor": "inf",
    "train.accumulate": 2,
    "train.batch_size": 16,
    "optimizer.kind": "muon",
}


@pytest.mark.slow
def test_a_student_of_today_killed_and_on_eight_devices(text, tmp_path):
    """It starts as a part of its teacher, is killed while taught, and ends as undisturbed."""
    names = "4 layers, every 1, E=8, top 2, residual", "2 layers, every 1, E=8, top 2, residual"
    teacher = tmp_path / "teacher"
    # Long enough that the student's divergence is far above float32's error in log-probabilities.
    assert main(arguments(text, teacher, names[0], **TODAY | {"train.steps": 60})) == 0
    taught = TODAY | {"train.steps": 60, "checkpoint.every": 10, "kd.stop": 0.7}
    taught |= {"teacher.workdir": teacher, "teacher.inherit": True}
    assert main(arguments(text, tmp_path / "whole", names[1], **taught)) == 0
    command = arguments(text, tmp_path / "run", names[1], **taught)
    process = start(*command)
    wait_for_lines(tmp_path / "run", 25, process)
    process.kill()
    finish(process)
    code, _, err = finish(start(*command))
    assert code == 0, err
    assert "resumed at step" in err
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    spread = taught | {"mesh.expert": 4, "mesh.fsdp": 2, "eval.batches": 1}
    spread |= {"train.steps": 6, "kd.stop": 1.0}
    command = arguments(text, tmp_path / "spread", names[1], **spread)
    code, _, err = finish(start(*command, JAX_NUM_CPU_DEVICES="8"))
    assert code == 0, err
    for name in ("loss", "kd_loss"):
        ours, alone = ([x[name] for x in logged(tmp_path / f)[:6]] for f in ("spread", "whole"))
        assert ours == pytest.approx(alone, rel=1e-4)
