"""Trains tied and independent experts side by side; a second call goes on where it stopped.

    python experiments/expert_init/demo.py [--workdir=runs/expert_init]

Writes demo.jsonl beside this file and prints the table of the README.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
STEPS, SEEDS = 120, (0, 1, 2)
# Two-sided 95 % points of Student's t for SEEDS - 1 degrees of freedom.
T_975 = 4.303


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs/expert_init"))
    workdir = parser.parse_args().workdir
    rows = []
    for seed in SEEDS:
        for architecture in ("moe", "prmoe"):
            for init in ("independent", "tied"):
                metrics = train(workdir, architecture, init, seed)
                rows.append({"architecture": architecture, "init": init, "seed": seed, **metrics})
                print(json.dumps(rows[-1]), flush=True)
    (HERE / "demo.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for architecture in ("moe", "prmoe"):
        report(architecture, [row for row in rows if row["architecture"] == architecture])


def train(workdir: Path, architecture: str, init: str, seed: int) -> dict:
    command = [
        *(sys.executable, "-m", "prmoe_jax", "train"),
        f"--config={HERE.parent.parent}/configs/tiny.py:{architecture}",
        f"--workdir={workdir}/{architecture}-{init}-{seed}",
        f"--config.moe.expert_init={init}",
        f"--config.seed={seed}",
        f"--config.train.steps={STEPS}",
        "--config.eval.every=0",
        "--json",
    ]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    metrics = json.loads(ran.stdout)
    names = "loss", "bits_per_byte", "drop_fraction", "aux_loss"
    return {name: metrics[f"eval/{name}"] for name in names}


def report(architecture: str, rows: list[dict]) -> None:
    loss = {(row["init"], row["seed"]): row["bits_per_byte"] for row in rows}
    difference = [loss["tied", seed] - loss["independent", seed] for seed in SEEDS]
    margin = T_975 * statistics.stdev(difference) / len(SEEDS) ** 0.5
    for init in ("independent", "tied"):
        values = [loss[init, seed] for seed in SEEDS]
        print(f"{architecture:6} {init:12} {statistics.mean(values):.4f} bits/byte {values}")
    print(f"{architecture:6} tied - independent {statistics.mean(difference):+.4f} ± {margin:.4f}")


if __name__ == "__main__":
    main()
