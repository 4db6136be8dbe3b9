"""Compile time of the train step against depth: layers are scanned, so it must not grow.

    python experiments/benchmarks/compile_time.py

Prints the median of three compilations of 8 and of 24 layers of the same widths, for a dense
model and a PR-MoE, and their ratio.
"""

import json
import statistics
import time

import jax
import jax.numpy as jnp

from prmoe_jax.config import architecture
from prmoe_jax.config.loading import resolve
from prmoe_jax.config.schema import default_config
from prmoe_jax.model.batch import Batch
from prmoe_jax.training.step import init_state, make_train_step

DEPTHS = {
    "dense": ("8 layers", "24 layers"),
    "prmoe": ("8 layers, E=4x3+8, residual", "24 layers, E=4x10+8x2, residual"),
}


def compile_seconds(text: str) -> float:
    settings = default_config()
    settings.model.update(architecture.parse_fields(text))
    settings.train.steps = 1
    settings.execution.remat = "dots"  # else 8 layers are compiled one by one on a CPU
    resolved = resolve(settings)
    shape = (resolved.train.batch_size, resolved.model.length)
    ids = jax.ShapeDtypeStruct(shape, jnp.int32)
    batch = Batch(ids, ids, jax.ShapeDtypeStruct(shape, jnp.bool_), ids)
    state = jax.eval_shape(lambda: init_state(resolved))
    lowered = jax.jit(make_train_step(resolved)).lower(state, batch)
    begun = time.perf_counter()
    lowered.compile()
    return time.perf_counter() - begun


def main():
    for name, texts in DEPTHS.items():
        rounds = [[compile_seconds(text) for text in texts] for _ in range(3)]
        short, deep = (statistics.median(times) for times in zip(*rounds, strict=True))
        record = {"model": name, "8_layers_s": round(short, 2), "24_layers_s": round(deep, 2)}
        print(json.dumps(record | {"ratio": round(deep / short, 3), "jax": jax.__version__}))


if __name__ == "__main__":
    main()
