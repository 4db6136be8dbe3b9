"""How much dense compute a MoE is worth, measured against a ladder of dense models.

The dense-equivalent multiplier m of a MoE is the compute for each token of the dense model that
reaches the MoE's loss with the same tokens, divided by the MoE's own. Compute is counted in FLOPs,
in active parameters, or by anything else that a record has. Between two dense models of the ladder,
log(loss) is taken as linear in log(compute); beyond its ends there is no multiplier.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from prmoe_jax.config.schema import ModelConfig
from prmoe_jax.errors import UserError
from prmoe_jax.report.arms import Factor, geometric_mean, models_of

# The joint MoE scaling law (Ludziejewski et al. 2025, arXiv 2502.05172, table 3), nats a token:
# L = a E^delta N^(alpha + gamma ln E) + b E^omega D^(beta + zeta ln E) + c. It was fitted to 280
# runs with 79 M active parameters or more, 500 M tokens or more, and up to 32 experts.
LAW_A, LAW_ALPHA, LAW_DELTA, LAW_GAMMA = 35.91, -0.1889, -0.2285, 0.0098
LAW_B, LAW_BETA, LAW_OMEGA, LAW_ZETA = 35.98, -0.1775, 0.5529, -0.0259
LAW_C, LAW_START, LAW_MAX = 1.3637, 2.0732, 290.4521


class Multiplier(NamedTuple):
    """The multiplier of one MoE arm. Here 0 is below the ladder and inf above it.

    `value` is the geometric mean of the seeds' multipliers and `low` and `high` the ends of its
    95 % interval (Student's t of their logarithms), NaN with a single seed. If the multiplier of
    some seed is beyond the ladder, `value` is that of the mean losses, without an interval. `least`
    and `most` are the multipliers that the ends of the ladder would have.
    """

    arm: str
    model: str
    experts: float  # of a layer, the mean of all layers; a dense one counts as 1
    tokens: int
    active_params: int
    by_seed: dict[int, float]
    value: float
    low: float
    high: float
    least: float
    most: float
    law: float  # the scaling law's prediction, NaN for layers of another kind than the law's

    @property
    def inside(self) -> bool:
        """Whether every seed's multiplier is a number."""
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
    """By what factor an arm's multiplier is that of another one, its base."""

    arm: str
    base: str
    factor: Factor


def equivalent_compute(loss: float, ladder: Sequence[tuple[float, float]]) -> float:
    """The least compute with which dense models reach a loss.

    Args:
      loss: in nats.
      ladder: (compute, loss) of each dense model, by compute; at least two.

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
    arms: dict[str, dict[int, dict]], unit: str = "flops_per_token"
) -> list[Multiplier]:
    """The multiplier of every MoE arm of a sweep, against the dense arms with as many tokens.

    Each seed that the MoE and all dense models of its ladder have in common gives one.

    Args:
      arms: records by arm and seed.
      unit: the field of a record that is its compute.

    Returns:
      One for each MoE arm; none for an arm with fewer than two dense ones to compare it with.

    Raises:
      UserError: two dense arms of as many tokens compute as much for each.
    """

    def compute(rows: dict[int, dict]) -> float:
        return next(iter(rows.values()))[unit]

    found, names = [], models_of(arms)
    for arm, rows in arms.items():
        record = next(iter(rows.values()))
        if _is_dense(record):
            continue
        ladder = {
            name: other
            for name, other in arms.items()
            if _is_dense(first := next(iter(other.values())))
            and first["tokens"] == record["tokens"]
        }
        rungs = sorted(ladder.values(), key=compute)
        for (one, a), (other, b) in itertools.combinations(ladder.items(), 2):
            if compute(a) == compute(b):
                raise UserError(
                    f"LADDER: the dense arms {one} and {other} have the same {unit}, "
                    f"{compute(a):,}; leave one of them out"
                )
        seeds = sorted(set(rows).intersection(*rungs))
        if len(rungs) >= 2 and seeds:
            found.append(_measure(arm, names[arm], rows, rungs, seeds, unit))
    return found


def ratios(found: Sequence[Multiplier]) -> list[Ratio]:
    """How multipliers grow, paired by seed: with the tokens of a model, and with the experts.

    Compared are neighbours: runs of one model, by tokens, and models of as many tokens, by experts,
    if these are models of the scaling law. Those with a seed beyond the ladder are left out, and
    pairs with under two common seeds.
    """
    inside = [one for one in found if one.inside]
    by_tokens = sorted(inside, key=lambda one: (one.model, one.tokens))
    of_the_law = [one for one in inside if not math.isnan(one.law)]
    by_experts = sorted(of_the_law, key=lambda one: (one.tokens, one.experts))
    pairs = [(base, arm) for base, arm in itertools.pairwise(by_tokens) if base.model == arm.model]
    pairs += [
        (base, arm) for base, arm in itertools.pairwise(by_experts) if base.tokens == arm.tokens
    ]
    grown = []
    for base, arm in pairs:
        common = base.by_seed.keys() & arm.by_seed.keys()
        if len(common) > 1:
            each = (arm.by_seed[seed] / base.by_seed[seed] for seed in common)
            grown.append(Ratio(arm.arm, base.arm, geometric_mean(each)))
    return grown


def law_multiplier(experts: float, active_params: float, tokens: float) -> float:
    """The law's multiplier in active parameters; inf if it has no dense model as good.

    It is the parameters of the dense model with the MoE's loss after as many tokens, divided by the
    MoE's active parameters.

    Args:
      experts: of each layer; where layers differ, their mean has as many parameters in experts.
      active_params: of the MoE, embeddings included.
      tokens: of the run.
    """
    loss = _law_of_params(experts, active_params) + _law_of_tokens(experts, tokens)
    left = loss - _law_of_tokens(1, tokens)
    if left <= 0:
        return math.inf
    power = LAW_ALPHA + LAW_GAMMA * math.log(_effective(1))
    return (left / _law_of_params(1, active_params)) ** (1 / power)


def _is_dense(record: dict) -> bool:
    # A MoE whose tokens use every expert has as many active parameters, too.
    return not record["settings"].get("model.experts")


def _measure(
    arm: str,
    model: str,
    rows: dict[int, dict],
    rungs: list[dict[int, dict]],
    seeds: list[int],
    unit: str,
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
    experts, active = _mean_experts(record), record["active_params"]
    law = math.nan
    if _is_of_the_law(record["settings"]):
        dense = law_multiplier(experts, active, record["tokens"]) * active
        sizes_R = [rung[seeds[0]]["active_params"] for rung in rungs]
        law = _compute_of(dense, sizes_R, compute_R) / own
    return Multiplier(
        arm, model, experts, record["tokens"], active, by_seed, value, low, high,
        *(compute_R[0] / own, compute_R[-1] / own, law),
    )  # fmt: skip


def _mean_experts(record: dict) -> float:
    """Experts of a layer, the mean over all; a dense layer counts as one."""
    names = "layers", "placement", "experts"
    given = {name: record["settings"].get(f"model.{name}") for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    if "experts" in given:
        given["experts"] = tuple(given["experts"])
    counts = ModelConfig(**given).schedule.experts
    return sum(max(1, count) for count in counts) / len(counts)


def _is_of_the_law(settings: dict) -> bool:
    """Whether a token has one expert in a layer, as wide as the dense MLP, and no MLP beside it."""
    other = (f"model.{name}" for name in ("top_k", "residual", "expert_d_ff"))
    return not any(map(settings.get, other)) and settings.get("moe.router") is None


def _compute_of(params: float, sizes: list[int], compute: list[float]) -> float:
    """The compute of a dense model of the ladder's kind with so many parameters.

    Its logarithm is linear in that of the parameters between two rungs, and beyond the last two.
    """
    if math.isinf(params):
        return params
    upper = next((i for i, size in enumerate(sizes) if i and size >= params), len(sizes) - 1)
    (x0, y0), (x1, y1) = ((math.log(sizes[i]), math.log(compute[i])) for i in (upper - 1, upper))
    slope = (y1 - y0) / (x1 - x0) if x1 > x0 else 1.0
    return math.exp(y0 + slope * (math.log(params) - x0))


def _effective(experts: float) -> float:
    """The law's number of experts, which it transforms."""
    added = experts - 1 + 1 / (1 / LAW_START - 1 / LAW_MAX)
    return 1 / (1 / added + 1 / LAW_MAX)


def _law_of_params(experts: float, active_params: float) -> float:
    effective = _effective(experts)
    power = LAW_ALPHA + LAW_GAMMA * math.log(effective)
    return LAW_A * effective**LAW_DELTA * active_params**power


def _law_of_tokens(experts: float, tokens: float) -> float:
    effective = _effective(experts)
    power = LAW_BETA + LAW_ZETA * math.log(effective)
    return LAW_B * effective**LAW_OMEGA * tokens**power + LAW_C
