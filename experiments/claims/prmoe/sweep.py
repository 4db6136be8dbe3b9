"""Is PR-MoE as good as a MoE of 1.5 times its parameters?

prmoe sweep experiments/claims/prmoe --workdir=runs/claims     # keeps what mos learns from
"""

import runpy
from pathlib import Path

MULTIPLIER = runpy.run_path(str(Path(__file__).parents[2] / "multiplier/sweep.py"))
MARGIN = 0.01
PRMOE = {"model.experts": (32, 32, 32, 64), "model.residual": True}
ARMS = {"moe": ("E64", {}), "prmoe": ("E64", PRMOE), "dense": ("dense_64", {})}


def runs():
    return MULTIPLIER["compared"](ARMS)
