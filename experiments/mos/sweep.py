"""Is a student better from scratch, with its teacher's tokens added, or taught, and how long?

prmoe sweep experiments/prmoe --workdir=runs/prose     # the teacher is one of its runs
prmoe sweep experiments/mos --workdir=runs/prose
"""

import runpy
from pathlib import Path

PROSE = runpy.run_path(str(Path(__file__).parents[2] / "configs/prose.py"))
TAUGHT = PROSE["TAUGHT"]
ARMS = {
    "student": ("student", {}),
    "student_2400": ("student", PROSE["of_steps"](2400)),
    "mos_throughout": ("student", TAUGHT | {"kd.stop": 1.0}),
    "mos": ("student", TAUGHT),
    "mos_inherited": ("student", TAUGHT | {"teacher.inherit": True}),
}


def runs():
    return PROSE["runs"](ARMS)
