"""By how much longer a step of the dense model takes that is as good as each MoE.

    python experiments/multiplier/in_time.py

As the multiplier, with the seconds of speed.jsonl in place of FLOPs. Prints the geometric mean of
the seeds with its 95 % interval, and each seed's number.
"""

import json
from pathlib import Path

from prmoe_jax.report.arms import arms
from prmoe_jax.report.multiplier import multipliers
from prmoe_jax.tables import aligned

HERE = Path(__file__).parent


def read(name: str) -> list[dict]:
    return list(map(json.loads, (HERE / name).read_text().splitlines()))


def main() -> None:
    seconds = {row["model"]: row["median_s"] for row in read("speed.jsonl")}
    records = read("results.jsonl")
    for record in records:
        record["seconds"] = seconds[record["run"].split("/")[0]]
    rows = [
        (one.arm, one, ", ".join(f"{value:.2f}" for _, value in sorted(one.by_seed.items())))
        for one in multipliers(arms(records), "seconds")
    ]
    print(aligned(("arm", "in time", "by seed"), rows))


if __name__ == "__main__":
    main()
