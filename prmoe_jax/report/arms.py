"""Groups a sweep's records by arm (runs that differ only in their seed), and compares arms."""

import csv
import io
import math
import statistics
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from prmoe_jax import files
from prmoe_jax.config.schema import Config, leaves
from prmoe_jax.errors import UserError


class Mean(NamedTuple):
    """A mean and the half-width of its 95 % confidence interval (NaN for a single value)."""

    value: float
    margin: float

    def __str__(self) -> str:
        return f"{self.value:.4f}" + ("" if math.isnan(self.margin) else f" ± {self.margin:.4f}")


def mean(values: list[float]) -> Mean:
    """The mean of values, with a margin from Student's t distribution."""
    if len(values) < 2:
        return Mean(values[0], math.nan)
    error = statistics.stdev(values) / len(values) ** 0.5
    return Mean(statistics.fmean(values), float(stats.t.ppf(0.975, len(values) - 1)) * error)


class Factor(NamedTuple):
    """A geometric mean and the ends of its 95 % confidence interval (NaN for a single value)."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        between = "" if math.isnan(self.low) else f" ({self.low:.2f} to {self.high:.2f})"
        return f"{self.value:.2f}{between}"


def geometric_mean(values: Iterable[float]) -> Factor:
    """The geometric mean of numbers above 0; Student's t of the logarithms gives the interval."""
    value, margin = mean([math.log(value) for value in values])
    return Factor(math.exp(value), math.exp(value - margin), math.exp(value + margin))


def arms(records: list[dict], varying: Collection[str] = ()) -> dict[str, dict[int, dict]]:
    """Records by arm and seed; the arm is the run's name up to the last '/'.

    Besides the seed, runs of an arm may differ in the settings `varying`.
    """
    found: dict[str, dict[int, dict]] = {}
    for record in records:
        arm, ours = record["run"].rpartition("/")[0] or record["run"], record["settings"]
        rows = found.setdefault(arm, {})
        for other in rows.values():
            theirs = other["settings"]
            differing = {name for name in ours | theirs if ours.get(name) != theirs.get(name)}
            more = ", ".join(sorted(differing - {"seed", *varying}))
            if more or "seed" not in differing:
                what = f"in {more}" if "seed" in differing else "not in seed"
                raise UserError(
                    f"{other['run']} and {record['run']} are of one arm, but differ {what}; "
                    "train one of them again, give them names of two arms, or name in VARYING of "
                    "sweep.py what may differ"
                )
        rows[record["seed"]] = record
    return found


def models_of(found: dict[str, dict[int, dict]]) -> dict[str, str]:
    """The model of each arm: MODEL for an arm MODEL/LENGTH, else the arm's own name.

    If two arms of a MODEL have equal tokens, each arm of this MODEL is a model of its own.
    """
    models = {arm: arm.rpartition("/")[0] for arm in found}
    lengths = Counter((models[arm], _tokens(by_seed)) for arm, by_seed in found.items())
    equal = {model for (model, _), count in lengths.items() if count > 1}
    return {arm: arm if model in ("", *equal) else model for arm, model in models.items()}


def _runs(found: dict[str, dict[int, dict]]) -> dict[tuple[str, int], dict[int, dict]]:
    """The records of each model and seed by their tokens."""
    names = models_of(found)
    runs: dict[tuple[str, int], dict[int, dict]] = {}
    for arm, by_seed in found.items():
        for seed, record in by_seed.items():
            runs.setdefault((names[arm], seed), {})[record["tokens"]] = record
    return runs


def models(found: dict[str, dict[int, dict]]) -> dict[str, dict[int, dict]]:
    """Records by model and seed: the longest run's, with the last evaluation of every run."""
    joined: dict[str, dict[int, dict]] = {}
    for (model, seed), by_tokens in _runs(found).items():
        records = [by_tokens[tokens] for tokens in sorted(by_tokens)]
        joined.setdefault(model, {})[seed] = records[-1] | {
            "evaluations": [record["evaluations"][-1] for record in records],
            "evaluated_tokens": [1] * len(records),  # equal, since all are on the whole split
        }
    return joined


def equally_long(found: dict[str, dict[int, dict]]) -> tuple[int, dict[str, dict[int, dict]]]:
    """The largest number of tokens on which every model was trained with each of its seeds.

    Returns:
      This number, and the records of its runs by model and seed. Without such a number, 0 and {}.
    """
    runs = _runs(found)
    tokens = max(set.intersection(*map(set, runs.values())), default=0)
    joined: dict[str, dict[int, dict]] = {}
    for (model, seed), by_tokens in runs.items() if tokens else ():
        joined.setdefault(model, {})[seed] = by_tokens[tokens]
    return tokens, joined


def base_of(arm: str, found: dict[str, dict[int, dict]], base: str) -> str | None:
    """The baseline of an arm; None if there is none, or if the baseline is the arm itself.

    If `base` is MODEL/LENGTH, the baseline is the arm of MODEL with as many tokens as the arm.
    Otherwise it is `base`, but an arm MODEL/LENGTH needs as many tokens as `base`.
    """
    names, tokens = models_of(found), _tokens(found[arm])
    if names[base] == base and names[arm] != arm and tokens != _tokens(found[base]):
        return None
    if names[base] != base:
        alike = (b for b in found if names[b] == names[base] and _tokens(found[b]) == tokens)
        base = next(alike, arm)
    return None if base == arm else base


def _tokens(by_seed: dict[int, dict]) -> int:
    return next(iter(by_seed.values()))["tokens"]


class Spread(NamedTuple):
    """A standard deviation, and the degrees of freedom of its estimate."""

    deviation: float
    freedom: int


def spread(found: dict[str, dict[int, dict]]) -> Spread | None:
    """The spread of losses around the sum of an arm effect and a seed effect.

    This is the residual standard deviation of a two-way analysis of variance without interaction
    (randomised blocks). It assumes one variance for all arms. None without a degree of freedom.
    """
    cells = [(arm, seed) for arm, rows in found.items() for seed in rows]
    columns = [(0, arm) for arm in found] + [(1, seed) for seed in sorted({s for _, s in cells})]
    effects = np.array([[cell[i] == value for i, value in columns] for cell in cells], float)
    losses = np.array([found[arm][seed]["loss"] for arm, seed in cells])
    fit, _, rank, _ = np.linalg.lstsq(effects, losses)
    freedom, residuals = len(cells) - int(rank), losses - effects @ fit
    return Spread(math.sqrt(residuals @ residuals / freedom), freedom) if freedom else None


class Difference(NamedTuple):
    """An arm's mean loss minus its baseline's, paired by seed."""

    value: float
    error: float  # the standard error
    freedom: int  # degrees of freedom of the standard error

    @property
    def margin(self) -> float:
        """Half of the 95 % interval (Student's t)."""
        return float(stats.t.ppf(0.975, self.freedom)) * self.error

    @property
    def p(self) -> float:
        """The p value of a two-sided t test."""
        if not self.error:
            return 0.0 if self.value else 1.0
        return float(2 * stats.t.sf(abs(self.value) / self.error, self.freedom))

    def verdict(self, margin: float) -> str:
        """The verdict on the arm: 'equivalent', 'better', 'worse' or 'not resolved'.

        The arm is equivalent if two one-sided t tests at 5 % reject a difference of the margin or
        more in either direction, even if the 95 % interval excludes 0. Otherwise the arm is better
        or worse if the 95 % interval excludes 0.

        Args:
          margin: smaller differences count as none; in nats, chosen before the runs.
        """
        if abs(self.value) + stats.t.ppf(0.95, self.freedom) * self.error < margin:
            return "equivalent"
        if abs(self.value) <= self.margin:
            return "not resolved"
        return "better" if self.value < 0 else "worse"

    def __str__(self) -> str:
        return str(Mean(self.value, self.margin))


def difference(
    arm: dict[int, dict], base: dict[int, dict], pooled: Spread | None = None
) -> Difference | None:
    """An arm's mean loss minus the baseline's; None with fewer than two common seeds.

    The standard error is estimated from the pairs or, if given, from the spread `pooled` of losses.
    """
    common = sorted(arm.keys() & base.keys())
    if len(common) < 2:
        return None
    pairs = [arm[seed]["loss"] - base[seed]["loss"] for seed in common]
    deviation, freedom = statistics.stdev(pairs), len(common) - 1
    if pooled:
        deviation, freedom = pooled.deviation * math.sqrt(2), pooled.freedom
    return Difference(statistics.fmean(pairs), deviation / math.sqrt(len(common)), freedom)


def with_documents(
    arm: dict[int, dict], base: dict[int, dict], apart: Difference
) -> tuple[float, float] | None:
    """The ends of the 95 % interval of `apart` over seeds and over validation documents.

    A bootstrap of 2,000 draws with a fixed seed. Each draws seeds and, independently of them,
    documents, both with replacement and the same ones for arm and base. The spread of the drawn
    seeds is scaled so that its standard deviation times 1.96 is the margin of `apart`, since a
    bootstrap of few seeds is too narrow. The ends are the percentiles 2.5 and 97.5 of the draws.

    Returns:
      None if a record of the common seeds has no documents, or others.
    """
    common = sorted(arm.keys() & base.keys())
    rows = [found[seed].get("documents") for found in (arm, base) for seed in common]
    targets = [[count for _, count in row or ()] for row in rows]
    if not targets[0] or any(counts != targets[0] for counts in targets):
        return None
    nats = np.array([[loss for loss, _ in row] for row in rows])
    apart_SxN = nats[: len(common)] - nats[len(common) :]
    seeds, documents = apart_SxN.shape
    rng = np.random.default_rng(0)
    draws = [rng.multinomial(n, np.full(n, 1 / n), 2000) for n in (seeds, documents)]
    means_SxR = apart_SxN @ draws[1].T / (draws[1] @ np.array(targets[0]))
    mean_R, drawn_R = means_SxR.mean(0), (means_SxR * draws[0].T).sum(0) / seeds
    deviation = (apart_SxN.sum(1) / sum(targets[0])).std() / math.sqrt(seeds)
    scale = apart.margin / (1.96 * deviation) if deviation else 0.0
    low, high = np.quantile(mean_R + scale * (drawn_R - mean_R), (0.025, 0.975))
    return float(low), float(high)


def holm(p_values: list[float]) -> list[float]:
    """P values corrected for the number of tests (Holm 1979); NaN counts as no test.

    The chance of any corrected p value below 0.05 for a difference that is not real is at most 5 %.
    """
    tests = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    corrected, least = [math.nan] * len(p_values), 0.0
    for rank, (p, i) in enumerate(tests):
        least = max(least, min(1.0, p * (len(tests) - rank)))
        corrected[i] = least
    return corrected


def write_csv(records: list[dict], path: Path) -> None:
    """Writes one line for each run: its results, and the settings in which runs differ."""
    settings = [leaves(Config()) | record["settings"] for record in records]
    names = sorted({name for record in records for name in record["settings"]} - {"seed"})
    varied = [name for name in names if len({str(one.get(name, "")) for one in settings}) > 1]
    columns = "run seed loss bits_per_byte drop_fraction tokens total_params active_params".split()
    columns += ["flops_per_token", "tokens_per_second", "device"]
    rows = [[*columns, *varied]]
    for record, own in zip(records, settings, strict=True):
        rows.append([record[name] for name in columns] + [own.get(name, "") for name in varied])
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([map(_cell, row) for row in rows])
    files.replace(path, text.getvalue())


def _cell(value):
    """Puts an apostrophe before text that a spreadsheet would run as a formula."""
    if not isinstance(value, str):
        return value
    value = value.replace("\r", "\n")  # the csv module may leave "\r" unquoted
    return f"'{value}" if value.startswith(("=", "+", "-", "@", "\t", "\n")) else value
