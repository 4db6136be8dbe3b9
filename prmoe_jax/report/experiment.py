"""`prmoe report experiments/NAME`: a report about a sweep's results.jsonl."""

import math
from collections import Counter
from pathlib import Path
from statistics import fmean

from prmoe_jax import files
from prmoe_jax.errors import UserError
from prmoe_jax.report import figures, page
from prmoe_jax.report.arms import (
    Difference,
    Mean,
    arms,
    base_of,
    difference,
    equally_long,
    holm,
    mean,
    models,
    models_of,
    spread,
    with_documents,
    write_csv,
)
from prmoe_jax.report.multiplier import Multiplier, multipliers, ratios
from prmoe_jax.sweep.definition import Constants, constants
from prmoe_jax.sweep.records import RESULTS, check_one_text, complete, read
from prmoe_jax.tables import aligned

SUMMARY = (
    "{} runs in {} arms. Losses are nats a token on the whole validation split, ± half of a 95 % "
    "interval (Student's t); differences are paired by seed."
)
EQUIVALENCE = (
    " An arm is equivalent to another if two one-sided t tests at 5 % place its difference within "
    "±{margin:g}, the margin that sweep.py states; else it is better or worse if the 95 % interval "
    "excludes 0."
)
POOLED = (
    " Intervals of differences take the losses of all arms to vary alike: around the sum of an "
    "effect of the arm and one of the seed, their standard deviation is {0.deviation:.4f} nats "
    "({0.freedom} degrees of freedom)."
)
LADDER = (
    "How many times a MoE's FLOPs for each token a dense model needs to reach its loss with the "
    "same tokens, and how many times its active parameters. Between two dense arms, log(loss) is "
    "linear in log(FLOPs), and beyond them no multiplier is measured. The geometric mean over "
    "seeds, and in brackets its 95 % interval (Student's t). FLOPs count attention to all "
    "positions of a sequence, later ones included. D/N: tokens per active parameter."
)
PREDICTED = (
    " The scaling law predicts active parameters; its dense model has as many FLOPs as the "
    "ladder's models would have with these, linear in logarithms, beyond the ladder's ends, too."
)
PAIR = ["arm", "base", "arm - base", "p, Holm", "verdict"]
COMPARISONS = (
    "The pairs that sweep.py names. Each interval and verdict is for one pair by itself; p is "
    "corrected for the number of pairs by Holm's method. Where p is 0.05 or more, a difference may "
    "be resolved only because so many were tested."
)
BOTH = "seeds and documents"
RESAMPLED = (
    " The interval of seeds and documents resamples both (a bootstrap of 2,000 draws, percentiles "
    "2.5 and 97.5); the other interval takes the validation text as given. Verdicts and p are "
    "those of the other interval."
)
GROWTH = "Multipliers of neighbours, one divided by the other, paired by seed."


def report(folder: Path, base: str | None = None) -> dict:
    """Writes results.csv, figures and report.html beside results.jsonl.

    The report shows every record in results.jsonl, even if sweep.py no longer names its run.
    Constants in sweep.py add to it: MARGIN (verdicts on differences), CONTRASTS (comparisons of
    pairs of arms), LADDER (multipliers) and PREDICTED (multipliers by the scaling law LAW). POOLED
    takes intervals from the spread of all arms. VARYING names settings in which runs of an arm may
    differ.

    Args:
      folder: the folder of results.jsonl.
      base: the baseline arm; by default the first one. If it is MODEL/LENGTH, each arm is compared
        with the arm of MODEL that has the same number of tokens.

    Returns:
      page (its path), base, model (of the base) and arms. Each arm has seeds, tokens and loss; with
      two seeds or more, margin (half of the 95 % interval); with two seeds in common with its
      baseline, difference and difference_margin, and with MARGIN a verdict; with LADDER, a MoE has
      its multiplier as text. CONTRASTS add contrasts, a list with arm, base, difference,
      difference_margin, p (two-sided t test, corrected for the number of pairs) and, with MARGIN,
      verdict; with_documents, an interval, where the records have documents.
      POOLED adds deviation (in nats) and freedom (its degrees of freedom).
    """
    path = folder / RESULTS
    records = complete(folder, read(folder))
    if not records:
        if not path.exists():
            raise UserError(f"{path} is missing; prmoe sweep {folder} makes it")
        raise UserError(f"{path} holds no runs of prmoe sweep")
    check_one_text(records)
    stated = constants(folder)
    found = arms(records, stated.varying)
    base = next(iter(found)) if base is None else base
    if base not in found:
        raise UserError(f"{path} has no arm {base!r}; --base is one of {', '.join(found)}")
    write_csv(records, folder / "results.csv")
    names = models_of(found)
    model, lengths = Counter(names.values()).most_common(1)[0]
    if stated.pooled and lengths > 1:
        raise UserError(
            f"{folder}/sweep.py: POOLED is for arms that share no steps, and {model} has {lengths} "
            "lengths; leave it out"
        )
    pooled = spread(found) if stated.pooled else None
    summary, apart = {}, {}
    for arm, by_seed in found.items():
        loss = mean([row["loss"] for row in by_seed.values()])
        tokens = next(iter(by_seed.values()))["tokens"]
        summary[arm] = {"seeds": len(by_seed), "tokens": tokens, "loss": loss.value}
        if len(by_seed) > 1:
            summary[arm]["margin"] = loss.margin
        other = base_of(arm, found, base)
        if other and (above := difference(by_seed, found[other], pooled)):
            apart[arm] = above
            summary[arm] |= _compared(above, stated.margin)
    contrasts = []
    pairs = [(arm, other) for arm, other in stated.contrasts if arm in found and other in found]
    between = [difference(found[arm], found[other], pooled) for arm, other in pairs]
    corrected = holm([one.p if one else math.nan for one in between])
    for (arm, other), above, p in zip(pairs, between, corrected, strict=True):
        row = _compared(above, stated.margin) | {"p": p} if above else {}
        if above and (both := with_documents(found[arm], found[other], above)):
            row["with_documents"] = both
        contrasts.append({"arm": arm, "base": other} | row)
    worth = multipliers(found, predicted=stated.predicted) if stated.ladder else []
    for one in worth:
        summary[one.arm]["multiplier"] = str(one)
    text = SUMMARY.format(len(records), len(found))
    text += POOLED.format(pooled) if pooled else ""
    text += EQUIVALENCE.format(margin=stated.margin) if stated.margin else ""
    parts = [
        page.paragraph(text),
        _arms(summary, found, names[base]),
        page.figures(_pictures(folder, found, names[base], apart, worth, stated)),
    ]
    if contrasts:
        told = COMPARISONS + (RESAMPLED if _resampled(contrasts) else "")
        parts += [page.heading("Comparisons"), page.paragraph(told), page.table(*_pairs(contrasts))]
    if stated.ladder:
        parts += _multipliers(worth, found, stated.predicted)
    parts += _runs(records)
    out = folder / "report.html"
    files.replace(out, page.page(folder.resolve().name, parts))
    result = {"page": str(out), "base": base, "model": names[base], "arms": summary}
    if contrasts:
        result["contrasts"] = contrasts
    return result | (pooled._asdict() if pooled else {})


def _compared(above: Difference, margin: float | None) -> dict:
    """The fields of a difference in the result, with a verdict if there is a margin."""
    found = {"difference": above.value, "difference_margin": above.margin}
    return found | ({"verdict": above.verdict(margin)} if margin else {})


def _loss(row: dict) -> Mean:
    return Mean(row["loss"], row.get("margin", math.nan))


def _above(row: dict, sign: str = "") -> str:
    """A difference with its margin; '' if there is none."""
    if "difference" not in row:
        return ""
    return f"{row['difference']:{sign}.4f} ± {row['difference_margin']:.4f}"


def _arms(summary: dict[str, dict], found: dict[str, dict[int, dict]], base: str) -> str:
    rows = []
    for arm, row in summary.items():
        records = list(found[arm].values())
        one = records[0]
        cells = {
            "arm": arm,
            "seeds": row["seeds"],
            "tokens": f"{row['tokens']:,}",
            "validation loss": _loss(row),
            f"above {base}": ", ".join(filter(None, [_above(row), row.get("verdict")])),
            "parameters": f"{one['total_params'] / 1e6:.2f} M",
            "active": f"{one['active_params'] / 1e6:.2f} M",
            "FLOPs/token": f"{one['flops_per_token'] / 1e6:.1f} M",
            "dropped": f"{fmean(record['drop_fraction'] for record in records):.1%}",
            "tokens/s": f"{fmean(record['tokens_per_second'] for record in records):,.0f}",
        }
        rows.append(list(cells.values()))
    return page.table(list(cells), rows)


def _pictures(
    folder: Path,
    found: dict,
    base: str,
    apart: dict[str, Difference],
    worth: list[Multiplier],
    stated: Constants,
) -> dict[Path, str]:
    """Draws all figures; returns their paths and captions. `base` is a model's name."""
    drawn, equal, when = found, found, "At the end"
    if len(set(models_of(found).values())) < len(found) or base not in found:
        drawn, (tokens, equal) = models(found), equally_long(found)
        when = f"After {tokens:,} tokens"
    captions = {"loss_tokens": "Validation loss against tokens; band: all seeds."}
    if figures.curves(drawn, folder / "loss_tokens", by_flops=False):
        captions["loss_tokens"] += " Hollow marks: the whole validation split; lines: a part of it."
    figures.curves(drawn, folder / "loss_flops", by_flops=True)
    captions["loss_flops"] = "The same against training FLOPs of the active parameters."
    if equal:
        figures.sizes(equal, folder / "loss_parameters")
        captions["loss_parameters"] = f"{when}: a line from active to all parameters."
    if dropping := {arm: rows for arm, rows in equal.items() if _drops(rows)}:
        figures.drops(dropping, folder / "drops")
        captions["drops"] = f"{when}: who is dropped in the evaluation."
    if apart:
        figures.differences(apart, base, folder / "differences", stated.margin)
        captions["differences"] = f"Differences from {base}, paired by seed."
        if stated.margin:
            captions["differences"] += f" Shaded: the margin of {stated.margin:g}."
    if worth:
        figures.multipliers(worth, folder / "multipliers")
        captions["multipliers"] = (
            "Dense-equivalent multipliers. Small dots: seeds; bars: 95 % intervals of three seeds "
            "or more, cut at the ends of the ladder. Triangles: beyond the ladder."
        )
        if stated.predicted:
            captions["multipliers"] += f" Dashed: {stated.law}."
    return {folder / name: caption for name, caption in captions.items()}


def _resampled(contrasts: list[dict]) -> bool:
    return any("with_documents" in row for row in contrasts)


def _pairs(contrasts: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of contrasts."""
    rows = []
    for row in contrasts:
        p = f"{row['p']:.2g}" if "p" in row else ""
        rows.append([row["arm"], row["base"], _above(row), p, row.get("verdict", "")])
    if not _resampled(contrasts):
        return PAIR, rows
    for cells, row in zip(rows, contrasts, strict=True):
        ends = row.get("with_documents")
        cells.insert(3, f"{ends[0]:.4f} to {ends[1]:.4f}" if ends else "")
    return [*PAIR[:3], BOTH, *PAIR[3:]], rows


def _multipliers(worth: list[Multiplier], found: dict, predicted: dict) -> list[str]:
    if not worth:
        return [page.paragraph("No MoE has two dense arms with as many tokens and a common seed.")]
    law = ["scaling law"] if predicted else []
    head = ["arm", "tokens", "D/N", "seeds", "multiplier", *law, "by active parameters", *law]
    rows = []
    for one, other in zip(worth, multipliers(found, "active_params", predicted), strict=True):
        row = [one.arm, f"{one.tokens:,}", f"{one.tokens_per_parameter:.1f}", len(one.by_seed)]
        for each in one, other:
            row.append(each)
            if predicted:
                row.append("" if math.isnan(each.law) else f"{each.law:.2f}")
        rows.append(row)
    return [
        page.heading("Dense-equivalent multipliers"),
        page.paragraph(LADDER + (PREDICTED if predicted else "")),
        page.table(head, rows),
        page.paragraph(GROWTH),
        page.table(["arm", "base", "ratio"], [list(one) for one in ratios(worth)]),
    ]


def _runs(records: list[dict]) -> list[str]:
    cells = "{run}", "{loss:.4f}", "{bits_per_byte:.4f}", "{tokens:,}", "{tokens_per_second:,.0f}"
    rows = [[cell.format(**row) for cell in cells] for row in records]
    revisions = sorted({revision for row in records for revision in row["revisions"]})
    devices = sorted({f"{row['device']}, jax {row['versions'].get('jax', '?')}" for row in records})
    return [
        page.heading("Runs"),
        page.table(["run", "loss", "bits/byte", "tokens", "tokens/s"], rows),
        page.paragraph(f"Made by revisions {', '.join(revisions)} on {'; '.join(devices)}."),
    ]


def _drops(rows: dict[int, dict]) -> bool:
    known = all(row.get("layers") for row in rows.values())
    return known and any(row["drop_fraction"] for row in rows.values())


def table(result: dict) -> str:
    """The result of `report` as text."""
    rows = result["arms"]
    columns = {
        "arm": list(rows),
        "seeds": [row["seeds"] for row in rows.values()],
        "tokens": [f"{row['tokens']:,}" for row in rows.values()],
        "loss": list(map(_loss, rows.values())),
        f"above {result['model']}": [_above(row, "+") for row in rows.values()],
    }
    if len(set(columns["tokens"])) == 1:
        del columns["tokens"]
    for name in "verdict", "multiplier":
        if any(name in row for row in rows.values()):
            columns[name] = [row.get(name, "") for row in rows.values()]
    tables = [aligned(list(columns), zip(*columns.values(), strict=True))]
    if contrasts := [row for row in result.get("contrasts", ()) if "difference" in row]:
        tables.append(aligned(*_pairs(contrasts)))
    if "deviation" in result:
        told = (
            "all arms: a standard deviation of {deviation:.4f} nats, {freedom} degrees of freedom"
        )
        tables.append(told.format(**result))
    return "\n\n".join(tables) + f"\n{result['page']}"
