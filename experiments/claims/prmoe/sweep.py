"""Is PR-MoE as good as a MoE of 1.5 times its parameters, and what do its students keep?

PR-MoE computes 1.17 times as much for each token as the MoE; `no_residual` is PR-MoE without its
residual MLPs. The students have an eighth less depth, and each seed has a teacher of its own.

    prmoe sweep experiments/claims/prmoe --workdir=runs/claims
"""

import runpy
from pathlib import Path

MULTIPLIER = runpy.run_path(str(Path(__file__).parents[2] / "multiplier/sweep.py"))
MARGIN = 0.01
POOLED = True
VARYING = ("teacher.workdir",)
CONTRASTS = (
    ("prmoe", "moe"),
    ("no_residual", "moe"),
    ("moe", "dense"),
    ("staged", "prmoe"),
    ("staged", "student"),
    ("staged", "throughout"),
    ("inherited", "staged"),
    ("student_longer", "staged"),
)
PYRAMID = {"model.experts": (32, 32, 32, 64)}
PRMOE = PYRAMID | {"model.residual": True}
STUDENT = {"model.layers": 7, "model.experts": (32, 32, 64), "model.residual": True}
TAUGHT = STUDENT | {"teacher.workdir": "runs/claims/prmoe/{seed}", "kd.stop": 0.7}
LONGER = {"train.steps": 2 * MULTIPLIER["STEPS"]["11M"]}  # its teacher's tokens added
ARMS = {
    "prmoe": ("E64", PRMOE),
    "moe": ("E64", {}),
    "no_residual": ("E64", PYRAMID),
    "dense": ("dense_64", {}),
    "student": ("E64", STUDENT),
    "student_longer": ("E64", STUDENT | LONGER, "student"),
    "throughout": ("E64", TAUGHT | {"kd.stop": 1.0}),
    "staged": ("E64", TAUGHT),
    "inherited": ("E64", TAUGHT | {"teacher.inherit": True}),
}


def runs():
    return MULTIPLIER["compared"](ARMS)
