"""Which learning rates suit the models of experiments/multiplier?

Three rates for the narrowest and the widest dense model and for 64 experts, on 6 M tokens with one
seed. The best ones go into experiments/multiplier/sweep.py.

    prmoe sweep experiments/multiplier_rates               # --shard=1/2 and 2/2 for two cores
"""

import runpy
from pathlib import Path

MULTIPLIER = runpy.run_path(str(Path(__file__).parents[1] / "multiplier/sweep.py"))
KEEP_CHECKPOINTS = False
RATES = 2e-3, 4e-3, 8e-3


def runs():
    for arm in "dense_64", "E64", "dense_216":
        for rate in RATES:
            yield (
                f"{arm}_{rate:g}/0",
                MULTIPLIER["get_config"](arm, MULTIPLIER["STEPS"]["6M"], rate),
            )
