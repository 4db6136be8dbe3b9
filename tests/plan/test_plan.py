"""Reading compiled programs, without the compilers; and one plan by the TPU's, where it is."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from configs import paper, tiny
from prmoe_jax.cli import main
from prmoe_jax.config import architecture
from prmoe_jax.config.loading import resolve, save
from prmoe_jax.config.schema import ExecutionConfig, MeshConfig, TeacherConfig
from prmoe_jax.config.teacher import adapt_teacher
from prmoe_jax.distill.loss import Distiller
from prmoe_jax.errors import UserError
from prmoe_jax.parallel.mesh import axis_sizes, check_fits, make_mesh
from prmoe_jax.plan.chips import CHIPS, chip_count, chip_of, device_count, slice_shapes, unit
from prmoe_jax.plan.collectives import (
    LATENCY,
    collectives,
    exposed,
    groups,
    hosts,
    kind,
    slices,
    torus,
)
from prmoe_jax.plan.find import find, fit
from prmoe_jax.plan.picture import draw
from prmoe_jax.plan.program import END, Operation, operations
from prmoe_jax.plan.report import (
    _arguments,
    _rounds,
    _seconds,
    component,
    held_bytes,
    needed_bytes,
    table,
)
from prmoe_jax.training.step import compile_train_step
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


# Attention kernels as the TPU's compiler writes them, [B, H, L, K], in a loop of 5; and
# cuDNN's, [B, L, H, K]. What comes before the queries has no heads, or is no float.
KERNELS = """\
HloModule jit_step, is_scheduled=true

%microbatch (s: (s32[], bf16[2,3,7,11])) -> (s32[], bf16[2,3,7,11]) {
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
  ROOT %w = (s32[], bf16[2,3,7,11]{3,2,1,0}) while(%x), condition=%condition, body=%microbatch, backend_config={"known_trip_count":{"n":"5"}}
}
"""  # noqa: E501


def test_attention_kernels_by_hand():
    """A causal product of B x H queries and keys, L by L of width K: half of 2 BHL²K FLOPs.

    The sizes are the kernel's own: a microbatch's, and those of whichever model it is of.
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
    # A window of 3 shows the queries 1, 2, 3, 3, 3, 3, 3 keys: 18 of the 28 of causal attention.
    windowed = {o.name.partition(".")[0]: o.flops for o in operations(KERNELS, window=3)}
    assert windowed["splash_mha_fwd_segmented_residuals"] / (2 * one) == pytest.approx(
        18 / 28, 0.15
    )
    assert operations(KERNELS, window=13) == operations(KERNELS)
    with pytest.raises(ValueError, match="splash_mha_dq.* has no visible queries"):
        operations(KERNELS.replace("custom-call(%mask, %q, %q, %q)", "custom-call(%mask)"))


def test_a_loop_without_a_bound_is_an_error():
    with pytest.raises(ValueError, match="trip count"):
        operations(HLO.replace("known_trip_count", "unknown"))


def test_a_loop_whose_first_trip_was_taken_out():
    """It counts from 1 to 5."""
    changed = (
        HLO.replace(
            'condition=%outer_condition, body=%outer_body, backend_config={"known_trip_count":'
            '{"n":"3"}}',
            "condition=%inner_condition, body=%outer_body",
        )
        .replace("while(%f)", "while(%start)")
        .replace(
            "  ROOT %w",
            "  %one = s32[] constant(1)\n  %copied = s32[] copy(%one)\n"
            "  %start = (s32[], f32[8]{0}) tuple(%copied, %f)\n  ROOT %w",
        )
    )
    assert cycles(changed) == 100 + 4 * (11 + 5 * 7)
    assert cycles(changed.replace("constant(1)", "constant(0)")) == 100 + 5 * (11 + 5 * 7)


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
    # Several arrays at once: operands, results, and perhaps flags.
    pair = "(bf16[250000]{0}, f32[10,250]{1,0})", "(bf16[1000000]{0:T(8)(2,1)}, f32[40,250]{1,0})"
    assert one("all-gather-start", f"({', '.join(pair)})", inner).bytes == 2_040_000
    assert one("all-gather-start", "(bf16[250]{0}, bf16[1000]{0}, u32[])", inner).bytes == 2000
    combined = one("reduce-scatter-start", f"(({', '.join(pair[::-1])}), u32[])", inner)
    assert combined.bytes == 2_040_000 + 510_000
    summed = one("all-reduce-start", "(bf16[1000]{0}, f32[10,250]{1,0})", everyone)
    assert summed.bytes == 12_000
    both = one("all-reduce-start", "((bf16[1000]{0}), bf16[1000]{0})", everyone)
    assert both.bytes == 2000
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


def test_two_devices_of_a_chip_by_hand():
    """Two chips of two devices each; a device has 1 MB/s of a link, and 30 MB/s to its twin."""
    seconds = torus(np.array([[0], [0], [1], [1]]), 1e6, 30e6)
    twins, across, everyone = np.array([0, 1]), np.array([0, 2]), np.arange(4)
    assert seconds("all-gather", twins, 6 * 10**6) == pytest.approx(6 / 2 / 30)
    assert seconds("all-reduce", twins, 6 * 10**6) == pytest.approx(6 / 30)
    assert seconds("all-to-all", twins, 6 * 10**6) == pytest.approx(6 / 2 / 30)
    # Each device gathers for itself, or both for one another: by half a link each, or the whole.
    assert seconds("all-gather", across, 8 * 10**6) == pytest.approx(8 / 2 / 2)
    assert seconds("all-gather", everyone, 8 * 10**6) == pytest.approx(8 * 3 / 4 / 4)


# As a TPU's compiler writes it for two slices of four chips: each program is of one slice. Sums of
# 2 and 3 MB go to the other slice; the second is awaited first, after a loop. Its shape may hold
# rows for four slices, two of which exchange.
SLICED = """\
HloModule jit_step, is_scheduled=true, num_partitions=4

%body (s: (s32[], f32[8])) -> (s32[], f32[8]) {
  ROOT %t = (s32[], f32[8]{0}) fusion(%s), calls=%none, backend_config={"estimated_cycles":"20"}
}

%condition (s: (s32[], f32[8])) -> pred[] {
  %limit = s32[] constant(5)
  ROOT %less = pred[] compare(%s, %limit), direction=LT
}

%none (p: f32[8]) -> f32[8] {
  ROOT %p = f32[8]{0} parameter(0)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %sum = f32[500000]{0} reduce-scatter(%x), replica_groups={{0,1,2,3}}
  %send = (f32[500000]{0:T(8,128)}, u32[]{:S(2)}, token[]) send(%sum, %token), is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="a_0",_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (f32[500000]{0:T(8,128)}, u32[]{:S(2)}, token[]) recv(%token), is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="a_0",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %send.1 = (bf16[1500000]{0}, u32[]{:S(2)}, token[]) send(%sum, %token), is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="b_0",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv.1 = (bf16[1500000]{0}, u32[]{:S(2)}, token[]) recv(%token), is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="b_0",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %w = (s32[], f32[8]{0}) while(%f), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %recv-done.1 = (bf16[1500000]{0}, token[]) recv-done(%recv.1), is_host_transfer=true
  %f = f32[8]{0} fusion(%x), calls=%none, backend_config={"estimated_cycles":"7"}
  %recv-done = (f32[500000]{0}, token[]) recv-done(%recv), is_host_transfer=true
  %send-done = token[] send-done(%send), is_host_transfer=true
  ROOT %g = f32[8]{0} fusion(%x), calls=%none, backend_config={"estimated_cycles":"1"}
}
"""  # noqa: E501


def test_traffic_between_slices_by_hand():
    """A link of 1 MB/s a direction in a slice, 0.1 MB/s for each chip between slices."""
    program = operations(SLICED)
    mesh = {"data_across": 2, "expert_0": 4}
    inside = torus(np.arange(4)[:, None], 1e6)
    network = slices(inside, 4, 1e5)
    found = collectives(program, mesh, network, np.arange(8) // 4, 4)
    assert [(c.kind, c.axes, c.asynchronous, c.bytes, c.away) for c in found.values()] == [
        ("reduce-scatter", ("expert_0",), False, 8 * 10**6, False),
        ("all-reduce", ("data_across",), True, 2 * 10**6, True),
        ("all-reduce", ("data_across",), True, 3 * 10**6, True),
    ]
    # Half of an array goes there and half of the sum comes back.
    assert found[2].seconds == pytest.approx(3 / 0.1 + LATENCY)
    assert found[0].seconds == inside("reduce-scatter", np.arange(4), 8 * 10**6)
    everyone = np.arange(0, 16, 4)
    four = slices(inside, 4, 1e5)
    assert four("all-to-all", everyone, 10**6) == pytest.approx(10 * 3 / 4 + LATENCY)
    assert four("all-gather", everyone[:2], 10**6) == pytest.approx(10 / 2 + LATENCY)
    assert four("collective-permute", everyone[:2], 10**6) == pytest.approx(10 + LATENCY)

    # Sends at 0 of 20 and 30 seconds; the loop takes 5 x 2, what follows 0.7 and 0.1.
    times = {0: 0.0, 1: 20 + LATENCY, 2: 30 + LATENCY}
    sent = {place: c._replace(seconds=times[place]) for place, c in found.items()}

    def waits(program, slower=1):
        seconds = [slower * (o.cycles or 0) * o.runs / 10 for o in program]
        return [c.exposed_seconds for c in exposed(program, seconds, sent).values()]

    # The second is there at 50, the loop ends at 10. The first is there by then.
    assert waits(program) == pytest.approx([0, 0, 50 + LATENCY - 10])
    assert waits(program, slower=10) == [0, 0, 0]  # the loop takes 100
    # A transfer that nothing in the program awaits is awaited at its end.
    unread = [operation for operation in program if operation.opcode != END]
    assert waits(unread) == pytest.approx([0, 20 + LATENCY - 10.8, 30])


@pytest.mark.parametrize(
    ("target", "axes", "kind", "moved"),
    [
        ('"{1,2,3,4}x{0:3}"', ("data_across", "expert_across_1"), "ALL_REDUCE", 8),
        ("{{100000,200000},{100001,200001}}", ("expert_across_1",), "ALL_TO_ALL", 8),
        ("{{100000,300000},{100001,300001}}", ("data_across",), "ALL_GATHER", 16),
        ("{{100000,300000}}", ("data_across",), "REDUCE_SCATTER", 8),
        ("{{100000,300000}}", ("data_across",), "ONE_TO_ONE", 8),
    ],
)
def test_transfers_in_every_notation(target, axes, kind, moved):
    text = (
        "(bf16[4]{0}, u32[]{:S(2)}, token[]) send(%x, %t), frontend_attributes={"
        f'_xla_megascale_target={target},_xla_megascale_transfer_type="{kind}"}}'
    )
    mesh = {"data_across": 2, "expert_across_1": 2, "data": 1, "expert_0": 2}
    operation = Operation("x", "send", None, 3, text, pair="a_0")
    inside = torus(np.zeros((2, 1)), 1e6)
    network = slices(inside, 2, 1e6)
    (found,) = collectives([operation], mesh, network, np.arange(8) // 2, 2).values()
    name = {"ONE_TO_ONE": "collective-permute"}.get(kind, kind.lower().replace("_", "-"))
    assert found[:5] == (name, axes, True, 3, 3 * moved)


def test_a_collective_of_a_sparse_core_by_hand():
    """A copy on a SparseCore, which starts and ends in the same way, is none."""
    program = """\
HloModule jit_step, is_scheduled=true

%gather (p: f32[2,3]) -> f32[8,3] {
  %p = f32[2,3]{1,0} parameter(0)
  ROOT %all-gather.1 = f32[8,3]{1,0} all-gather(%p), replica_groups={{0,1,2,3}}, dimensions={0}
}, execution_thread="sparsecore"

%move (p: f32[2,3]) -> f32[2,3] {
  %p.1 = f32[2,3]{1,0} parameter(0)
  ROOT %copy = f32[2,3]{0,1} copy(%p.1)
}, execution_thread="sparsecore"

ENTRY %main (x: f32[2,3]) -> f32[8,3] {
  %x = f32[2,3]{1,0} parameter(0)
  %start = ((), (), (s32[1]{0})) call-start(), async_execution_thread="sparsecore", to_apply=%gather
  %update = ((f32[2,3]{1,0}), f32[8,3]{1,0}) call-update(%start, %x)
  %start.1 = ((f32[2,3]{1,0}), f32[2,3]{0,1}, u32[]) call-start(%x), to_apply=%move
  %done.1 = f32[2,3]{0,1} call-done(%start.1)
  ROOT %done = f32[8,3]{1,0} call-done(%update)
}
"""
    found = operations(program)
    assert [(o.name, o.opcode, o.pair) for o in found] == [
        ("update", "all-gather", "start"), ("done.1", "call-done", ""), ("done", END, "start")
    ]  # fmt: skip
    (sent,) = collectives(found, {"a": 1, "b": 4}, lambda kind, members, moved: moved).values()
    assert sent[:5] == ("all-gather", ("b",), True, 1, 4 * 8 * 3)


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
        (["--topology=0xv5p:4x4x4"], "--topology=0xv5p:4x4x4 is unknown; use one of v4, v5e"),
        (["--topology=2v5p:4x4x4"], "--topology=2v5p:4x4x4 is unknown; use one of v4, v5e"),
        (["--topology=2xv9:4x4x4"], "--topology=2xv9:4x4x4 is unknown; use one of v4, v5e"),
        (["--topology=2xh100:16x8"], "slices, which only TPUs have; use h100:32x8 for so many"),
        (["--topology=999xv5p:4x4x4"], "999xv5p:4x4x4 has 63,936 chips; use 16,384 or fewer"),
        (["--find=2xh100"], "--find=2xh100 asks for slices, which only TPUs have; use --find=h100"),
        (
            ["--topology=v5e:4x4", "--decode=3"],
            "--decode=3 sequences are not divisible by 16 devic",
        ),
        (["--find=9999xv5p"], "9999xv5p:2x2x1 has 39,996 chips; use 16,384 or fewer"),
        (["--find=2xv9"], "--find=2xv9 is unknown; use one of v4, v5e"),
        (
            ["--topology=2xv5p:4x4x4", "--config.mesh.slices=4"],
            "mesh.slices=4, but --topology=2xv5p:4x4x4 has 2; use 2, or 0",
        ),
        (["--find=v5p", "--config.mesh.slices=2"], "mesh.slices=2, but --topology=v5p:2x2x1 has 1"),
        (["--find="], "--find= is unknown; use one of v4, v5e"),
        (["--find=v9"], "--find=v9 is unknown; use one of v4, v5e"),
        (["--find=v5p", "--decode=-1"], "--decode=-1 must be a number of sequences"),
        (["--find=v5p", f"--decode={10**20}"], f"--decode={10**20} must be a number of sequences"),
        (["--find=v5p", f"--decode={'9' * 9999}"], "argument --decode: invalid int value: "),
        ([], "prmoe plan needs either --topology=v5p:4x4x8 or --find=v5p"),
        (["--find=v5p", "--topology=v5p:2x2x1"], "prmoe plan needs either"),
        (["--find=v5p", "--teacher=configs/tiny.py:prmoe"], "the config has no teacher"),
        (
            [
                "--find=v5p",
                "--teacher=configs/tiny.py:prmoe",
                "--config.teacher.cache=a",
                "--config.kd.kind=top_k",
                "--config.kd.top_k=3",
            ],
            "has no effect: the run learns from teacher.cache; leave it out",
        ),
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


def test_topologies():
    """Chips and devices of several slices; a TPU7x chip is two devices."""
    assert chip_of("2xv5p:4x4x4") is chip_of("v5p:4x4x4") is CHIPS["v5p"]
    assert (chip_count("2xv5p:4x4x4"), device_count("2xv5p:4x4x4")) == (128, 128)
    assert (chip_count("tpu7x:2x2x1"), device_count("3xtpu7x:2x2x1")) == (4, 24)
    assert (unit("2xtpu7x:2x2x1"), unit("b200:2x8")) == ("device", "chip")
    assert slice_shapes("2xv5e")[:2] == ["2xv5e:1x1", "2xv5e:2x2"]
    assert slice_shapes("100xv5e")[-1] == "100xv5e:8x16"  # 16 x 16 would be too many
    for chip in CHIPS.values():
        assert chip.network_bytes_per_s < chip.link_bytes_per_s < chip.hbm_bytes_per_s


def a_plan(topology, held, fits=True):
    result = {"topology": topology, "mesh": {}, "chips": 4, "fits": fits}
    result["hbm_bytes_per_chip"] = {"parameters": 1, "optimizer": 2, "temporaries": held}
    parts = {"mlp": 0.25, "collectives": 0.5}
    result |= {"collectives": [], "tokens_per_s": 1.0}
    return result | {"modelled_step_s": 0.75, "modelled_mfu": 0.5, "components": parts}


def test_find_takes_the_first_slice_that_fits(monkeypatch):
    """What can't hold the state isn't compiled for; a mesh that doesn't fit is no plan."""
    values = resolve(paper.get_config("prmoe_1.3b"))
    asked = []

    def plan(config, topology, decode, teacher, load):
        assert teacher is None or teacher.mesh == config.mesh
        asked.append((topology, config.mesh))
        if topology == "v5p:2x2x2":
            raise UserError("the mesh does not fit")
        # So much that no number of microbatches is expected to help.
        return a_plan(topology, held=10**5 * 2**30, fits=topology == "v5p:2x4x4")

    monkeypatch.setattr("prmoe_jax.plan.find.plan", plan)
    found = find(values, "v5p")
    # 31.4 B parameters of 12 bytes: 351 GiB, four chips of 95.
    assert [topology for topology, _ in asked] == [
        "v5p:2x2x1", "v5p:2x2x2", "v5p:2x2x4", "v5p:2x4x4"
    ]  # fmt: skip
    assert [mesh.expert for _, mesh in asked] == [4, 8, 16, 32]
    assert found["topology"] == "v5p:2x4x4"
    assert [reason for _, reason in found["tried"]] == [
        "needs 100,000.0 GiB a chip", "the mesh does not fit", "needs 100,000.0 GiB a chip"
    ]  # fmt: skip
    asked.clear()
    with pytest.raises(UserError, match="--find=h100: no slice fits; h100:128x8: needs 100,000.0"):
        find(values, "h100")
    assert asked[0][0] == "h100:1x8"  # 351 GiB on eight of 80 GB
    asked.clear()
    fixed = dataclasses.replace(values, mesh=MeshConfig(expert=2))
    find(fixed, "v5p")
    assert {mesh.expert for _, mesh in asked} == {2}
    asked.clear()
    student = resolve(paper.get_config("mos_1.3b"))
    find(student, "v5p", teacher=adapt_teacher(values, student))
    assert [mesh.expert for _, mesh in asked] == [4, 8, 16, 32]


def test_a_teacher_whose_groups_no_mesh_keeps_whole():
    """A teacher routes four rows together: 8 rows suit two devices, not 4, nor microbatches."""
    values = resolve(paper.get_config("mos_1.3b"))
    student = dataclasses.replace(values, train=dataclasses.replace(values.train, batch_size=8))
    moe = dataclasses.replace(values.moe, group_size=4 * values.model.length)
    teacher = adapt_teacher(dataclasses.replace(values, moe=moe), student)

    def held(devices):
        sizes = axis_sizes(dataclasses.replace(student, mesh=MeshConfig()), devices)
        mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
        return held_bytes(student, mesh, teacher=teacher)

    assert held(2)["teacher"] > 0
    with pytest.raises(
        UserError, match="the teacher, on its student's mesh and batches: train.batch_size=8"
    ):
        held(4)
    train = dataclasses.replace(student.train, accumulate=2)
    student = dataclasses.replace(student, train=train)
    with pytest.raises(UserError, match="is not divisible by 2 devices x train.accumulate=2 x rou"):
        held(2)


def test_recorded_predictions_are_a_part_of_the_step():
    """Eight likeliest tokens of a position, as int32 and float32; a step takes them."""
    given = {
        "model": {"layers": 1, "d_model": 16, "heads": 2, "d_ff": 24, "length": 8},
        "train": {"steps": 4, "batch_size": 4},
        "kd": {"kind": "top_k", "top_k": 8, "stop": 0.5},
    }
    student = resolve(given | {"teacher": {"cache": "recorded"}})
    mesh = make_mesh(student)
    held = held_bytes(student, mesh)
    alone = dataclasses.replace(student, teacher=TeacherConfig())
    assert held["batch"] - held_bytes(alone, mesh)["batch"] == 4 * 8 * 8 * (4 + 4)
    with jax.set_mesh(mesh):
        compile_train_step(student, mesh, Distiller(student)).lower(
            *_arguments(student, mesh, 0, None)
        )


def large(text="2 layers", batch_size=8, mesh=(), accumulate=1, **model):
    """A config of 6.51 B parameters in two layers; nothing of it is ever made."""
    sizes = {"d_model": 16384, "d_ff": 65536, "heads": 64, "dtype": "bfloat16"}
    fields = architecture.parse_fields(text) | sizes | model
    train = {"steps": 1, "batch_size": batch_size, "accumulate": accumulate}
    return resolve({"model": fields, "mesh": dict(mesh), "train": train})


GIB = 2**30


@pytest.fixture
def compiled(monkeypatch):
    """Plans without a compiler; the list has (topology, mesh) of each.

    A step takes its state, the gradient and, over all chips, `activations` GiB for a batch in one
    microbatch.
    """
    asked = []

    def set_up(activations):
        def plan(values, topology, decode, teacher, load):
            asked.append((topology, values.mesh))
            chips = device_count(topology)
            check_fits(values, chips)
            sizes = axis_sizes(values, chips)
            mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
            held = held_bytes(values, mesh, decode, teacher)
            held["temporaries"] = activations * GIB // chips // values.train.accumulate
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
    assert asked == [("v5p:2x2x2", m) for m in (values.mesh, MeshConfig(1, fsdp=8))]
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
    # With --find eight chips are enough: four of them split a row's activations, too.
    result = find(values, "v5e")
    assert (result["topology"], result["flags"]) == (
        "v5e:2x4",
        "--config.mesh.fsdp=2 --config.mesh.tensor=4 --config.train.accumulate=16",
    )
    assert [(topology, mesh.fsdp) for topology, mesh in asked] == [("v5e:2x4", 8), ("v5e:2x4", 2)]
    assert [reason for _, reason in result["tried"]] == [
        "the model alone is 73 GiB", "the model alone is 73 GiB", "needs 56.6 GiB a chip"
    ]  # fmt: skip


def test_two_slices_where_one_is_too_small(compiled):
    """97 GiB with the gradient, over the 16 chips of each slice: FSDP doesn't cross them."""
    asked = compiled(activations=8)
    result = fit(large(batch_size=32), "2xv5e:4x4")
    assert result["fits"]
    assert result["flags"] == "--config.mesh.data=2 --config.mesh.fsdp=16 --config.mesh.slices=2"
    result = find(large(batch_size=32), "2xv5e")
    assert result["topology"] == "2xv5e:2x4"
    assert result["flags"] == "--config.mesh.data=2 --config.mesh.fsdp=8 --config.mesh.slices=2"
    assert {mesh.slices for _, mesh in asked} == {2}
    # A mesh of one's own is kept, and the search for another one knows the slices, too.
    asked.clear()
    result = fit(large(batch_size=8, mesh={"data": 8}), "2xv5e:2x2")
    assert "flags" not in result and asked[0][1] == MeshConfig(8, slices=2)
    assert result["instead"]["topology"] == "2xv5e:2x4"
    # Two devices a chip: half of the chips, of as much memory for a device.
    result = find(large(batch_size=32), "tpu7x")
    assert (result["topology"], result["flags"]) == ("tpu7x:2x2x1", "--config.mesh.fsdp=8")


def test_fsdp_of_experts_where_replicas_do_not_fit(compiled):
    """Four experts of 32 GiB on 32 chips of 16: each over eight chips by FSDP."""
    asked = compiled(activations=1)
    result = fit(large("2 layers, E=4", batch_size=32), "v5e:4x8")
    assert result["flags"] == "--config.mesh.fsdp=8 --config.mesh.expert=4"
    assert not result["fits"]
    assert result["instead"]["flags"] == "--config.mesh.fsdp_experts=8 --config.mesh.expert=4"
    assert len(asked) == 2


def test_a_search_leaves_an_exchange_in_two_stages(compiled):
    """No suggested mesh of these chips has two stages; the flags name the other exchange."""
    compiled(activations=1)
    mesh = {"expert": 4, "expert_inner": 2, "fsdp": 8}
    values = large("2 layers, E=4", batch_size=32, mesh=mesh)
    staged = ExecutionConfig(exchange="hierarchical")
    result = fit(dataclasses.replace(values, execution=staged), "v5e:4x8")
    assert not result["fits"]
    assert result["instead"]["flags"] == (
        "--config.mesh.fsdp_experts=8 --config.mesh.expert=4 --config.execution.exchange=auto"
    )
    # A teacher has its student's exchange, that of the search as well.
    student = dataclasses.replace(values, execution=staged)
    teacher = adapt_teacher(large("1 layers", batch_size=32, d_model=1024), student)
    taught = fit(student, "v5e:4x8", teacher=teacher)
    assert taught["instead"]["flags"] == result["instead"]["flags"]


def test_a_search_for_decoding_leaves_groups_out(compiled):
    """With groups of eight sequences, `tensor` would have to be 8: a batch of 32 has four."""
    compiled(activations=300)
    values = large("2 layers, E=4", batch_size=32, mesh={"data": 8, "expert": 4})
    moe = dataclasses.replace(values.moe, group_size=8 * values.model.length)
    flat = ExecutionConfig(exchange="flat")
    result = fit(dataclasses.replace(values, moe=moe, execution=flat), "v5e:4x8", decode=32)
    assert not result["fits"]
    assert result["instead"]["flags"] == (
        "--config.mesh.fsdp=4 --config.mesh.expert=4 --config.mesh.tensor=2"
    )


@pytest.mark.parametrize(
    ("mesh", "decode", "load", "pieces", "rounds"),
    [
        ({"expert": 4}, 0, 1.0, False, 1),
        ({"expert": 4}, 0, 1.3, False, 2),
        ({"expert": 4}, 4096, 1.3, False, 2),
        ({"expert": 4}, 520, 1.3, False, 1),  # the smallest buffer has room for 128 rows
        ({"expert": 4}, 520, 3.0, False, 2),
        ({"expert": 4}, 520, 2.5, False, 2),
        ({"expert": 4}, 520, 2.5, True, 1),  # pieces of 41 rows, where 16.25 are the even share
        ({"expert": 4}, 520, 3.0, True, 2),
        ({"expert": 4}, 256, 2.0, False, 1),  # all devices get all tokens
        ({"expert": 1}, 0, 2.0, False, 1),
    ],
)
def test_rounds_by_hand(mesh, decode, load, pieces, rounds):
    """Eight devices; a step of 64 sequences of 256 tokens, or one token of each."""
    values = resolve(
        {
            "model": architecture.parse_fields("2 layers, E=4"),
            "train": {"steps": 1, "batch_size": decode or 64},
            "mesh": mesh,
        }
    )
    sizes = axis_sizes(values, 8)
    placed = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    assert _rounds(values, placed, decode, load, pieces) == rounds


def test_a_batch_in_portions_where_its_activations_do_not_fit(compiled):
    """97 GiB and 600 of activations: on 16 chips of 16 GiB, 97 / 16 + 600 / 16 / 4."""
    asked = compiled(activations=600)
    values = large(batch_size=64)
    result = fit(values, "v5e:4x4")
    assert result["flags"] == "--config.mesh.fsdp=16"
    assert result["tried"] == [("v5e:4x4", "needs 43.6 GiB a chip")]
    assert result["instead"]["flags"] == "--config.mesh.fsdp=16 --config.train.accumulate=4"
    assert "v5e:4x4 --config.mesh.fsdp=16 --config.train.accumulate=4 (15.45 GiB" in table(result)
    assert len(asked) == 2  # two microbatches would need 24.8 GiB, and were not compiled for
    # Microbatches of the user's own are doubled; a context's activations are not of a batch.
    halves = large(batch_size=64, accumulate=2)
    assert fit(halves, "v5e:4x4")["instead"]["flags"].endswith("--config.train.accumulate=4")
    result = fit(large(batch_size=64, length=2048), "v5e:2x4", decode=64)
    assert not result["fits"] and "accumulate" not in str(result)


def test_the_slice_that_is_needed(compiled):
    """97 GiB and 75 of a row: 12.1 and 9.4 on each of eight chips, 6.1 and, of two rows, 9.4."""
    asked = compiled(activations=600)
    result = fit(large(), "v5e:2x4")
    assert result["instead"]["topology"] == "v5e:4x4"
    flags = "--config.mesh.fsdp=2 --config.mesh.tensor=8 --config.train.accumulate=4"
    assert f"this fits: --topology=v5e:4x4 {flags}" in table(result)
    assert {topology for topology, _ in asked} == {"v5e:2x4", "v5e:4x4"}
    # None is large enough, as JSON says, too.
    asked = compiled(activations=10**6)
    result = fit(large(batch_size=64), "v5e:8x16")
    assert result["instead"] is None
    assert [topology for topology, _ in result["tried"]] == ["v5e:8x16", "v5e:16x16"]
    assert "nothing that was tried fits: no mesh of these chips, no slice of v5e" in table(result)
    with pytest.raises(UserError, match="no slice fits; v5e:16x16: .*; leave --config.mesh"):
        find(large(batch_size=64, mesh={"fsdp": 4}), "v5e")


def test_decoding_has_no_groups(compiled):
    """They limit routing in training; a router that needs the limit can't be decoded at all."""
    compiled(activations=0)

    def decoded(**moe):
        values = large("2 layers, E=4", batch_size=64, length=2048)
        values = dataclasses.replace(values, moe=dataclasses.replace(values.moe, **moe))
        return fit(values, "v5e:2x2", decode=6)["flags"]

    assert decoded() == decoded(group_size=4096)
    with pytest.raises(UserError, match="expert_choice"):
        decoded(router="expert_choice")


@pytest.mark.parametrize("there", [True, False])
def test_the_teacher_of_a_config_teaches_in_its_plan(there, tmp_path, monkeypatch, capsys):
    """If its run can be read; otherwise a line says that it is left out."""
    asked = []

    def fit(config, topology, decode, teacher, load):
        asked.append(teacher)
        return a_plan(topology, 3)

    monkeypatch.setattr("prmoe_jax.plan.find.fit", fit)
    values = resolve(tiny.get_config("prmoe"))
    if there:
        save(values, tmp_path / "config.json")
    taught = [f"--config={tiny.__file__}:mos", f"--config.teacher.workdir={tmp_path}"]
    assert main(["plan", *taught, "--topology=v5e:2x2"]) == 0
    err = capsys.readouterr().err
    if there:
        assert asked[0].model == values.model
    else:
        assert asked == [None]
        assert "planned without it: --teacher=FILE:NAME gives its config" in err


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
    taught = a_plan("v5p:2x2x1", 3 * 2**30)
    taught["hbm_bytes_per_chip"] |= {"teacher": 4 * 2**30, "batch": 2**30, "padding": 2**30}
    draw([("taught", taught)], path)
    assert "<!-- 9.0 GiB" in path.read_text()
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
def test_libtpu_adds_no_word_and_sigterm_ends_a_plan(tmp_path):
    command = [sys.executable, "-m", "prmoe_jax", "plan", f"--config={tiny.__file__}:2 layers"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TPU_")}
    path = clean | {"PYTHONPATH": str(Path(tiny.__file__).parent.parent)}
    command += ["--topology=v5e:2x2", "--config.mesh.data=4"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=path)
    starts = []
    for line in process.stderr:
        starts.append(line.partition(" ")[0])
        if line.startswith("compiling the step"):
            process.terminate()
    assert process.wait() == -signal.SIGTERM
    assert starts == ["attention:", "mesh:", "compiling"]


@needs_tpu_compiler
def test_attention_kernels_of_portions_and_of_a_teacher(tmp_path):
    """In two microbatches kernels take what they take in one; a wider teacher's, its own."""
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
def test_two_slices_by_the_real_compiler(tmp_path):
    """Between the slices nothing but sums, of as many bytes as a chip's gradient and statistics."""
    result, _ = planned(
        *("2 layers, E=4", "--topology=2xv5e:2x2", "--config.train.batch_size=8"), folder=tmp_path
    )
    assert result["mesh"] == {"data_across": 2, "expert_0": 4} and result["chips"] == 8
    rows = {(c["network"], c["kind"]): c for c in result["collectives"]}
    across = {kind for network, kind in rows if network == "dcn"}
    assert across == {"all-reduce"}
    between = rows["dcn", "all-reduce"]
    assert (between["axes"], between["asynchronous"]) == (["data_across"], True)
    assert {axis for row in result["collectives"] for axis in row["axes"]} == {
        "data_across", "expert_0"
    }  # fmt: skip
    # A gradient has as many numbers as the parameters, of four bytes or, but for the experts, two.
    parameters = result["hbm_bytes_per_chip"]["parameters"]
    assert 0.5 * parameters < between["bytes"] < 1.2 * parameters
    assert 0 < between["exposed_seconds"] < between["seconds"]
    assert ("ici", "all-to-all") in rows


@needs_tpu_compiler
def test_tpu7x_by_the_real_compiler(tmp_path):
    """Eight devices on four chips; FSDP's collectives run on SparseCores."""
    arguments = ["--topology=tpu7x:2x2x1", "--config.train.batch_size=8", "--config.mesh.fsdp=4"]
    result, _ = planned("2 layers", *arguments, folder=tmp_path)
    assert (result["chips"], result["mesh"]) == (4, {"data": 2, "fsdp": 4})
    gathered = [c for c in result["collectives"] if c["kind"] == "all-gather"]
    # Not over "data", too: the batch stays where it is.
    assert {tuple(c["axes"]) for c in gathered} == {("fsdp",)}
    assert result["chip_hours"] == pytest.approx(4 * 24 * result["days"])


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
    # All devices of a MoE layer get every row, one a chip, and nothing else moves weights.
    sent = {tuple(c["axes"]): c for c in result["collectives"] if c["kind"] == "all-gather"}
    assert {axes: (c["runs"], c["bytes"]) for axes, c in sent.items()} == {
        ("expert_0",): (1, 4 * 256 * 2), ("expert_1", "expert_0"): (1, 8 * 256 * 2)
    }  # fmt: skip


@needs_tpu_compiler
def test_exchanged_rows_lie_as_they_are_sent(tmp_path):
    """Without drops, rows become tiles of their own and rows again, and no more than that."""
    arguments = ["--config.mesh.expert=4", "--config.moe.capacity_factor=inf"]
    arguments += ["--topology=v5p:2x2x1", "--config.train.batch_size=64"]
    sizes = {"length": 512, "d_model": 1024, "d_ff": 1024, "heads": 8}
    result, _ = planned("2 layers, every 1, E=4, top 2", *arguments, folder=tmp_path, **sizes)
    sent = next(c for c in result["collectives"] if c["kind"] == "ragged-all-to-all")
    assert (sent["runs"], sent["bytes"]) == (8, 8 * 16 * 512 * 2 * 1024 * 2)
    # A buffer of 1.25 times the rows, once read and once written, at 2.77 TB/s. It is 3.7 times
    # that, 8.3 times by quarters of tiles and copies of empty buffers, and 12.5 times by columns.
    once = 1.25 * 2 * sent["bytes"] / 2.77e12
    copies = result["components"]["exchange"] + result["components"]["other"]
    assert once < copies < 5 * once


# Shortened, and long lines cut: rows to four devices and a loop of further rounds, whose trips the
# program decides; a grouped product of two groups; two rows scattered into a large array.
ROUNDS = """\
HloModule jit_step, is_scheduled=true

%body (s: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %s = (s32[], bf16[8,4]{1,0}) parameter(0)
  ROOT %again = (s32[], bf16[8,4]{1,0}) fusion(%s), calls=%fused,
backend_config={"estimated_cycles":"50"}
}

%fused (p: f32[8]) -> f32[8] {
  ROOT %p = f32[8]{0} parameter(0)
}

%more (s: (s32[], bf16[8,4])) -> pred[] {
  %s = (s32[], bf16[8,4]{1,0}) parameter(0)
  ROOT %less = pred[] compare(%s, %s), direction=LT
}

ENTRY %main (x: bf16[8,4]) -> bf16[10,4] {
  %x = bf16[8,4]{1,0} parameter(0)
  %n = s32[4]{0} parameter(1)
  %b = bf16[10,4]{1,0} parameter(2)
  %w = bf16[2,4,6]{2,1,0} parameter(3)
  %e = bf16[1000,4]{1,0} parameter(4)
  %u = bf16[2,4]{1,0} parameter(5)
  %ragged-all-to-all-start = ((bf16[8,4]{1,0}, bf16[10,4]{1,0}, s32[4]{0}, s32[4]{0},
s32[4]{0}, s32[4]{0}), bf16[10,4]{1,0}, u32[]) ragged-all-to-all-start(%x, %b, %n, %n, %n, %n),
replica_groups={{0,1,2,3}}
  %ragged-all-to-all-done = bf16[10,4]{1,0} ragged-all-to-all-done(%ragged-all-to-all-start)
  %ragged-dot-none = bf16[10,6]{1,0} custom-call(%n, %ragged-all-to-all-done, %w),
custom_call_target="tpu_custom_call"
  %ragged-dot-metadata = (s32[2]{0}, s32[2]{0}) custom-call(%n),
custom_call_target="tpu_custom_call"
  %scatter = bf16[1000,4]{1,0} scatter(%e, %n, %u), to_apply=%fused
  ROOT %loop = (s32[], bf16[8,4]{1,0}) while(%x), condition=%more, body=%body,
metadata={op_name="jit(step)/shard_map/dispatch/rounds/while"}
}
"""


@pytest.mark.parametrize(
    ("name", "outer"),
    [
        ("jvp(layers)/while/body/shard_map/dispatch/rounds", True),
        ("transpose(jvp(layers))/while/body/checkpoint/shard_map/dispatch/rounds", True),
        ("shard_map/dispatch/jvp(rounds)", False),
        ("shard_map/dispatch/transpose(jvp(rounds))", False),
        ("shard_map/dispatch/rounds/while/body/eval_jaxpr/rounds", False),
        ("shard_map/dispatch/rounds/while/body/transpose(jvp(rounds))", False),
    ],
)
def test_the_outer_stage_of_an_exchange_takes_the_rounds(name, outer):
    """The names are the compiler's, of an exchange in two stages."""
    hlo = ROUNDS.replace("shard_map/dispatch/rounds", name)
    found = {operation.name: operation for operation in operations(hlo, 3)}
    assert found["again"].runs == (2 if outer else 0)


@pytest.mark.parametrize("rounds", [1, 3])
def test_rounds_beyond_the_first_run_as_often_as_the_load_says(rounds):
    found = {operation.name: operation for operation in operations(ROUNDS, rounds)}
    assert found["again"].runs == rounds - 1
    # 10 rows of 4 by 4 x 6: the buffer's rows count, whatever their expert.
    assert found["ragged-dot-none"].flops == 2 * 10 * 4 * 6
    assert found["ragged-dot-metadata"].flops == 0
    assert found["scatter"].bytes == 2 * 2 * 4 * 2  # in place: two rows are read and written


@pytest.mark.parametrize("asynchronous", [True, False])
def test_ragged_rows_count_without_the_room_of_the_buffer(asynchronous):
    """Four devices in a row: a quarter of 8 rows of 4 crosses the middle in each direction."""
    network = torus(np.arange(4)[:, None], 100.0)
    hlo = ROUNDS
    if not asynchronous:
        begin, end = hlo.index("  %ragged-all-to-all-start"), hlo.index("  %ragged-dot-none")
        once = (
            "%ragged-all-to-all-done = bf16[10,4]{1,0} ragged-all-to-all(%x, %b, %n, %n, %n, %n), "
        )
        hlo = f"{hlo[:begin]}  {once}replica_groups={{{{0,1,2,3}}}}\n{hlo[end:]}"
    (sent,) = collectives(operations(hlo), {"expert_0": 4}, network).values()
    assert (sent.kind, sent.axes) == ("ragged-all-to-all", ("expert_0",))
    assert sent.asynchronous == asynchronous
    assert (sent.bytes, sent.seconds) == (64, pytest.approx(64 * 4 / 8 / 100))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--load=0.5"], "--load=0.5 must be a number from 1, the even load"),
        (["--load=2"], "--load=2 has no effect with moe.capacity_factor=1, by which no expert"),
        (
            ["--load=2", "--config=tiny:dense"],
            "--load=2 has no effect: the architecture is den",
        ),
    ],
)
def test_a_load_without_effect_is_refused(options, line, capsys):
    command = ["plan", "--config=tiny:moe", "--topology=v5e:2x2", *options]
    assert main(command) == 2
    assert line in only_line(capsys.readouterr().err)


@pytest.mark.parametrize("chip", ["h100", "v5p"])
def test_the_end_of_a_collective_takes_no_time_of_its_own(chip):
    """A GPU has no compiler's cycles, by which to divide."""
    assert _seconds(Operation("done", END, 0, 3, ""), CHIPS[chip]) == 0
