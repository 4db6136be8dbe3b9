"""Experts in every other layer, in every layer, in the first half or in the second one?

prmoe sweep experiments/placement --workdir=runs/prose
"""

import runpy
from pathlib import Path

PROSE = runpy.run_path(str(Path(__file__).parents[2] / "configs/prose.py"))
ARMS = {name: (name, {}) for name in ("moe", "every_layer", "first_half", "second_half", "dense")}


def runs():
    return PROSE["runs"](ARMS)
