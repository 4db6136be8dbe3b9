"""Multipliers: ladders with known answers, and the scaling law's table."""

import json
import math
import runpy
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from prmoe_jax.cli import main
from prmoe_jax.errors import UserError
from prmoe_jax.report import figures
from prmoe_jax.report.arms import arms, difference, equally_long, holm, models, spread
from prmoe_jax.report.multiplier import (
    equivalent_compute,
    multipliers,
    ratios,
)
from prmoe_jax.sweep.definition import constants
from tests.support.lines import only_line
from tests.support.records import record

EXPERIMENT = Path(__file__).parents[2] / "experiments" / "multiplier"

# Rungs of a ladder on which loss = 5 compute^-0.1.
RUNGS = [(compute, 5 * compute**-0.1) for compute in (1.0, 2.0, 5.0, 7.0)]
LOSSES = [3.0, 3.1, 2.9, 3.3, 3.2], [3.2, 3.15, 3.0, 3.35, 3.5]
EQUAL = {1: {"loss": 1.0}, 2: {"loss": 2.0}}  # 1 below some other losses, with each seed
SEEDS = {1: 0.01, 2: -0.02, 3: 0.01}  # what a seed adds to a log loss


def loss_of(compute):
    return 5 * compute**-0.1


def sweep(moe, rungs=RUNGS, seeds=SEEDS, tokens=2000):
    """Records of the dense arms, and of MoEs {name: (compute, loss)}."""
    found = []
    for number, (compute, loss) in enumerate(rungs):
        size = 7 + number
        dense = {"flops_per_token": compute, "total_params": size, "active_params": size}
        found += [
            record(f"dense{number}/{tokens}", seed, loss * math.exp(add), **dense, tokens=tokens)
            for seed, add in seeds.items()
        ]
    for name, (compute, loss) in moe.items():
        for seed, add in seeds.items():
            row = record(f"{name}/{tokens}", seed, loss * math.exp(add), tokens=tokens)
            row |= {"flops_per_token": compute, "total_params": 70, "active_params": 11}
            row["settings"] |= {"model.experts": [8], "model.placement": "every 1"}
            found.append(row)
    return found


@pytest.mark.parametrize(
    ("loss", "compute"),
    [
        (loss_of(3.0), 3.0),
        (loss_of(1.0), 1.0),
        (loss_of(2.0), 2.0),
        (loss_of(7.0), 7.0),
        (loss_of(0.99), 0.0),
        (loss_of(7.01), math.inf),
    ],
)
def test_a_power_law_is_inverted_exactly(loss, compute):
    assert equivalent_compute(loss, RUNGS) == pytest.approx(compute, rel=1e-12)


def test_a_ladder_by_hand():
    """Log(loss) is linear in log(compute); the first model that reaches the loss counts."""
    ladder = [(1.0, 4.0), (4.0, 2.0), (9.0, 3.0), (16.0, 1.0)]
    # Half of the way from 4 to 2 in the logarithm of the loss, and of that from 1 to 4.
    assert equivalent_compute(8**0.5, ladder) == pytest.approx(2.0)
    assert equivalent_compute(2.5, ladder) == pytest.approx(4 ** (math.log(1.6) / math.log(2)))
    # From 3 to 1 between 9 and 16, where the loss first falls below 2.
    expected = 9 * (16 / 9) ** (math.log(3 / 1.5) / math.log(3))
    assert equivalent_compute(1.5, ladder) == pytest.approx(expected)
    assert equivalent_compute(3.0, [(1.0, 3.0), (2.0, 3.0)]) == 1.0
    assert equivalent_compute(3.0, [(1.0, 3.0), (2.0, 4.0)]) == 1.0
    same = [(2.0, 3.1), (2.0, 3.0)]
    with pytest.raises(
        UserError, match="dense arms dense0/2000 and dense1/2000 have the same flops_"
    ):
        multipliers(arms(sweep({"moe": (1.0, 3.05)}, same)))


def test_a_moe_that_is_worth_twice_its_compute():
    """Recovered exactly, whatever the seeds add to all losses alike."""
    found = multipliers(arms(sweep({"moe": (1.1, loss_of(2.2))})))
    (one,) = found
    assert (one.arm, one.tokens, list(one.by_seed)) == ("moe/2000", 2000, [1, 2, 3])
    assert one.value == pytest.approx(2.0) and one.tokens_per_parameter == 2000 / 11
    assert (one.low, one.high) == pytest.approx((2.0, 2.0))
    assert (one.least, one.most) == pytest.approx((1 / 1.1, 7 / 1.1))
    assert str(one) == "2.00 (2.00 to 2.00)"


def test_the_interval_is_that_of_seeds():
    """A MoE whose seeds are worth 1.1, 2 and 4: the mean of their logarithms, by hand."""
    rows = sweep({"moe": (1.0, 1.0)}, seeds=dict.fromkeys(SEEDS, 0.0))
    worth = {1: 1.1, 2: 2.0, 3: 4.0}
    for row in rows:
        if row["run"].startswith("moe"):
            row["loss"] = loss_of(worth[row["seed"]])
    (one,) = multipliers(arms(rows))
    logs = [math.log(value) for value in worth.values()]
    mean = sum(logs) / 3
    deviation = (sum((log - mean) ** 2 for log in logs) / 2) ** 0.5
    margin = 4.303 * deviation / 3**0.5  # t of two degrees of freedom
    assert one.by_seed == pytest.approx(worth)
    assert one.value == pytest.approx(math.exp(mean))
    assert (one.low, one.high) == pytest.approx(
        (math.exp(mean - margin), math.exp(mean + margin)), rel=1e-3
    )
    (single,) = multipliers(arms([row for row in rows if row["seed"] == 2]))
    assert single.value == pytest.approx(2.0) and math.isnan(single.low)
    assert str(single) == "2.00"
    for row in rows:  # one seed is beyond the ladder: no interval
        if row["run"] == "moe/2000/3":
            row["loss"] = loss_of(9.0)
    (one,) = multipliers(arms(rows))
    assert one.by_seed[3] == math.inf and math.isnan(one.low) and math.isnan(one.high)
    mean = sum(map(loss_of, (1.1, 2.0, 9.0))) / 3
    assert one.value == pytest.approx((5 / mean) ** 10)
    assert str(one) == f"{one.value:.2f} (a seed is beyond the ladder)"


def test_growth_by_hand():
    """With tokens from 2 to 3, with experts from 2 to 4; seeds differ, and their ratios don't."""
    rows = []
    for tokens, few in ((2000, 2.0), (4000, 3.0)):
        some = sweep({"few": (1.0, 1.0), "many": (1.0, 1.0)}, tokens=tokens, seeds={1: 0.0, 2: 0.0})
        for row in some:
            if row["run"].startswith(("few", "many")):
                times = 1.1 ** row["seed"]
                row["loss"] = loss_of(few * times)
                if row["run"].startswith("many"):
                    row["settings"]["model.experts"] = [16]
                    row["loss"] = loss_of(2 * few * times if tokens == 2000 else 9.0)
        rows += some
    grown = {(one.base, one.arm): one for one in ratios(multipliers(arms(rows)))}
    assert list(grown) == [("few/2000", "few/4000"), ("few/2000", "many/2000")]
    for one, expected in zip(grown.values(), (1.5, 2.0), strict=True):
        assert one.factor == pytest.approx((expected, expected, expected))
    assert str(grown["few/2000", "few/4000"].factor) == "1.50 (1.50 to 1.50)"


def test_a_prediction_in_the_units_of_the_ladder():
    """Its dense model's parameters as FLOPs of the ladder, which grow as their square root here."""
    rows = sweep({"moe": (1e3, loss_of(2.0))}, seeds={1: 0.0})
    for row, size in zip(rows, (1e6, 4e6, 9e6, 1.6e7), strict=False):
        row |= {"total_params": size, "active_params": size, "flops_per_token": size**0.5}
    settings = {"model.layers": 4, "model.experts": [9], "model.placement": "every 2"}
    rows[-1] |= {"settings": settings | {"seed": 1}, "total_params": 9e6, "active_params": 1e6}
    for law in (0.2, 5.0, 40.0):  # below the ladder, and between and beyond its rungs
        (one,) = multipliers(arms(rows), predicted={"moe/2000": law})
        assert one.law == pytest.approx(law**0.5)
        assert one.plain and one.experts == 5.0  # 1, 9, 1, 9
    for other in {"top_k": 2}, {"residual": True}, {"expert_d_ff": 7}:
        ((name, value),) = other.items()
        rows[-1]["settings"] = settings | {"seed": 1, f"model.{name}": value}
        (one,) = multipliers(arms(rows))
        assert math.isnan(one.law) and not one.plain and one.value == pytest.approx(2.0)


def test_another_unit_of_compute():
    """Twice the dense models' FLOPs, but seconds in which each model takes its square."""
    rows = sweep({"moe": (1.0, loss_of(2.0))})
    for row in rows:
        row["seconds"] = row["flops_per_token"] ** 2
    (flops,), (seconds,) = (
        multipliers(arms(rows), unit) for unit in ("flops_per_token", "seconds")
    )
    assert (flops.value, seconds.value) == pytest.approx((2.0, 4.0))
    assert (seconds.low, seconds.most) == pytest.approx((flops.low**2, 49.0))
    for row in rows:
        row["seconds"] = 1.0
    with pytest.raises(
        UserError, match="dense0/2000 and dense1/2000 have the same seconds, 1.0; l"
    ):
        multipliers(arms(rows), "seconds")


def test_beyond_the_ladder_nothing_is_extrapolated():
    moe = {"good": (1.0, loss_of(7.5)), "bad": (2.0, loss_of(0.9)), "near": (1.0, loss_of(6.9))}
    good, bad, near = multipliers(arms(sweep(moe)))
    assert str(good) == "beyond the ladder: at least 7.00"
    assert str(bad) == "beyond the ladder: at most 0.50"
    assert near.value == pytest.approx(6.9)


def test_only_dense_arms_with_as_many_tokens_and_the_same_seeds():
    rows = sweep({"moe": (1.0, loss_of(2.0))}) + sweep({"moe": (1.0, loss_of(2.0))}, tokens=4000)
    short, long = multipliers(arms(rows))
    assert (short.tokens, long.tokens) == (2000, 4000)
    assert not multipliers(arms(sweep({"moe": (1.0, 3.0)}, RUNGS[:1])))
    assert not multipliers(arms(sweep({})))
    less = [row for row in rows if row["run"] != "dense3/4000/2"]
    assert [len(one.by_seed) for one in multipliers(arms(less))] == [3, 2]


# Tokens by active parameters, and the multipliers of 8, 32 and 128 experts, rounded.
LAW = [
    (1e6, 60, 1.2, 1.3, 1.2),
    (1e6, 200, 1.6, 2.2, 2.8),
    (5e6, 2, 0.4, 0.2, 0.1),
    (5e6, 60, 1.4, 1.8, 2.1),
    (5e6, 230, 1.8, 2.8, 4.2),
    (20e6, 60, 1.6, 2.2, 3.1),
]


@pytest.mark.parametrize(("active", "ratio", "few", "some", "many"), LAW)
def test_the_scaling_law(active, ratio, few, some, many):
    multiplier = runpy.run_path(str(EXPERIMENT / "law.py"))["law_multiplier"]
    found = [multiplier(experts, active, active * ratio) for experts in (8, 32, 128)]
    assert [round(one, 1) for one in found] == [few, some, many]
    assert multiplier(1, active, active * ratio) == pytest.approx(1.0)


def test_the_experiment_states_what_the_law_predicts():
    """For each model that the law is for, by the numbers of its records."""
    predicted = runpy.run_path(str(EXPERIMENT / "law.py"))["predicted"]()
    assert constants(EXPERIMENT).predicted == pytest.approx(predicted, rel=1e-5)
    assert {arm.partition("/")[0] for arm in predicted} == {"E8", "E64", "E128"}


def test_report(tmp_path, capsys):
    """Multipliers and verdicts where sweep.py states that it wants them, and else none."""
    moe = {"moe": (1.0, loss_of(2.0)), "top2": (1.0, loss_of(9.0))}
    rows = sweep(moe) + sweep(moe, tokens=9000)
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["report", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["arms"]
    assert not (tmp_path / "multipliers.svg").exists()
    assert all("multiplier" not in row and "verdict" not in row for row in found.values())
    pairs = (("top2/2000", "moe/2000"), ("dense1/2000", "moe/2000"), ("moe/2000", "not/trained"))
    text = f"LADDER = True\nMARGIN = 0.02\nCONTRASTS = {pairs}\n1 / 0"
    (tmp_path / "sweep.py").write_text(text)
    assert main(["report", str(tmp_path), "--json", "--base=moe/2000"]) == 0
    result = json.loads(capsys.readouterr().out)
    found, (top2, dense) = result["arms"], result["contrasts"]
    assert (top2["arm"], top2["base"], top2["verdict"]) == ("top2/2000", "moe/2000", "better")
    assert dense["verdict"] == "equivalent" and dense["difference"] == pytest.approx(0.0)
    by_seed = arms(rows)
    pair = difference(by_seed["top2/2000"], by_seed["moe/2000"]).p
    assert top2["p"] == pytest.approx(2 * pair) and pair < 1e-3  # two pairs have records
    assert found["moe/2000"]["multiplier"].startswith("2.00 (")
    assert found["top2/9000"]["multiplier"] == "beyond the ladder: at least 7.00"
    assert found["dense1/2000"]["verdict"] == "equivalent"  # it has the same loss
    assert found["dense0/2000"]["verdict"] == "worse"
    # Arms are compared with the base's model at their own number of tokens.
    assert found["dense1/9000"]["difference"] == pytest.approx(0.0)
    assert "difference" not in found["moe/2000"] and "difference" not in found["moe/9000"]
    html = (tmp_path / "report.html").read_text()
    assert "<td>beyond the ladder: at least 7.00</td>" in html and "±0.02, the margin" in html
    assert (tmp_path / "multipliers.png").exists()
    assert main(["report", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "multiplier" in out and "verdict" in out and "beyond the ladder: at least" in out
    assert "top2/2000    moe/2000" in out and "  better" in out  # a pair of CONTRASTS


def test_a_moe_whose_tokens_use_every_expert_is_no_rung_of_the_ladder():
    """As many of its parameters are active as it has, as of a dense model."""
    full = sweep({"full": (3.0, loss_of(9.0))}, rungs=[])
    for row in full:
        row["active_params"] = row["total_params"]
        row["settings"] |= {"model.experts": [2], "model.top_k": 2}
    rows = sweep({"moe": (1.0, loss_of(4.0))}) + full
    found = {one.model: one.value for one in multipliers(arms(rows))}
    assert found == {"moe": pytest.approx(4.0), "full": math.inf}


def test_the_figure_shows_what_is_beyond_the_ladder(drawn):
    """Models by experts, each with its law; a triangle where the ladder ends."""
    rows = sweep({"moe": (1.0, loss_of(2.0))}) + sweep({"moe": (1.0, loss_of(9.0))}, tokens=9000)
    few = sweep({"few": (1.0, loss_of(3.0))}, rungs=[])
    for row in few:
        row["settings"]["model.experts"] = [2]
    law = {"few/2000": 0.5, "moe/2000": 0.6}
    figures.multipliers(multipliers(arms(rows + few), predicted=law), Path())
    few, _, few_law, moe, seeds, triangle, law, *_ = drawn.pop().lines
    np.testing.assert_allclose(few.get_ydata(), [3.0])
    np.testing.assert_allclose(moe.get_ydata(), [2.0, np.nan])
    np.testing.assert_allclose(moe.get_xdata(), [2000 / 11, 9000 / 11])
    np.testing.assert_allclose(seeds.get_ydata(), [2.0, 2.0, 2.0])
    assert (triangle.get_marker(), triangle.get_ydata()) == ("^", [7.0])
    assert (few_law.get_linestyle(), law.get_linestyle()) == ("--", "--")
    np.testing.assert_allclose(triangle.get_xdata(), 9000 / 11)


def test_no_bar_without_an_interval(drawn):
    """One seed is beyond the ladder, and the mean of all is not."""
    rows = sweep({"moe": (1.0, loss_of(6.0))})
    rows[-1]["loss"] = loss_of(7.2) * math.exp(SEEDS[3])
    (one,) = multipliers(arms(rows))
    assert 6 < one.value < 7 and math.isinf(one.by_seed[3])
    figures.multipliers(multipliers(arms(rows)), Path())
    assert not drawn.pop().collections
    figures.multipliers(multipliers(arms(sweep({"moe": (1.0, loss_of(2.0))}))), Path())
    assert len(drawn.pop().collections) == 1
    rows = sweep({"moe": (1.0, loss_of(2.0))}, seeds={1: 0.0, 2: 0.1})  # too few for a bar
    figures.multipliers(multipliers(arms(rows)), Path())
    assert not drawn.pop().collections


def test_only_what_is_drawn_is_in_the_legend(drawn):
    rows = sweep({"moe": (1.0, loss_of(2.0))})
    law = {"moe/2000": 0.5}
    figures.multipliers(multipliers(arms(rows), predicted=law), Path())
    assert drawn.pop().get_legend_handles_labels()[1] == ["moe", "scaling law"]
    rows = sweep({"moe": (1.0, loss_of(9.0))})
    figures.multipliers(multipliers(arms(rows)), Path())
    assert drawn.pop().get_legend_handles_labels()[1] == ["moe", "beyond the ladder"]


def test_a_models_runs_of_all_lengths_are_one_curve():
    rows = sweep({"moe": (1.0, 3.0)}) + sweep({"moe": (1.0, 2.5)}, tokens=4000)
    joined = models(arms(rows))
    assert list(joined) == ["dense0", "dense1", "dense2", "dense3", "moe"]
    (loss, *_), (longer, *_) = (
        [r["loss"] for r in rows if r["run"] == f"moe/{n}/1"] for n in (2000, 4000)
    )
    assert joined["moe"][1]["evaluations"] == [[2000, loss], [2000, longer]]
    assert joined["moe"][1]["tokens"] == 4000 and joined["moe"][1]["loss"] == longer


def test_models_are_compared_at_a_length_that_all_have():
    """One stopped early, a seed of another hasn't got far yet, and there is nothing in common."""
    losses = {"a": {1: (2000, 4000, 8000), 2: (2000, 4000)}, "b": {1: (2000, 4000), 2: (4000,)}}
    rows = [
        record(f"{model}/{tokens}", seed, tokens / 1000 + seed, tokens=tokens)
        for model, seeds in losses.items()
        for seed, lengths in seeds.items()
        for tokens in lengths
    ]
    tokens, found = equally_long(arms(rows))
    assert tokens == 4000
    loss = {model: {seed: row["loss"] for seed, row in by.items()} for model, by in found.items()}
    assert loss == {"a": {1: 5.0, 2: 6.0}, "b": {1: 5.0, 2: 6.0}}
    assert equally_long(arms([*rows, record("c/9000", 1, 1.0, tokens=9000)])) == (0, {})


def test_arms_of_one_length_are_models_of_their_own(tmp_path, capsys):
    """Their names before the '/' say no model."""
    losses = {"size/small": 3.0, "size/big": 2.0, "other/x": 1.5}
    rows = [record(arm, seed, loss) for arm, loss in losses.items() for seed in (1, 2)]
    assert list(models(arms(rows))) == ["size/small", "size/big", "other"]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["report", str(tmp_path), "--json", "--base=size/big"]) == 0
    found = json.loads(capsys.readouterr().out)["arms"]
    assert "difference" not in found["size/big"]
    assert found["size/small"]["difference"] == pytest.approx(1.0)
    assert found["other/x"]["difference"] == pytest.approx(-0.5)


def test_a_length_is_compared_with_as_many_tokens_alone(tmp_path, capsys):
    """Also where the base is of one length, and named without it."""
    arms = {("dense", 2000): 3.0, ("moe/2000", 2000): 2.9, ("moe/4000", 4000): 2.5}
    arms["longer", 4000] = 2.4  # on purpose: its name has no length
    rows = [
        record(arm, seed, loss, tokens=tokens)
        for (arm, tokens), loss in arms.items()
        for seed in (1, 2)
    ]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["report", str(tmp_path), "--json", "--base=dense"]) == 0
    found = json.loads(capsys.readouterr().out)["arms"]
    differences = {arm: row["difference"] for arm, row in found.items() if "difference" in row}
    assert differences == pytest.approx({"moe/2000": -0.1, "longer": -0.6})


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("MARGIN = 0", "MARGIN is 0; it must be nats above 0, such as 0.02"),
        ("MARGIN = '0.02'", "MARGIN is '0.02'; it must be nats above 0"),
        ("PREDICTED = {'a': -1}", "PREDICTED is {'a': -1}; it must be arms and numbers above 0"),
        ("LAW = 7", "LAW is 7; it must be a text"),
        ("LADDER = 'dense'", "LADDER is 'dense'; it must be True or False"),
        ("VARYING = 'seed'", "VARYING is 'seed'; it must be settings, such as ('init.workdir',)"),
        (
            "CONTRASTS = 'a', 'b'",
            "CONTRASTS is ('a', 'b'); it must be pairs of two arms, such as",
        ),
        ("CONTRASTS = (('a', 3),)", "CONTRASTS is (('a', 3),); it must be pairs of two arms"),
        ("CONTRASTS = (('a', 'a'),)", "CONTRASTS is (('a', 'a'),); it must be pairs of two arms"),
        ("VARYING = ('sed',)", "VARYING is ('sed',); it must be settings, such as ('init.workdir"),
        (
            "a = 1\nMARGIN = a / 50",
            "line 2: MARGIN must be a plain value, such as 0.02 or True",
        ),
        ("MARGIN: float = 0", "MARGIN is 0; it must be nats above 0, such as 0.02"),
        ("MARGIN: float", "line 1: MARGIN must be a plain value"),
        ("MARGIN, LADDER = 0.02, True", "line 1: MARGIN must be a plain value"),
        ("if True:\n    LADDER = True", "line 2: LADDER must be a plain value"),
        ("from shared import MARGIN", "line 1: MARGIN must be a plain value"),
        ("from shared import TRUE as LADDER", "line 1: LADDER must be a plain value"),
        ("MARGIN =", "sweep.py fails: SyntaxError: invalid syntax"),
    ],
)
def test_wrong_constants(code, message, tmp_path, capsys):
    line = json.dumps(record("a", 1, 3.0)) + "\n"
    (tmp_path / "results.jsonl").write_text(line)
    (tmp_path / "sweep.py").write_text(code)
    assert main(["report", str(tmp_path)]) == 2
    assert message in only_line(capsys.readouterr().err)
    assert not (tmp_path / "report.html").exists()


def pair(*apart):
    """An arm and its base, whose losses differ by so much with each seed."""
    base = {seed: {"loss": 3.0 + 0.1 * seed} for seed in range(len(apart))}
    return {seed: {"loss": base[seed]["loss"] + d} for seed, d in enumerate(apart)}, base


@pytest.mark.parametrize(
    ("apart", "margin", "expected"),
    [
        # Mean 0, standard deviation 0.01, standard error 0.01/√3; t of 2 degrees of freedom is
        # 2.920 at 5 % on one side, so that the interval is ± 0.01686.
        ((-0.01, 0.0, 0.01), 0.0169, "equivalent"),
        ((-0.01, 0.0, 0.01), 0.0168, "not resolved"),
        # Mean 0.05, the same deviation: ± 4.303 * 0.01/√3 = ± 0.0248 excludes 0.
        ((0.04, 0.05, 0.06), 0.02, "worse"),
        ((-0.04, -0.05, -0.06), 0.02, "better"),
        ((0.04, 0.05, 0.06), 0.067, "equivalent"),
        ((0.01, 0.02, 0.03), 0.02, "not resolved"),
        ((0.002, 0.002), 0.02, "equivalent"),
    ],
)
def test_verdicts_by_hand(apart, margin, expected):
    assert difference(*pair(*apart)).verdict(margin) == expected


def test_equivalence_is_that_of_two_one_sided_tests():
    """Beside scipy's t test, at margins around the one where the verdict changes."""
    from scipy import stats

    apart = (0.004, -0.011, 0.007, 0.013, -0.002)
    seen = set()
    for margin in (n / 10000 for n in range(50, 200)):
        above = stats.ttest_1samp(apart, -margin, alternative="greater").pvalue
        below = stats.ttest_1samp(apart, margin, alternative="less").pvalue
        equivalent = max(above, below) < 0.05
        verdict = difference(*pair(*apart)).verdict(margin)
        assert (verdict == "equivalent") == equivalent, margin
        seen.add(equivalent)
    assert seen == {True, False}
    assert difference(*pair(0.1)) is None


def test_p_values_are_those_of_students_t():
    """Pairs by seed as in scipy; pooled, two arms have the spread of their pairs."""
    one, other = ({s: {"loss": loss} for s, loss in enumerate(L)} for L in LOSSES)
    assert difference(one, other).p == pytest.approx(stats.ttest_rel(*LOSSES).pvalue)
    pooled = spread({"one": one, "other": other})  # with two arms it is that of the pairs
    assert difference(one, other, pooled).p == pytest.approx(stats.ttest_rel(*LOSSES).pvalue)
    assert difference(one, {7: {"loss": 1.0}}) is None
    above = {seed: {"loss": row["loss"] + 1} for seed, row in EQUAL.items()}
    assert (difference(one, one).p, difference(above, EQUAL).p) == (1.0, 0.0)


def test_holm_by_hand():
    """The least p of three times 3, the next times 2, but none below one before it."""
    assert holm([0.03, 0.01, math.nan, 0.02]) == pytest.approx(
        [0.04, 0.03, math.nan, 0.04], nan_ok=True
    )
    assert holm([0.6, 0.5]) == [1.0, 1.0] and holm([]) == []
