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


def table(findings: list[Finding]) -> str:
    """The findings as lines; a fix is in the line below its finding."""
    lines = aligned(
        ("", "", ""),
        [(finding.status, finding.name, finding.line) for finding in findings],
        texts=(0, 1, 2),
    ).splitlines()[1:]
    shown = []
    for finding, line in zip(findings, lines, strict=True):
        shown.append(line)
        if finding.fix:
            shown.append(f"      fix: {finding.fix}")
    return "\n".join(shown)


def rate(value: float, unit: str) -> str:
    """Formats a rate: '1.23 TFLOP/s'."""
    for prefix, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {prefix}{unit}/s"
    return f"{value:.3g} {unit}/s"
