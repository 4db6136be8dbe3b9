"""One expert a token, two, or one and a dense MLP, mixed in three ways?

prmoe sweep experiments/top2_vs_residual --workdir=runs/prose
"""

import runpy
from pathlib import Path

PROSE = runpy.run_path(str(Path(__file__).parents[2] / "configs/prose.py"))
ARMS = {
    "moe": ("moe", {}),
    "top2": ("top2", {}),
    "residual": ("residual", {}),
    "residual_sum": ("residual", {"model.residual_mix": "sum"}),
    "residual_half": ("residual", {"model.residual_mix": "half"}),
}


def runs():
    return PROSE["runs"](ARMS)
