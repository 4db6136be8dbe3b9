"""Reading a compiled TPU program, without a TPU compiler."""

import os

import numpy as np
import pytest

from configs import tiny
from prmoe_jax.cli import main
from prmoe_jax.plan.collectives import collectives, groups
from prmoe_jax.plan.cycles import Operation, cycles
from prmoe_jax.plan.report import component

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


def test_cycles_by_hand():
    counted = cycles(HLO)
    assert counted.total == 100 + 3 * 11 + 3 * 5 * 7
    assert [(o.name, o.cycles, o.runs) for o in counted.costed] == [
        ("t", 105, 15),
        ("f", 100, 1),
        ("a", 33, 3),
    ]
    assert [(o.name, o.opcode) for o in counted.uncosted] == [
        ("odd", "fusion"),
        ("exchange", "all-to-all"),
    ]


def test_all_branches_count():
    """An upper bound, in either way that a conditional is written."""
    call = "conditional(%x), branch_computations={%outer_body, %inner_body}"
    old = HLO.replace("all-to-all(%odd, %f), replica_groups={{0,1}}", call)
    assert cycles(old).total == cycles(HLO).total + 11 + 5 * 7 + 7
    call = "conditional(%x), true_computation=%inner_body, false_computation=%inner_body"
    new = HLO.replace("all-to-all(%odd, %f), replica_groups={{0,1}}", call)
    assert cycles(new).total == cycles(HLO).total + 2 * 7


def test_a_loop_without_a_bound_is_an_error():
    with pytest.raises(ValueError, match="trip count"):
        cycles(HLO.replace("known_trip_count", "unknown"))


def test_attributes_over_several_lines():
    """As a kernel has them; the computation goes on after it."""
    kernel = """\
  %k = f32[8]{0} custom-call(%x), frontend_attributes={kernel_metadata={
"block_q": 512
}}, metadata={op_name="jit(step)/attention/kernel"}
  %f = """
    counted = cycles(HLO.replace("  %f = ", kernel))
    assert counted.total == cycles(HLO).total
    assert "k" in [operation.name for operation in counted.uncosted]


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
        operation = Operation("x", opcode, 0, runs, text)
        (found,) = collectives([operation], mesh, coordinates, 1e6)
        return found

    inner, everyone = "{{0,1,2,3},{4,5,6,7}}", "[1,8]<=[8]"
    gather = one("all-gather", "f32[1000000]{0:T(8)}", inner, runs=3)
    assert gather[:4] == ("all-gather", ("b",), False, 3)
    assert gather.bytes == 3 * 4_000_000
    assert gather.seconds == pytest.approx(3 * 4 * 3 / 4 / 2)  # one ring, both ways
    reduce = one("all-reduce-start", "bf16[1000000]{0}", everyone)
    assert (reduce.kind, reduce.axes, reduce.hidden) == ("all-reduce", ("a", "b"), True)
    assert reduce.seconds == pytest.approx(2 * 2 * 7 / 8 / 4)  # there and back, two rings
    scatter = one("reduce-scatter", "f32[250000]{0}", inner)
    assert scatter.seconds == pytest.approx(gather.seconds / 3)
    exchange = one("all-to-all", "(bf16[500000]{0}, bf16[500000]{0})", inner)
    assert (exchange.bytes, exchange.seconds) == (2_000_000, pytest.approx(2 * 4 / 8))
    start = one("all-gather-start", "(f32[250000]{0}, f32[1000000]{0}, u32[])", inner)
    assert (start.bytes, start.hidden) == (4_000_000, True)


def test_components_are_innermost_scopes():
    def of(name):
        return component(Operation("x", "fusion", 1, 1, f"f32[] fusion(), metadata={{{name}}}"))

    assert of('op_name="jit(step)/transpose(jvp())/while/body/dispatch/experts/dot"') == "experts"
    assert of('op_name="jit(step)/while/body/attention/add"') == "attention"
    assert of('op_name="jit(step)/while/body/add"') == "other"
    assert of("") == "other"


def test_an_unknown_topology_is_refused(capsys, monkeypatch):
    monkeypatch.setattr("os.environ", os.environ.copy())  # the verb sets some
    config = f"--config={tiny.__file__}:prmoe"
    for topology in ("v9:2x2", "v5p", "v5p:4by4"):
        assert main(["plan", config, f"--topology={topology}"]) == 2
        assert f"--topology={topology} is unknown; use one of v4, v5e" in capsys.readouterr().err
