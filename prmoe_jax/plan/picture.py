"""A picture of plans: a step's time by part of the model, and a chip's memory by use."""

import io
import os
from pathlib import Path

from prmoe_jax import files
from prmoe_jax.errors import UserError
from prmoe_jax.plan.chips import CHIPS

# Parts of a step in the order of the bars, matrix products first.
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
    "optimizer": "#999999",
    "other": "#cccccc",
    "collectives": "#b3282d",
}
HELD = {
    "parameters": "#1b6ca8",
    "optimizer": "#999999",
    "past": "#7cc49a",
    "temporaries": "#f0b36d",
    "needed": "#b3282d",
}


def check(path: Path) -> None:
    """Raises the errors of `draw` early, before a plan is made.

    Raises:
      UserError: matplotlib is missing or does not support the format, or the folder can't be
        written.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise UserError("a picture needs matplotlib: pip install -e '.[plot]'") from None
    if path.suffix[1:].lower() not in FigureCanvasBase.get_supported_filetypes():
        raise UserError(
            f"{path}: '{path.suffix}' is no format of a picture; use .png, .svg or .pdf"
        )
    if not os.access(path.parent, os.W_OK) or path.is_dir():
        raise UserError(f"{path} cannot be written: name a file in a folder that takes one")


def draw(plans: dict[str, dict], path: Path) -> None:
    """Writes a figure with one bar for each plan: milliseconds by part, and GiB per chip by use.

    Args:
      plans: label -> plan from `report.plan`.
      path: the picture's path, whose suffix gives the format.

    Raises:
      UserError: see `check`, or the file cannot be written.
    """
    check(path)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (times, memory) = pyplot.subplots(
        1, 2, figsize=(13, 1.6 + 0.42 * len(plans)), sharey=True, layout="constrained"
    )
    places = range(len(plans) - 1, -1, -1)  # the first on top
    for place, result in zip(places, plans.values(), strict=True):
        parts = result.get("components", {})
        _bar(times, place, {part: parts.get(part, 0) * 1e3 for part in PARTS}, PARTS)
        if "modelled_step_s" in result:
            text = f" {result['modelled_step_s'] * 1e3:.4g} ms"
            if "modelled_mfu" in result:
                text += f", {result['modelled_mfu']:.0%} MFU"
            times.text(result["modelled_step_s"] * 1e3, place, text, va="center", fontsize=8)
        else:
            times.text(0, place, " does not fit", va="center", fontsize=8)
        held = result["hbm_bytes_per_chip"]
        uses = ["needed"] if "needed" in held else [use for use in HELD if use in held]
        _bar(memory, place, {use: held[use] / 2**30 for use in uses}, HELD)
        limit = CHIPS[result["topology"].partition(":")[0]].hbm_bytes / 2**30
        memory.plot([limit, limit], [place - 0.45, place + 0.45], color="black", linewidth=2)
    times.set_yticks(list(places), plans.keys(), fontsize=8)
    times.set_xlabel("modelled milliseconds a step")
    memory.set_xlabel("GiB a chip (black: what it has)")
    times.margins(x=0.25)
    for axes, colours in ((times, PARTS), (memory, HELD)):
        axes.spines[["top", "right"]].set_visible(False)
        handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()]
        axes.legend(handles, colours.keys(), fontsize=7, ncols=6, loc="lower left",
                    bbox_to_anchor=(0, 1), frameon=False)  # fmt: skip
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix[1:].lower(), dpi=120)
    pyplot.close(figure)
    files.replace(path, drawn.getvalue())


def _bar(axes, place: int, sizes: dict[str, float], colours: dict[str, str]) -> None:
    left = 0.0
    for name, size in sizes.items():
        axes.barh(place, size, left=left, color=colours[name], height=0.7)
        left += size
