"""Training steps of all models of this experiment, interleaved in one process.

    taskset -c 0 python experiments/multiplier/speed.py > experiments/multiplier/speed.jsonl

Prints a JSON line for each model; needs no text.
"""

import json
import os
import runpy
import statistics
import subprocess
from pathlib import Path

import jax

from prmoe_jax.allocator import keep_freed_memory
from prmoe_jax.bench.step import compiled_step
from prmoe_jax.bench.timing import interleaved
from prmoe_jax.config.loading import resolve
from prmoe_jax.run.directory import device_name

HERE = Path(__file__).parent
SWEEP = runpy.run_path(str(HERE / "sweep.py"))
REPEATS = 15


def main() -> None:
    keep_freed_memory()
    arms = [arm for arm in SWEEP["ARMS"] if arm != "dense_216"]
    configs = {arm: resolve(SWEEP["get_config"](arm, 350, SWEEP["rate"](arm))) for arm in arms}
    steps = {arm: compiled_step(config) for arm, config in configs.items()}
    seconds = interleaved({arm: step.seconds for arm, step in steps.items()}, REPEATS)
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, cwd=HERE).stdout.strip()
    for arm, times in seconds.items():
        row = {"model": arm, "median_s": statistics.median(times)}
        row |= {"min_s": min(times), "max_s": max(times)}
        row |= {"tokens_per_s": configs[arm].tokens_per_step / row["median_s"]}
        row |= {"times_dense_64": row["median_s"] / statistics.median(seconds["dense_64"])}
        row |= {"cores": len(os.sched_getaffinity(0)), "device": device_name(jax.devices()[0])}
        row |= {"jax": jax.__version__, "commit": commit}
        print(json.dumps(row))


if __name__ == "__main__":
    main()
