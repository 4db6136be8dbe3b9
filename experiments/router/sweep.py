"""What keeps the first routers of a model of 64 experts uniform, and what mends them?

One factor at a time, from `moe`; and a ladder of dense models, for multipliers.

    prmoe sweep experiments/router                         # --shard=1/2 and 2/2 for two cores
    prmoe report experiments/router
"""

import runpy
from pathlib import Path

MULTIPLIER = runpy.run_path(str(Path(__file__).parents[1] / "multiplier/sweep.py"))
SEEDS = 1, 2, 3
KEEP_CHECKPOINTS = False
MARGIN = 0.02  # nats a token
POOLED = True
LADDER = True
ARMS = {
    "moe": {},
    "batch": {"moe.balance": "batch"},
    "top2": {"model.top_k": 2},
    "top2_unnormalised": {"model.top_k": 2, "model.normalize_top_k": "never"},
    "bias": {"moe.bias_update_rate": 0.001, "moe.aux_loss_weight": 0.0},
    "router_rate": {"optimizer.router_rate": 0.25},
    "z_loss": {"moe.z_loss_weight": 0.001},
    "weight": {"moe.aux_loss_weight": 0.001},
    "later": {"model.placement": "layers 2 3 5 7", "model.experts": (64,) * 4},
    "sigmoid": {"moe.scores": "sigmoid"},
    "top2_sampled": {"model.top_k": 2, "moe.second_expert_sampling": True},
}
CONTRASTS = (
    ("batch", "moe"),
    ("top2", "moe"),
    ("top2_unnormalised", "moe"),
    ("bias", "moe"),
    ("router_rate", "moe"),
    ("z_loss", "moe"),
    ("weight", "moe"),
    ("later", "moe"),
    ("sigmoid", "moe"),
    ("top2_sampled", "top2"),
)


def get_config(arm: str, seed: int):
    model = arm if arm not in ARMS else "E64"
    config = MULTIPLIER["get_config"](model, MULTIPLIER["STEPS"]["11M"], MULTIPLIER["rate"](model))
    config.update_from_flattened_dict(ARMS.get(arm, {}))
    config.seed = seed
    config.data.validation_fraction = 0.02
    config.eval.documents = True
    return config


def runs():
    for seed in SEEDS:
        for arm in (*ARMS, "dense_64", "dense_96", "dense_144"):
            yield f"{arm}/{seed}", get_config(arm, seed)
