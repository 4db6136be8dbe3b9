"""Which experts of a trained MoE can go, and what does its teacher give back?

    prmoe sweep experiments/prune/teacher --workdir=runs/prune/teacher
    python experiments/prune/cut.py                        # prunes, and evaluates what is left
    prmoe sweep experiments/prune --workdir=runs/prune     # --shard=1/2 and 2/2 for two cores
    prmoe report experiments/prune

The pruned models, as cut.jsonl lists them, learn from the model they came from. Beside them are
models of the same number of experts from scratch, with equal tokens and with the teacher's added,
and pruned ones that go on without a teacher.
"""

import json
import runpy
from pathlib import Path

HERE = Path(__file__).parent
TEACHER = runpy.run_path(str(HERE / "teacher/sweep.py"))
MARGIN = 0.01
KEEP_CHECKPOINTS = False
CONTRASTS = (
    ("uniform_50", "scratch_50"),
    ("uniform_50", "scratch_50_longer"),
    ("uniform_50", "uniform_50_alone"),
    ("by_load_50", "uniform_50"),
    ("by_activation_50", "uniform_50"),
    ("by_loss_50", "uniform_50"),
    ("by_activation_50", "inverse_50"),
    ("merged_50", "by_activation_50"),
    ("uniform_75", "scratch_75"),
    ("uniform_75", "scratch_75_longer"),
    ("by_load_75", "uniform_75"),
    ("by_activation_75", "uniform_75"),
    ("by_loss_75", "uniform_75"),
    ("by_activation_75", "inverse_75"),
    ("merged_75", "by_activation_75"),
)
# Each seed has a teacher of its own, whose pyramid may have other numbers of experts.
VARYING = "init.workdir", "teacher.workdir", "model.experts"
STEPS = 175  # of learning from the teacher
SCRATCH = {50: (8,), 75: (12,)}  # experts of each MoE layer, by percent


def get_config(steps: int, seed: int, experts, start: str = "", teacher: str = ""):
    config = TEACHER["get_config"](steps)
    config.seed, config.model.experts = seed, tuple(experts)
    if start:  # a lower rate than from scratch
        config.init.workdir = start
        config.optimizer.learning_rate = TEACHER["RATE"] / 2
    if teacher:
        config.teacher.workdir = teacher
        config.kd.stop = 0.7
    return config


def runs():
    for seed in TEACHER["SEEDS"]:
        for keep, experts in SCRATCH.items():
            yield f"scratch_{keep}/{seed}", get_config(STEPS, seed, experts)
        for keep, experts in SCRATCH.items():
            longer = get_config(STEPS + TEACHER["STEPS"], seed, experts)
            yield f"scratch_{keep}_longer/{seed}", longer
    record = HERE / "cut.jsonl"
    rows = map(json.loads, record.read_text().splitlines() if record.exists() else [])
    for row in sorted(rows, key=lambda row: row["seed"]):
        arm, seed, plan = row["arm"], row["seed"], row["plan"]
        experts = [len(layer["kept"]) for layer in plan["layers"]]
        start, teacher = f"runs/prune/cut/{arm}/{seed}", f"runs/prune/teacher/{seed}"
        yield f"{arm}/{seed}", get_config(STEPS, seed, experts, start, teacher)
        if arm in ("uniform_50", "by_activation_50"):
            yield f"{arm}_alone/{seed}", get_config(STEPS, seed, experts, start)
