"""The contrasts of all claims by the spread of all their models together.

    python experiments/claims/pooled.py

A sweep of two seeds has few degrees of freedom, and its models were often trained on one machine at
one commit, whose effect it then takes for that of the seed. Here all models are in one analysis,
each run once, with one effect for each seed. Prints the residual standard deviations, and each
contrast with its 95 % interval and verdict, in nats a token.
"""

from pathlib import Path
from typing import NamedTuple

from prmoe_jax.report.arms import Mean, Spread, arms, difference, holm, p_value, spread, verdict
from prmoe_jax.sweep import records
from prmoe_jax.sweep.definition import constants
from prmoe_jax.tables import aligned

HERE = Path(__file__).parent


class Contrast(NamedTuple):
    """How far the loss of an arm of a sweep is above that of another, and what follows."""

    sweep: str
    arm: str
    base: str
    apart: Mean
    p: float  # corrected for the sweep's contrasts
    verdict: str


def main() -> None:
    spreads, compared = contrasts()
    rows = [(name, f"{one.deviation:.4f}", one.freedom) for name, one in spreads.items()]
    print(f"{aligned(('sweep', 'deviation', 'freedom'), rows)}\n")
    rows = [(*one[:3], shown(one.apart), f"{one.p:.3f}", one.verdict) for one in compared]
    head = "sweep", "arm", "against", "above it", "p (Holm)", "verdict"
    print(aligned(head, rows, texts=(0, 1, 2, 5)))


def shown(apart: Mean) -> str:
    return f"{apart.value:+.3f} ± {apart.margin:.3f}"


def contrasts() -> tuple[dict[str, Spread], list[Contrast]]:
    """The spread of each sweep and of all models, and the contrasts that have two seeds."""
    stated = {path.parent.name: constants(path.parent) for path in sorted(HERE.glob("*/sweep.py"))}
    found = {
        name: arms(records.read(HERE / name), constant.varying) for name, constant in stated.items()
    }
    spreads = {name: alone for name, runs in found.items() if (alone := spread(runs))}
    # Sweeps share models, such as `moe`.
    models = {
        tuple(sorted((seed, record["loss"]) for seed, record in rows.items())): rows
        for runs in found.values()
        for rows in runs.values()
    }
    pooled = spread(models)
    compared = []
    for name, runs in found.items():
        pairs = [pair for pair in stated[name].contrasts if runs.keys() >= {*pair}]
        corrected = holm([p_value(runs[arm], runs[base], pooled) for arm, base in pairs])
        for (arm, base), p in zip(pairs, corrected, strict=True):
            if apart := difference(runs[arm], runs[base], pooled):
                is_so = verdict(runs[arm], runs[base], stated[name].margin, pooled)
                compared.append(Contrast(name, arm, base, apart, p, is_so))
    return spreads | {"all": pooled}, compared


if __name__ == "__main__":
    main()
