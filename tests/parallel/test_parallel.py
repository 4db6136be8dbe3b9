"""The mesh: its axes, its rules, and that what it splits is what one device computes.

Eight devices are eight threads of a CPU, in a process of their own.
"""

import dataclasses
import json
import math
import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P
from scipy import stats

from prmoe_jax.cli import main
from prmoe_jax.config import architecture
from prmoe_jax.config.loading import load, resolve
from prmoe_jax.config.schema import MeshConfig
from prmoe_jax.errors import UserError
from prmoe_jax.moe import exchange
from prmoe_jax.moe.experts import Experts, UnstackedExperts
from prmoe_jax.nn.mlp import MLPShape
from prmoe_jax.nn.parameters import PARAMETERS, named_leaves
from prmoe_jax.parallel import sharding
from prmoe_jax.parallel.axes import batch_axes, expert_axes
from prmoe_jax.parallel.mesh import (
    axis_sizes,
    check_fits,
    check_teacher_fits,
    choose_mesh,
    flags,
    lower_memory_configs,
    on_slices,
    suggest_mesh,
)
from prmoe_jax.parallel.sharding import spec, specs
from prmoe_jax.training.step import init_state
from tests.support.lines import only_line
from tests.support.paths import REPOSITORY
from tests.support.runs import arguments, logged


def settings(text, batch_size=8, model=(), moe=(), train=(), **mesh):
    fields = architecture.parse_fields(text) | dict(model)
    train = {"steps": 10, "batch_size": batch_size} | dict(train)
    return resolve({"model": fields, "moe": dict(moe), "mesh": mesh, "train": train})


def sizes(devices, text, **changes):
    values = settings(text, **changes)
    check_fits(values, devices)
    return axis_sizes(values, devices)


def test_the_rest_goes_to_the_open_axis():
    assert sizes(8, "4 layers, E=4") == {
        "data": 8, "fsdp": 1, "expert_0": 1, "slice": 1, "tensor": 1
    }  # fmt: skip
    assert sizes(8, "4 layers, E=4", data=1, fsdp=-1, expert=2)["fsdp"] == 4
    assert sizes(8, "4 layers, E=4", data=2, fsdp=2, tensor=-1)["tensor"] == 2


def test_every_layer_of_a_pyramid_uses_as_many_devices_as_it_can():
    """The paper's example: 32, 64 and 128 experts on 128 devices: EP 32, 64, 128."""
    shape = sizes(128, "6 layers, E=32+64+128", batch_size=128, expert=128)
    assert list(shape.items())[2:5] == [("expert_2", 2), ("expert_1", 2), ("expert_0", 32)]
    mesh = AbstractMesh(tuple(shape.values()), tuple(shape))
    assert expert_axes(mesh, 32) == ("expert_0",)
    assert expert_axes(mesh, 64) == ("expert_1", "expert_0")
    assert expert_axes(mesh, 128) == ("expert_2", "expert_1", "expert_0")
    assert batch_axes(mesh) == ("data", "fsdp", "expert_2", "expert_1", "expert_0", "slice")
    # Fewer devices than experts: several on each.
    assert sizes(16, "6 layers, E=32+64+128", batch_size=16, expert=16)["expert_0"] == 16
    # An exchange in two stages: hosts of 8.
    changes = {"batch_size": 128, "moe": {"exchange": "hierarchical"}}
    shape = sizes(128, "6 layers, E=32+64+128", **changes, expert=128, expert_inner=8)
    assert [shape[f"expert_{i}"] for i in range(4)] == [8, 4, 2, 2]


@pytest.mark.parametrize(
    ("text", "changes", "line"),
    [
        ("2 layers, E=4", {"data": 3}, "mesh.data=3 makes 3 devices, there are 8; leave one at -1"),
        (
            "2 layers, E=4",
            {"expert": 3},
            "mesh.expert=3 makes 3 devices, there are 8; use sizes whose product divides it",
        ),
        (
            "2 layers, E=4",
            {"expert": 8},
            "mesh.expert=8: no layer can spread its experts over more than 4 devices; use "
            "mesh.expert=4",
        ),
        (
            "4 layers, E=3+8",
            {"expert": 8},
            "mesh.expert=8: the 3 experts of layer 1 share no divisor with it; use mesh.expert=1",
        ),
        ("2 layers", {"expert": 2}, "mesh.expert=2: no layer can spread its experts over more"),
        (
            "2 layers, E=4",
            {"tensor": 8},
            "model.heads=4 is not divisible by mesh.tensor=8; use 4 of them",
        ),
        (
            "2 layers, E=4",
            {"model": {"d_ff": 12}, "tensor": 4, "expert_slice": 2},
            "model.expert_d_ff=12 is not divisible by mesh.tensor x mesh.expert_slice=8; use 4 of",
        ),
        (
            "2 layers, every 1, E=4",  # no layer has an MLP of width d_ff
            {"model": {"d_ff": 9, "expert_d_ff": 18}, "tensor": 4},
            "model.expert_d_ff=18 is not divisible by mesh.tensor=4; use 2 of",
        ),
        (
            "2 layers, E=4",
            {"model": {"d_model": 12, "heads": 2}, "data": 1, "fsdp_experts": 8},
            "model.d_model=12 is not divisible by mesh.fsdp_experts=8; use 4 of them",
        ),
        (
            "2 layers, E=4",
            {"batch_size": 12},
            "train.batch_size=12 is not divisible by 8 devices x train.accumulate=1 x routing "
            "groups of 256 tokens; use 8",
        ),
        (
            "2 layers, E=4",
            {"moe": {"exchange": "coordinated"}},
            "execution.exchange=coordinated has no effect with mesh.tensor=1; use auto",
        ),
        (
            "2 layers, E=4",
            {"moe": {"exchange": "hierarchical"}, "expert": 4},
            "execution.exchange=hierarchical needs mesh.expert_inner",
        ),
        (
            "2 layers, E=8",
            {"moe": {"exchange": "hierarchical"}, "expert": 8, "expert_inner": 3},
            "mesh.expert=8: its layers or stages spread over 3 and over 8 devices: not nested; "
            "use mesh.expert_inner=4",
        ),
        (
            "2 layers, E=8",
            {"moe": {"exchange": "hierarchical"}, "expert": 8, "expert_inner": 8},
            "execution.exchange=hierarchical needs mesh.expert_inner above 1 and below",
        ),
        # Whatever the order of the layers.
        (
            "6 layers, E=1+4+9",
            {"expert": 4, "data": 2},
            "mesh.expert=4: the 9 experts of layer 5 share no divisor with it; use mesh.expert=1",
        ),
        (
            "6 layers, E=9+4+1",
            {"expert": 4, "data": 2},
            "mesh.expert=4: the 9 experts of layer 1 share no divisor with it; use mesh.expert=1",
        ),
        (
            "2 layers, E=8",
            {"expert": 4, "expert_inner": 8},
            "mesh.expert=4: mesh.expert_inner=8 exceeds it; use mesh.expert_inner=4",
        ),
        (
            "2 layers",
            {"expert_inner": 10**9},
            f"mesh.expert=1: mesh.expert_inner={10**9} exceeds it; use mesh.expert_inner=1",
        ),
        ("2 layers", {"data": 10**9}, f"mesh.data={10**9} makes {10**9} devices, there are 8"),
        (
            "2 layers, E=4",
            {"expert": 10**9, "tensor": 10**9},
            f"mesh.expert={10**9} x mesh.tensor={10**9} makes {10**18} devices, there are 8",
        ),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(text, changes, line):
    with pytest.raises(UserError) as error:
        sizes(8, text, **changes)
    assert str(error.value).startswith(line)


def test_a_mesh_splits_only_what_a_model_has():
    assert sizes(8, "2 layers, every 1, E=4", model={"d_ff": 9, "expert_d_ff": 16}, tensor=4)
    assert sizes(8, "2 layers", model={"d_ff": 12}, tensor=4, expert_slice=2)


def test_a_teacher_on_its_students_mesh_is_named():
    """Sizes that its student doesn't have are its own."""
    student = settings("2 layers", model={"heads": 4}, tensor=4)
    teacher = settings("2 layers", model={"heads": 2})
    mesh = AbstractMesh((2, 1, 1, 4), ("data", "fsdp", "slice", "tensor"))
    with pytest.raises(UserError, match="^the teacher, on its student's mesh and batches: model.h"):
        check_teacher_fits(teacher, student, mesh)


@pytest.mark.parametrize(
    ("rows", "devices", "factor", "piece"),
    [
        (4096, 128, 1.25, 65),  # 32, 5 standard deviations of 5.66, and 4: more than 40
        (65536, 4, 1.25, 20480),  # a quarter more than 16384, of which 5 deviations are 640
        (1000, 2, 4.0, 1000),  # no device has more to send
        (16, 4, 1.25, 16),
        (64, 128, 1.25, 9),
        (512, 128, 1.25, 18),
    ],
)
def test_pieces_of_one_size_have_room_for_chance(rows, devices, factor, piece, monkeypatch):
    """Where choices are made evenly at random, all pairs of devices hardly ever need more."""
    monkeypatch.setattr(jax.lax, "axis_size", lambda axes: devices)
    monkeypatch.setattr(exchange, "lacks_ragged_exchange", lambda axes: True)
    monkeypatch.setattr(exchange, "LEAST_ROWS", 1)
    parallel = exchange.ExpertParallel(None, ("expert_0",), "flat", factor)
    (stage,) = parallel._stages(rows)
    assert (stage.piece, stage.buffer) == (piece, devices * piece)
    assert devices**2 * stats.binom.sf(piece, rows, 1 / devices) < 1 / 700


def test_the_inner_stage_is_no_axis_that_takes_the_rest():
    """What is wrong isn't what is proposed."""
    with pytest.raises(UserError) as error:
        settings("2 layers, E=4", expert_inner=-1)
    assert str(error.value) == "mesh.expert_inner=-1 is out of range; use 1 or more"


def test_proposals_work():
    """Whatever number of experts and devices is asked for, the mesh proposed is accepted."""
    proposed = 0
    for experts in ("2", "6", "12", "3+6", "4+6", "4+8+12", "5+10"):
        for asked in range(2, 25):
            text = (
                f"6 layers, E={experts}"
                if "+" not in experts
                else (f"{2 * (1 + experts.count('+'))} layers, E={experts}")
            )
            try:
                sizes(24, text, batch_size=24, data=1, fsdp=-1, expert=asked)
            except UserError as error:
                if "use mesh.expert=" in str(error):
                    works = int(str(error).rpartition("=")[2])
                    sizes(24, text, batch_size=24, data=1, fsdp=-1, expert=works)
                    proposed += 1
    assert proposed > 20


@pytest.mark.parametrize(
    ("text", "expert"),
    [("4 layers", 1), ("6 layers, E=4", 4), ("6 layers, E=3+6+12", 12), ("4 layers, E=3+8", 1)],
)
def test_a_proposed_mesh_fits(text, expert):
    for devices in (1, 2, 6, 8, 12, 64, 128, 96):
        mesh = suggest_mesh(settings(text), devices)
        shape = sizes(devices, text, batch_size=devices, **dataclasses.asdict(mesh))
        assert math.prod(shape.values()) == devices and shape["fsdp"] <= 16
    assert mesh.expert == expert


@pytest.mark.parametrize(
    ("text", "devices", "fsdp", "split"),
    [
        ("4 layers", 24, 8, 8),
        ("4 layers", 72, 8, 8),
        ("4 layers", 5, 1, 1),
        # Twelve devices for the experts don't divide a width of 64; the two for FSDP do.
        ("4 layers, E=12", 24, 2, 2),
        ("4 layers, E=4", 96, 8, 32),
    ],
)
def test_fsdp_splits_a_width_that_not_all_axes_divide(text, devices, fsdp, split):
    values = settings(text, model={"d_model": 64})
    mesh = suggest_mesh(values, devices)
    assert mesh.fsdp == fsdp
    shape = axis_sizes(dataclasses.replace(values, mesh=mesh), devices)
    part = NamedSharding(mesh_of(**shape), spec("tokens", (512, 64), mesh_of(**shape)))
    assert 64 // part.shard_shape((512, 64))[1] == split


@pytest.mark.parametrize(
    ("mesh", "split"),
    [
        ({"fsdp": 2, "expert": 4}, 4),
        ({"fsdp": 4, "expert": 2}, 4),
        ({"fsdp": 4, "expert_slice": 2}, 4),
        ({"expert": 4, "expert_inner": 2, "expert_slice": 2}, 4),
        ({"data": 2, "fsdp": 2, "expert": 2}, 4),
        ({"fsdp": 8}, 8),
    ],
)
def test_fsdp_over_all_devices_leaves_out_the_smallest_axis(mesh, split):
    shape = sizes(8, "4 layers, E=4", batch_size=8, **{"data": 1} | mesh)
    part = NamedSharding(mesh_of(**shape), spec("tokens", (512, 64), mesh_of(**shape)))
    assert 64 // part.shard_shape((512, 64))[1] == split


def test_two_stages_are_suggested_where_they_are_asked_for():
    values = settings("6 layers, E=8", moe={"exchange": "hierarchical"})
    assert suggest_mesh(values, 8).expert_inner == 4
    assert suggest_mesh(settings("6 layers, E=8"), 8).expert_inner == 8


def test_fsdp_that_splits_nothing_is_told(caplog):
    choose_mesh(settings("2 layers", model={"d_model": 64}, fsdp=12), 24)
    told = "mesh.fsdp=12 splits hardly anything, since it doesn't divide d_model=64"
    assert caplog.messages == [told]


def test_a_proposed_mesh_never_has_fsdp_over_all_devices():
    text = "6 layers, E=128"
    for devices in (32, 64, 128, 256):
        mesh = suggest_mesh(settings(text), devices)
        shape = sizes(devices, text, batch_size=devices, **dataclasses.asdict(mesh))
        split = NamedSharding(mesh_of(**shape), spec("tokens", (512, 4096), mesh_of(**shape)))
        assert 16 <= 4096 // split.shard_shape((512, 4096))[1] < devices


@pytest.mark.parametrize(
    ("text", "batch_size", "devices", "expected"),
    [
        ("4 layers", 8, 1, {}),
        ("4 layers", 8, 8, {"fsdp": 8}),
        ("4 layers", 64, 64, {"data": 4, "fsdp": 16}),
        ("6 layers, E=4", 24, 24, {"data": 3, "fsdp": 2, "expert": 4}),
        ("6 layers, E=4+8+8", 16, 8, {"expert": 8, "expert_inner": 8}),
        # The batch is for 4 of 8 devices, 4 of 16 and, of 24, for 8: the rest slices heads.
        ("6 layers, E=4", 4, 8, {"expert": 4, "tensor": 2}),
        ("4 layers", 12, 16, {"fsdp": 4, "tensor": 4}),
    ],
)
def test_a_config_without_a_mesh_gets_one_that_fits(text, batch_size, devices, expected, caplog):
    """The log names it; its flags, on the command line, make the same mesh."""
    values = settings(text, batch_size=batch_size)
    with caplog.at_level("INFO"):
        chosen = choose_mesh(values, devices)
    sizes = {"data": 1} | expected
    assert chosen == dataclasses.replace(values, mesh=MeshConfig(**sizes))
    given = flags(chosen.mesh)
    asked = dict(re.findall(r"--config\.mesh\.(\w+)=(\d+)", given))
    again = settings(text, batch_size=batch_size, **{name: int(n) for name, n in asked.items()})
    assert axis_sizes(again, devices) == axis_sizes(chosen, devices)
    assert math.prod(axis_sizes(chosen, devices).values()) == devices
    line = f"mesh: suggested: {given}; give other sizes for another"
    assert caplog.messages == ([line] if devices > 1 else [])


def test_a_mesh_of_ones_own_is_kept(caplog):
    """So is one of replicas alone. Where no mesh fits the batch, the line says which would."""
    for mesh in ({"data": 8}, {"fsdp": -1, "data": 1}, {"expert": 2}, {"expert_inner": 2}):
        values = settings("4 layers, E=4", **mesh)
        assert choose_mesh(values, 8) is values
    assert not caplog.messages
    with pytest.raises(
        UserError, match="train.batch_size=3 is not divisible by 8 devices .* use 8"
    ):
        choose_mesh(settings("4 layers", batch_size=3), 8)
    # What only some meshes allow.
    coordinated = settings("4 layers, E=4", moe={"exchange": "coordinated"})
    assert choose_mesh(coordinated, 8).mesh.tensor == 2


@pytest.mark.parametrize(
    "text", ["4 layers", "4 layers, E=2", "6 layers, E=4", "6 layers, E=3+6+12"]
)
@pytest.mark.parametrize(("devices", "batch_size"), [(8, 8), (32, 32), (32, 16)])
def test_meshes_for_lower_memory_hold_less(text, devices, batch_size):
    """Each fits. The first holds no more than the suggested one, the leanest an even share."""
    values = settings(text, batch_size=batch_size)
    state = jax.eval_shape(lambda: init_state(values))

    def numbers(mesh):
        """Numbers of the state that one device holds."""
        shape = axis_sizes(dataclasses.replace(values, mesh=mesh), devices)
        assert math.prod(shape.values()) == devices
        places = sharding.shardings(state, mesh_of(**shape))
        parts = jax.tree.map(lambda x, p: math.prod(p.shard_shape(x.shape)), state, places)
        return sum(jax.tree.leaves(parts))

    meshes = [lower.mesh for lower in lower_memory_configs(values, devices)]
    assert len(meshes) == len(set(meshes))
    assert [mesh.tensor for mesh in meshes] == sorted(mesh.tensor for mesh in meshes)
    assert numbers(meshes[0]) <= numbers(choose_mesh(values, devices).mesh)
    whole = sum(math.prod(x.shape) for x in jax.tree.leaves(state))
    assert whole / devices <= min(map(numbers, meshes)) < 1.2 * whole / devices


def test_axes_that_cross_slices_by_hand():
    """Replicas come first; experts in the slices of one replica where the user asks for it."""
    shape = sizes(8, "2 layers, E=4", slices=2, expert=4)
    assert shape == {"data_across": 2, "data": 1, "fsdp": 1, "expert_0": 4, "slice": 1, "tensor": 1}
    shape = sizes(8, "2 layers, E=4", slices=2, data=4, tensor=2)
    assert (shape["data_across"], shape["data"], shape["tensor"]) == (2, 2, 2)
    assert "data_across" not in sizes(8, "2 layers, E=4", slices=1, expert=4)
    # The paper's pyramid on two slices of 64: its 32 and 64 experts stay in a slice of their own.
    asked = {"batch_size": 128, "moe": {"exchange": "hierarchical"}}
    text = "6 layers, E=32+64+128"
    shape = sizes(128, text, **asked, slices=2, expert=128, expert_inner=64)
    assert list(shape)[:4] == ["expert_across_2", "data", "fsdp", "expert_1"]
    mesh = AbstractMesh(tuple(shape.values()), tuple(shape))
    assert expert_axes(mesh, 64) == ("expert_1", "expert_0")
    assert expert_axes(mesh, 128) == ("expert_across_2", "expert_1", "expert_0")
    # Four slices, two for each of two replicas.
    shape = sizes(128, text, **asked, slices=4, data=2, expert=64, expert_inner=32)
    assert list(shape.items())[:2] == [("data_across", 2), ("expert_across_1", 2)]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"slices": 3}, "mesh.slices=3 does not divide 8 devices; use 1, or 0 to find the slices"),
        ({"slices": -1}, "mesh.slices=-1 is out of range; use 0 or more"),
        (
            {"slices": 2, "expert": 8},
            "mesh.expert=8 spans 8 devices, but a slice has 4 (mesh.slices=2) and only mesh.data "
            "crosses slices; use sizes whose product divides 4, or, for experts across slices, "
            "execution.exchange=hierarchical with mesh.expert_inner=4",
        ),
        (
            {"slices": 4, "fsdp": 2, "tensor": 2},
            "mesh.fsdp=2 x mesh.tensor=2 spans 4 devices, but a slice has 2 (mesh.slices=4) and "
            "only mesh.data crosses slices; use sizes whose product divides 2",
        ),
        (
            {"slices": 2, "expert": 8, "expert_inner": 2, "moe": {"exchange": "hierarchical"}},
            "mesh.expert=8 spans 8 devices, but a slice has 4 (mesh.slices=2) and only mesh.data "
            "crosses slices; use sizes whose product divides 4, or, for experts across slices, "
            "execution.exchange=hierarchical with mesh.expert_inner=4",
        ),
        # One device of each slice has no inner stage of its own.
        (
            {"slices": 8, "expert": 8},
            "mesh.expert=8 spans 8 devices, but a slice has 1 (mesh.slices=8) and only mesh.data "
            "crosses slices; use sizes whose product divides 1",
        ),
    ],
)
def test_a_mesh_that_does_not_fit_slices_is_refused(changes, line):
    with pytest.raises(UserError) as error:
        sizes(8, "2 layers, E=8", **changes)
    assert str(error.value) == line


def tpus(*slices):
    return [SimpleNamespace(platform="tpu", slice_index=index) for index in slices]


def test_slices_are_those_of_the_devices():
    """TPUs know theirs; a GPU's number of that name tells another thing, and CPUs have none."""
    values = settings("2 layers, E=4")
    assert on_slices(values, tpus(0, 0, 1, 1)).mesh.slices == 2
    assert on_slices(values, tpus(3, 3)) is values
    assert on_slices(values, [SimpleNamespace(platform="tpu")] * 4) is values
    gpus = [SimpleNamespace(platform="gpu", slice_index=i) for i in range(2)]
    assert on_slices(values, gpus) is values
    asked = settings("2 layers, E=4", slices=2)
    assert on_slices(asked, gpus) is asked
    assert on_slices(asked, tpus(1, 1, 4, 4)) == asked
    for devices, line in (
        (tpus(0, 1, 2, 3), "mesh.slices=2, but the devices form 4; use 4, or 0 to find them"),
        (tpus(0, 0), "mesh.slices=2, but the devices form 1; use 1, or 0 to find them"),
    ):
        with pytest.raises(UserError) as error:
            on_slices(asked, devices)
        assert str(error.value).startswith(line)


@pytest.mark.parametrize("text", ["4 layers", "6 layers, E=4", "6 layers, E=3+6+12"])
def test_suggested_meshes_stay_in_their_slice(text):
    """Apart from the replicas, a mesh of S slices is that of a slice."""
    for slices, devices in ((2, 8), (2, 96), (4, 96)):
        values = settings(text, batch_size=devices, slices=slices)
        whole = choose_mesh(values, devices).mesh
        alone = choose_mesh(settings(text, batch_size=devices), devices // slices).mesh
        assert whole == dataclasses.replace(alone, data=alone.data * slices, slices=slices)
        for lower in lower_memory_configs(values, devices):
            assert axis_sizes(lower, devices)
        given = dict(re.findall(r"--config\.mesh\.(\w+)=(\d+)", flags(whole)))
        again = settings(text, batch_size=devices, **{k: int(n) for k, n in given.items()})
        assert axis_sizes(again, devices) == axis_sizes(
            dataclasses.replace(values, mesh=whole), devices
        )
    # The batch needs the devices of a slice to split heads, which no two slices do.
    with pytest.raises(UserError, match="train.batch_size=2 is not divisible by 8 devices"):
        choose_mesh(settings(text, batch_size=2, slices=4), 8)
    assert choose_mesh(settings(text, batch_size=4, slices=4), 8).mesh.tensor == 2


def test_the_command_line_refuses_slices_that_are_not_there(text, tmp_path, capsys):
    workdir = tmp_path / "run"
    command = arguments(text, workdir, "1 layers, layers 0, E=4")
    assert main([*command, "--config.mesh.slices=3"]) == 2
    assert "mesh.slices=3 does not divide 1 devices" in only_line(capsys.readouterr().err)
    assert not workdir.exists()


def mesh_of(**sizes):
    return AbstractMesh(tuple(sizes.values()), tuple(sizes))


def test_rules_by_hand():
    mesh = mesh_of(data=2, fsdp=4, expert_1=2, expert_0=8, slice=3, tensor=2)
    shards = "fsdp", "expert_1", "expert_0", "slice"
    assert spec("tokens", (512, 192), mesh) == P(("tensor",), shards)
    assert spec("tokens", (512, 192), mesh, in_use=True) == P(("tensor",), ())
    w_in = "stages.0.blocks.1.mlp.experts.w_in"
    spread = ("expert_1", "expert_0")
    assert spec(w_in, (3, 32, 64, 96), mesh) == P(None, spread, (), ("slice", "tensor"))
    assert spec(w_in, (3, 8, 64, 96), mesh)[1] == "expert_0"
    w_out = "stages.0.blocks.1.mlp.mlp.w_out"
    assert spec(w_out, (3, 384, 192), mesh) == P(None, ("tensor", *shards), ())
    assert spec(w_out, (3, 384, 192), mesh, in_use=True) == P(None, "tensor", ())
    # Where the width can't be split over all, over the inner ones.
    assert spec("tokens", (512, 72), mesh)[1] == ("expert_0", "slice")
    assert spec("0.mu.stages.0.blocks.0.attention.w_out", (3, 4, 8, 192), mesh)[3] == shards
    # Not over all devices of the mesh, if there is a smaller choice.
    whole = mesh_of(data=1, fsdp=1, expert_1=2, expert_0=8, slice=1, tensor=1)
    assert spec("tokens", (512, 192), whole)[1] == "expert_0"
    assert spec("tokens", (512, 192), mesh_of(data=1, fsdp=8, slice=1, tensor=1))[1] == "fsdp"
    # Nothing but experts is split over slices; a whole slice is no smaller choice than a pod.
    sliced = mesh_of(data_across=2, expert_across_2=2, data=1, fsdp=1, expert_1=2, expert_0=8)
    assert spec("tokens", (512, 192), mesh_of(**sliced.shape, slice=1, tensor=1))[1] == "expert_0"
    assert batch_axes(sliced)[:2] == ("data_across", "expert_across_2")
    # FSDP of the experts splits the model's width, and other parameters as FSDP does.
    whole = mesh_of(data=1, fsdp=2, fsdp_experts=4, expert_0=8, slice=1, tensor=2)
    assert spec(w_in, (3, 32, 64, 96), whole) == P(None, "expert_0", "fsdp_experts", "tensor")
    assert spec(w_in, (3, 32, 64, 96), whole, in_use=True) == P(None, "expert_0", (), "tensor")
    assert spec(w_in.replace("in", "out"), (3, 32, 96, 64), whole)[3] == "fsdp_experts"
    assert spec("tokens", (512, 192), whole)[1] == ("fsdp", "fsdp_experts", "expert_0")
    # An axis of one device splits nothing.
    alone = mesh_of(data=8, fsdp=1, expert_0=1, slice=1, tensor=1)
    assert spec("tokens", (8, 8), alone) == P((), ())


def test_every_leaf_is_declared():
    """Of the state with every option on, and of experts apart; a new name is an error."""
    everything = [settings("8 layers, E=2x3+5, residual", moe={"bias_update_rate": 0.1})]
    for family in ("qwen2_moe", "olmoe", "qwen3"):
        parts = {"family": family, "kv_heads": 2, "biases": "all", "positions": "learned"}
        everything.append(settings("8 layers, E=2x3+5, residual", model=parts))
    everything.append(settings("8 layers, E=2x3+5, residual", model={"family": "gpt_oss"}))
    key = jax.random.key(0)
    state = jax.eval_shape(
        lambda: (
            [init_state(values) for values in everything],
            UnstackedExperts(Experts(3, MLPShape(8, 16, gated=True, gate_bias=True), key)),
        )
    )
    mesh = mesh_of(data=2, fsdp=2, expert_0=1, slice=1, tensor=2)
    decided = named_leaves(specs(state, mesh))
    assert decided.keys() == named_leaves(state).keys()
    words = [".".join(p for p in name.split(".") if not p.isdigit()) for name in decided]
    used = {next(end for end in PARAMETERS if name.endswith(end)) for name in words}
    assert used == PARAMETERS.keys()
    for name, leaf in named_leaves(state).items():
        partition = decided[name]
        assert len(partition) == leaf.ndim
        for size, axes in zip(leaf.shape, partition, strict=True):
            for axis in [axes] if isinstance(axes, str) else axes or ():
                assert size % mesh.shape[axis] == 0
    with pytest.raises(KeyError, match="declares no stages.0.w_new"):
        specs({"stages": [{"w_new": jnp.zeros((3, 3))}]}, mesh)


@pytest.fixture(scope="module")
def on_eight_devices(tmp_path_factory):
    """Runs a case of `tests/support/eight_devices.py`, whose checks are assertions.

    Returns its standard output and standard error.
    """
    files = [tmp_path_factory.mktemp("eight") / name for name in ("out", "err")]
    command = [sys.executable, "-m", "tests.support.eight_devices"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=REPOSITORY, **pipes) as server:

        def ask(case, *arguments):
            line = json.dumps([case, *arguments, *map(str, files)])
            print(line, file=server.stdin, flush=True)
            code = server.stdout.readline()
            out, err = (file.read_text() for file in files)
            assert code == "0\n", err[-3000:]
            return out, err

        yield ask
        server.stdin.close()


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "meshes"),
    [
        ("pyramid, top 2", ["sliced", "expert, tensor, coordinated"]),
        ("accumulate", ["fsdp, expert, tensor"]),
        ("dropless", ["two stages"]),
        ("dropless, top 4", ["experts over slices"]),
        ("equal pieces", ["expert"]),
        ("a part", ["fsdp of experts"]),
        slow("moe", ["replicas over and in slices", "experts over slices", "fsdp of experts"]),
        slow("pyramid, top 2", ["fsdp", "two stages"]),
        slow("dropless", ["expert, slice, tensor"]),
        slow("bfloat16 products", ["data", "sliced"]),
        slow("today's parts", ["slices, expert, tensor"]),
        slow("muon", ["fsdp, expert, tensor", "fsdp of experts"]),
        slow("a part", ["fsdp", "expert, slice, tensor"]),
    ],
)
def test_a_step_on_a_mesh_equals_one_on_one_device(name, meshes, on_eight_devices):
    """Loss, every gradient, and the state after one clipped update.

    `experiments/meshes` has every architecture on every mesh.
    """
    assert on_eight_devices("step", name, *meshes)[0].count("equal") == len(meshes)


@pytest.mark.slow
def test_rounds_serve_every_row_of_one_expert(on_eight_devices):
    """All tokens choose the same expert: its device takes rounds of a buffer of bounded size.

    Four devices send it 4 · 16 rows without 8 of padding, which is 56. Its buffer has 1.25 · 16
    rows, rounded up to 24. In the coordinated exchange, two devices share 104 rows.
    """
    lines = on_eight_devices("step", "one expert", "expert", "expert, tensor, coordinated")[0]
    assert lines.count("equal") == 2 and lines.count("rounds [3.0]") == 2, lines


def test_the_same_tokens_are_dropped_on_1_2_4_and_8_devices(on_eight_devices):
    lines = on_eight_devices("drops")[0].splitlines()
    assert [line.split()[0] for line in lines] == ["1", "2", "4", "8"]


@pytest.mark.slow
def test_exchanges(on_eight_devices):
    """The compiled program: all-to-alls, their groups and bytes, and no expert weight gathered."""
    assert "checked" in on_eight_devices("exchanges")[0]


def test_only_sums_and_experts_rows_cross_slices(on_eight_devices):
    """The compiled program on two and four slices of eight devices."""
    assert "checked" in on_eight_devices("across_slices")[0]


def test_a_split_vocabulary_stays_split(on_eight_devices):
    """The compiled program: no logits and no whole table cross devices."""
    assert "checked" in on_eight_devices("vocabulary")[0]


def test_gradients_of_experts_are_summed_in_float32(on_eight_devices):
    assert "checked" in on_eight_devices("replicas")[0]


def test_evaluation_on_devices_that_the_batch_does_not_divide(tmp_path, on_eight_devices):
    assert "equal over" in on_eight_devices("evaluates", str(tmp_path))[0]


@pytest.mark.slow
def test_every_mesh_generates_what_one_device_does(on_eight_devices):
    assert on_eight_devices("generates")[0].count("equal") == 8


def test_meshes_score_texts_as_one_device_does(on_eight_devices):
    meshes = "fsdp, expert, tensor", "expert, slice, tensor"
    assert on_eight_devices("scores", *meshes)[0].count("equal") == 3


def test_check_exchanges_in_rounds_and_as_in_decoding(on_eight_devices):
    assert "in rounds" in on_eight_devices("kernels_of_check")[0]


def test_prefill_does_no_more_work_on_more_devices(on_eight_devices):
    assert "times the work" in on_eight_devices("prefills")[0]


@pytest.mark.slow
def test_checkpoints_between_meshes(tmp_path, on_eight_devices):
    """Parameters, optimizer state and position, bit for bit between all pairs of five meshes."""
    assert on_eight_devices("checkpoints", str(tmp_path))[0].count("restored") == 25


def test_a_run_without_a_mesh_of_its_own_goes_on_anywhere(text, tmp_path, on_eight_devices):
    """Three steps on the mesh suggested for eight devices, used there as well; three more on one.

    The losses are those of one device alone.
    """

    def command(workdir, steps):
        schedule = {"optimizer.decay_tokens": 8 * 32 * 12, "train.steps": steps}
        return arguments(text, tmp_path / workdir, "1 layers, layers 0, E=4", **schedule)

    evaluation = ["eval", f"--workdir={tmp_path / 'run'}", "--json"]

    def export(out):
        where = f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / out}"
        return ["export", "--kind=safetensors", *where, "--json"]

    verbs = json.dumps([command("run", 3), evaluation, export("eight")])
    out, err = on_eight_devices("verbs", verbs)
    suggested = "--config.mesh.fsdp=2 --config.mesh.expert=4"
    assert err.count(f"mesh: suggested: {suggested}; give other sizes") == 2
    assert err.count("mesh: fsdp 2, expert_0 4; exchange between experts: flat") == 2
    trained, evaluated, _ = map(json.loads, out.splitlines())
    assert main(export("one")) == 0
    eight, one = (tmp_path / out / "model.safetensors" for out in ("eight", "one"))
    assert eight.read_bytes() == one.read_bytes()
    assert evaluated["loss"] == pytest.approx(trained["eval/loss"], rel=1e-6)
    assert main(command("run", 6)) == 0
    assert load(tmp_path / "run" / "config.json").mesh == MeshConfig()
    assert main(command("alone", 6)) == 0
    ours, alone = (
        [r["loss"] for r in logged(tmp_path / w) if "loss" in r] for w in ("run", "alone")
    )
    assert len(ours) == 6
    assert ours == pytest.approx(alone, rel=1e-5)
