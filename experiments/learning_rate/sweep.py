"""Which learning rate is best for each architecture of `configs/prose.py`?

One seed, three rates, 450 steps instead of the experiments' 1,200; the answer is the README's.

prmoe sweep experiments/learning_rate
"""

import runpy
from pathlib import Path

PROSE = runpy.run_path(str(Path(__file__).parents[2] / "configs/prose.py"))
RATES = 4e-3, 8e-3, 16e-3


def runs():
    for name in PROSE["ARCHITECTURES"]:
        for rate in RATES:
            rate = rate / 4 if name == "dense_5x" else rate  # a wider one wants lower ones
            config = PROSE["get_config"](name)
            config.optimizer.learning_rate, config.optimizer.min_learning_rate = rate, rate / 10
            config.update_from_flattened_dict(PROSE["of_steps"](450))
            yield f"{name}_{rate:g}/0", config
