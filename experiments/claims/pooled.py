"""The contrasts of all claims by the spread of all their models together.

    python experiments/claims/pooled.py

A sweep of two seeds has few degrees of freedom, and its models were often trained on one machine at
one commit, whose effect it then takes for that of the seed. Here all models are in one analysis,
each run once, with one effect for each seed; a run that goes on from another one of its sweep is
left out. Prints the residual standard deviations, a test whether one effect for each seed is
enough, and each contrast with its 95 % interval and verdict, in nats a token, twice: at equal
tokens, and at equal compute: there the base has the loss that it would have with as many FLOPs for
each token as the arm, if its dense-equivalent multiplier (experiments/multiplier) stayed the same.
So an arm is better at equal compute if its multiplier is larger. The error of the ladder of dense
models is left out, and a teacher's FLOPs don't count.
"""

import math
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
from scipy import stats

from prmoe_jax.report.arms import Difference, Spread, arms, difference, holm, spread
from prmoe_jax.report.multiplier import equivalent_compute
from prmoe_jax.sweep import records
from prmoe_jax.sweep.definition import planned
from prmoe_jax.tables import aligned

HERE = Path(__file__).parent


class Model(NamedTuple):
    """A model of one or more sweeps, with its records by seed."""

    origin: str  # the sweep that trained it
    settings: dict  # without the seed
    rows: dict[int, dict]


class Contrast(NamedTuple):
    """How far the loss of an arm of a sweep is above that of another, and what follows."""

    sweep: str
    arm: str
    base: str
    apart: Difference
    p: float  # corrected for the sweep's contrasts
    verdict: str
    at_equal_compute: Difference
    verdict_at_equal_compute: str


def main() -> None:
    spreads, compared = contrasts()
    rows = [(name, f"{one.deviation:.4f}", one.freedom) for name, one in spreads.items()]
    print(f"{aligned(('sweep', 'deviation', 'freedom'), rows)}\n")
    inside, ratio, p = by_origin(spreads["all"])
    print(
        f"one effect of the seed for each sweep that trained models: {inside.deviation:.4f}, "
        f"{inside.freedom}; F({spreads['all'].freedom - inside.freedom}, {inside.freedom}) = "
        f"{ratio:.1f}, p = {p:.2g}\n"
    )
    rows = [
        (
            *one[:3], shown(one.apart), f"{one.p:.3f}", one.verdict, shown(one.at_equal_compute),
            one.verdict_at_equal_compute,
        )
        for one in compared
    ]  # fmt: skip
    head = "sweep", "arm", "against", "above it", "p (Holm)", "verdict"
    print(aligned((*head, "at equal compute", "verdict"), rows, texts=(0, 1, 2, 5, 7)))


def shown(apart: Difference) -> str:
    return f"{apart.value:+.3f} ± {apart.margin:.3f}"


def contrasts() -> tuple[dict[str, Spread], list[Contrast]]:
    """The spread of each sweep and of all models, and the contrasts that have two seeds."""
    stated = {path.parent.name: planned(path.parent) for path in sorted(HERE.glob("*/sweep.py"))}
    found = {
        name: arms(records.read(HERE / name), sweep.constants.varying)
        for name, sweep in stated.items()
    }
    spreads = {name: alone for name, runs in found.items() if (alone := spread(runs))}
    pooled = spread(dict(enumerate(model.rows for model in models())))
    dense = ladder()
    compared = []
    for name, runs in found.items():
        constants = stated[name].constants
        pairs = [pair for pair in constants.contrasts if runs.keys() >= {*pair}]
        differences = [difference(runs[arm], runs[base], pooled) for arm, base in pairs]
        corrected = holm([apart.p if apart else math.nan for apart in differences])
        for (arm, base), apart, p in zip(pairs, differences, corrected, strict=True):
            if apart:
                equal = apart._replace(value=apart.value - gain(runs[base], runs[arm], dense))
                verdicts = [one.verdict(constants.margin) for one in (apart, equal)]
                compared.append(
                    Contrast(name, arm, base, apart, p, verdicts[0], equal, verdicts[1])
                )
    return spreads | {"all": pooled}, compared


def ladder() -> list[tuple[float, float]]:
    """FLOPs per token and mean loss of the dense models of experiments/multiplier, 11 M tokens."""
    rows = [
        row for row in records.read(HERE.parent / "multiplier") if row["run"].startswith("dense")
    ]
    losses = defaultdict(list)
    for row in rows:
        if row["run"].split("/")[1] == "11M":
            losses[row["flops_per_token"]].append(row["loss"])
    return sorted((flops, fmean(values)) for flops, values in losses.items())


def gain(base: dict[int, dict], arm: dict[int, dict], dense: list[tuple[float, float]]) -> float:
    """The change of the base's loss with the arm's FLOPs per token, at the base's multiplier."""
    loss = fmean(row["loss"] for row in base.values())
    per_token = [next(iter(rows.values()))["flops_per_token"] for rows in (base, arm)]
    if per_token[0] == per_token[1]:
        return 0.0
    # A loss above the narrowest dense model's counts as this model's.
    flops = max(equivalent_compute(loss, dense), dense[0][0])
    before, after = (
        math.exp(np.interp(math.log(flops * factor), *np.log(dense).T))
        for factor in (1, per_token[1] / per_token[0])
    )
    return after - before


def models() -> list[Model]:
    """All models of the sweeps; one that several sweeps share, such as `moe`, is there once."""
    copied = {(row["seed"], row["loss"]) for row in records.read(HERE.parent / "multiplier")}
    found: list[Model] = []
    for path in sorted(HERE.glob("*/sweep.py")):
        name, sweep = path.parent.name, planned(path.parent)
        varying = {"seed", *sweep.constants.varying}
        for arm, rows in arms(records.read(path.parent), sweep.constants.varying).items():
            if any(run.trunk for one, run in sweep.runs.items() if one.rpartition("/")[0] == arm):
                continue
            row = next(iter(rows.values()))
            settings = {key: value for key, value in row["settings"].items() if key not in varying}
            origin = "multiplier" if (row["seed"], row["loss"]) in copied else name
            for model in found:
                common = model.rows.keys() & rows.keys()
                alike = all(model.rows[seed]["loss"] == rows[seed]["loss"] for seed in common)
                if model.settings == settings and alike:  # else it was trained again
                    model.rows.update(rows)
                    break
            else:
                found.append(Model(origin, settings, dict(rows)))
    return found


def by_origin(whole: Spread) -> tuple[Spread, float, float]:
    """The spread with one effect of the seed for each sweep that trained models, and an F test.

    Args:
      whole: the spread with one effect of the seed for all of them.

    Returns:
      The spread, the F statistic of one effect for all sweeps against it, and its p value.
    """
    every = models()
    parts = []
    for origin in {model.origin for model in every}:
        those = {i: model.rows for i, model in enumerate(every) if model.origin == origin}
        parts += filter(None, [spread(those)])
    squares = sum(part.deviation**2 * part.freedom for part in parts)
    freedom = sum(part.freedom for part in parts)
    more = (whole.deviation**2 * whole.freedom - squares) / (whole.freedom - freedom)
    ratio = more / (squares / freedom)
    inside = Spread((squares / freedom) ** 0.5, freedom)
    return inside, ratio, float(stats.f.sf(ratio, whole.freedom - freedom, freedom))


if __name__ == "__main__":
    main()
