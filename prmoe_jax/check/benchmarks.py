"""Runs `prmoe bench moe`, `step` and `decode` in one call, for an accelerator's first numbers."""

import logging
import time
from collections.abc import Callable

import jax

from prmoe_jax.bench import decode, moe, step
from prmoe_jax.check.findings import FAIL, OK, WARN, Finding, Part
from prmoe_jax.config import architecture
from prmoe_jax.config.loading import resolve
from prmoe_jax.config.schema import Config
from prmoe_jax.errors import UserError
from prmoe_jax.errors.ending import describe
from prmoe_jax.inference.generate import STEPS
from prmoe_jax.parallel import processes

log = logging.getLogger(__name__)

# No benchmark starts later than this many seconds after the check began, so that a call ends within
# ten minutes.
START_BY = 420.0
# The model of `bench step` and `bench decode` on CPUs, and on accelerators.
CPU_MODEL = architecture.parse_fields("6 layers, E=4x2+8, residual") | {"dtype": "float32"}
MODEL = architecture.parse_fields("12 layers, E=8, residual") | {
    "vocab_size": 50_304,
    "length": 2048,
    "d_model": 768,
    "heads": 12,
    "d_ff": 3072,
    "remat": "dots",
}


def check(config: Config | None, begun: float, tell: Callable[[str], None]) -> Part:
    """Runs the benchmarks on process 0's first device; none starts after `START_BY`.

    The experiment of `bench step` and `bench decode` is the config, or a small PR-MoE. The check
    began at `begun`, by `time.perf_counter`. `tell` is called with the table of each benchmark.
    """
    findings, numbers = [], {}
    if jax.process_index() == 0:
        for name, (run, table) in _benchmarks(config).items():
            if time.perf_counter() - begun > START_BY:
                line = f"left out: {START_BY:.0f} s had passed"
                findings.append(Finding(name, WARN, line, f"run prmoe {name} by itself"))
                continue
            log.info("%s", name)
            try:
                numbers[name] = run()
            except Exception as error:  # such as too little memory; the others still run
                # The machine is not at fault if a benchmark refuses the config.
                status = WARN if isinstance(error, UserError) else FAIL
                findings.append(Finding(name, status, describe(error).line))
                continue
            tell(f"{table(numbers[name])}\n")
            findings.append(Finding(name, OK, f"{len(numbers[name])} rows"))
    processes.barrier()
    return Part(findings, numbers)


def _benchmarks(config: Config | None) -> dict[str, tuple[Callable, Callable]]:
    """Benchmark -> the function that runs it, and the function that formats its rows as a table."""
    if jax.default_backend() == "cpu":
        sizes, turns, dtype = [moe.Size(4096, 256, 1024, 32)], 5, "float32"
        model, batch_size = CPU_MODEL, 16
    else:
        sizes = [moe.Size(4096, 512, 2048, 64), moe.Size(8192, 1024, 4096, 32)]
        turns, dtype, model, batch_size = 15, "bfloat16", MODEL, 8
    if config is None:
        config = resolve({"model": model, "train": {"steps": 1, "batch_size": batch_size}})
    one, prompt = {"one device": None}, max(1, min(64, config.model.length - STEPS))
    return {
        "bench moe": (lambda: moe.bench_moe(sizes, ["uniform"], dtype, turns), moe.table),
        "bench step": (lambda: step.bench_step(config, turns), step.table),
        "bench decode": (
            lambda: decode.bench_decode(config, [1, 8], [dtype, "int8"], prompt, turns, one),
            decode.table,
        ),
    }
