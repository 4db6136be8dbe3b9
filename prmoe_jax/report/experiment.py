"""`prmoe report experiments/NAME`: a report about a sweep's results.jsonl."""

import statistics
from pathlib import Path

from prmoe_jax import files
from prmoe_jax.errors import UserError
from prmoe_jax.report import figures, page
from prmoe_jax.report.arms import arms, difference, mean, write_csv
from prmoe_jax.sweep.records import RESULTS, complete, read
from prmoe_jax.tables import aligned

HEAD = (
    "arm",
    "seeds",
    "validation loss",
    "above {base}",
    "parameters",
    "active",
    "FLOPs/token",
    "dropped",
    "tokens/s",
)


def report(folder: Path, base: str | None = None) -> dict:
    """Writes results.csv, figures and report.html beside results.jsonl.

    The report shows every record in results.jsonl, even if sweep.py no longer names its run.

    Args:
      folder: the folder of results.jsonl.
      base: the arm that the others are compared with; by default the first one.

    Returns:
      page, the path; base; and arms. For each arm: seeds, loss and, with two seeds or more, margin
      (of the 95 % interval); with two seeds in common with the base also difference and
      difference_margin, paired by seed.

    Raises:
      UserError: the results are missing or damaged, the arm is unknown, matplotlib is missing, or
        a file cannot be written, which is then unchanged.
    """
    path = folder / RESULTS
    records = complete(folder, read(folder))
    if not records:
        if not path.exists():
            raise UserError(f"{path} is missing; prmoe sweep {folder} makes it")
        raise UserError(f"{path} holds no runs of prmoe sweep")
    found = arms(records)
    base = next(iter(found)) if base is None else base
    if base not in found:
        raise UserError(f"{path} has no arm {base!r}; --base is one of {', '.join(found)}")
    write_csv(records, folder / "results.csv")
    rows, summary, apart = [], {}, {}
    for arm, by_seed in found.items():
        loss = mean([row["loss"] for row in by_seed.values()])
        above = difference(by_seed, found[base]) if arm != base else None
        rows.append([arm, len(by_seed), loss, above or "", *_costs(list(by_seed.values()))])
        summary[arm] = {"seeds": len(by_seed), "loss": loss.value}
        if len(by_seed) > 1:
            summary[arm]["margin"] = loss.margin
        if above:
            apart[arm] = above
            summary[arm] |= {"difference": above.value, "difference_margin": above.margin}

    caption = "Validation loss against tokens; band: all seeds."
    if figures.curves(found, folder / "loss_tokens", by_flops=False):
        caption += " Hollow marks: the whole validation split; lines: a part of it."
    pictures = {folder / "loss_tokens": caption}
    pictures[folder / "loss_flops"] = "The same against training FLOPs of the active parameters."
    figures.curves(found, folder / "loss_flops", by_flops=True)
    pictures[folder / "loss_parameters"] = "At the end: a line from active to all parameters."
    figures.sizes(found, folder / "loss_parameters")
    if apart:
        pictures[folder / "differences"] = f"Differences from {base}, paired by seed."
        figures.differences(apart, base, folder / "differences")

    if dropping := {arm: rows for arm, rows in found.items() if _drops(rows)}:
        pictures[folder / "drops"] = "Who is dropped, in the last evaluation."
        figures.drops(dropping, folder / "drops")

    revisions = sorted({revision for row in records for revision in row["revisions"]})
    devices = sorted({f"{row['device']}, jax {row['versions'].get('jax', '?')}" for row in records})
    parts = [
        page.paragraph(
            f"{len(records)} runs in {len(found)} arms. Losses are nats a token on the whole "
            "validation split, ± half of a 95 % interval (Student's t); differences are paired by "
            "seed."
        ),
        page.table([name.format(base=base) for name in HEAD], rows),
        page.figures(pictures),
        page.heading("Runs"),
        page.table(
            ["run", "loss", "bits/byte", "tokens", "tokens/s"],
            [
                [
                    row["run"],
                    f"{row['loss']:.4f}",
                    f"{row['bits_per_byte']:.4f}",
                    f"{row['tokens']:,}",
                    f"{row['tokens_per_second']:,.0f}",
                ]
                for row in records
            ],
        ),
        page.paragraph(f"Made by revisions {', '.join(revisions)} on {'; '.join(devices)}."),
    ]
    out = folder / "report.html"
    files.replace(out, page.page(folder.resolve().name, parts))
    return {"page": str(out), "base": base, "arms": summary}


def _drops(rows: dict[int, dict]) -> bool:
    known = all(row.get("layers") for row in rows.values())
    return known and any(row["drop_fraction"] for row in rows.values())


def _costs(rows: list[dict]) -> list[str]:
    row = rows[0]
    return [
        f"{row['total_params'] / 1e6:.2f} M",
        f"{row['active_params'] / 1e6:.2f} M",
        f"{row['flops_per_token'] / 1e6:.1f} M",
        f"{statistics.fmean(r['drop_fraction'] for r in rows):.1%}",
        f"{statistics.fmean(r['tokens_per_second'] for r in rows):,.0f}",
    ]


def table(result: dict) -> str:
    """The result of `report` as text."""
    rows = []
    for arm, row in result["arms"].items():
        loss = f"{row['loss']:.4f}" + (f" ± {row['margin']:.4f}" if "margin" in row else "")
        above = ""
        if "difference" in row:
            above = f"{row['difference']:+.4f} ± {row['difference_margin']:.4f}"
        rows.append((arm, row["seeds"], loss, above))
    head = "arm", "seeds", "loss", f"above {result['base']}"
    return f"{aligned(head, rows)}\n{result['page']}"
