"""Experts in every other layer, in every layer, in the first half or in the second one?

prmoe sweep experiments/placement --workdir=runs/prose
"""

import runpy
from pathlib import Path

PROSE = runpy.run_path(str(Path(__file__).parents[2] / "configs/prose.py"))
SEEDS = 1, 2, 3
ARMS = "moe", "every_layer", "first_half", "second_half"


def runs():
    for name in ARMS:
        for seed in SEEDS:
            config = PROSE["get_config"](name)
            config.seed = seed
            yield f"{name}/{seed}", config
