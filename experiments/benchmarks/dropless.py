"""Training steps without drops interleaved with those with a capacity factor of 1, in one process.

    python experiments/benchmarks/dropless.py                 # on all cores
    taskset -c 0 python experiments/benchmarks/dropless.py    # on one

Prints a JSON line for each model and capacity factor.
"""

import json
import math
import os
import runpy
import statistics
from pathlib import Path

import jax

from prmoe_jax.allocator import keep_freed_memory
from prmoe_jax.bench.step import compiled_step
from prmoe_jax.bench.timing import interleaved
from prmoe_jax.config.loading import resolve
from prmoe_jax.config.schema import Config
from prmoe_jax.run.directory import device_name

TINY = runpy.run_path(str(Path(__file__).parents[2] / "configs" / "tiny.py"))
SMALL = {"d_model": 64, "d_ff": 256, "vocab_size": 1024}
MODELS = {  # architecture, sizes that differ from tiny's, sequences of a step
    "tiny:moe": ("moe", {}, 16),
    "E=64, 64 wide": ("8 layers, every 2, E=64", SMALL, 32),
}
FACTORS = 1.0, math.inf
REPEATS = 15


def config(name: str, factor: float) -> Config:
    architecture, sizes, batch = MODELS[name]
    settings = TINY["get_config"](architecture)
    settings.model.update(sizes)
    settings.moe.update(capacity_factor=factor, eval_capacity_factor=factor)
    settings.train.batch_size = batch
    return resolve(settings)


def main() -> None:
    keep_freed_memory()
    configs = {(name, factor): config(name, factor) for name in MODELS for factor in FACTORS}
    steps = {case: compiled_step(values) for case, values in configs.items()}
    seconds = interleaved({case: step.seconds for case, step in steps.items()}, REPEATS)
    for (name, factor), times in seconds.items():
        row = {"model": name, "capacity_factor": str(factor)}
        row |= {"tokens_per_s": configs[name, factor].tokens_per_step / statistics.median(times)}
        row |= {"median_s": statistics.median(times), "min_s": min(times), "max_s": max(times)}
        row |= {"cores": len(os.sched_getaffinity(0)), "jax": jax.__version__}
        print(json.dumps(row | {"device": device_name(jax.devices()[0])}))


if __name__ == "__main__":
    main()
