"""The contrasts of all claims by the spread of all their sweeps together.

    python experiments/claims/pooled.py

A sweep of two seeds has few degrees of freedom, and may see little of chance by luck. Here the
residual standard deviations of the sweeps are weighted by their degrees of freedom. Prints them,
and each contrast with its 95 % interval and verdict, in nats a token. Sweeps share `moe`, `dense`
and `residual`, so that the degrees of freedom are a little fewer than it says.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

from prmoe_jax.report.arms import Mean, Spread, arms, difference, holm, p_value, spread, verdict
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
    """The spread of each sweep and of all, and the contrasts that have two seeds."""
    stated = {path.parent.name: constants(path.parent) for path in sorted(HERE.glob("*/sweep.py"))}
    found = {name: arms(_read(name), constant.varying) for name, constant in stated.items()}
    spreads = {name: alone for name, runs in found.items() if (alone := spread(runs))}
    freedom = sum(alone.freedom for alone in spreads.values())
    squares = sum(alone.freedom * alone.deviation**2 for alone in spreads.values())
    pooled = Spread(math.sqrt(squares / freedom), freedom)
    compared = []
    for name, runs in found.items():
        pairs = stated[name].contrasts
        corrected = holm([p_value(runs[arm], runs[base], pooled) for arm, base in pairs])
        for (arm, base), p in zip(pairs, corrected, strict=True):
            if apart := difference(runs[arm], runs[base], pooled):
                is_so = verdict(runs[arm], runs[base], stated[name].margin, pooled)
                compared.append(Contrast(name, arm, base, apart, p, is_so))
    return spreads | {"all": pooled}, compared


def _read(name: str) -> list[dict]:
    text = (HERE / name / "results.jsonl").read_text()
    return list(map(json.loads, text.splitlines()))


if __name__ == "__main__":
    main()
