"""`prmoe report --workdir=DIR`: one run's losses, speed and routers; here S is steps."""

from functools import partial
from operator import itemgetter
from pathlib import Path

import numpy as np

from prmoe_jax import files
from prmoe_jax.config.loading import load
from prmoe_jax.config.schema import changed
from prmoe_jax.errors import UserError, refusing
from prmoe_jax.model.sizes import cost
from prmoe_jax.report import figures, page
from prmoe_jax.run import directory as workdirs
from prmoe_jax.run.metrics import entropy_share, fullest, of_layer, read
from prmoe_jax.sweep.records import NUMBER, logged

# What is drawn against the step, with a line for each MoE layer: its label, its value for a layer's
# metrics, and the value of a uniform router or an even load, if there is one.
BY_LAYER = {
    "drop_fraction": ("choices dropped, share", itemgetter("drop_fraction"), None),
    "router_entropy": ("entropy of the router / ln E", entropy_share, 1.0),
    "fullest_expert": ("load of the fullest expert, × even", fullest, 1.0),
    "router_weight": ("weight of a token's experts, mean", itemgetter("router_weight"), None),
    "added_norm": (
        "norm of the experts' output / of the residual stream",
        itemgetter("added_norm"),
        None,
    ),
    "residual_coefficient": (
        "weight of the experts' branch",
        itemgetter("residual_coefficient"),
        None,
    ),
}
# Maps of each layer's experts: the metric, its quantity and its caption.
BY_EXPERT = (
    ("expert_load", "× even load", "Choices of each expert, in shares of an even load."),
    ("expert_drop_fraction", "dropped", "Share of each expert's choices that it dropped."),
)


ODD = (IndexError, TypeError, ValueError)  # what reading odd values of a metric raises


def report(workdir: Path) -> dict:
    """Writes the folder report/ with figures and report.html into a run's folder.

    Returns:
      page (its path), and the last logged step, loss and, if evaluated, validation_loss.
    """
    config = load(workdir / workdirs.CONFIG)
    trained, evaluated = logged(workdir)
    if not trained:
        raise UserError(f"{workdir}/metrics.jsonl holds no step yet")
    step = max(lines[-1]["step"] for lines in (trained, evaluated) if lines)
    out = workdir / "report"
    with refusing(f"{out} cannot be written", OSError):
        out.mkdir(exist_ok=True)
    pictures: dict[Path, str] = {}

    def drawn(name: str, caption: str, draw, *arguments) -> None:
        draw(*arguments, out / name)
        pictures[out / name] = caption

    losses = {"training": _series(trained, "lm_loss")}
    # Evaluations on a part of the split have fewer tokens, and get their own line.
    counts = sorted({line["eval/tokens"] for line in evaluated})
    whole = {line["eval/tokens"] for line in evaluated if line["step"] == config.total_steps}
    for count in counts:
        kind = ", whole split" if count in whole else f", {count:,} tokens"
        points = [line for line in evaluated if line["eval/tokens"] == count]
        losses["validation" + (kind if len(counts) > 1 else "")] = _series(points, "eval/loss")
    drawn("loss", "Cross-entropy.", figures.lines, losses, "nats a token")
    speed = {"": _series(trained, "tokens_per_second")}
    drawn("speed", "Throughput.", figures.lines, speed, "tokens/s")

    layers = sorted({name.split("/")[1] for name in trained[-1] if name.startswith("layers/")})
    for name, (label, value, even) in BY_LAYER.items():
        series = {}
        for layer in layers:
            with refusing(f"{workdir}/metrics.jsonl is damaged: odd values of layer {layer}", ODD):
                points = [(line["step"], read(value, of_layer(line, layer))) for line in trained]
            if points := [(step, y) for step, y in points if isinstance(y, NUMBER)]:
                series[f"layer {layer}"] = tuple(map(list, zip(*points, strict=True)))
        if series:
            caption = f"{label[0].upper()}{label[1:]}, by layer."
            drawn(name, caption, partial(figures.lines, level=even), series, label)
    for name, label, caption in BY_EXPERT:
        keys = {layer: f"layers/{layer}/{name}" for layer in layers}
        having = [line for line in trained if all(key in line for key in keys.values())]
        maps = {}
        for layer, key in keys.items() if having else ():
            damaged = f"{workdir}/metrics.jsonl is damaged: odd values of {key}"
            with refusing(damaged, ODD):
                values_SxE = np.array([line[key] for line in having], float)
                maps[layer] = values_SxE * (values_SxE.shape[1] if name == "expert_load" else 1)
        if maps:
            drawn(name, caption, figures.heat, maps, [line["step"] for line in having], label)

    size = cost(config.model, config.moe)
    rows = {"step": f"{step} of {config.total_steps}"}
    if evaluated:
        last = evaluated[-1]
        rows["validation loss, nats a token"] = f"{last['eval/loss']:.4f}"
        rows["tokens of the validation split"] = f"{last['eval/tokens']:,}"
        rows["bits a byte"] = f"{last['eval/bits_per_byte']:.4f}"
        rows["choices dropped"] = f"{last['eval/drop_fraction']:.1%}"
    rows["parameters"] = f"{size.total_params:,}"
    rows["active for a token"] = f"{size.active_params:,}"
    parts = [
        page.paragraph(f"{config.model.schedule}, seed {config.seed}."),
        page.table(["", ""], rows.items()),
        page.figures(pictures),
        page.heading("Settings that differ from the defaults"),
        page.table(["setting", "value"], changed(config).items()),
    ]
    path = out / "report.html"
    files.replace(path, page.page(str(workdir), parts))
    found = {"page": str(path), "step": step, "loss": trained[-1]["loss"]}
    return found | ({"validation_loss": evaluated[-1]["eval/loss"]} if evaluated else {})


def _series(lines: list[dict], name: str) -> tuple[list, list]:
    """The steps of lines, and their values of a metric."""
    return [line["step"] for line in lines], [line[name] for line in lines]
