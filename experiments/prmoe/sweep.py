"""The paper's table in small: dense, dense with five times the compute, MoE, PR-MoE, MoS.

prmoe sweep experiments/prmoe --workdir=runs/prose
"""

import runpy
from pathlib import Path

PROSE = runpy.run_path(str(Path(__file__).parents[2] / "configs/prose.py"))
ARMS = {name: (name, {}) for name in ("dense", "dense_5x", "moe", "prmoe", "student")}
ARMS["mos"] = "student", PROSE["TAUGHT"]


def runs():
    return PROSE["runs"](ARMS)
