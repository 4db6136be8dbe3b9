"""The multipliers that the joint MoE scaling law predicts: PREDICTED of sweep.py.

    python experiments/multiplier/law.py

The law (Ludziejewski et al. 2025, arXiv 2502.05172, table 3) has, in nats a token,
L = a E^delta N^(alpha + gamma ln E) + b E^omega D^(beta + zeta ln E) + c. It was fitted to 280 runs
with 79 M active parameters or more, 500 M tokens or more, and up to 32 experts. It is for experts
in every layer: where layers differ it is given their mean number, which has as many parameters in
experts. It is for one expert a token with nothing beside it; other models have no prediction.
"""

import json
import math
from pathlib import Path

from prmoe_jax.report.arms import arms
from prmoe_jax.report.multiplier import multipliers

A, ALPHA, DELTA, GAMMA = 35.91, -0.1889, -0.2285, 0.0098
B, BETA, OMEGA, ZETA = 35.98, -0.1775, 0.5529, -0.0259
C, START, MAX = 1.3637, 2.0732, 290.4521


def law_multiplier(experts: float, active_params: float, tokens: float) -> float:
    """The law's multiplier in active parameters; inf if it has no dense model as good.

    It is the parameters of the dense model with the MoE's loss after as many tokens, divided by the
    MoE's active parameters.

    Args:
      experts: of each layer.
      active_params: of the MoE, embeddings included.
      tokens: of the run.
    """
    loss = _of_params(experts, active_params) + _of_tokens(experts, tokens)
    left = loss - _of_tokens(1, tokens)
    if left <= 0:
        return math.inf
    power = ALPHA + GAMMA * math.log(_effective(1))
    return (left / _of_params(1, active_params)) ** (1 / power)


def _effective(experts: float) -> float:
    """The law's number of experts, which it transforms."""
    added = experts - 1 + 1 / (1 / START - 1 / MAX)
    return 1 / (1 / added + 1 / MAX)


def _of_params(experts: float, active_params: float) -> float:
    effective = _effective(experts)
    return A * effective**DELTA * active_params ** (ALPHA + GAMMA * math.log(effective))


def _of_tokens(experts: float, tokens: float) -> float:
    effective = _effective(experts)
    return B * effective**OMEGA * tokens ** (BETA + ZETA * math.log(effective)) + C


def predicted() -> dict[str, float]:
    """The prediction for each arm of the records that the law is for."""
    lines = Path(__file__).with_name("results.jsonl").read_text().splitlines()
    return {
        one.arm: law_multiplier(one.experts, one.active_params, one.tokens)
        for one in multipliers(arms(list(map(json.loads, lines))))
        if one.plain
    }


if __name__ == "__main__":
    for arm, multiplier in predicted().items():
        print(f'    "{arm}": {multiplier:.6g},')
