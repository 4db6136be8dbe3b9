"""By how much longer a step of the dense model takes that is as good as each MoE.

    python experiments/multiplier/in_time.py

As the multiplier, with the seconds of speed.jsonl in place of FLOPs. Prints one number for each
seed; nothing is extrapolated, so that 'inf' is more than the widest dense model's.
"""

import json
from pathlib import Path

from prmoe_jax.report.multiplier import equivalent_compute
from prmoe_jax.tables import aligned

HERE = Path(__file__).parent
LADDER = "dense_64", "dense_96", "dense_144"
MODELS = "E8", "E64", "E128", "residual", "fine"
LENGTHS = "3M", "6M", "11M", "23M"


def read(name: str) -> list[dict]:
    return list(map(json.loads, (HERE / name).read_text().splitlines()))


def main() -> None:
    seconds = {row["model"]: row["median_s"] for row in read("speed.jsonl")}
    loss = {row["run"]: row["loss"] for row in read("results.jsonl")}

    def worth(model: str, length: str) -> str:
        found = []
        for seed in "123":
            runs = [f"{name}/{length}/{seed}" for name in (model, *LADDER)]
            if all(run in loss for run in runs):
                ladder = [
                    (seconds[name], loss[run]) for name, run in zip(LADDER, runs[1:], strict=True)
                ]
                found.append(equivalent_compute(loss[runs[0]], ladder) / seconds[model])
        return ", ".join(f"{one:.2f}" for one in found)

    rows = [(model, *(worth(model, length) for length in LENGTHS)) for model in MODELS]
    print(aligned(("model", *LENGTHS), rows))


if __name__ == "__main__":
    main()
