"""Where a training step's time goes: throughput, wait for input, share of matrix products.

    python experiments/benchmarks/train_step.py --config=configs/tiny.py:prmoe

Trains on the config's real data. The share comes from a profiler trace: an operation counts
as a matrix product if the computation it runs in the compiled program contains a `dot`.
"""

import argparse
import collections
import json
import re
import statistics
import tempfile
import time
from pathlib import Path

import jax

from prmoe_jax.allocator import keep_freed_memory
from prmoe_jax.cli import parse_config
from prmoe_jax.data.pipeline import load_data, train_iterator
from prmoe_jax.model.sizes import cost
from prmoe_jax.parallel.axes import split_batch
from prmoe_jax.parallel.mesh import make_mesh
from prmoe_jax.run.directory import device_name
from prmoe_jax.training.step import compile_train_step, sharded_state

TRACED_STEPS = 3


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    options, rest = parser.parse_known_args()
    keep_freed_memory()  # as `prmoe train` does
    config = parse_config(rest)
    mesh = make_mesh(config)
    data = load_data(config.data, config.model.vocab_size, config.model.length)
    batches = train_iterator(data.train, config.train.batch_size, config.seed)
    with jax.set_mesh(mesh):
        state = sharded_state(config, mesh)
        batch = split_batch(next(batches), mesh, config.train.batch_size)
        compiled = compile_train_step(config, mesh).lower(state, batch).compile()

    seconds, waits = [], []
    for _ in range(options.steps + 1):
        begun = time.perf_counter()
        batch = split_batch(next(batches), mesh, config.train.batch_size)
        waits.append(time.perf_counter() - begun)
        state, metrics = compiled(state, batch)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - begun)
    seconds, waits = seconds[1:], waits[1:]

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(TRACED_STEPS):
                state, metrics = compiled(state, batch)
                jax.block_until_ready(metrics)
        spent = operation_seconds(Path(folder))
    products = matrix_products(compiled.as_text())
    inside = sum(t for name, t in spent.items() if name in products)
    kinds = collections.Counter()
    for name, t in spent.items():
        if name not in products:
            kinds[re.sub(r"[.\d]+$", "", name)] += t
    total = sum(spent.values())
    median = statistics.median(seconds)
    flops = cost(config.model).train_flops_per_token * config.tokens_per_step
    record = {
        "architecture": str(config.model.schedule),
        "device": device_name(jax.devices()[0]),
        "jax": jax.__version__,
        "steps": options.steps,
        "step_s": {"median": median, "min": min(seconds), "max": max(seconds)},
        "tokens_per_second": config.tokens_per_step / median,
        "model_gflops_per_second": flops / median / 1e9,
        "input_wait_share": sum(waits) / sum(seconds),
        "outside_matrix_products_share": 1 - inside / total,
        "largest_outside": {k: round(t / total, 4) for k, t in kinds.most_common(8)},
    }
    print(json.dumps(record, indent=2))


def operation_seconds(folder: Path) -> dict[str, float]:
    """Seconds each operation of the program ran, its nested ones taken out, all threads."""
    (path,) = folder.rglob("*.xplane.pb")
    spent = collections.Counter()
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
            if not line.name.startswith(("tf_XLA", "XLA Ops", "Stream")):
                continue
            open_events = []
            events = sorted((e.start_ns, -e.duration_ns, e.name) for e in line.events)
            for start, negative, name in events:
                while open_events and open_events[-1][0] <= start:
                    open_events.pop()
                if open_events:
                    spent[open_events[-1][1]] += negative / 1e9
                spent[name] -= negative / 1e9
                open_events.append((start - negative, name))
    # What the runtime records of itself (waiting, threads, loops' shells) is no operation.
    return {k: t for k, t in spent.items() if re.fullmatch(r"[\w.-]+", k) and "while" not in k}


def matrix_products(hlo: str) -> set[str]:
    """Names of the instructions that are a matrix product or call a computation with one.

    TPUs write a product as a convolution, other compilers as a dot or as a library's call.
    """
    instruction = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = .*?(?:calls=%?([\w.-]+)|$)")
    with_dot, callers, names, computation = set(), {}, set(), ""
    for line in hlo.splitlines():
        if line and not line[0].isspace():
            computation = line.removeprefix("ENTRY ").lstrip("%").split(" ")[0].split("(")[0]
        elif match := instruction.match(line):
            name, called = match.groups()
            if re.search(r"\b(dot|convolution)\(|\bcustom-call\(.*dot", line):
                with_dot.add(computation)
                names.add(name)
            if called:
                callers[name] = called
    return names | {name for name, called in callers.items() if called in with_dot}


if __name__ == "__main__":
    main()
