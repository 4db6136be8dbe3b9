"""How much dense compute a MoE is worth, measured against a ladder of dense models.

A MoE's dense-equivalent multiplier is a quotient: the compute per token of the dense model that
reaches the MoE's loss with the same tokens, divided by the MoE's compute. Compute is FLOPs, active
parameters, or another field of a record. Between two dense models of the ladder, log(loss) is taken
as linear in log(compute); beyond its ends there is no multiplier. R: rungs, the dense models.
"""

import bisect
import itertools
import math
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from prmoe_jax.config.schema import ModelConfig
from prmoe_jax.errors import UserError
from prmoe_jax.report.arms import Factor, geometric_mean, models_of


class Multiplier(NamedTuple):
    """The multiplier of one MoE arm: 0 stands for below the ladder, and inf for above it.

    `value` is the geometric mean of the seeds' multipliers. `low` and `high` are the ends of its
    95 % interval (Student's t of the logarithms), NaN with a single seed. If a seed is beyond the
    ladder, `value` is the multiplier of the mean losses, without an interval. `least` and `most`
    are the smallest and the largest multiplier that the ladder can measure.
    """

    arm: str
    model: str
    experts: float  # per layer, the mean of all; a dense layer counts as 1
    tokens: int
    active_params: int
    by_seed: dict[int, float]
    value: float
    low: float
    high: float
    least: float
    most: float
    law: float  # the prediction of a scaling law; NaN without one
    plain: bool  # top-1 token choice of experts as wide as the dense MLP, no residual MLP

    @property
    def inside(self) -> bool:
        """Whether every seed is within the ladder."""
        return all(0 < value < math.inf for value in self.by_seed.values())

    @property
    def tokens_per_parameter(self) -> float:
        """Tokens per active parameter, D/N."""
        return self.tokens / self.active_params

    def __str__(self) -> str:
        if self.value == 0:
            return f"beyond the ladder: at most {self.least:.2f}"
        if self.value == math.inf:
            return f"beyond the ladder: at least {self.most:.2f}"
        if not self.inside:
            return f"{self.value:.2f} (a seed is beyond the ladder)"
        return str(Factor(self.value, self.low, self.high))


class Ratio(NamedTuple):
    """An arm's multiplier divided by that of its base."""

    arm: str
    base: str
    factor: Factor


def equivalent_compute(loss: float, ladder: Sequence[tuple[float, float]]) -> float:
    """The least compute with which dense models reach a loss.

    Args:
      loss: in nats.
      ladder: (compute, loss) of each dense model, least compute first; at least two.

    Returns:
      The compute; 0 if the smallest model's loss is lower, and inf if no model reaches the loss.
    """
    (compute, worse), *rest = ladder
    if worse <= loss:
        return compute if worse == loss else 0.0
    for more, better in rest:
        if better <= loss:
            share = math.log(worse / loss) / math.log(worse / better)
            return compute * (more / compute) ** share
        compute, worse = more, better
    return math.inf


def multipliers(
    arms: dict[str, dict[int, dict]],
    unit: str = "flops_per_token",
    predicted: Mapping[str, float] | None = None,
) -> list[Multiplier]:
    """The multiplier of every MoE arm of a sweep, against the dense arms with as many tokens.

    Only seeds that the MoE and all dense arms of its ladder have in common are used.

    Args:
      arms: records by arm and seed.
      unit: the field of a record that is its compute.
      predicted: multipliers in active parameters that a scaling law predicts, by arm.

    Returns:
      One for each MoE arm that has two dense arms or more, and a common seed.
    """
    found, names = [], models_of(arms)
    first = {arm: next(iter(rows.values())) for arm, rows in arms.items()}
    # Not by active = total parameters: this also holds for a MoE whose tokens use every expert.
    dense = [arm for arm, record in first.items() if not record["settings"].get("model.experts")]
    dense.sort(key=lambda rung: first[rung][unit])
    for arm, rows in arms.items():
        if arm in dense:
            continue
        ladder = [rung for rung in dense if first[rung]["tokens"] == first[arm]["tokens"]]
        for one, other in itertools.pairwise(ladder):
            if first[one][unit] == first[other][unit]:
                raise UserError(
                    f"LADDER: the dense arms {one} and {other} have the same {unit}, "
                    f"{first[one][unit]:,}; leave one of them out"
                )
        rungs = [arms[rung] for rung in ladder]
        seeds = sorted(set(rows).intersection(*rungs))
        if len(rungs) >= 2 and seeds:
            law = (predicted or {}).get(arm, math.nan)
            found.append(_measure(arm, names[arm], rows, rungs, seeds, unit, law))
    return found


def ratios(found: Sequence[Multiplier]) -> list[Ratio]:
    """Ratios of neighbouring multipliers, paired by seed.

    Neighbours are arms of one model, sorted by tokens, and plain models with equal tokens, sorted
    by experts. Arms with a seed beyond the ladder are left out, as are pairs with fewer than two
    common seeds.
    """
    inside = [one for one in found if one.inside]
    plain = [one for one in inside if one.plain]
    pairs = []
    for some, same, by in (inside, "model", "tokens"), (plain, "tokens", "experts"):
        ordered = sorted(some, key=attrgetter(same, by))
        for base, arm in itertools.pairwise(ordered):
            if getattr(base, same) == getattr(arm, same):
                pairs.append((base, arm))
    grown = []
    for base, arm in pairs:
        common = base.by_seed.keys() & arm.by_seed.keys()
        if len(common) > 1:
            each = (arm.by_seed[seed] / base.by_seed[seed] for seed in common)
            grown.append(Ratio(arm.arm, base.arm, geometric_mean(each)))
    return grown


def _measure(
    arm: str,
    model: str,
    rows: dict[int, dict],
    rungs: list[dict[int, dict]],
    seeds: list[int],
    unit: str,
    law: float,
) -> Multiplier:
    record = rows[seeds[0]]
    own, compute_R = record[unit], [rung[seeds[0]][unit] for rung in rungs]

    def measured(seeds: list[int]) -> float:
        """The multiplier of the mean losses of these seeds."""
        loss, *ladder = (
            float(np.mean([one[seed]["loss"] for seed in seeds])) for one in (rows, *rungs)
        )
        return equivalent_compute(loss, list(zip(compute_R, ladder, strict=True))) / own

    by_seed = {seed: measured([seed]) for seed in seeds}
    value, low, high = measured(seeds), math.nan, math.nan
    if all(0 < one < math.inf for one in by_seed.values()):
        value, low, high = geometric_mean(by_seed.values())
    active = record["active_params"]
    sizes_R = [rung[seeds[0]]["active_params"] for rung in rungs]
    return Multiplier(
        arm=arm,
        model=model,
        experts=_mean_experts(record["settings"]),
        tokens=record["tokens"],
        active_params=active,
        by_seed=by_seed,
        value=value,
        low=low,
        high=high,
        least=compute_R[0] / own,
        most=compute_R[-1] / own,
        law=_compute_of(law * active, sizes_R, compute_R) / own,
        plain=_is_plain(record["settings"]),
    )


def _mean_experts(settings: dict) -> float:
    """The mean number of experts per layer; a dense layer counts as one."""
    names = "layers", "placement"
    given = {n: value for n in names if (value := settings.get(f"model.{n}")) is not None}
    counts = ModelConfig(**given, experts=tuple(settings["model.experts"])).schedule.experts
    return sum(max(1, count) for count in counts) / len(counts)


def _is_plain(settings: dict) -> bool:
    other = (f"model.{name}" for name in ("top_k", "residual", "expert_d_ff"))
    return not any(map(settings.get, other)) and settings.get("moe.router") is None


def _compute_of(params: float, sizes: list[int], compute: list[float]) -> float:
    """The compute of a dense model of the ladder's kind with `params` parameters.

    log(compute) is linear in log(parameters) between two rungs, and beyond the two at either end.
    """
    if math.isinf(params):
        return params
    upper = min(max(1, bisect.bisect_left(sizes, params)), len(sizes) - 1)
    (x0, y0), (x1, y1) = ((math.log(sizes[i]), math.log(compute[i])) for i in (upper - 1, upper))
    slope = (y1 - y0) / (x1 - x0) if x1 > x0 else 1.0
    return math.exp(y0 + slope * (math.log(params) - x0))
