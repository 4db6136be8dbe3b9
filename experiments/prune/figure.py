"""Draws prune.png: the loss of each pruned model before and after it learns from its teacher.

    python experiments/prune/figure.py

The losses are those of the recorded runs.
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

HERE = Path(__file__).parent
WAYS = "uniform by_load by_activation by_loss inverse merged".split()
LINES = {"teacher": "black", "scratch_{}_longer": "#009E73"}


def losses(path: Path) -> dict[str, list[float]]:
    """The losses of all seeds, by arm."""
    found: dict[str, list[float]] = {}
    for row in map(json.loads, path.read_text().splitlines()):
        arm = row["arm"] if "arm" in row else row["run"].rpartition("/")[0] or "teacher"
        found.setdefault(arm, []).append(row["loss"])
    return found


def main() -> None:
    before, after = losses(HERE / "cut.jsonl"), losses(HERE / "results.jsonl")
    after |= losses(HERE / "teacher/results.jsonl")
    figure, panels = pyplot.subplots(1, 2, figsize=(8, 3.2), sharex=True, layout="constrained")
    for panel, keep in zip(panels, (50, 75), strict=True):
        for name, colour in LINES.items():
            seeds = after[name.format(keep)]
            panel.axvspan(min(seeds), max(seeds), color=colour, alpha=0.15, linewidth=0)
            label = "from scratch, the teacher's tokens too" if "scratch" in name else name
            panel.axvline(sum(seeds) / len(seeds), color=colour, label=label)
        for place, way in enumerate(WAYS):
            for label, found, colour in (
                ("pruned", before, "#D55E00"),
                ("and distilled", after, "#0072B2"),
            ):
                seeds = found[f"{way}_{keep}"]
                panel.plot(seeds, [place] * len(seeds), color=colour, linewidth=1)
                mean = sum(seeds) / len(seeds)
                panel.plot(mean, place, "o", color=colour, label="" if place else label)
        panel.set_yticks(range(len(WAYS)), WAYS if keep == 50 else [""] * len(WAYS))
        panel.invert_yaxis()
        panel.set(title=f"{keep} % of the experts", xlabel="validation loss, nats")
        panel.grid(alpha=0.3)
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(HERE / "prune.png", dpi=140, metadata={"Software": None})


if __name__ == "__main__":
    main()
