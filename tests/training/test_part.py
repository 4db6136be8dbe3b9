"""A part of the parameters trains: the others keep every bit and cost no state and no gradient."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from prmoe_jax.cli import main
from prmoe_jax.config.loading import load
from prmoe_jax.distill.loss import Distiller
from prmoe_jax.model.sizes import cost
from prmoe_jax.nn.parameters import declaration, named_leaves
from prmoe_jax.parallel.mesh import make_mesh
from prmoe_jax.plan.report import held_bytes
from prmoe_jax.training.step import init_state, make_train_step
from tests.support.batches import make_batch
from tests.support.configs import GENTLE, settings
from tests.support.quick import jit
from tests.support.runs import arguments, assert_same_run, parameters
from tests.training.test_train import stop_at

ROUTERS, EXPERTS, NORMS = "router", "experts", "norm"
BALANCED = {"bias_update_rate": 0.1}
DROPLESS = {"capacity_factor": float("inf"), "eval_capacity_factor": float("inf")}


def arrays(tree):
    return {name: np.asarray(leaf) for name, leaf in named_leaves(tree).items()}


def with_pattern(config, pattern):
    return dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, trainable=pattern)
    )


@pytest.mark.parametrize(
    ("pattern", "groups"),
    [
        (ROUTERS, {"moe": BALANCED, "train": {"accumulate": 2}}),
        (EXPERTS, {"moe": BALANCED, "optimizer": {"kind": "muon"}}),
        (NORMS, {"moe": DROPLESS, "optimizer": {"kind": "muon"}}),
        ("w_router", {"moe": BALANCED, "model": {"dtype": "bfloat16"}}),
        ("^tokens", {"execution": {"remat": "none"}}),
        (r"blocks\.1", {"teacher": {"workdir": "any"}, "optimizer": {"router_rate": 0.5}}),
    ],
)
def test_a_part_trains_as_in_a_whole_run_whose_rest_is_put_back(pattern, groups):
    """After every step. The frozen part keeps its bits, and the optimizer has no number of it."""
    optimizer = {"clip_norm": float("inf"), "weight_decay": 0.3} | GENTLE
    groups |= {"optimizer": optimizer | groups.get("optimizer", {})}
    groups["execution"] = {"remat": "full"} | groups.get("execution", {})
    whole = settings("4 layers, E=3, residual", **groups)
    part = with_pattern(whole, pattern)
    taught = ()
    if whole.teacher.workdir:
        teacher = settings("1 layers", seed=3)
        taught = (init_state(teacher).model,)
    steps = [
        jit(make_train_step(values, Distiller(values, teacher) if taught else None))
        for values in (whole, part)
    ]
    states = [init_state(whole), init_state(part)]
    first = arrays(states[0].model)
    frozen = {name for name in first if not re.search(pattern, name)}
    assert 0 < len(frozen) < len(first)
    for seed in range(3):
        metrics = []
        for i, step in enumerate(steps):
            states[i], found = step(states[i], make_batch(seed), *taught)
            metrics.append(found)
        np.testing.assert_allclose(metrics[1]["loss"], metrics[0]["loss"], rtol=1e-5)
        moved, ours = (arrays(state.model) for state in states)
        for name, value in ours.items():
            if name in frozen:
                np.testing.assert_array_equal(value, first[name], err_msg=name)
            else:
                np.testing.assert_allclose(value, moved[name], 2e-4, 2e-5, err_msg=name)
                assert (value != first[name]).any(), name
        back = {name: first[name] if name in frozen else moved[name] for name in moved}
        model = jax.tree.unflatten(jax.tree.structure(states[0].model), list(back.values()))
        states[0] = states[0]._replace(model=model)
    state = named_leaves(states[1].optimizer)
    assert not [name for name in state if any(name.endswith(f".{other}") for other in frozen)]
    assert len(state) > 1


def test_the_norm_of_the_gradient_and_its_clipping_leave_frozen_parameters_out():
    """The first moments are a tenth of the gradient."""
    moe = {"aux_loss_weight": 0.5}
    text = "1 layers, every 1, E=3"
    values = settings(text, moe=moe, optimizer={"clip_norm": float("inf")})

    def moments(config):
        state, metrics = jit(make_train_step(config))(init_state(config), make_batch())
        named = arrays(state.optimizer)
        return {k.partition(".mu.")[2]: v for k, v in named.items() if ".mu." in k}, metrics

    everything, _ = moments(values)
    routers, metrics = moments(with_pattern(values, ROUTERS))
    assert list(routers) == [name for name in everything if ROUTERS in name]
    norm = 10 * np.sqrt(sum((everything[name] ** 2).sum() for name in routers))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)
    clipped = settings(
        text, moe=moe, optimizer={"clip_norm": float(norm / 2), "trainable": ROUTERS}
    )
    halves, _ = moments(clipped)
    for name, value in halves.items():
        np.testing.assert_allclose(value, routers[name] / 2, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("2 layers", {}),
        ("2 layers", {"execution": {"remat": "full"}, "model": {"output": "untied"}}),
        ("1 layers, every 1, E=4", {}),
        ("1 layers, every 1, E=4", {"moe": DROPLESS}),
        ("1 layers, every 1, E=4", {"moe": DROPLESS, "execution": {"dispatch": "padded"}}),
        ("1 layers, every 1, E=4", {"moe": DROPLESS, "execution": {"dispatch": "ragged"}}),
    ],
)
def test_no_gradient_of_a_frozen_weight_is_computed(text, groups):
    """The FLOPs of the compiled step fall by two for each token and each number of a matrix."""
    flops, batch = [], make_batch()
    values = settings(text, **groups)
    for config in (values, with_pattern(values, NORMS)):
        state = jax.eval_shape(lambda: init_state(config))  # noqa: B023
        program = jit(make_train_step(config)).lower(state, batch).compile()
        flops.append(program.cost_analysis()["flops"])
    numbers = {
        name: leaf.size // (4 if "experts" in name else 1)  # a token is in one of four experts
        for name, leaf in named_leaves(state.model).items()
        if declaration(name).contracted
    }
    if "output" in numbers:
        del numbers["tokens"]  # which are looked up
    saved = 2 * batch.tokens_BxL.size * sum(numbers.values())
    assert flops[0] - flops[1] >= saved > 0.15 * flops[0]


def test_a_plan_holds_moments_of_the_part_alone():
    """Two moments in float32; AdamW and its schedule each count the steps in int32."""
    values = settings("2 layers, E=3", moe=BALANCED)
    routers = with_pattern(values, ROUTERS)
    mesh = make_mesh(values, jax.devices()[:1])
    whole, part = held_bytes(values, mesh), held_bytes(routers, mesh)
    assert part["optimizer"] == 2 * 4 * (12 * 3 + 3) + 2 * 4
    assert whole["optimizer"] == 2 * whole["parameters"] + 2 * 4
    assert whole["parameters"] == part["parameters"]


def test_routers_of_an_upcycled_run_train_and_resume_bit_for_bit(
    text, tmp_path, monkeypatch, capsys
):
    """The experts stay what they start as, the MLP of the dense run; the log counts."""
    dense = tmp_path / "dense"
    assert main(arguments(text, dense, "2 layers", **{"train.steps": 1})) == 0
    given = {"init.workdir": dense, "optimizer.trainable": ROUTERS, "checkpoint.every": 4}
    name = "2 layers, E=4, top 2"
    assert main(arguments(text, tmp_path / "whole", name, **given)) == 0
    told = capsys.readouterr().err
    total = cost(load(tmp_path / "whole" / "config.json").model).total_params
    assert f"64 of {total:,} parameters train (optimizer.trainable=router)" in told
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        assert main(arguments(text, tmp_path / "run", name, **given)) == 0
    other = given | {"optimizer.trainable": EXPERTS}
    assert main(arguments(text, tmp_path / "run", name, **other)) == 2
    assert "optimizer.trainable was 'router', is 'experts'" in capsys.readouterr().err
    assert main(arguments(text, tmp_path / "run", name, **given)) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    (_, before), (_, after) = parameters(dense), parameters(tmp_path / "run")
    place = "stages.0.blocks.1.mlp."
    for of_mlp in ("w_in", "b_in", "w_out", "b_out"):
        for copy in np.moveaxis(after[f"{place}experts.{of_mlp}"], 1, 0):
            np.testing.assert_array_equal(copy[0], before["stages.0.blocks.0.mlp." + of_mlp][1])
    np.testing.assert_array_equal(after["tokens"], before["tokens"])


def test_a_pattern_that_is_in_no_name(text, tmp_path, capsys):
    """Told before any text is read."""
    command = arguments((tmp_path / "none", tmp_path), tmp_path / "run", "1 layers")
    assert main([*command, "--config.optimizer.trainable=router"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "prmoe: optimizer.trainable=router is found in the name of no parameter; some names are "
        "norm.scale, stages.0.blocks.0.attention.b_out, stages.0.blocks.0.attention.w_qkv, "
        "stages.0.blocks.0.mlp.w_in, stages.0.blocks.0.norm_attention.shift, tokens"
    )
