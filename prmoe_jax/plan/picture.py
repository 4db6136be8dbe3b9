"""A picture of plans: a step's time by part of the model, and a chip's memory by use."""

import io
import math
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from prmoe_jax import files
from prmoe_jax.errors import UserError, missing
from prmoe_jax.plan.chips import chip_of, unit

# Parts of a step and their colours, in the order of the bars: matrix products come first.
PARTS = {
    "mlp": "#1b6ca8",
    "experts": "#4a9fd8",
    "attention": "#2f8f5b",
    "attention kernels": "#7cc49a",
    "logits": "#8a6bb1",
    "embedding": "#c0a9d9",
    "routing": "#d97b29",
    "dispatch": "#f0b36d",
    "exchange": "#f7d9b0",
    "norm": "#c9b458",
    "layers": "#666666",
    "cast": "#838383",
    "optimizer": "#999999",
    "other": "#cccccc",
    "collectives": "#b3282d",
}
HELD = {
    "parameters": "#1b6ca8",
    "optimizer": "#999999",
    "teacher": "#4a9fd8",
    "past": "#7cc49a",
    "batch": "#c0a9d9",
    "padding": "#cccccc",
    "temporaries": "#f0b36d",
    "needed": "#b3282d",
}


def check(path: Path) -> None:
    """Raises the errors of `draw` early, before a plan is made."""
    with missing("a picture needs matplotlib", "prmoe_jax[plot]"):
        from matplotlib.backend_bases import FigureCanvasBase
    formats = FigureCanvasBase.get_supported_filetypes().keys() - {"pgf"}  # pgf needs LaTeX
    if path.suffix[1:].lower() not in formats:
        raise UserError(
            f"{path}: '{path.suffix}' is no format of a picture; use .png, .svg or .pdf"
        )
    if not os.access(path.parent, os.W_OK) or path.is_dir():
        raise UserError(f"{path} cannot be written: name a file in a folder that takes one")


def draw(plans: Sequence[tuple[str, dict]], path: Path) -> None:
    """Writes a figure with two bars for each plan: its step's time by part, its memory by use.

    Bars are shares of the step and of a chip's memory, so that plans of any size can be compared;
    the milliseconds and GiB stand beside them. Each topology has one row of the figure.

    Args:
      plans: pairs of a label, unique within its topology, and a plan from `report.plan`.
      path: the picture's path; its suffix gives the format.
    """
    check(path)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import PercentFormatter

    groups: dict[str, dict[str, dict]] = defaultdict(dict)
    for label, result in plans:
        groups[result["topology"]][label] = result
    sizes = [len(group) + 1 for group in groups.values()]
    figure, axes = pyplot.subplots(
        *(len(groups), 2),
        figsize=(10, 1 + 0.3 * sum(sizes)),
        height_ratios=sizes,
        sharex="col",
        squeeze=False,
        layout="constrained",
    )
    for (times, memory), (topology, group) in zip(axes, groups.items(), strict=True):
        room = chip_of(topology).hbm_bytes
        for place, result in enumerate(group.values()):
            step_s = result.get("modelled_step_s", math.nan)
            _bar(times, place, result.get("components", {}), step_s, PARTS, _time(result))
            held = result["hbm_bytes_per_chip"]
            held = {"needed": held["needed"]} if "needed" in held else held
            _bar(memory, place, held, room, HELD, f"{sum(held.values()) / 2**30:.1f} GiB")
        times.set_yticks(range(len(group)), group.keys())
        memory.set_yticks([])
        times.set_title(topology, loc="left", fontsize=10)
        memory.set_title(f"{room / 2**30:.0f} GiB a {unit(topology)}", loc="left", fontsize=10)
        for one in times, memory:
            one.set(xlim=(0, 1), ylim=(len(group) - 0.5, -0.5))
            one.xaxis.set_major_formatter(PercentFormatter(1))
            one.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("share of the modelled step")
    axes[-1, 1].set_xlabel("share of a chip's memory")
    for side, (names, colours) in enumerate(zip(_shown(plans), (PARTS, HELD), strict=True)):
        handles = [pyplot.Rectangle((0, 0), 1, 1, color=colours[name]) for name in names]
        axes[0, side].legend(
            *(handles, names), fontsize=7, ncols=4 - side, loc="lower left",
            bbox_to_anchor=(0, 1 + 0.8 / sizes[0]), frameon=False,
        )  # fmt: skip
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix[1:].lower(), dpi=120)
    pyplot.close(figure)
    files.replace(path, drawn.getvalue())


def _time(result: dict) -> str:
    if "modelled_step_s" not in result:
        return "does not fit"
    mfu = f", {result['modelled_mfu']:.0%} MFU" if "modelled_mfu" in result else ""
    return f"{result['modelled_step_s'] * 1e3:.4g} ms{mfu}"


def _shown(plans: Sequence[tuple[str, dict]]) -> tuple[list[str], list[str]]:
    """The parts with at least 1 % of some plan's step, and uses with 1 % of a chip's memory."""
    parts, uses = set(), set()
    for _, plan in plans:
        least = 0.01 * chip_of(plan["topology"]).hbm_bytes
        uses |= {use for use, size in plan["hbm_bytes_per_chip"].items() if size >= least}
        least = 0.01 * plan.get("modelled_step_s", 0)
        parts |= {part for part, seconds in plan.get("components", {}).items() if seconds >= least}
    return [part for part in PARTS if part in parts], [use for use in HELD if use in uses]


def _bar(
    axes, place: int, sizes: dict[str, float], whole: float, colours: dict[str, str], text: str
) -> None:
    """Draws a bar, and writes a text to the right of the axes in its row."""
    left = 0.0
    for name in filter(sizes.__contains__, colours):
        axes.barh(place, sizes[name] / whole, left=left, color=colours[name], height=0.7)
        left += sizes[name] / whole
    axes.text(1.01, place, text, va="center", fontsize=8, transform=axes.get_yaxis_transform())
