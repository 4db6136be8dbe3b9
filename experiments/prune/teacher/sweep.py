"""The uniform MoEs that experiments/prune cuts down: 16 experts in each of four MoE layers.

prmoe sweep experiments/prune/teacher --workdir=runs/prune/teacher
"""

import runpy
from pathlib import Path

MULTIPLIER = runpy.run_path(str(Path(__file__).parents[2] / "multiplier/sweep.py"))
SEEDS = 1, 2, 3
STEPS, RATE = 700, 4e-3


def get_config(steps: int = STEPS):
    config = MULTIPLIER["on_prose"]("E8", steps, RATE)
    config.model.experts = (16,)
    return config


def runs():
    for seed in SEEDS:
        config = get_config()
        config.seed = seed
        yield str(seed), config
