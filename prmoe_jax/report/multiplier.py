"""How much dense compute a MoE is worth, measured against a ladder of dense models.

The dense-equivalent multiplier m of a MoE is the compute for each token of the dense model that
reaches the MoE's loss with the same tokens, divided by the MoE's own. Between two dense models of
the ladder, log(loss) is taken as linear in log(compute); beyond its ends there is no multiplier.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000

# The joint MoE scaling law (Ludziejewski et al. 2025, arXiv 2502.05172, table 3), nats a token:
# L = a E^delta N^(alpha + gamma ln E) + b E^omega D^(beta + zeta ln E) + c. It was fitted to 280
# runs with 79 M active parameters or more, 500 M tokens or more, and up to 32 experts.
LAW_A, LAW_ALPHA, LAW_DELTA, LAW_GAMMA = 35.91, -0.1889, -0.2285, 0.0098
LAW_B, LAW_BETA, LAW_OMEGA, LAW_ZETA = 35.98, -0.1775, 0.5529, -0.0259
LAW_C, LAW_START, LAW_MAX = 1.3637, 2.0732, 290.4521


class Multiplier(NamedTuple):
    """The multiplier of one MoE arm. Here 0 is below the ladder and inf above it.

    `low` and `high` are the ends of the 95 % interval, NaN with a single seed; `least` and `most`
    are the multipliers that the ends of the ladder would have.
    """

    arm: str
    experts: tuple[int, ...]
    tokens: int
    active_params: int
    seeds: int
    value: float
    low: float
    high: float
    least: float
    most: float
    law: float | None  # the scaling law's prediction; None if layers differ in their experts

    @property
    def tokens_per_parameter(self) -> float:
        """Tokens by active parameters, D/N."""
        return self.tokens / self.active_params

    def __str__(self) -> str:
        if self.value in (0, math.inf):
            return f"beyond the ladder: {self.shown(self.value)}"
        if math.isnan(self.low):
            return self.shown(self.value)
        return f"{self.shown(self.value)} ({self.shown(self.low)} to {self.shown(self.high)})"

    def shown(self, value: float) -> str:
        """A value or an end of the interval as text."""
        if value == 0:
            return f"at most {self.least:.2f}"
        return f"at least {self.most:.2f}" if value == math.inf else f"{value:.2f}"


def equivalent_compute(loss: float, ladder: Sequence[tuple[float, float]]) -> float:
    """The least compute with which dense models reach a loss.

    Args:
      loss: in nats.
      ladder: (compute, loss) of each dense model, by compute; at least two.

    Returns:
      The compute; 0 if the smallest model's loss is lower, and inf if no model reaches the loss.
    """
    (compute, worse), *rest = ladder
    if worse < loss:
        return 0.0
    for more, better in rest:
        if better <= loss:
            share = math.log(worse / loss) / math.log(worse / better) if better < worse else 0.0
            return compute * (more / compute) ** share
        compute, worse = more, better
    return compute if worse == loss else math.inf


def multipliers(arms: dict[str, dict[int, dict]]) -> list[Multiplier]:
    """The multiplier of every MoE arm of a sweep, against the dense arms with as many tokens.

    The interval is a percentile bootstrap: the seeds that the MoE and all dense models of its
    ladder have in common are drawn with replacement. With few seeds it is too narrow.

    Args:
      arms: records by arm and seed.

    Returns:
      One for each MoE arm; none for an arm with fewer than two dense ones to compare it with.
    """
    found = []
    for arm, rows in arms.items():
        record = next(iter(rows.values()))
        if _is_dense(record):
            continue
        rungs = [
            other
            for other in arms.values()
            if _is_dense(first := next(iter(other.values())))
            and first["tokens"] == record["tokens"]
        ]
        rungs.sort(key=_compute)
        seeds = sorted(set(rows).intersection(*rungs))
        if len(rungs) >= 2 and seeds:
            found.append(_measure(arm, rows, rungs, seeds))
    return found


def law_loss(experts: int, active_params: float, tokens: float) -> float:
    """The loss that the joint MoE scaling law predicts; one expert is a dense model."""
    return _law_of_params(experts, active_params) + _law_of_tokens(experts, tokens)


def law_multiplier(experts: int, active_params: float, tokens: float) -> float:
    """The multiplier that the law predicts; inf if it has no dense model as good at these tokens.

    Compute is taken as proportional to active parameters, since the tokens are equal.
    """
    left = law_loss(experts, active_params, tokens) - _law_of_tokens(1, tokens)
    if left <= 0:
        return math.inf
    power = LAW_ALPHA + LAW_GAMMA * math.log(_effective(1))
    return (left / _law_of_params(1, active_params)) ** (1 / power)


def _is_dense(record: dict) -> bool:
    return record["total_params"] == record["active_params"]


def _compute(rows: dict[int, dict]) -> float:
    return next(iter(rows.values()))["flops_per_token"]


def _measure(
    arm: str, rows: dict[int, dict], rungs: list[dict[int, dict]], seeds: list[int]
) -> Multiplier:
    record, own = rows[seeds[0]], _compute(rows)
    compute_R = [_compute(rung) for rung in rungs]
    loss_S = np.array([rows[seed]["loss"] for seed in seeds])
    ladder_RxS = np.array([[rung[seed]["loss"] for seed in seeds] for rung in rungs])

    def measured(drawn) -> float:
        ladder = zip(compute_R, ladder_RxS[:, drawn].mean(1), strict=True)
        return equivalent_compute(loss_S[drawn].mean(), list(ladder)) / own

    low = high = math.nan
    if len(seeds) > 1:
        draws = np.random.default_rng(0).integers(len(seeds), size=(RESAMPLES, len(seeds)))
        # The ends are values that were drawn, since 0 and inf have no values between them.
        low, high = np.quantile(
            list(map(measured, draws)), (0.025, 0.975), method="inverted_cdf"
        ).tolist()
    experts = tuple(record["settings"].get("model.experts", ()))
    law = None
    if len(set(experts)) == 1:
        law = law_multiplier(experts[0], record["active_params"], record["tokens"])
    return Multiplier(
        arm, experts, record["tokens"], record["active_params"], len(seeds),
        *(measured(range(len(seeds))), low, high),
        *(compute_R[0] / own, compute_R[-1] / own, law),
    )  # fmt: skip


def _effective(experts: int) -> float:
    """The law's number of experts, which it transforms."""
    added = experts - 1 + 1 / (1 / LAW_START - 1 / LAW_MAX)
    return 1 / (1 / added + 1 / LAW_MAX)


def _law_of_params(experts: int, active_params: float) -> float:
    effective = _effective(experts)
    power = LAW_ALPHA + LAW_GAMMA * math.log(effective)
    return LAW_A * effective**LAW_DELTA * active_params**power


def _law_of_tokens(experts: int, tokens: float) -> float:
    effective = _effective(experts)
    power = LAW_BETA + LAW_ZETA * math.log(effective)
    return LAW_B * effective**LAW_OMEGA * tokens**power + LAW_C
