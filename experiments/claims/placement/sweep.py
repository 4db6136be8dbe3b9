"""Which layers should have the experts, if the first one has none?

prmoe sweep experiments/claims/placement --workdir=runs/claims
"""

import runpy
from pathlib import Path

MULTIPLIER = runpy.run_path(str(Path(__file__).parents[2] / "multiplier/sweep.py"))
KEEP_CHECKPOINTS = False
MARGIN = 0.01
POOLED = True
CONTRASTS = (("second_half", "first_half"), ("second_half", "moe"), ("two_late", "two_early"))
# Equally many experts in all: 64 in each of four layers, or 128 in each of two.
ARMS = {
    "moe": ("E64", {}),  # layers 1, 3, 5 and 7
    "first_half": ("E64", {"model.placement": "layers 1 2 3 4"}),
    "second_half": ("E64", {"model.placement": "layers 4 5 6 7"}),
    "two_early": ("E128", {"model.placement": "layers 1 3"}),
    "two_late": ("E128", {"model.placement": "layers 5 7"}),
}


def runs():
    return MULTIPLIER["compared"](ARMS)
