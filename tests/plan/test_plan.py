"""Reading compiled programs, without the compilers; and one plan by the TPU's, where it is."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from jax.sharding import AbstractMesh

from configs import paper, tiny
from prmoe_jax import config
from prmoe_jax.cli import main
from prmoe_jax.config import architecture
from prmoe_jax.errors import UserError
from prmoe_jax.parallel.mesh import axis_sizes, check_fits
from prmoe_jax.plan.chips import chip_count, chip_of
from prmoe_jax.plan.collectives import collectives, exposed, groups, hosts, kind, torus
from prmoe_jax.plan.find import find, fit
from prmoe_jax.plan.picture import draw
from prmoe_jax.plan.program import END, Operation, operations
from prmoe_jax.plan.report import component, held_bytes, needed_bytes, table
from tests.support.extras import needs_extra
from tests.support.lines import only_line

# As the compiler writes it, shortened: a loop of 3 around a loop of 5, a fusion whose inside must
# not count again, an unknown estimate, and a collective, which has none.
HLO = """\
HloModule jit_step, is_scheduled=true

%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %inside = f32[8]{0} add(%p, %p), backend_config={"estimated_cycles":"1000000"}
}

%inner_body (s: (s32[], f32[8])) -> (s32[], f32[8]) {
  %s = (s32[], f32[8]{0:T(8)}) parameter(0)
  ROOT %t = (s32[], f32[8]{0:T(8)}) fusion(%s), calls=%fused, backend_config={"estimated_cycles":"7"}
}

%inner_condition (s: (s32[], f32[8])) -> pred[] {
  %limit = s32[] constant(5)
  ROOT %less = pred[] compare(%s, %limit), direction=LT
}

%outer_body (s: (s32[], f32[8])) -> (s32[], f32[8]) {
  %a = f32[8]{0} add(%s, %s), backend_config={"estimated_cycles":"11"}
  ROOT %loop = (s32[], f32[8]{0}) while(%s), condition=%inner_condition, body=%inner_body
}

%outer_condition (s: (s32[], f32[8])) -> pred[] {
  ROOT %less.1 = pred[] compare(%s, %s), direction=LT
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0), backend_config={"estimated_cycles":"18446744073709551615"}
  %f = f32[8]{0} fusion(%x), calls=%fused, backend_config={"estimated_cycles":"100"}
  %odd = f32[8]{0} fusion(%f), calls=%fused, backend_config={"estimated_cycles":"18446744073709551615"}
  %exchange = (f32[8]{0}, f32[8]{0}) all-to-all(%odd, %f), replica_groups={{0,1}}
  ROOT %w = (s32[], f32[8]{0}) while(%f), condition=%outer_condition, body=%outer_body, backend_config={"known_trip_count":{"n":"3"}}
}
"""  # noqa: E501


def cycles(hlo: str) -> int:
    return sum((o.cycles or 0) * o.runs for o in operations(hlo))


def test_cycles_by_hand():
    assert cycles(HLO) == 100 + 3 * 11 + 3 * 5 * 7
    assert [(o.name, o.opcode, o.cycles, o.runs) for o in operations(HLO)] == [
        ("f", "fusion", 100, 1),
        ("odd", "fusion", None, 1),
        ("exchange", "all-to-all", None, 1),
        ("a", "add", 11, 3),
        ("t", "fusion", 7, 15),
    ]


def test_all_branches_count():
    """An upper bound, in either way that a conditional is written."""
    call = "conditional(%x), branch_computations={%outer_body, %inner_body}"
    old = HLO.replace("all-to-all(%odd, %f), replica_groups={{0,1}}", call)
    assert cycles(old) == cycles(HLO) + 11 + 5 * 7 + 7
    call = "conditional(%x), true_computation=%inner_body, false_computation=%inner_body"
    new = HLO.replace("all-to-all(%odd, %f), replica_groups={{0,1}}", call)
    assert cycles(new) == cycles(HLO) + 2 * 7


# As the compilers write a stack of weights read and written by a loop, a product with an operand
# of another computation, a library's product, work of a SparseCore, and a reduce-scatter.
COSTS = """\
HloModule jit_step, is_scheduled=true

%read (p: bf16[5,7,11], i: s32[]) -> bf16[7,11] {
  %p = bf16[5,7,11]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %s = bf16[1,7,11]{2,1,0} dynamic-slice(%p, %i), dynamic_slice_sizes={1,7,11}
  ROOT %b = bf16[7,11]{1,0} bitcast(%s)
}

%write (q: f32[5,13], u: f32[1,13]) -> f32[5,13] {
  %q = f32[5,13]{1,0} parameter(0)
  %u = f32[1,13]{1,0} parameter(1)
  ROOT %w = f32[5,13]{1,0} dynamic-update-slice(%q, %u)
}

%product (l: bf16[3,7], r: bf16[7,11]) -> bf16[3,11] {
  %l = bf16[3,7]{1,0} parameter(0)
  %r = bf16[7,11]{1,0} parameter(1)
  ROOT %d = bf16[3,11]{1,0} dot(%l, %r), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%offloaded (t: f32[17,19]) -> f32[2,19] {
  %t = f32[17,19]{1,0} parameter(0)
  ROOT %c = f32[2,19]{1,0} gather(%t)
}, execution_thread="sparsecore"

%all-reduce-scatter (g: bf16[8,6]) -> bf16[2,6] {
  %g = bf16[8,6]{1,0} parameter(0)
  %sum = bf16[8,6]{1,0} all-reduce(%g), replica_groups={{0,1,2,3}}
  ROOT %own = bf16[2,6]{1,0} dynamic-slice(%sum), dynamic_slice_sizes={2,6}
}

ENTRY %main (x: bf16[5,7,11]) -> f32[8] {
  %x = bf16[5,7,11]{2,1,0} parameter(0)
  %n = s32[] parameter(1)
  %stack = f32[5,13]{1,0} parameter(2)
  %row = f32[1,13]{1,0} parameter(3)
  %a = bf16[3,7]{1,0} parameter(4)
  %reading = bf16[7,11]{1,0} fusion(%x, %n), calls=%read
  %apart = ((bf16[5,7,11], s32[]), bf16[7,11], u32[]) fusion-start(%x, %n), calls=%read
  %writing = f32[5,13]{1,0} fusion(%stack, %row), calls=%write
  %fused = bf16[3,11]{1,0} fusion(%a, %reading), calls=%product
  %plain = bf16[7,7]{1,0} dot(%a, %a), lhs_contracting_dims={0}, rhs_contracting_dims={0}
  %gemm = (bf16[3,11]{1,0}, s8[64]{0}) custom-call(%a, %reading), custom_call_target="__cublas$gemm", backend_config={"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}
  %started = ((), (), (s32[1])) call-start(), to_apply=%offloaded
  %ended = f32[2,19]{1,0} call-done(%started)
  %buffer = f32[1000]{0} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %shard = bf16[2,6]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter, metadata={op_name="x"}
}
"""  # noqa: E501


def test_flops_and_bytes_by_hand():
    found = {o.name: o for o in operations(COSTS)}
    assert {name: o.flops for name, o in found.items() if o.flops} == {
        "fused": 2 * 3 * 7 * 11,
        "plain": 2 * 7 * 3 * 7,
        "gemm": 2 * 3 * 7 * 11,
    }
    read = 2 * 2 * 7 * 11 + 4  # a slice of the stack, and its copy; the index
    assert {name: o.bytes for name, o in found.items() if name not in ("shard", "gemm")} == {
        "reading": read,
        "apart": read,
        "writing": 2 * 4 * 13,  # in place
        "fused": 2 * (3 * 11 + 3 * 7 + 7 * 11),
        "plain": 2 * (7 * 7 + 2 * 3 * 7),
        "ended": 2 * 4 * 2 * 19,
    }
    assert (found["shard"].opcode, kind(found["shard"])) == ("reduce-scatter", "reduce-scatter")
    sent = collectives([found["shard"]], {"a": 1, "b": 4}, lambda kind, members, moved: moved)[0]
    assert (sent.kind, sent.axes, sent.bytes) == ("reduce-scatter", ("b",), 2 * 8 * 6)


# Attention kernels as the TPU's compiler writes them, [B, H, L, K], in a loop of 5 portions; and
# cuDNN's, [B, L, H, K]. What comes before the queries has no heads, or is no float.
KERNELS = """\
HloModule jit_step, is_scheduled=true

%portion (s: (s32[], bf16[2,3,7,11])) -> (s32[], bf16[2,3,7,11]) {
  %s = (s32[], bf16[2,3,7,11]{3,2,1,0}) parameter(0)
  %mask = s8[1,1,1]{2,1,0} constant(0)
  %scale = f32[7]{0} constant(0)
  %q = bf16[2,3,7,11]{3,2,1,0:T(8,128)(2,1)S(1)} get-tuple-element(%s), index=1
  %splash_mha_fwd_segmented_residuals.1 = (f32[2,7,128]{2,1,0}, bf16[2,3,7,11]{3,2,1,0}) custom-call(%mask, %scale, %q, %q, /*index=4*/%q), custom_call_target="tpu_custom_call"
  %splash_mha_dq_segmented_no_residuals.1 = (f32[2,7,128]{2,1,0}, bf16[2,3,7,11]{3,2,1,0}) custom-call(%mask, %q, %q, %q), custom_call_target="tpu_custom_call"
  %splash_mha_dkv_segmented_no_residuals.1 = (f32[2,7,128]{2,1,0}, bf16[2,3,7,11]{3,2,1,0}) custom-call(%mask, %q, %q, %q), custom_call_target="tpu_custom_call"
  ROOT %t = (s32[], bf16[2,3,7,11]{3,2,1,0}) tuple(%scale, %q)
}

%condition (s: (s32[], bf16[2,3,7,11])) -> pred[] {
  ROOT %less = pred[] compare(%s, %s), direction=LT
}

ENTRY %main (x: bf16[2,3,7,11]) -> bf16[2,3,7,11] {
  %x = bf16[2,13,3,11]{3,2,1,0} parameter(0)
  %dot_product_attention_fwd.1 = (bf16[2,3,13,11]{3,1,2,0}, u8[0]{0}) custom-call(%x, %x, %x), custom_call_target="__cudnn$fmhaSoftmax"
  %dot_product_attention_bwd.1 = (bf16[2,3,13,11]{3,1,2,0}, u8[0]{0}) custom-call(%x, %x, %x), custom_call_target="__cudnn$fmhaSoftmaxBackward"
  ROOT %w = (s32[], bf16[2,3,7,11]{3,2,1,0}) while(%x), condition=%condition, body=%portion, backend_config={"known_trip_count":{"n":"5"}}
}
"""  # noqa: E501


def test_attention_kernels_by_hand():
    """A causal product of B x H queries and keys, L by L of width K: half of 2 BHL²K FLOPs.

    The sizes are the kernel's own: a portion's, and those of whichever model it is of.
    """
    found = {o.name.partition(".")[0]: (o.flops, o.runs) for o in operations(KERNELS)}
    one, cudnn = 2 * 3 * 7 * 7 * 11, 2 * 3 * 13 * 13 * 11
    assert found == {
        "splash_mha_fwd_segmented_residuals": (2 * one, 5),
        "splash_mha_dq_segmented_no_residuals": (3 * one, 5),
        "splash_mha_dkv_segmented_no_residuals": (4 * one, 5),
        "dot_product_attention_fwd": (2 * cudnn, 1),
        "dot_product_attention_bwd": (5 * cudnn, 1),
    }
    with pytest.raises(ValueError, match="splash_mha_dq.* has no visible queries"):
        operations(KERNELS.replace("custom-call(%mask, %q, %q, %q)", "custom-call(%mask)"))


def test_a_loop_without_a_bound_is_an_error():
    with pytest.raises(ValueError, match="trip count"):
        operations(HLO.replace("known_trip_count", "unknown"))


def test_attributes_over_several_lines():
    """As a kernel has them; the computation goes on after it."""
    kernel = """\
  %k = f32[8]{0} custom-call(%x), frontend_attributes={kernel_metadata={
"block_q": 512
}}, metadata={op_name="jit(step)/attention/kernel"}
  %f = """
    changed = HLO.replace("  %f = ", kernel)
    assert cycles(changed) == cycles(HLO)
    assert "k" in [operation.name for operation in operations(changed)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{0,1},{2,3}}, dimensions={0}", [[0, 1], [2, 3]]),
        ("{}, to_apply=%add", [[0, 1, 2, 3]]),
        ("[2,2]<=[4], channel_id=1", [[0, 1], [2, 3]]),
        ("[2,2]<=[2,2]T(1,0), x", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2] {'a'}, x", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
        ("mesh['a'=1,'b'=4] {'a','b'}", [[0, 1, 2, 3]]),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [[0, 2], [1, 3]]),
    ],
)
def test_groups_in_every_notation(text, expected):
    assert groups(f"f32[2] all-gather(%x), replica_groups={text}", 4).tolist() == expected


def test_collectives_by_hand():
    """A torus of 2 x 4 chips, 'b' along the 4; links of 1 MB/s a direction."""
    mesh = {"a": 2, "b": 4}
    coordinates = np.array([(x, y) for x in range(2) for y in range(4)])

    def one(opcode, result, replica_groups, runs=1):
        text = f"{result} {opcode}(%x), replica_groups={replica_groups}"
        pair = "x" if opcode.endswith("-start") else ""
        operation = Operation("x", opcode, None, runs, text, pair=pair)
        other = Operation("y", "fusion", 7, 1, "f32[] fusion()")
        found = collectives([other, operation], mesh, torus(coordinates, 1e6))
        assert list(found) == [1]
        return found[1]

    inner, everyone = "{{0,1,2,3},{4,5,6,7}}", "[1,8]<=[8]"
    gather = one("all-gather", "f32[1000000]{0:T(8)}", inner, runs=3)
    assert gather[:4] == ("all-gather", ("b",), False, 3)
    assert gather.bytes == 3 * 4_000_000
    assert gather.seconds == pytest.approx(3 * 4 * 3 / 4 / 2)  # one ring, both ways
    reduce = one("all-reduce-start", "bf16[1000000]{0}", everyone)
    assert (reduce.kind, reduce.axes, reduce.asynchronous) == ("all-reduce", ("a", "b"), True)
    assert reduce.seconds == pytest.approx(2 * 2 * 7 / 8 / 4)  # there and back, two rings
    scatter = one("reduce-scatter", "f32[250000]{0}", inner)
    assert scatter.seconds == pytest.approx(gather.seconds / 3)
    exchange = one("all-to-all", "(bf16[500000]{0}, bf16[500000]{0})", inner)
    assert (exchange.bytes, exchange.seconds) == (2_000_000, pytest.approx(2 * 4 / 8))
    start = one("all-gather-start", "(f32[250000]{0}, f32[1000000]{0}, u32[])", inner)
    assert (start.bytes, start.asynchronous) == (4_000_000, True)


# Two ways in which the TPU's compiler writes an asynchronous collective, in a loop of 3 runs: on
# the network's own engines, and in a call on a SparseCore, which gets its operand later.
ASYNCHRONOUS = """\
HloModule jit_step, is_scheduled=true

%offloaded (t: f32[10]) -> f32[40] {
  %t = f32[10]{0} parameter(0)
  ROOT %gathered = f32[40]{0} all-gather(%t), replica_groups={{0,1,2,3}}, dimensions={0}
}, execution_thread="sparsecore"

%body (s: (s32[], f32[10])) -> (s32[], f32[10]) {
  %s = (s32[], f32[10]{0}) parameter(0)
  %x = f32[10]{0} get-tuple-element(%s), index=1
  %begun = ((), (), (s32[1])) call-start(), async_execution_thread="sparsecore", to_apply=%offloaded
  %one = f32[10]{0} add(%x, %x), backend_config={"estimated_cycles":"1"}
  %given = ((f32[10]{0}), f32[40]{0}) call-update(%begun, %one)
  %summing = f32[10]{0} all-reduce-start(%one), replica_groups={{0,1,2,3}}, to_apply=%add
  %two = f32[10]{0} add(%x, %x), backend_config={"estimated_cycles":"2"}
  %all = f32[40]{0} call-done(%given)
  %four = f32[10]{0} add(%x, %x), backend_config={"estimated_cycles":"4"}
  %sum = f32[10]{0} all-reduce-done(%summing)
  ROOT %t = (s32[], f32[10]{0}) tuple(%x, %sum)
}

%condition (s: (s32[], f32[10])) -> pred[] {
  ROOT %less = pred[] compare(%s, %s), direction=LT
}

ENTRY %main (x: f32[10]) -> f32[10] {
  %x = f32[10]{0} parameter(0)
  %w = (s32[], f32[10]{0}) while(%x), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %eight = f32[10]{0} all-reduce(%x), replica_groups={{0,1,2,3}}, to_apply=%add
}
"""  # noqa: E501


def test_asynchronous_collectives_begin_with_their_operands_and_end_with_a_wait():
    found = operations(ASYNCHRONOUS)
    assert [(o.name, o.opcode, o.runs, o.pair) for o in found] == [
        ("one", "add", 3, ""),
        ("given", "all-gather", 3, "begun"),
        ("summing", "all-reduce-start", 3, "summing"),
        ("two", "add", 3, ""),
        ("all", END, 3, "begun"),
        ("four", "add", 3, ""),
        ("sum", END, 3, "summing"),
        ("eight", "all-reduce", 1, ""),
    ]
    sent = collectives(found, {"a": 4}, lambda kind, members, moved: moved)
    assert {i: (c.kind, c.asynchronous, c.bytes) for i, c in sent.items()} == {
        1: ("all-gather", True, 3 * 4 * 40),
        2: ("all-reduce", True, 3 * 4 * 10),
        7: ("all-reduce", False, 4 * 10),
    }


@pytest.mark.parametrize(
    ("gather", "reduce", "expected"),
    [
        (1, 2, (0, 0)),  # both are hidden
        (5, 1, (3, 0)),  # begun after `one`; `two` hides 2 of its 5
        (5, 3, (3, 0)),  # the sum gets the links at 6 and is there at 9, before `four` ends
        (5, 9, (3, 5)),
        (1, 9, (0, 4)),
    ],
)
def test_exposed_time_by_hand(gather, reduce, expected):
    """All of a loop's runs together, in the order of the schedule; the links do one at a time."""
    found = operations(ASYNCHRONOUS)
    seconds = [(o.cycles or 0) * o.runs for o in found]
    times = {"all-gather": gather, "all-reduce": reduce}
    sent = collectives(found, {"a": 4}, lambda kind, members, moved: times[kind])
    waits = {i: c.exposed_seconds for i, c in exposed(found, seconds, sent).items()}
    assert waits == {1: 3 * expected[0], 2: 3 * expected[1], 7: reduce}


def test_hosts_by_hand():
    """Two hosts of two GPUs: 1 GB/s to the switch, 0.1 GB/s a GPU to the network."""
    seconds = hosts(np.array([0, 0, 1, 1]), 1e9, 1e8)
    one, across, everyone = np.array([0, 1]), np.array([0, 2]), np.arange(4)
    assert seconds("all-gather", one, 10**9) == pytest.approx(0.5)  # the other half, by the switch
    assert seconds("all-gather", across, 10**9) == pytest.approx(5)
    # A half comes over the network, each GPU bringing half of that; then the switch.
    assert seconds("all-gather", everyone, 10**9) == pytest.approx(2.5 + 0.5)
    assert seconds("all-reduce", everyone, 10**9) == pytest.approx(6)
    # Of four parts one stays, one goes to the neighbour and two to the other host.
    assert seconds("all-to-all", everyone, 10**9) == pytest.approx(5 + 0.25)
    assert seconds("collective-permute", across, 10**9) == pytest.approx(10)


def test_components_are_innermost_scopes():
    def of(name):
        return component(Operation("x", "fusion", None, 1, f"f32[] fusion(), metadata={{{name}}}"))

    assert of('op_name="jit(step)/transpose(jvp())/while/body/dispatch/experts/dot"') == "experts"
    assert of('op_name="jit(step)/while/body/attention/add"') == "attention"
    assert of('op_name="jit(step)/layers/while/body/attention/norm/add"') == "norm"
    assert of('op_name="jit(step)/layers/while/body/dynamic_update_slice"') == "layers"
    assert of('op_name="jit(step)/while/body/add"') == "other"
    assert of("") == "other"


CONFIG = f"--config={tiny.__file__}:prmoe"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--topology=v9:2x2"], "--topology=v9:2x2 is unknown; use one of v4, v5e"),
        (["--topology=v5p"], "--topology=v5p is unknown; use one of v4, v5e"),
        (["--topology=v5p:4by4"], "--topology=v5p:4by4 is unknown; use one of v4, v5e"),
        (["--topology=v5p:0x4"], "--topology=v5p:0x4 is unknown; use one of v4, v5e"),
        (["--topology="], "--topology= is unknown; use one of v4, v5e"),
        (["--topology=v5p:0x0x0"], "--topology=v5p:0x0x0 is unknown; use one of v4, v5e"),
        (["--topology=v5p:4x4x8x2"], "--topology=v5p:4x4x8x2 is unknown; use one of v4, v5e"),
        (["--topology=v5e:2x2x2"], "--topology=v5e:2x2x2 is unknown; use one of v4, v5e"),
        (["--topology=v5e:٤x٤"], "--topology=v5e:٤x٤ is unknown; use one of v4, v5e"),
        (["--topology=v5e:4x" + "9" * 9999], "9 is unknown; use one of v4, v5e"),
        (["--topology=v5p:64x64x64"], "v5p:64x64x64 has 262,144 chips; use 16,384 or fewer"),
        (["--topology=h100:999999x8"], "h100:999999x8 has 7,999,992 chips; use 16,384 or fewer"),
        (["--find="], "--find= is unknown; use one of v4, v5e"),
        (["--find=v9"], "--find=v9 is unknown; use one of v4, v5e"),
        (["--find=v5p", "--decode=-1"], "--decode=-1 must be a number of sequences"),
        (["--find=v5p", f"--decode={10**20}"], f"--decode={10**20} must be a number of sequences"),
        (["--find=v5p", f"--decode={'9' * 9999}"], "argument --decode: invalid int value: "),
        ([], "prmoe plan needs either --topology=v5p:4x4x8 or --find=v5p"),
        (["--find=v5p", "--topology=v5p:2x2x1"], "prmoe plan needs either"),
        (["--find=v5p", "--teacher=configs/tiny.py:prmoe"], "the config has no teacher"),
    ],
)
def test_mistakes(arguments, line, capsys, monkeypatch):
    monkeypatch.setattr("os.environ", os.environ.copy())  # the verb sets some
    assert main(["plan", CONFIG, *arguments]) == 2
    told = only_line(capsys.readouterr().err)
    assert line in told


@pytest.mark.parametrize(
    ("picture", "line"),
    [
        ("plan.docx", "plan.docx: '.docx' is no format of a picture; use .png, .svg or .pdf"),
        ("plan", "plan: '' is no format of a picture; use .png, .svg or .pdf"),
        ("no/such/plan.png", "no/such/plan.png cannot be written: name a file in a folder that"),
        ("folder.png", "folder.png cannot be written: name a file in a folder that takes one"),
    ],
)
def test_a_picture_is_refused_before_the_plan_is_made(picture, line, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr("os.environ", os.environ.copy())
    monkeypatch.setattr("prmoe_jax.plan.find.plan", lambda *_: pytest.fail("a plan was made"))
    assert main(["plan", CONFIG, "--topology=v5p:2x2x1", f"--picture={picture}"]) == 2
    *_, told = capsys.readouterr().err.splitlines()
    assert told.startswith(f"prmoe: {line}")


def a_plan(topology, held, fits=True):
    result = {"topology": topology, "mesh": {}, "chips": 4, "fits": fits}
    result["hbm_bytes_per_chip"] = {"parameters": 1, "optimizer": 2, "temporaries": held}
    parts = {"mlp": 0.25, "collectives": 0.5}
    result |= {"collectives": [], "tokens_per_s": 1.0}
    return result | {"modelled_step_s": 0.75, "modelled_mfu": 0.5, "components": parts}


def test_find_takes_the_first_slice_that_fits(monkeypatch):
    """What can't hold the state isn't compiled for; a mesh that doesn't fit is no plan."""
    values = config.resolve(paper.get_config("prmoe_1.3b"))
    asked = []

    def plan(config, topology, decode, teacher):
        assert teacher is None or teacher.mesh == config.mesh
        asked.append((topology, config.mesh))
        if topology == "v5p:2x2x2":
            raise UserError("the mesh does not fit")
        return a_plan(topology, held=100 * 2**30, fits=topology == "v5p:2x4x4")

    monkeypatch.setattr("prmoe_jax.plan.find.plan", plan)
    found = find(values, "v5p")
    # 31.4 B parameters of 12 bytes: 351 GiB, four chips of 95.
    assert [topology for topology, _ in asked] == [
        "v5p:2x2x1", "v5p:2x2x2", "v5p:2x2x4", "v5p:2x4x4"
    ]  # fmt: skip
    assert [mesh.expert for _, mesh in asked] == [4, 8, 16, 32]
    assert found["topology"] == "v5p:2x4x4"
    assert [reason for _, reason in found["tried"]] == [
        "needs 100.0 GiB a chip", "the mesh does not fit", "needs 100.0 GiB a chip"
    ]  # fmt: skip
    asked.clear()
    with pytest.raises(UserError, match="--find=h100: no slice fits; h100:128x8: needs 100.0"):
        find(values, "h100")
    assert asked[0][0] == "h100:1x8"  # 351 GiB on eight of 80 GB
    asked.clear()
    fixed = dataclasses.replace(values, mesh=config.MeshConfig(expert=2))
    find(fixed, "v5p")
    assert {mesh.expert for _, mesh in asked} == {2}
    asked.clear()
    student = config.resolve(paper.get_config("mos_1.3b"))
    find(student, "v5p", teacher=config.beside(values, student))
    assert [mesh.expert for _, mesh in asked] == [4, 8, 16, 32]


def large(text="2 layers", batch_size=8, mesh=(), **model):
    """A config of 6.51 B parameters in two layers; nothing of it is ever made."""
    sizes = {"d_model": 16384, "d_ff": 65536, "heads": 64, "dtype": "bfloat16"}
    fields = architecture.parse_fields(text) | sizes | model
    train = {"steps": 1, "batch_size": batch_size}
    return config.resolve({"model": fields, "mesh": dict(mesh), "train": train})


GIB = 2**30


@pytest.fixture
def compiled(monkeypatch):
    """Plans without a compiler; the list has (topology, mesh) of each.

    A step takes its state, the gradient and, over all chips, `activations` GiB.
    """
    asked = []

    def set_up(activations):
        def plan(values, topology, decode, teacher):
            asked.append((topology, values.mesh))
            chips = chip_count(topology)
            check_fits(values, chips)
            sizes = axis_sizes(values, chips)
            mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
            held = held_bytes(values, mesh, decode, teacher)
            held["temporaries"] = activations * GIB // chips
            held["temporaries"] += 0 if decode else held["parameters"]
            result = a_plan(topology, 0, sum(held.values()) <= chip_of(topology).hbm_bytes)
            return result | {"chips": chips, "hbm_bytes_per_chip": held}

        monkeypatch.setattr("prmoe_jax.plan.find.plan", plan)
        return asked

    return set_up


def test_a_mesh_that_does_not_fit_names_one_that_does(compiled):
    """97 GiB with the gradient in each of eight replicas; one mesh more is compiled for."""
    asked = compiled(activations=8)
    values = large(mesh={"data": 8})
    result = fit(values, "v5p:2x2x2")
    assert not result["fits"] and "flags" not in result
    assert result["instead"]["fits"]
    assert result["instead"]["flags"] == "--config.mesh.fsdp=8"
    assert asked == [("v5p:2x2x2", m) for m in (values.mesh, config.MeshConfig(1, fsdp=8))]
    assert result["tried"] == [("v5p:2x2x2", "needs 98.1 GiB a chip")]
    assert "this fits: --topology=v5p:2x2x2 --config.mesh.fsdp=8 (13.14 GiB" in table(result)
    asked.clear()
    # Without a mesh of its own it has that one.
    result = fit(large(), "v5p:2x2x2")
    assert result["fits"] and result["flags"] == "--config.mesh.fsdp=8"
    assert "the mesh is the suggested one: --config.mesh.fsdp=8" in table(result)
    assert len(asked) == 1


def test_more_fsdp_than_is_suggested_where_it_is_needed(compiled):
    """97 GiB and 356 of activations: on 32 chips of 16 GiB, 97 / 16 + 11 or 97 / 32 + 11."""
    asked = compiled(activations=356)
    values = large(batch_size=32)
    result = fit(values, "v5e:4x8")
    assert result["flags"] == "--config.mesh.data=2 --config.mesh.fsdp=16"
    assert result["tried"] == [("v5e:4x8", "needs 17.2 GiB a chip")]
    assert result["instead"]["flags"] == "--config.mesh.fsdp=32"
    assert [mesh.fsdp for _, mesh in asked] == [16, 32]
    asked.clear()
    # So with --find this slice is the smallest; on smaller ones no mesh can help.
    result = find(values, "v5e")
    assert (result["topology"], result["flags"]) == ("v5e:4x8", "--config.mesh.fsdp=32")
    assert [(topology, mesh.fsdp) for topology, mesh in asked] == [
        ("v5e:2x4", 8), ("v5e:4x4", 16), ("v5e:4x8", 16), ("v5e:4x8", 32)
    ]  # fmt: skip
    assert [reason for _, reason in result["tried"]] == [
        "the model alone is 73 GiB", "the model alone is 73 GiB", "needs 56.6 GiB a chip",
        "needs 28.3 GiB a chip", "needs 17.2 GiB a chip",
    ]  # fmt: skip


def test_slices_of_experts_where_replicas_do_not_fit(compiled):
    """Four experts of 32 GiB on 32 chips of 16: over 4 of them, over 8 in halves, or quartered."""
    asked = compiled(activations=1)
    result = fit(large("2 layers, E=4", batch_size=32), "v5e:4x8")
    assert result["flags"] == "--config.mesh.fsdp=8 --config.mesh.expert=4"
    assert not result["fits"]
    assert result["instead"]["flags"] == (
        "--config.mesh.fsdp=2 --config.mesh.expert=4 --config.mesh.expert_slice=4"
    )
    assert len(asked) == 2


def test_the_slice_that_is_needed(compiled):
    asked = compiled(activations=600)
    values = large(batch_size=64)
    result = fit(values, "v5e:2x4")
    assert result["instead"]["topology"] == "v5e:8x8"
    assert "this fits: --topology=v5e:8x8 --config.mesh.data=4 --config.mesh.fsdp=16" in table(
        result
    )
    assert {topology for topology, _ in asked} == {"v5e:2x4", "v5e:4x4", "v5e:4x8", "v5e:8x8"}
    # None is large enough, as JSON says, too.
    asked = compiled(activations=10**6)
    result = fit(values, "v5e:8x16")
    assert result["instead"] is None
    assert [topology for topology, _ in result["tried"]] == ["v5e:8x16", "v5e:16x16"]
    assert "nothing that was tried fits: no mesh of these chips, no slice of v5e" in table(result)
    with pytest.raises(UserError, match="no slice fits; v5e:16x16: .*; leave --config.mesh"):
        find(large(batch_size=64, mesh={"fsdp": 4}), "v5e")


def test_decoding_names_a_mesh_that_fits(compiled):
    """12 GiB of weights in bfloat16 and 16 of past: each of four chips holds all, or a quarter."""
    asked = compiled(activations=0)
    result = fit(large(length=2048), "v5e:2x2", decode=64)
    assert result["flags"] == "--config.mesh.fsdp=4"  # which splits no weight that is in use
    assert not result["fits"]
    assert result["instead"]["flags"] == "--config.mesh.fsdp=2 --config.mesh.tensor=2"
    assert len(asked) == 2
    # A batch for two of four chips: the rest slices the model.
    assert fit(large(length=2048), "v5e:2x2", decode=2)["flags"].endswith("mesh.tensor=2")


def test_what_the_compiler_says_it_needs():
    """Both of its messages; held are 3 GiB of 16."""
    total = "Ran out of memory in memory space hbm. Used 25.5G of 15.75G hbm. Exceeded hbm"
    beside = (
        "Ran out of memory on HBM, the total memory required for HLO temporaries (26.10G) exceed"
    )
    assert needed_bytes(total, 3 * GIB, 16 * GIB) == 25.5 * GIB
    assert needed_bytes(beside, 3 * GIB, 16 * GIB) == round(26.1 * GIB) + 3 * GIB
    assert needed_bytes("RESOURCE_EXHAUSTED", 3 * GIB, 16 * GIB) == 16 * GIB


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    too_large = a_plan("v5e:2x2", 3, fits=False)
    too_large["hbm_bytes_per_chip"]["needed"] = 40 * 2**30
    del too_large["modelled_step_s"], too_large["components"]
    path = tmp_path / "plans.svg"
    draw([("fits", a_plan("v5p:2x2x1", 3)), ("too large", too_large)], path)
    text = path.read_text()
    for words in (
        *("750 ms, 50% MFU", "does not fit", "16 GiB a chip", "40.0 GiB", "too large"),
        *("v5e:2x2", "v5p:2x2x1", "collectives", "needed"),
    ):
        assert f"<!-- {words}" in text or f"<!--  {words}" in text, words
    with pytest.raises(UserError, match="plans.docx: .*docx"):
        draw([("fits", a_plan("v5p:2x2x1", 3))], tmp_path / "plans.docx")


needs_tpu_compiler = needs_extra("tpu", "libtpu")


def planned(text, *arguments, folder, **model):
    """`prmoe plan` in a process of its own, of a model of 128 tokens of context in bfloat16."""
    sizes = {"length": 128, "d_model": 256, "d_ff": 512, "heads": 2, "dtype": "bfloat16"} | model
    settings = [f"--config.model.{name}={value}" for name, value in sizes.items()]
    command = [sys.executable, "-m", "prmoe_jax", "plan", "--json", *settings, *arguments]
    path = os.environ | {"PYTHONPATH": str(Path(tiny.__file__).parent.parent)}
    config_name = f"--config={tiny.__file__}:{text}"
    done = subprocess.run(
        [*command, config_name], capture_output=True, text=True, cwd=folder, env=path
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


@needs_tpu_compiler
def test_attention_kernels_of_portions_and_of_a_teacher(tmp_path):
    """In two portions a step's kernels take what they take in one; a wider teacher's, its own."""
    (tmp_path / "teacher.py").write_text(
        "from configs import tiny\n\n\ndef get_config():\n"
        "    values = tiny.get_config('3 layers')\n"
        "    values.model.update(length=128, d_model=384, d_ff=512, heads=3, dtype='bfloat16')\n"
        "    return values\n"
    )
    arguments = ["--topology=v5e:2x2", "--config.train.batch_size=8", "--config.train.accumulate=2"]
    arguments += [f"--teacher={tmp_path}/teacher.py", "--config.teacher.workdir=any"]
    result, _ = planned("2 layers", *arguments, folder=tmp_path)
    # Of 8 / 4 rows a chip: 2 products forward, 7 backward in the student; 2 in the teacher. Half of
    # the square, at half the peak.
    product = 8 // 4 * 128 * 128 / (197e12 * 0.5)
    expected = (9 * 2 * 256 + 2 * 3 * 384) * product
    assert result["components"]["attention kernels"] == pytest.approx(expected, rel=1e-9)
    assert result["flags"] == "--config.mesh.fsdp=4"


@needs_tpu_compiler
def test_what_fits_by_the_real_compiler(tmp_path):
    """18 GiB of state don't fit each of four chips of 16; spread over them they do."""
    deep = {"d_model": 1024, "d_ff": 4096, "heads": 8, "remat": "full"}
    arguments = ["--topology=v5e:2x2", "--config.mesh.data=4", "--config.train.batch_size=4"]
    result, said = planned("128 layers", *arguments, folder=tmp_path, **deep)
    assert not result["fits"]
    other = result["instead"]
    assert (other["topology"], other["flags"]) == ("v5e:2x2", "--config.mesh.fsdp=4")
    assert sum(other["hbm_bytes_per_chip"].values()) < 16 * GIB
    assert other["modelled_step_s"] > 0
    assert said.count("compiling the step") == 1  # the replicas' state alone is too large
    result, _ = planned("1 layers", "--find=v5e", folder=tmp_path)
    assert (result["topology"], result["chips"], result["tried"]) == ("v5e:1x1", 1, [])


@needs_tpu_compiler
def test_a_plan_by_the_real_compiler(tmp_path):
    """Two cells of a pyramid on eight chips: what it holds, exchanges, and takes."""
    config_name = f"{tiny.__file__}:4 layers, E=4+8, residual"
    changes = "dtype=bfloat16 length=512 d_model=256 d_ff=1024 heads=2".split()
    command = [sys.executable, "-m", "prmoe_jax", "plan", "--json", "--topology=v5e:2x4"]
    command += [f"--config={config_name}"]
    command += ["--config.mesh.expert=8", *(f"--config.model.{change}" for change in changes)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["fits"] and result["chips"] == 8
    assert result["mesh"] == {"expert_1": 2, "expert_0": 4}
    assert {"experts", "mlp", "attention kernels", "routing"} <= result["components"].keys()
    exchanged = [c for c in result["collectives"] if c["kind"] == "all-to-all"]
    assert sorted(c["runs"] for c in exchanged) == [4, 4]
    assert {tuple(c["axes"]) for c in exchanged} == {("expert_0",), ("expert_1", "expert_0")}
    # 2 x 512 tokens a chip, bfloat16, once there and back, forward and backward; each layer's
    # capacity is even.
    assert [c["bytes"] for c in exchanged] == [4 * 2 * 512 * 256 * 2] * 2
    alone = result["modelled_step_s"]
    values = dict(change.split("=") for change in changes)
    sizes = {name: int(size) for name, size in values.items() if size.isdecimal()}
    (tmp_path / "teacher.py").write_text(
        "from configs import tiny\n\n\ndef get_config():\n"
        "    values = tiny.get_config('4 layers, E=4+8, residual')\n"
        f"    values.model.update({sizes | {'dtype': 'bfloat16'}})\n    return values\n"
    )
    taught = [f"--teacher={tmp_path}/teacher.py", "--config.teacher.workdir=any"]
    path = os.environ | {"PYTHONPATH": str(Path(tiny.__file__).parent.parent)}
    done = subprocess.run(
        [*command, *taught], capture_output=True, text=True, cwd=tmp_path, env=path
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    # Parameters in float32, in the teacher those that it computes with in bfloat16.
    parameters, teacher = (result["hbm_bytes_per_chip"][n] for n in ("parameters", "teacher"))
    assert parameters / 2 < teacher < parameters
    assert result["modelled_step_s"] > 1.2 * alone
    done = subprocess.run([*command, "--decode=8"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    # 4 layers' keys and values of a whole context, one sequence a chip, bfloat16.
    assert result["hbm_bytes_per_chip"]["past"] == 4 * 2 * 512 * 256 * 2
    assert result["tokens_per_s"] == pytest.approx(8 / result["modelled_step_s"])
    # One token there and back, to a place of its own at every expert.
    sent = {tuple(c["axes"]): c for c in result["collectives"] if c["kind"] == "all-to-all"}
    assert {axes: c["runs"] for axes, c in sent.items()} == {
        ("expert_0",): 2, ("expert_1", "expert_0"): 2
    }  # fmt: skip
