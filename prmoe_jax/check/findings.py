"""Findings of a check: one line each, with a fix if something is wrong."""

import statistics
from collections.abc import Mapping
from typing import NamedTuple

from prmoe_jax.tables import aligned

OK, WARN, FAIL = "ok", "warn", "fail"


class Finding(NamedTuple):
    """The result of one test."""

    name: str
    status: str  # OK | WARN | FAIL; only FAIL makes the whole check red
    line: str  # what was found, with its numbers
    fix: str = ""  # what to do about it


class Part(NamedTuple):
    """The findings of one part of the check, and its numbers for the record."""

    findings: list[Finding]
    numbers: dict


def slow(rates: Mapping, share: float) -> dict:
    """Members whose rate is below `share` of the median -> their rate divided by the median."""
    if not rates:
        return {}
    median = statistics.median(rates.values())
    return {name: rate / median for name, rate in rates.items() if rate < share * median}


def slow_processes(rates: list[float], share: float, unit: str) -> str:
    """Names the processes whose rate is below `share` of the median; '' if there is none."""
    behind = slow(dict(enumerate(rates)), share)
    return ", ".join(f"process {number} {rate(rates[number], unit)}" for number in behind)


def table(findings: list[Finding]) -> str:
    """The findings as lines; a fix is in the line below its finding."""
    cells = [(finding.status, finding.name, finding.line) for finding in findings]
    lines = aligned(("", "", ""), cells, texts=(0, 1, 2)).splitlines()[1:]
    return "\n".join(
        f"{line}\n      fix: {finding.fix}" if finding.fix else line
        for finding, line in zip(findings, lines, strict=True)
    )


def rate(value: float, unit: str) -> str:
    """Formats a rate: '1.23 TFLOP/s'."""
    for prefix, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {prefix}{unit}/s"
    return f"{value:.3g} {unit}/s"
