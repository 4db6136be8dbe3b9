"""What do a PR-MoE's students keep of it, and when should distillation stop?

The students have an eighth less depth. Each seed has a teacher of its own, the `prmoe` of
experiments/claims/prmoe, and models are compared seed by seed.

    prmoe sweep experiments/claims/mos --workdir=runs/claims
"""

import runpy
from pathlib import Path

PRMOE = runpy.run_path(str(Path(__file__).parents[1] / "prmoe/sweep.py"))
MULTIPLIER = PRMOE["MULTIPLIER"]
MARGIN = 0.01
VARYING = ("teacher.workdir",)
CONTRASTS = (
    ("staged", "prmoe"),
    ("staged", "student"),
    ("staged", "throughout"),
    ("inherited", "staged"),
    ("student_longer", "staged"),
)
STUDENT = {"model.layers": 7, "model.experts": (32, 32, 64), "model.residual": True}
TAUGHT = STUDENT | {"teacher.workdir": "runs/claims/prmoe/{seed}", "kd.stop": 0.7}
LONGER = {"train.steps": 2 * MULTIPLIER["STEPS"]["11M"]}  # its teacher's tokens added
ARMS = {
    "prmoe": PRMOE["ARMS"]["prmoe"],
    "student": ("E64", STUDENT),
    "student_longer": ("E64", STUDENT | LONGER, "student"),
    "throughout": ("E64", TAUGHT | {"kd.stop": 1.0}),
    "staged": ("E64", TAUGHT),
    "inherited": ("E64", TAUGHT | {"teacher.inherit": True}),
}


def runs():
    return MULTIPLIER["compared"](ARMS)
