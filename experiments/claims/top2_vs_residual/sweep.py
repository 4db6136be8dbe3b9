"""One expert a token, two, one and a dense MLP, or one and a shared expert of half width?

Each is asked without drops and with capacity 1. The paper adds the outputs of expert and MLP,
DeepSpeed's code mixes them by learned weights, as `residual` does; `residual_sum` adds them, too.

prmoe sweep experiments/claims/top2_vs_residual --workdir=runs/claims
"""

import runpy
from pathlib import Path

MULTIPLIER = runpy.run_path(str(Path(__file__).parents[2] / "multiplier/sweep.py"))
KEEP_CHECKPOINTS = False
MARGIN = 0.02
POOLED = True
CONTRASTS = (
    ("residual", "top2"),
    ("shared", "top2"),
    ("top2", "moe"),
    ("residual", "moe"),
    ("residual_capacity_1", "top2_capacity_1"),
    ("shared_capacity_1", "top2_capacity_1"),
    ("top2_capacity_1", "moe_capacity_1"),
    ("residual_capacity_1", "moe_capacity_1"),
    ("moe_capacity_1", "moe"),
    ("residual_sum", "top2"),  # these two were added after two seeds of the others
    ("residual_sum", "residual"),
)
WAYS = {
    "moe": {},
    "residual": {"model.residual": True},
    "top2": {"model.top_k": 2},
    # A shared expert, half as wide as the others.
    "shared": {"model.residual": True, "model.residual_mix": "sum", "model.residual_d_ff": 128},
}
CAPACITY_1 = {"moe.capacity_factor": 1.0, "moe.eval_capacity_factor": 1.0}
ARMS = {way: ("E64", changes) for way, changes in WAYS.items()}
ARMS |= {f"{way}_capacity_1": ("E64", changes | CAPACITY_1) for way, changes in WAYS.items()}
ARMS["residual_sum"] = "E64", {"model.residual": True, "model.residual_mix": "sum"}


def runs():
    return MULTIPLIER["compared"](ARMS)
