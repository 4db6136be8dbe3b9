"""More experts in the last layer, or in the first, or as many in all?

prmoe sweep experiments/pyramid --workdir=runs/prose
"""

import runpy
from pathlib import Path

PROSE = runpy.run_path(str(Path(__file__).parents[2] / "configs/prose.py"))
SEEDS = 1, 2, 3
# The first and the last two have equally many parameters.
ARMS = "moe", "small", "large", "pyramid", "inverse"


def runs():
    for name in ARMS:
        for seed in SEEDS:
            config = PROSE["get_config"](name)
            config.seed = seed
            yield f"{name}/{seed}", config
