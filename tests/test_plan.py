"""Reading a compiled TPU program, without a TPU compiler."""

import pytest

from prmoe_jax.plan.cycles import cycles

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
