"""One expert a token, two, or one and a dense MLP, mixed in three ways?

prmoe sweep experiments/top2_vs_residual --workdir=runs/prose
"""

import runpy
from pathlib import Path

PROSE = runpy.run_path(str(Path(__file__).parents[2] / "configs/prose.py"))
SEEDS = 1, 2, 3
ARMS = {
    "moe": {},
    "top2": {},
    "residual": {},
    "residual_sum": {"model.residual_mix": "sum"},
    "residual_half": {"model.residual_mix": "half"},
}


def runs():
    for name, changes in ARMS.items():
        for seed in SEEDS:
            config = PROSE["get_config"](name.partition("_")[0])
            config.update_from_flattened_dict(changes)
            config.seed = seed
            yield f"{name}/{seed}", config
