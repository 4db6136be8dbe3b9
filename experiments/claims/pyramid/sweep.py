"""More experts in the last layers, or in the first, if they are as many in all?

prmoe sweep experiments/claims/pyramid --workdir=runs/claims
"""

import runpy
from pathlib import Path

MULTIPLIER = runpy.run_path(str(Path(__file__).parents[2] / "multiplier/sweep.py"))
KEEP_CHECKPOINTS = False
MARGIN = 0.01
POOLED = True
CONTRASTS = (("pyramid", "inverse"), ("pyramid", "moe"))
ARMS = {
    "moe": ("E64", {}),
    "pyramid": ("E64", {"model.experts": (32, 32, 96, 96)}),
    "inverse": ("E64", {"model.experts": (96, 96, 32, 32)}),
}


def runs():
    return MULTIPLIER["compared"](ARMS)
