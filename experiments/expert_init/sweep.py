"""Should experts start as copies of one MLP, or each on its own?

prmoe sweep experiments/expert_init --workdir=runs/prose
prmoe report experiments/expert_init; prmoe report experiments/expert_init --base=prmoe
"""

import runpy
from pathlib import Path

PROSE = runpy.run_path(str(Path(__file__).parents[2] / "configs/prose.py"))
TIED = {"moe.expert_init": "tied"}
ARMS = {"moe": ("moe", {}), "moe_tied": ("moe", TIED)}
ARMS |= {"prmoe": ("prmoe", {}), "prmoe_tied": ("prmoe", TIED)}


def runs():
    return PROSE["runs"](ARMS)
