"""How many tokens does Muon need for the losses that AdamW reaches in experiments/muon?

    python experiments/muon/same_loss.py

For each seed, log(tokens) is interpolated linearly in log(loss) between two runs with Muon; nothing
is extrapolated. Prints AdamW's tokens divided by Muon's, the geometric mean over seeds and its 95 %
interval (Student's t).
"""

import json
import math
from pathlib import Path

from prmoe_jax.report.arms import arms, geometric_mean, mean
from prmoe_jax.report.multiplier import equivalent_compute
from prmoe_jax.tables import aligned

RECORD = Path(__file__).parent / "results.jsonl"
LENGTHS = "0.75M", "1.5M", "3M", "4.5M"


def fewer(found: dict, model: str, length: str) -> str:
    """AdamW's tokens over Muon's for the same loss, as text."""
    ratios, most = [], math.inf
    for seed, record in found[f"{model}_adamw/{length}"].items():
        runs = [found.get(f"{model}_muon/{other}", {}).get(seed) for other in LENGTHS]
        points = [(run["tokens"], run["loss"]) for run in runs if run]
        if len(points) > 1:
            ratios.append(record["tokens"] / max(equivalent_compute(record["loss"], points), 1e-9))
            most = min(most, record["tokens"] / points[0][0])
    if not ratios or min(ratios) == 0:
        return ""
    if max(ratios) > most:  # Muon's shortest run has a lower loss
        return f"more than {most:.2f}"
    return str(geometric_mean(ratios))


def main() -> None:
    found = arms([json.loads(line) for line in RECORD.read_text().splitlines()])
    rows = []
    for model in ("dense", "moe"):
        for length in LENGTHS:
            if adamw := found.get(f"{model}_adamw/{length}"):
                loss = mean([record["loss"] for record in adamw.values()])
                rows.append((model, length, len(adamw), loss, fewer(found, model, length)))
    head = "model", "AdamW's tokens", "seeds", "AdamW's loss", "AdamW's tokens / Muon's"
    print(aligned(head, rows))


if __name__ == "__main__":
    main()
