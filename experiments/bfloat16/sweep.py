"""Does a model learn the same from products of bfloat16 on a CPU?

The demo's PR-MoE, and of experiments/multiplier the narrowest dense model and its MoE of 64
experts after 11 M tokens.

    prmoe sweep experiments/bfloat16                       # --shard=1/2 and 2/2 for two cores
    prmoe report experiments/bfloat16
"""

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]
TINY = runpy.run_path(str(ROOT / "configs/tiny.py"))
MULTIPLIER = runpy.run_path(str(ROOT / "experiments/multiplier/sweep.py"))
SEEDS = 1, 2, 3
MARGIN = 0.01  # nats a token
MODELS = "demo", "dense_64", "E64"
CONTRASTS = (
    ("demo_bfloat16", "demo_float32"),
    ("dense_64_bfloat16", "dense_64_float32"),
    ("E64_bfloat16", "E64_float32"),
)
KEEP_CHECKPOINTS = False


def get_config(model: str):
    if model == "demo":
        return TINY["get_config"]("prmoe")
    return MULTIPLIER["get_config"](model, MULTIPLIER["STEPS"]["11M"], MULTIPLIER["rate"](model))


def runs():
    for seed in SEEDS:
        for model in MODELS:
            for dtype in ("float32", "bfloat16"):
                config = get_config(model)
                config.seed, config.model.dtype = seed, dtype
                if dtype == "bfloat16":
                    config.execution.cpu_products = "bfloat16"
                yield f"{model}_{dtype}/{seed}", config
