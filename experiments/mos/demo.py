"""Trains students of one PR-MoE in four ways; a second call goes on where the first one stopped.

    prmoe train --config=configs/tiny.py:prmoe --workdir=runs/prmoe     # the teacher, once
    python experiments/mos/demo.py [--teacher=runs/prmoe] [--workdir=runs/mos]

Appends to demo.jsonl beside this file, prints the table of the README and draws students.png.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from prmoe_jax.run.metrics import read_metrics

HERE = Path(__file__).parent
SEEDS = (1, 2, 3)
# Two-sided 95 % points of Student's t for SEEDS - 1 degrees of freedom.
T_975 = 4.303
STUDENT = "5 layers, E=4+8, residual"
# What each arm adds to the student's architecture; the second one has its teacher's tokens added.
ARMS = {
    "from scratch": {},
    "from scratch, twice the steps": {"train.steps": 600},
    "distilled throughout": {"kd.stop": 1.0},
    "staged": {"kd.stop": 0.7},
    "staged, part of its teacher": {"kd.stop": 0.7, "teacher.inherit": "true"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", type=Path, default=Path("runs/prmoe"))
    parser.add_argument("--workdir", type=Path, default=Path("runs/mos"))
    options = parser.parse_args()
    results = HERE / "demo.jsonl"
    rows = (
        [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    )
    if not rows:
        record(rows, "teacher", 0, options.teacher)
    done = {(row["arm"], row["seed"]) for row in rows}
    for seed in SEEDS:
        for arm, changes in ARMS.items():
            if (arm, seed) not in done:
                workdir = options.workdir / f"{arm.replace(' ', '_').replace(',', '')}-{seed}"
                train(changes, seed, options.teacher, workdir)
                record(rows, arm, seed, workdir)
    report(rows)
    draw(rows)


def train(changes: dict, seed: int, teacher: Path, workdir: Path) -> None:
    overrides = {"seed": seed, "eval.every": 100, "eval.batches": 20, **changes}
    if "kd.stop" in changes:
        overrides["teacher.workdir"] = teacher
    command = [
        *(sys.executable, "-m", "prmoe_jax", "train"),
        f"--config={HERE.parent.parent}/configs/tiny.py:{STUDENT}",
        f"--workdir={workdir}",
        *(f"--config.{name}={value}" for name, value in overrides.items()),
    ]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)


def record(rows: list[dict], arm: str, seed: int, workdir: Path) -> None:
    lines = read_metrics(workdir / "metrics.jsonl")
    evaluated = [line for line in lines if "eval/loss" in line]
    row = {
        "arm": arm,
        "seed": seed,
        "loss": evaluated[-1]["eval/loss"],
        "bits_per_byte": evaluated[-1]["eval/bits_per_byte"],
        # The last one is of the whole split, the others of its first batches.
        "losses": [(line["step"], round(line["eval/loss"], 5)) for line in evaluated],
    }
    rows.append(row)
    print(json.dumps(row), flush=True)
    with (HERE / "demo.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def report(rows: list[dict]) -> None:
    loss = {(row["arm"], row["seed"]): row["loss"] for row in rows}
    print(f"| teacher | {loss['teacher', 0]:.4f} | |")
    for arm in ARMS:
        values = [loss[arm, seed] for seed in SEEDS]
        difference = [loss[arm, seed] - loss["from scratch", seed] for seed in SEEDS]
        margin = T_975 * statistics.stdev(difference) / len(SEEDS) ** 0.5
        each = ", ".join(f"{value:.4f}" for value in values)
        against = f"{statistics.mean(difference):+.4f} ± {margin:.4f}"
        against = "" if arm == "from scratch" else against
        print(f"| {arm} | {statistics.mean(values):.4f} ({each}) | {against} |")
    staged = [loss["staged", seed] - loss["distilled throughout", seed] for seed in SEEDS]
    margin = T_975 * statistics.stdev(staged) / len(SEEDS) ** 0.5
    print(f"staged - distilled throughout {statistics.mean(staged):+.4f} ± {margin:.4f}")


def draw(rows: list[dict]) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    _, axes = pyplot.subplots(figsize=(7, 3), layout="constrained")
    for number, arm in enumerate(ARMS):
        losses = [row["loss"] for row in rows if row["arm"] == arm]
        axes.plot(losses, [number] * len(losses), "o", alpha=0.7)
    (teacher,) = (row["loss"] for row in rows if row["arm"] == "teacher")
    axes.axvline(teacher, color="black", linewidth=1, label="teacher")
    axes.set(xlabel="validation loss, nats a token")
    axes.set_yticks(range(len(ARMS)), ARMS)
    axes.invert_yaxis()
    axes.legend(frameon=False, loc="lower right")
    pyplot.savefig(HERE / "students.png", dpi=120)


if __name__ == "__main__":
    main()
