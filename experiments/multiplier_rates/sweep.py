"""Which learning rates suit the models of experiments/multiplier?

Three rates for the narrowest and the widest dense model and for each number of experts, on 3 M
tokens, and one beyond where the best is at an end. MoEs, which differ more, have two seeds. The
best ones go into experiments/multiplier/sweep.py. Three models are also trained on 11 M tokens at
half of these, with seed 1; experiments/multiplier has the same runs at the whole rate.

    prmoe sweep experiments/multiplier_rates               # --shard=1/2 and 2/2 for two cores
"""

import runpy
from pathlib import Path

MULTIPLIER = runpy.run_path(str(Path(__file__).parents[1] / "multiplier/sweep.py"))
KEEP_CHECKPOINTS = False
DENSE, MOE = (4e-3, 8e-3, 16e-3), (8e-3, 16e-3, 32e-3)
TRIED = {"dense_64": (*DENSE, 32e-3), "E64": MOE, "E8": MOE, "E128": MOE, "dense_216": DENSE}
LONGER = "dense_64", "dense_144", "E64"


def runs():
    for arm, rates in TRIED.items():
        for rate in rates:
            for seed in (0, 1) if arm.startswith("E") else (0,):
                config = MULTIPLIER["get_config"](arm, MULTIPLIER["STEPS"]["3M"], rate)
                config.seed = seed
                yield f"{arm}_{rate:g}/{seed}", config
    for arm in LONGER:
        rate = MULTIPLIER["rate"](arm) / 2
        config = MULTIPLIER["get_config"](arm, MULTIPLIER["STEPS"]["11M"], rate)
        config.seed = 1
        yield f"{arm}_11M_{rate:g}/1", config
