"""Groups a sweep's records by arm (runs that differ only in their seed), and compares arms."""

import csv
import io
import math
import statistics
from pathlib import Path
from typing import NamedTuple

from prmoe_jax import files
from prmoe_jax.errors import UserError


class Mean(NamedTuple):
    """A mean and the half-width of its 95 % confidence interval; NaN for a single value."""

    value: float
    margin: float

    def __str__(self) -> str:
        return f"{self.value:.4f}" + ("" if math.isnan(self.margin) else f" ± {self.margin:.4f}")


def mean(values: list[float]) -> Mean:
    """The mean of values, with a margin by Student's t."""
    from scipy import stats

    if len(values) < 2:
        return Mean(values[0], math.nan)
    t = float(stats.t.ppf(0.975, len(values) - 1))
    return Mean(statistics.fmean(values), t * statistics.stdev(values) / len(values) ** 0.5)


def arms(records: list[dict]) -> dict[str, dict[int, dict]]:
    """Records by arm and seed; the arm is the run's name up to the last '/'.

    Raises:
      UserError: two runs of an arm differ in more than their seed, or in nothing.
    """
    found: dict[str, dict[int, dict]] = {}
    for record in records:
        arm = record["run"].rpartition("/")[0] or record["run"]
        rows = found.setdefault(arm, {})
        for other in rows.values():
            differing = {
                name
                for name in record["settings"].keys() | other["settings"].keys()
                if record["settings"].get(name) != other["settings"].get(name)
            }
            if differing != {"seed"}:
                raise UserError(
                    f"{other['run']} and {record['run']} are of one arm, but differ in "
                    f"{', '.join(sorted(differing)) or 'nothing'}; an arm's runs differ in seed "
                    "alone: delete the older record's line in results.jsonl"
                )
        rows[record["seed"]] = record
    return found


def difference(arm: dict[int, dict], base: dict[int, dict], of: str = "loss") -> Mean | None:
    """An arm's mean difference from another, paired by seed; None with under two common seeds."""
    common = sorted(arm.keys() & base.keys())
    if len(common) < 2:
        return None
    return mean([arm[seed][of] - base[seed][of] for seed in common])


def write_csv(records: list[dict], path: Path) -> None:
    """Writes one line for each run: its results, and the settings in which runs differ.

    Raises:
      UserError: the file cannot be written.
    """
    names = sorted({name for record in records for name in record["settings"]})
    varied = [
        name for name in names if len({str(record["settings"].get(name)) for record in records}) > 1
    ]
    columns = "run seed loss bits_per_byte drop_fraction tokens total_params active_params".split()
    columns += ["flops_per_token", "tokens_per_second", "device"]
    rows = [[*columns, *varied]]
    for record in records:
        settings = [record["settings"].get(name, "") for name in varied]
        rows.append([*(record[name] for name in columns), *settings])
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([map(_cell, row) for row in rows])
    files.replace(path, text.getvalue())


def _cell(value):
    """Puts an apostrophe before text that a spreadsheet would run as a formula."""
    if not isinstance(value, str):
        return value
    value = value.replace("\r", "\n")  # the csv module may leave "\r" unquoted
    return f"'{value}" if value.startswith(("=", "+", "-", "@", "\t", "\n")) else value
