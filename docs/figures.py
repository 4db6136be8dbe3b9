"""Draws the figures of docs/ and README.md into docs/images/ from the records of experiments/.

python docs/figures.py
"""

import json
from pathlib import Path

from prmoe_jax.plan import picture
from prmoe_jax.report import figures
from prmoe_jax.report.arms import arms
from prmoe_jax.report.multiplier import multipliers
from prmoe_jax.sweep.definition import constants

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
IMAGES = Path(__file__).with_name("images")


def main(folder: Path = IMAGES) -> None:
    law = constants(EXPERIMENTS / "multiplier").predicted
    worth = multipliers(arms(records("multiplier")), predicted=law)
    figures.multipliers(worth, folder / "multipliers")
    (folder / "multipliers.png").unlink()  # the pages show the SVG
    plans = [(row["model"], row) for row in records("pod_plans") if "why" not in row]
    picture.draw(plans, folder / "pod_plans.png")


def records(experiment: str) -> list[dict]:
    text = (EXPERIMENTS / experiment / "results.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


if __name__ == "__main__":
    main()
