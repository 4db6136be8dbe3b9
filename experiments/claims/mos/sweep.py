"""Is a student better from scratch, with its teacher's tokens added, or taught, and how long?

prmoe sweep experiments/claims/prmoe --workdir=runs/claims     # the teacher is one of its runs
prmoe sweep experiments/claims/mos --workdir=runs/claims
"""

import runpy
from pathlib import Path

MULTIPLIER = runpy.run_path(str(Path(__file__).parents[2] / "multiplier/sweep.py"))
KEEP_CHECKPOINTS = False
MARGIN = 0.01
TEACHER = "runs/claims/prmoe/1"
# An eighth of the depth less than its teacher, PR-MoE of experiments/claims/prmoe.
STUDENT = {"model.layers": 7, "model.experts": (32, 32, 64), "model.residual": True}
TAUGHT = STUDENT | {"teacher.workdir": TEACHER, "kd.stop": 0.7}
ARMS = {
    "student": ("E64", STUDENT),
    "student_longer": ("E64", STUDENT | {"train.steps": 2 * MULTIPLIER["STEPS"]["6M"]}),
    "throughout": ("E64", TAUGHT | {"kd.stop": 1.0}),
    "staged": ("E64", TAUGHT),
    "inherited": ("E64", TAUGHT | {"teacher.inherit": True}),
}


def runs():
    return MULTIPLIER["compared"](ARMS)
