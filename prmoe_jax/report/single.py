"""`prmoe report --workdir=DIR`: one run's losses, speed and routers."""

from pathlib import Path

import numpy as np

from prmoe_jax import workdir as workdirs
from prmoe_jax.config import changed, load
from prmoe_jax.errors import UserError
from prmoe_jax.metrics import read_metrics
from prmoe_jax.report import figures, page
from prmoe_jax.sizes import cost

# Of a MoE layer: what is drawn by layer against the step.
BY_LAYER = {
    "drop_fraction": "choices dropped, share",
    "router_entropy": "entropy of the router, nats",
    "residual_coefficient": "weight of the experts' branch",
}


def report(workdir: Path) -> dict:
    """Writes the folder report/ with figures and report.html into a run's folder.

    Returns:
      page, the path; step, loss and validation_loss as logged last.

    Raises:
      UserError: no run there, or none that has logged anything.
    """
    config = load(workdir / workdirs.CONFIG)
    lines = read_metrics(workdir / "metrics.jsonl")
    trained = [line for line in lines if "loss" in line]
    evaluated = [line for line in lines if "eval/loss" in line]
    if not trained:
        raise UserError(f"{workdir}/metrics.jsonl holds no step yet")
    out = workdir / "report"
    out.mkdir(exist_ok=True)
    steps = [line["step"] for line in trained]

    def drawn(name: str, caption: str, draw, *arguments) -> None:
        draw(*arguments, out / name)
        pictures[out / name] = caption

    pictures: dict[Path, str] = {}
    losses = {"training": (steps, [line["lm_loss"] for line in trained])}
    if evaluated:
        whole = [line["step"] for line in evaluated], [line["eval/loss"] for line in evaluated]
        losses["validation"] = whole
    drawn("loss", "Cross-entropy.", figures.lines, losses, "nats a token")
    speed = {"": (steps, [line["tokens_per_second"] for line in trained])}
    drawn("speed", "Throughput.", figures.lines, speed, "tokens/s")

    layers = sorted({name.split("/")[1] for name in trained[-1] if name.startswith("layers/")})
    for name, label in BY_LAYER.items():
        key = f"layers/{{}}/{name}"
        series = {
            f"layer {layer}": (steps, [line[key.format(layer)] for line in trained])
            for layer in layers
            if key.format(layer) in trained[-1]
        }
        if series:
            drawn(name, f"{label.capitalize()}, by layer.", figures.lines, series, label)
    for name, label in (("expert_load", "× even load"), ("expert_drop_fraction", "dropped")):
        maps = {}
        for layer in layers:
            values = np.array([line[f"layers/{layer}/{name}"] for line in trained])
            maps[layer] = values * (values.shape[1] if name == "expert_load" else 1)
        if maps:
            caption = {
                "expert_load": "Choices of each expert, in shares of an even load.",
                "expert_drop_fraction": "Share of each expert's choices that it dropped.",
            }[name]
            drawn(name, caption, figures.heat, maps, steps, label)

    size = cost(config.model)
    rows = [["step", f"{lines[-1]['step']} of {config.total_steps}"]]
    if evaluated:
        last = evaluated[-1]
        rows.append(["validation loss, nats a token", f"{last['eval/loss']:.4f}"])
        rows.append(["bits a byte", f"{last['eval/bits_per_byte']:.4f}"])
        rows.append(["choices dropped", f"{last['eval/drop_fraction']:.1%}"])
    rows.append(["parameters", f"{size.total_params:,}"])
    rows.append(["active for a token", f"{size.active_params:,}"])
    parts = [
        page.paragraph(f"{config.model.schedule}, seed {config.seed}."),
        page.table(["", ""], rows),
        page.figures(pictures),
        page.heading("Settings that differ from the defaults"),
        page.table(["setting", "value"], [list(item) for item in changed(config).items()]),
    ]
    path = out / "report.html"
    path.write_text(page.page(str(workdir), parts))
    found = {"page": str(path), "step": lines[-1]["step"], "loss": trained[-1]["loss"]}
    return found | ({"validation_loss": evaluated[-1]["eval/loss"]} if evaluated else {})
