"""The paper's table in small: dense, dense with five times the compute, MoE, PR-MoE, MoS.

prmoe sweep experiments/prmoe --workdir=runs/prose
"""

import runpy
from pathlib import Path

PROSE = runpy.run_path(str(Path(__file__).parents[2] / "configs/prose.py"))
SEEDS = 1, 2, 3
ARMS = "dense", "dense_5x", "moe", "prmoe", "student", "mos"
TEACHER = "runs/prose/prmoe/1"


def runs():
    for name in ARMS:
        for seed in SEEDS:
            config = PROSE["get_config"]("student" if name == "mos" else name)
            config.seed = seed
            if name == "mos":
                config.teacher.workdir = TEACHER
                config.kd.stop = 0.7
            yield f"{name}/{seed}", config
