"""Placement schedules, their strings, and their stages."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prmoe_jax.config import architecture
from prmoe_jax.config.architecture import Schedule, Stage, parse_fields, placed, placement_of
from prmoe_jax.config.loading import resolve
from prmoe_jax.config.schema import default_config
from prmoe_jax.errors import UserError

# One row of the paper's comparison each: the string, and the experts layer by layer.
SCHEDULES = {
    "dense": ("4 layers", (0, 0, 0, 0), 1, False),
    "moe": ("6 layers, E=8", (0, 8, 0, 8, 0, 8), 1, False),
    "first half": ("6 layers, first half, E=8", (8, 8, 8, 0, 0, 0), 1, False),
    "second half": ("6 layers, second half, E=8", (0, 0, 0, 8, 8, 8), 1, False),
    "top 2": ("4 layers, E=8, top 2", (0, 8, 0, 8), 2, False),
    "residual": ("4 layers, E=8, residual", (0, 8, 0, 8), 1, True),
    "pyramid": ("6 layers, E=4x2+8", (0, 4, 0, 4, 0, 8), 1, False),
    "pyramid of three": ("8 layers, E=2+4x2+8", (0, 2, 0, 4, 0, 4, 0, 8), 1, False),
    "PR-MoE": ("6 layers, E=4x2+8, residual", (0, 4, 0, 4, 0, 8), 1, True),
    "student": ("5 layers, E=4+8, residual", (0, 4, 0, 8, 0), 1, True),
    "everything": ("5 layers, layers 0 3 4, E=3+5x2, top 2, residual", (3, 0, 0, 5, 5), 2, True),
}


@pytest.mark.parametrize("text, experts, top_k, residual", SCHEDULES.values(), ids=SCHEDULES)
def test_rows_of_the_paper(text, experts, top_k, residual):
    schedule = Schedule(experts, top_k, residual)
    assert Schedule.parse(text) == schedule
    assert str(schedule) == text


@pytest.mark.parametrize(
    "layers, placement, indices",
    [
        (6, "none", []),
        (1, "every 1", [0]),
        (6, "every 1", [0, 1, 2, 3, 4, 5]),
        (6, "every 2", [1, 3, 5]),
        (7, "every 2", [1, 3, 5]),
        (6, "every 3", [2, 5]),
        (7, "every 3", [2, 5]),
        (6, "every 4", [3]),
        (6, "every 5", [4]),
        (6, "every 6", [5]),
        (6, "first half", [0, 1, 2]),
        (6, "second half", [3, 4, 5]),
        # The middle layer of an odd depth is in neither half.
        (7, "first half", [0, 1, 2]),
        (7, "second half", [4, 5, 6]),
        (7, "layers 0", [0]),
        (7, "layers 0 2 6", [0, 2, 6]),
        (11, "layers 9 10", [9, 10]),
    ],
)
def test_placements(layers, placement, indices):
    assert list(placed(layers, placement)) == indices
    assert placed(layers, placement_of(indices, layers)) == tuple(indices)


@pytest.mark.parametrize(
    "text, same_as",
    [
        ("6 layers, every 2, E=8", "6 layers, E=8"),
        ("6 layers, E=8x3", "6 layers, E=8"),
        ("6 layers, E=4+4+8x1", "6 layers, E=4x2+8"),
        ("residual,E=8 ,  6 layers", "6 layers, E=8, residual"),
        ("6 layers, E=8, top 1", "6 layers, E=8"),
        ("6 layers, layers 1 3 5, E=8", "6 layers, E=8"),
        ("6 layers, layers 0 1 2, E=8", "6 layers, first half, E=8"),
        ("2 layers, second half, E=8", "2 layers, E=8"),
        ("2 layers, E=8x1", "2 layers, E=8"),
    ],
)
def test_printed_form_is_canonical(text, same_as):
    assert str(Schedule.parse(text)) == same_as
    assert Schedule.parse(text) == Schedule.parse(same_as)


counts = st.lists(st.sampled_from([0, 0, 1, 2, 3, 32]), min_size=1, max_size=13).map(tuple)


@given(counts, st.sampled_from([1, 2]), st.booleans())
def test_every_schedule_prints_and_parses_back(experts, top_k, residual):
    moe = any(experts)
    schedule = Schedule(experts, top_k if moe else 1, residual and moe)
    assert Schedule.parse(str(schedule)) == schedule
    assert str(Schedule.parse(str(schedule))) == str(schedule)


ERRORS = {
    "no layers": ("E=8", "does not say how many layers; add '24 layers'"),
    "no number": ("layers", "does not say how many layers"),
    "no index": ("6 layers, layers, E=8", "placement 'layers' is unknown; use 'none', 'every 2'"),
    "zero layers": ("0 layers", "'0 layers' is not understood; write for example"),
    "unknown part": ("6 layers, E=8, residue", "'residue' is not understood"),
    "empty part": ("6 layers,", "'' is not understood"),
    "negative": ("6 layers, E=-8", "'E=-8' is not understood"),
    "no expert": ("6 layers, E=0", "'E=0' is not understood"),
    "no repeat": ("6 layers, E=8x0", "'E=8x0' is not understood"),
    "no term": ("6 layers, E=8+", "'E=8+' is not understood"),
    "layers twice": ("6 layers, 7 layers", "'7 layers' gives the layers a second time"),
    "E twice": ("6 layers, E=8, E=8", "'E=8' gives the experts a second time"),
    "placement twice": ("6 layers, every 2, first half, E=8", "gives the placement a second"),
    "top twice": ("6 layers, E=8, top 2, top 1", "'top 1' gives the top_k a second time"),
    "residual twice": ("6 layers, E=8, residual, residual", "gives the residual a second time"),
    "dense residual": ("6 layers, residual", "has no experts, so the rest has no effect"),
    "dense top": ("6 layers, top 2", "has no experts, so the rest has no effect"),
    "dense placement": ("6 layers, every 2", "has no experts, so the rest has no effect"),
    "placement none": ("6 layers, none, E=8", "placement 'none' puts no MoE layer into 6 layers"),
    "empty half": ("1 layers, first half, E=8", "puts no MoE layer into 1 layers"),
    "too few counts": ("6 layers, E=4+8", "2 entries, but placement 'every 2' makes 3 MoE layers"),
    "one layer's": (
        "6 layers, E=8x1",
        "E=8x1 is for one MoE layer, and placement 'every 2' makes 3",
    ),
    "too many counts": ("6 layers, E=4x3+8", "has 4 entries"),
    "every 0": ("6 layers, every 0, E=8", "names none of 6 layers; use 'every N'"),
    "every 7": ("6 layers, every 7, E=8", "with N from 1 to 6"),
    "every half": ("6 layers, every half, E=8", "placement 'every half' is unknown"),
    "third half": ("6 layers, second third, E=8", "use 'none', 'every 2', 'first half'"),
    "layer not there": ("6 layers, layers 1 6, E=8", "must name ascending layers from 0 to 5"),
    "layers descend": ("6 layers, layers 3 1, E=8", "must name ascending layers"),
    "layer twice": ("6 layers, layers 3 3, E=8", "must name ascending layers"),
}


@pytest.mark.parametrize("text, message", ERRORS.values(), ids=ERRORS)
def test_errors_say_what_is_wrong(text, message):
    with pytest.raises(UserError) as error:
        Schedule.parse(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_string_replaces_the_whole_architecture():
    """`config.model.update(parse_fields(text))` leaves nothing of what was there before."""
    config = default_config()
    config.train.steps = 1
    config.model.update(parse_fields("4 layers, second half, E=2+8, top 2, residual"))
    for text in "4 layers", "6 layers, E=4", "6 layers, E=4, top 2", "6 layers, E=4, residual":
        config.model.update(parse_fields(text))
        assert resolve(config).model.schedule == Schedule.parse(text)


def test_a_placement_without_a_layer_is_refused_even_without_experts():
    with pytest.raises(UserError, match="placement 'first half' puts no MoE layer into 1 layers"):
        Schedule.place(1, "first half", ())


@pytest.mark.parametrize(
    "text, stages",
    [
        ("24 layers", [((0,), 24)]),
        ("24 layers, E=128", [((0, 128), 12)]),
        ("24 layers, E=32x10+64x2, residual", [((0, 32), 10), ((0, 64), 2)]),
        ("21 layers, E=32x8+64x2, residual", [((0, 32), 8), ((0, 64), 2), ((0,), 1)]),
        ("6 layers, first half, E=8", [((8,), 3), ((0,), 3)]),
        ("7 layers, second half, E=8", [((0,), 4), ((8,), 3)]),
        ("6 layers, every 3, E=8", [((0, 0, 8), 2)]),
        ("9 layers, every 1, E=1+2+1+2+1+2+3+1+2", [((1, 2), 3), ((3, 1, 2), 1)]),
        # The first run stops early: what is left then compiles 3 layers instead of 4.
        ("10 layers, every 1, E=1+2+1+2+1+2+3+1+2+3", [((1, 2), 2), ((1, 2, 3), 2)]),
    ],
)
def test_stages(text, stages):
    assert architecture.stages(Schedule.parse(text).experts) == tuple(
        Stage(*stage) for stage in stages
    )


def cut(values):
    """Every way to cut a tuple into consecutive parts."""
    if not values:
        yield ()
    for first in range(1, len(values) + 1):
        for rest in cut(values[first:]):
            yield (values[:first], *rest)


def period(values):
    """The length of the shortest cell that values repeats a whole number of times."""
    return next(n for n in range(1, len(values) + 1) if values[:n] * (len(values) // n) == values)


@settings(deadline=None)
@given(st.lists(st.sampled_from([0, 2, 3]), min_size=1, max_size=10).map(tuple))
def test_stages_are_the_layers_and_the_fewest_to_compile(experts):
    stages = architecture.stages(experts)
    assert sum((stage.cell * stage.repeats for stage in stages), ()) == experts
    compiled = sum(len(stage.cell) for stage in stages)
    best = min((sum(map(period, parts)), len(parts)) for parts in cut(experts))
    assert (compiled, len(stages)) == best
