"""`prmoe report experiments/NAME`: a report about a sweep's results.jsonl."""

import math
import statistics
from collections import Counter
from pathlib import Path

from prmoe_jax import files
from prmoe_jax.errors import UserError
from prmoe_jax.report import figures, page
from prmoe_jax.report.arms import (
    Mean,
    Spread,
    arms,
    base_of,
    difference,
    equally_long,
    holm,
    mean,
    models,
    models_of,
    p_value,
    spread,
    verdict,
    write_csv,
)
from prmoe_jax.report.multiplier import Multiplier, multipliers, ratios
from prmoe_jax.sweep.definition import constants
from prmoe_jax.sweep.records import RESULTS, check_one_text, complete, read
from prmoe_jax.tables import aligned

HEAD = (
    "arm",
    "seeds",
    "tokens",
    "validation loss",
    "above {base}",
    "parameters",
    "active",
    "FLOPs/token",
    "dropped",
    "tokens/s",
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
    "positions of a sequence, later ones included. D/N: tokens per active parameter. The scaling "
    "law predicts active parameters; its dense model has as many FLOPs as the ladder's models "
    "would have with these, linear in logarithms, beyond the ladder's ends, too. The law is for "
    "experts in every layer, so that it takes the mean number of all layers, and for one expert a "
    "token with nothing beside it."
)
PAIR = ["arm", "base", "arm - base", "p, Holm", "verdict"]
COMPARISONS = (
    "The pairs that sweep.py names. Each interval and verdict is for one pair by itself; p is "
    "corrected for the number of pairs by Holm's method. Where p is 0.05 or more, a difference may "
    "be resolved only because so many were tested."
)
GROWTH = "Multipliers of neighbours, one divided by the other, paired by seed."


def report(folder: Path, base: str | None = None) -> dict:
    """Writes results.csv, figures and report.html beside results.jsonl.

    The report shows every record in results.jsonl, even if sweep.py no longer names its run. The
    constants of sweep.py ask for more: MARGIN for verdicts on differences, CONTRASTS for pairs of
    arms to compare, POOLED for intervals from the spread of all arms, LADDER for multipliers.
    VARYING names settings in which an arm's runs differ.

    Args:
      folder: the folder of results.jsonl.
      base: the arm that the others are compared with; by default the first one. If it is named
        MODEL/LENGTH, arms are compared with the model's arm of their own number of tokens.

    Returns:
      page, the path; base; its model; and arms. For each arm: seeds, tokens, loss and, with two
      seeds or more, margin (of the 95 % interval); with two seeds in common with the base also
      difference and difference_margin, paired by seed, and with MARGIN the verdict; with LADDER a
      MoE has its multiplier, as text. With CONTRASTS also contrasts, a list of arm, base,
      difference, difference_margin, p (a two-sided t test, corrected for the number of pairs) and,
      with MARGIN, verdict; with POOLED also deviation, in nats, and freedom, its degrees of
      freedom.

    Raises:
      UserError: the results are missing or damaged, a constant of sweep.py is wrong, the arm
        is unknown, matplotlib is missing, or a file cannot be written, which is then unchanged.
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
    rows, summary, apart = [], {}, {}
    for arm, by_seed in found.items():
        loss = mean([row["loss"] for row in by_seed.values()])
        other = base_of(arm, found, base)
        compared = _apart(by_seed, found[other], stated.margin, pooled) if other else {}
        told = ", ".join(filter(None, _told(compared)))
        tokens = next(iter(by_seed.values()))["tokens"]
        head = [arm, len(by_seed), f"{tokens:,}"]
        rows.append([*head, loss, told, *_costs(list(by_seed.values()))])
        summary[arm] = {"seeds": len(by_seed), "tokens": tokens, "loss": loss.value}
        if len(by_seed) > 1:
            summary[arm]["margin"] = loss.margin
        if compared:
            apart[arm] = Mean(compared["difference"], compared["difference_margin"])
            summary[arm] |= compared

    named = names[base]
    worth = multipliers(found) if stated.ladder else []
    by_params = multipliers(found, "active_params") if stated.ladder else []
    for one in worth:
        summary[one.arm]["multiplier"] = str(one)
    drawn, equal, when = found, found, "At the end"
    if lengths > 1 or named != base:
        drawn, (tokens, equal) = models(found), equally_long(found)
        when = f"After {tokens:,} tokens"
    pictures = _curves(folder, drawn) | _sizes_and_drops(folder, equal, when)
    if apart:
        pictures |= _differences(folder, apart, named, stated.margin)
    if worth:
        pictures |= _worth(folder, worth)

    pairs = [(arm, other) for arm, other in stated.contrasts if arm in found and other in found]
    corrected = holm([p_value(found[arm], found[other], pooled) for arm, other in pairs])
    contrasts = []
    for (arm, other), p in zip(pairs, corrected, strict=True):
        compared = _apart(found[arm], found[other], stated.margin, pooled)
        contrasts.append((arm, other, compared | {"p": p} if compared else compared))
    revisions = sorted({revision for row in records for revision in row["revisions"]})
    devices = sorted({f"{row['device']}, jax {row['versions'].get('jax', '?')}" for row in records})
    parts = [
        page.paragraph(
            f"{len(records)} runs in {len(found)} arms. Losses are nats a token on the whole "
            "validation split, ± half of a 95 % interval (Student's t); differences are paired by "
            "seed."
            + (POOLED.format(pooled) if pooled else "")
            + (EQUIVALENCE.format(margin=stated.margin) if stated.margin else "")
        ),
        page.table([name.format(base=named) for name in HEAD], rows),
        page.figures(pictures),
        *_contrasts(contrasts),
        *(_multipliers(worth, by_params) if stated.ladder else []),
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
    result = {"page": str(out), "base": base, "model": named, "arms": summary}
    if contrasts:
        result["contrasts"] = [{"arm": arm, "base": other} | row for arm, other, row in contrasts]
    if pooled:
        result |= pooled._asdict()
    return result


def _curves(folder: Path, drawn: dict) -> dict[Path, str]:
    """Draws losses against tokens and FLOPs; the figures and their captions."""
    tokens, flops = folder / "loss_tokens", folder / "loss_flops"
    caption = "Validation loss against tokens; band: all seeds."
    if figures.curves(drawn, tokens, by_flops=False):
        caption += " Hollow marks: the whole validation split; lines: a part of it."
    figures.curves(drawn, flops, by_flops=True)
    return {tokens: caption, flops: "The same against training FLOPs of the active parameters."}


def _sizes_and_drops(folder: Path, equal: dict, when: str) -> dict[Path, str]:
    """Draws sizes and drops of arms that are equally long; the figures and their captions."""
    found = {}
    if equal:
        found[folder / "loss_parameters"] = f"{when}: a line from active to all parameters."
        figures.sizes(equal, folder / "loss_parameters")
    if dropping := {arm: rows for arm, rows in equal.items() if _drops(rows)}:
        found[folder / "drops"] = f"{when}: who is dropped in the evaluation."
        figures.drops(dropping, folder / "drops")
    return found


def _differences(
    folder: Path, apart: dict[str, Mean], base: str, margin: float | None
) -> dict[Path, str]:
    """Draws differences from the arm `base`; the figure and its caption."""
    path = folder / "differences"
    figures.differences(apart, base, path, margin)
    shaded = f" Shaded: the margin of {margin:g}." if margin else ""
    return {path: f"Differences from {base}, paired by seed.{shaded}"}


def _worth(folder: Path, worth: list[Multiplier]) -> dict[Path, str]:
    """Draws the multipliers; the figure and its caption."""
    path = folder / "multipliers"
    figures.multipliers(worth, path)
    return {
        path: "Dense-equivalent multipliers. Small dots: seeds; bars: 95 % intervals of three "
        "seeds or more, cut at the ends of the ladder. Triangles: beyond the ladder. Dashed: the "
        "joint MoE scaling law (arXiv 2502.05172), which was fitted to models of 79 M active "
        "parameters and more."
    }


def _apart(
    arm: dict[int, dict], other: dict[int, dict], margin: float | None, pooled: Spread | None
) -> dict:
    """An arm's difference from another, its margin and its verdict, as far as there are any."""
    above = difference(arm, other, pooled=pooled)
    if above is None:
        return {}
    found = {"difference": above.value, "difference_margin": above.margin}
    return found | ({"verdict": verdict(arm, other, margin, pooled)} if margin else {})


def _told(compared: dict) -> tuple[str, str]:
    """A difference and its verdict as text; '' for what there isn't."""
    if not compared:
        return "", ""
    apart = Mean(compared["difference"], compared["difference_margin"])
    return str(apart), compared.get("verdict", "")


def _contrast(arm: str, base: str, compared: dict) -> list[str]:
    """A row of the table of comparisons."""
    apart, verdict = _told(compared)
    return [arm, base, apart, f"{compared['p']:.2g}" if compared else "", verdict]


def _contrasts(contrasts: list[tuple[str, str, dict]]) -> list[str]:
    """The part of the page about the pairs that sweep.py names."""
    if not contrasts:
        return []
    return [
        page.heading("Comparisons"),
        page.paragraph(COMPARISONS),
        page.table(PAIR, [_contrast(*contrast) for contrast in contrasts]),
    ]


def _multipliers(worth: list[Multiplier], by_params: list[Multiplier]) -> list[str]:
    """The part of the page about multipliers in FLOPs and in active parameters."""
    if not worth:
        return [page.paragraph("No MoE has two dense arms with as many tokens and a common seed.")]
    head = ["arm", "tokens", "D/N", "seeds", "multiplier", "scaling law"]
    head += ["by active parameters", "scaling law"]
    rows = []
    for one, other in zip(worth, by_params, strict=True):
        rows.append([one.arm, f"{one.tokens:,}", f"{one.tokens_per_parameter:.1f}"])
        rows[-1].append(len(one.by_seed))
        for each in one, other:
            rows[-1] += [each, "" if math.isnan(each.law) else f"{each.law:.2f}"]
    return [
        page.heading("Dense-equivalent multipliers"),
        page.paragraph(LADDER),
        page.table(head, rows),
        page.paragraph(GROWTH),
        page.table(["arm", "base", "ratio"], [list(one) for one in ratios(worth)]),
    ]


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
    several = len({row["tokens"] for row in result["arms"].values()}) > 1
    for arm, row in result["arms"].items():
        loss = f"{row['loss']:.4f}" + (f" ± {row['margin']:.4f}" if "margin" in row else "")
        above = ""
        if "difference" in row:
            above = f"{row['difference']:+.4f} ± {row['difference_margin']:.4f}"
        tokens = [f"{row['tokens']:,}"] if several else []
        rows.append([arm, row["seeds"], *tokens, loss, above])
    head = ["arm", "seeds", *(["tokens"] if several else []), "loss", f"above {result['model']}"]
    for column in "verdict", "multiplier":
        if any(column in row for row in result["arms"].values()):
            head.append(column)
            for cells, row in zip(rows, result["arms"].values(), strict=True):
                cells.append(row.get(column, ""))
    tables = [aligned(head, rows)]
    contrasts = [row for row in result.get("contrasts", ()) if "difference" in row]
    if contrasts:
        rows = [_contrast(row["arm"], row["base"], row) for row in contrasts]
        tables.append(aligned(PAIR, rows))
    if "deviation" in result:
        tables.append(
            "all arms: a standard deviation of {deviation:.4f} nats, {freedom} degrees of "
            "freedom".format(**result)
        )
    return "\n\n".join(tables) + f"\n{result['page']}"
