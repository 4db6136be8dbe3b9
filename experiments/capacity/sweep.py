"""What is lost where experts are full, and who loses it?

prmoe sweep experiments/capacity --workdir=runs/prose
"""

import runpy
from math import inf
from pathlib import Path

PROSE = runpy.run_path(str(Path(__file__).parents[2] / "configs/prose.py"))
# A model is evaluated by the rules it was trained with.
CHANGES = {
    "moe": {},  # a capacity factor of 1, groups of one sequence, first come first served
    "capacity_0.5": {"moe.capacity_factor": 0.5, "moe.eval_capacity_factor": 0.5},
    "capacity_2": {"moe.capacity_factor": 2.0, "moe.eval_capacity_factor": 2.0},
    "dropless": {"moe.capacity_factor": inf, "moe.eval_capacity_factor": inf},
    "random_selection": {"moe.overflow": "random"},  # in training only
    "groups_of_64": {"moe.group_size": 64},
}
ARMS = {arm: ("moe", changes) for arm, changes in CHANGES.items()}


def runs():
    return PROSE["runs"](ARMS)
