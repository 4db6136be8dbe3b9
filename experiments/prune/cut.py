"""Cuts the teachers of experiments/prune down, each in every way, and evaluates what is left.

    python experiments/prune/cut.py [--root=runs/prune]

The teachers are in ROOT/teacher, the pruned runs go to ROOT/cut. Each adds a line to cut.jsonl:
arm, seed, the plan of `prmoe prune`, and the validation loss in nats a token before the model
learns anything. What cut.jsonl has is not evaluated again.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
RECORD = HERE / "cut.jsonl"
SEEDS = 1, 2, 3
KEEP = 50, 75  # percent
WAYS = {
    "uniform": ["--shape=uniform"],
    "by_load": ["--importance=load"],
    "by_activation": ["--importance=activation"],
    "by_loss": ["--importance=loss"],
    "inverse": ["--shape=inverse"],
    "merged": ["--merge"],
}


def prmoe(*arguments: str) -> dict:
    """What a command of prmoe prints with --json."""
    command = [sys.executable, "-m", "prmoe_jax", *arguments, "--json"]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path("runs/prune"))
    root = parser.parse_args().root
    lines = RECORD.read_text().splitlines() if RECORD.exists() else []
    done = {(row["arm"], row["seed"]) for row in map(json.loads, lines)}
    for seed in SEEDS:
        teacher = root / "teacher" / str(seed)
        for keep in KEEP:
            for way, options in WAYS.items():
                arm, out = f"{way}_{keep}", root / "cut" / f"{way}_{keep}" / str(seed)
                if (arm, seed) in done and out.exists():
                    continue
                if out.exists():  # of a run of this script that was stopped
                    shutil.rmtree(out)
                share = f"--keep={keep / 100}"
                plan = prmoe("prune", f"--workdir={teacher}", f"--out={out}", share, *options)
                if (arm, seed) in done:
                    continue
                loss = prmoe("eval", f"--workdir={out}")["loss"]
                row = {"arm": arm, "seed": seed, "loss": loss, "plan": plan}
                with RECORD.open("a", encoding="utf-8") as record:
                    record.write(json.dumps(row) + "\n")
                print(arm, seed, plan["architecture"][1], round(loss, 4), flush=True)


if __name__ == "__main__":
    main()
