"""Does Muon need fewer tokens than AdamW for the same loss?

The narrowest dense model of experiments/multiplier and its MoE of 64 experts. The same learning
rates are tried with both optimizers, on 3 M tokens; the best ones are in RATES.

    prmoe sweep experiments/muon                           # --shard=1/2 and 2/2 for two cores
    prmoe report experiments/muon
"""

import runpy
from pathlib import Path

MULTIPLIER = runpy.run_path(str(Path(__file__).parents[1] / "multiplier/sweep.py"))
SEEDS = 1, 2, 3
KEEP_CHECKPOINTS = False
SHORT = {"0.75M": 88}  # with Muon alone, which reaches AdamW's first loss before 1.5 M tokens
STEPS = {"1.5M": 175, "3M": 350, "4.5M": 525}
MODELS = {"dense": "dense_64", "moe": "E64"}
TRIED = 2e-3, 4e-3, 8e-3, 16e-3
HIGHER = {"moe_muon": (32e-3,)}  # where the highest of them was the best
# The best of those tried, by model and optimizer.
RATES = {"dense_adamw": 4e-3, "dense_muon": 8e-3, "moe_adamw": 4e-3, "moe_muon": 16e-3}


def get_config(model: str, kind: str, steps: int, rate: float):
    config = MULTIPLIER["on_prose"](MODELS[model], steps, rate)
    config.optimizer.kind = kind
    return config


def runs():
    for model in MODELS:
        for kind in ("adamw", "muon"):
            for rate in (*TRIED, *HIGHER.get(f"{model}_{kind}", ())):
                yield f"{model}_{kind}_{rate:g}/0", get_config(model, kind, STEPS["3M"], rate)
    for seed in SEEDS:
        for arm, rate in RATES.items():
            trunk = None
            for tokens, steps in STEPS.items():
                config = get_config(*arm.split("_"), steps, rate)
                config.seed = seed
                name = f"{arm}/{tokens}/{seed}"
                yield name, config, trunk
                trunk = name
            if arm.endswith("muon"):
                for tokens, steps in SHORT.items():
                    config = get_config(*arm.split("_"), steps, rate)
                    config.seed = seed
                    yield f"{arm}/{tokens}/{seed}", config
