"""Figures of sweeps and of single runs, each as PNG and SVG; here S is steps, P positions."""

import contextlib
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from prmoe_jax import files
from prmoe_jax.errors import missing
from prmoe_jax.report.arms import Difference, Mean, mean
from prmoe_jax.report.multiplier import Multiplier

# Colours that people with red-green colour blindness can tell apart (Okabe and Ito).
COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #000000 #8C6D31".split()
MARKS = "o s ^ D v P X *".split()
LEGEND = 8  # a legend of more names goes below the figure
# Each file type's resolution, and metadata without a date, so that files are reproducible.
KINDS = {
    "svg": {"dpi": "figure", "metadata": {"Date": None, "Creator": None}},
    "png": {"dpi": 140, "metadata": {"Software": None}},
}


@contextlib.contextmanager
def figure(path: Path, height: float = 3.6, rows: int = 1) -> Iterator:
    """Yields axes to draw on; saves them as `path`.png and .svg, reproducible to the byte."""
    with missing("a report needs matplotlib", "prmoe_jax[plot]"):
        import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {"svg.hashsalt": path.name, "font.size": 11, "axes.grid": True, "grid.alpha": 0.3}
    style["text.usetex"] = False  # overrides the user's own style
    with pyplot.rc_context(style):
        shape = {"nrows": rows, "squeeze": False, "layout": "constrained", "sharex": rows > 1}
        drawing, axes = pyplot.subplots(figsize=(6.4, height), **shape)
        for one in axes.flat:
            one.spines[["top", "right"]].set_visible(False)
        try:
            yield axes[0, 0] if rows == 1 else list(axes[:, 0])
            for kind, options in KINDS.items():
                content = io.BytesIO()
                drawing.savefig(content, format=kind, **options)
                files.replace(path.with_suffix(f".{kind}"), content.getvalue())
        finally:
            pyplot.close(drawing)


def _style(number: int) -> dict[str, str]:
    """The colour and marker of an arm by its number; pairs repeat after 64 arms."""
    again, colour = divmod(number, len(COLOURS))
    return {"color": COLOURS[colour], "marker": MARKS[(number + again) % len(MARKS)]}


def _legend(axes) -> None:
    """Adds a legend inside the axes; a long one goes below, and makes the figure higher."""
    handles, names = axes.get_legend_handles_labels()
    if len(names) <= LEGEND:
        axes.legend(frameon=False)
        return
    drawing, columns = axes.figure, 3
    drawing.set_figheight(drawing.get_figheight() + 0.2 * -(-len(names) // columns))
    place = {"loc": "outside lower center", "ncols": columns}
    drawing.legend(handles, names, frameon=False, fontsize=8, **place)


def _logarithmic(axis, subs: Sequence[float], shown: Callable[[float, int], str]) -> None:
    """Puts ticks at these multiples of the powers of 10, with the text `shown`."""
    from matplotlib.ticker import LogLocator

    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(shown)
    axis.set_minor_formatter("")


def label(name: str) -> str:
    """Escapes a name so that matplotlib shows it literally.

    Matplotlib sets text between dollar signs as mathematics, and leaves names that start with an
    underscore out of legends.
    """
    return re.sub("^_", " _", name).replace("$", r"\$")


def curves(arms: dict[str, dict[int, dict]], path: Path, by_flops: bool) -> bool:
    """Draws validation loss against tokens or training FLOPs: mean and range of the seeds.

    The last evaluation is on the whole split, and earlier ones may be on a part of it. If an arm
    has partial evaluations, its line joins only these, and evaluations on the whole split are
    hollow marks.

    Returns:
      Whether there are partial evaluations.
    """
    hollow = {"linestyle": "none", "markersize": 9, "markerfacecolor": "none"}
    any_partial = False
    with figure(path) as axes:
        for number, (arm, rows) in enumerate(arms.items()):
            scale = next(iter(rows.values()))["flops_per_token"] if by_flops else 1
            style = _style(number)
            colour = style["color"]
            partial, whole = zip(*map(_evaluations, rows.values()), strict=True)
            x, losses = _common(partial, scale)
            if len(x):
                any_partial = True
                end, last = _common(whole, scale)
                axes.vlines(end, last.min(0), last.max(0), color=colour)
                axes.plot(end, last.mean(0), **style, **hollow)
            else:
                x, losses = _common(whole, scale)
            axes.plot(x, losses.mean(0), **style, markersize=4, label=label(arm))
            axes.fill_between(x, losses.min(0), losses.max(0), color=colour, alpha=0.2, linewidth=0)
        if any_partial:
            axes.plot([], [], color="grey", marker="o", **hollow, label="whole split")
        axes.set(xlabel="training FLOPs" if by_flops else "tokens", ylabel="validation loss, nats")
        _legend(axes)
    return any_partial


def _evaluations(record: dict) -> tuple[dict[int, float], dict[int, float]]:
    """Loss by trained tokens: evaluations on a part of the split, and those on all of it."""
    evaluations = record["evaluations"]
    # Old records have no counts; only their last evaluation is known to be on the whole split.
    counts = record.get("evaluated_tokens") or range(len(evaluations))
    partial, whole = {}, {}
    for (tokens, loss), count in zip(evaluations, counts, strict=True):
        (whole if count == counts[-1] else partial)[tokens] = loss
    return partial, whole


def _common(by_seed: Sequence[dict[int, float]], scale: float) -> tuple[np.ndarray, np.ndarray]:
    """x [points] and losses [seeds, points] of the evaluations that all seeds have."""
    tokens = sorted(set.intersection(*map(set, by_seed)))
    return np.array(tokens) * scale, np.array([[losses[t] for t in tokens] for losses in by_seed])


def sizes(arms: dict[str, dict[int, dict]], path: Path) -> None:
    """Draws the last validation loss against all parameters and against the active ones."""
    with figure(path) as axes:
        for number, (arm, rows) in enumerate(arms.items()):
            record = next(iter(rows.values()))
            loss = mean([row["loss"] for row in rows.values()])
            style = _style(number)
            x = [record["active_params"], record["total_params"]]
            axes.plot(x, [loss.value] * 2, color=style["color"], linewidth=1)
            margin = np.nan_to_num(loss.margin)
            axes.errorbar(x[1], loss.value, yerr=margin, capsize=3, label=label(arm), **style)
        axes.set(xlabel="parameters, active to all", ylabel="validation loss, nats", xscale="log")
        _logarithmic(axes.xaxis, (1, 1.5, 2, 3, 5, 7), lambda size, _: f"{size / 1e6:g}M")
        _legend(axes)


def differences(
    found: Mapping[str, Difference | Mean], base: str, path: Path, margin: float | None = None
) -> None:
    """Draws each arm's difference from `base` with its 95 % interval.

    The range of equivalence, ±`margin`, is shaded.
    """
    with figure(path, 1.2 + 0.4 * len(found)) as axes:
        if margin:
            axes.axvspan(-margin, margin, color="grey", alpha=0.2, linewidth=0)
        for number, above in enumerate(found.values()):
            style = {"fmt": "o", "color": COLOURS[0], "capsize": 4}
            axes.errorbar(above.value, number, xerr=above.margin, **style)
        axes.axvline(0, color="black", linewidth=1)
        axes.set_yticks(range(len(found)), list(map(label, found)))
        axes.set_ylim(-0.6, len(found) - 0.4)
        axes.invert_yaxis()
        axes.locator_params(axis="x", nbins=6)  # more tick labels would touch
        axes.set(xlabel=f"validation loss above {label(base)}, nats (95 %)")


def multipliers(found: list[Multiplier], path: Path) -> None:
    """Draws multipliers against tokens per active parameter, and what a scaling law predicts.

    A line joins the arms of a model. An arm beyond the ladder is a triangle at the ladder's end,
    which points outwards. Small dots are seeds. A bar is the 95 % interval, cut at the ladder's
    ends; it needs three seeds, since two would make it several times as wide.
    """
    predicted = not all(np.isnan(one.law) for one in found)
    series: dict[str, list[Multiplier]] = {}
    for one in sorted(found, key=lambda one: (one.experts, one.tokens)):
        series.setdefault(one.model, []).append(one)
    with figure(path, 4.2) as axes:
        beyond = False
        for number, (name, some) in enumerate(series.items()):
            style = {"color": _style(number)["color"]}
            x = [one.tokens_per_parameter for one in some]
            inside = [0 < one.value < np.inf for one in some]
            y = np.where(inside, [one.value for one in some], np.nan)
            axes.plot(x, y, marker="o", markersize=5, label=label(name), **style)
            for one, at, ok in zip(some, x, inside, strict=True):
                if ok:
                    seeds = [value for value in one.by_seed.values() if 0 < value < np.inf]
                    axes.plot([at] * len(seeds), seeds, ".", markersize=4, alpha=0.6, **style)
                    if one.inside and len(seeds) > 2:
                        low, high = max(one.low, one.least), min(one.high, one.most)
                        axes.vlines(at, low, high, **style)
                    continue
                beyond, above = True, one.value > 0
                end, mark = (one.most, "^") if above else (one.least, "v")
                axes.plot(at, end, mark, markersize=9, markerfacecolor="none", **style)
            if predicted:
                axes.plot(x, [one.law for one in some], linestyle="--", linewidth=1, **style)
        axes.axhline(1, color="black", linewidth=1)
        if predicted:
            axes.plot([], [], linestyle="--", linewidth=1, color="grey", label="scaling law")
        if beyond:
            mark = {"marker": "^", "markersize": 9, "markerfacecolor": "none", "color": "grey"}
            axes.plot([], [], linestyle="", label="beyond the ladder", **mark)
        axes.set(xlabel="tokens per active parameter, D/N", ylabel="dense-equivalent multiplier")
        axes.set(xscale="log", yscale="log")
        for axis in axes.xaxis, axes.yaxis:
            _logarithmic(axis, (1, 2, 3, 5), lambda value, _: f"{value:g}")
        _legend(axes)


def drops(arms: dict[str, dict[int, dict]], path: Path) -> None:
    """Draws the dropped share of choices by position in the group (mean of layers and seeds)."""
    with figure(path) as axes:
        for number, (arm, rows) in enumerate(arms.items()):
            layers = [layer for record in rows.values() for layer in record["layers"].values()]
            shares = [layer["position_drop_fraction"] for layer in layers]
            places_P = _middles(max(map(len, shares)))  # small groups have fewer
            share_P = np.mean([np.interp(places_P, _middles(len(s)), s) for s in shares], 0)
            axes.plot(places_P, share_P, markersize=4, label=label(arm), **_style(number))
        axes.set(xlabel="place in the routing group, from 0 to 1", ylabel="choices dropped, share")
        _legend(axes)


def _middles(parts: int) -> np.ndarray:
    """The middles of `parts` equal parts of the range from 0 to 1."""
    return (np.arange(parts) + 0.5) / parts


def lines(
    series: dict[str, tuple[list, list]], quantity: str, path: Path, level: float | None = None
) -> None:
    """Draws named series against the step, and a dashed line at `level`.

    A series of one point is a mark.
    """
    with figure(path, 3.0) as axes:
        if level is not None:
            axes.axhline(level, color="0.5", linestyle="--", linewidth=0.8)
        for number, (name, (x, y)) in enumerate(series.items()):
            style = _style(number)
            if len(x) > 1:
                del style["marker"]
            axes.plot(x, y, label=label(name), linewidth=1.2, **style)
        axes.set(xlabel="step", ylabel=quantity)
        if len(series) > 1:
            axes.legend(frameon=False, ncols=min(4, len(series)))


def heat(layers: dict[str, np.ndarray], steps: list[int], quantity: str, path: Path) -> None:
    """Draws a map for each layer: steps on the x-axis, experts on the y-axis, values as colours.

    The highest 1 % of the values share one colour.
    """
    with figure(path, 0.8 + 1.3 * len(layers), len(layers)) as axes:
        axes = np.atleast_1d(axes)
        top = float(np.quantile(np.concatenate([v.ravel() for v in layers.values()]), 0.99))
        width = (steps[-1] - steps[0]) / (len(steps) - 1) if len(steps) > 1 else 1
        edges = [*steps, steps[-1] + width]
        for one, (layer, values_SxE) in zip(axes, layers.items(), strict=True):
            experts = np.arange(values_SxE.shape[1] + 1) - 0.5
            mesh = one.pcolormesh(edges, experts, values_SxE.T, vmin=0, vmax=top, rasterized=True)
            one.grid(False)
            one.set(ylabel=label(f"layer {layer}"))
        one.set(xlabel="step")
        one.figure.colorbar(mesh, ax=axes, label=quantity, extend="max")
