"""Is PR-MoE as good as a MoE of 1.5 times its parameters?

PR-MoE computes 1.17 times as much for each token as the MoE; `no_residual` is PR-MoE without its
residual MLPs.

    prmoe sweep experiments/claims/prmoe --workdir=runs/claims
"""

import runpy
from pathlib import Path

MULTIPLIER = runpy.run_path(str(Path(__file__).parents[2] / "multiplier/sweep.py"))
MARGIN = 0.01
POOLED = True
CONTRASTS = ("prmoe", "moe"), ("no_residual", "moe"), ("prmoe", "no_residual"), ("moe", "dense")
PYRAMID = {"model.experts": (32, 32, 32, 64)}
PRMOE = PYRAMID | {"model.residual": True}
ARMS = {
    "prmoe": ("E64", PRMOE),
    "moe": ("E64", {}),
    "no_residual": ("E64", PYRAMID),
    "dense": ("dense_64", {}),
}


def runs():
    return MULTIPLIER["compared"](ARMS)
