"""Which learning rate is best for each architecture of `configs/prose.py`?

One seed, three rates, 450 steps instead of the experiments' 1,200.

prmoe sweep experiments/learning_rate
"""

import runpy
from pathlib import Path

PROSE = runpy.run_path(str(Path(__file__).parents[2] / "configs/prose.py"))


def runs():
    for name in PROSE["ARCHITECTURES"]:
        for rate in PROSE["rates"](name):
            config = PROSE["get_config"](name)
            PROSE["set_rate"](config, rate)
            config.update_from_flattened_dict(PROSE["of_steps"](450))
            yield f"{name}_{rate:g}/0", config
