"""Plans of the next token, of the paper's models and of a trillion parameters, on TPU v5p.

    pip install -e '.[tpu]'
    python experiments/pod_plans/decode.py

Writes decode.jsonl and prints the table. Weights are bfloat16, all contexts full, nothing dropped.
The bound is the time in which a chip reads its weights and its part of the KV cache once.
"""

import dataclasses
import json
import os
import runpy
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")

import jax

from prmoe_jax.config.loading import resolve
from prmoe_jax.plan.chips import chip_of
from prmoe_jax.plan.report import plan

HERE = Path(__file__).parent
PAPER = runpy.run_path(str(HERE.parent.parent / "configs" / "paper.py"))
POD, LARGE = "v5p:4x4x8", "v5p:4x4x16"
# Model, pod, sequences, mesh (the rest is data).
PLANS = (
    ("dense_1.3b", POD, 128, {}),
    ("dense_1.3b", POD, 128, {"tensor": 8}),
    ("dense_6.7b", POD, 128, {}),
    ("dense_6.7b", POD, 128, {"tensor": 8}),
    ("moe_1.3b", POD, 128, {"expert": 128}),
    ("moe_1.3b", POD, 128, {"expert": 16, "tensor": 8}),
    ("prmoe_1.3b", POD, 128, {"expert": 128}),
    ("prmoe_1.3b", POD, 128, {"expert": 16, "tensor": 8}),
    ("mos_1.3b", POD, 128, {"expert": 16, "tensor": 8}),
    ("moe_24b", LARGE, 32, {"expert": 32, "tensor": 8}),
    ("moe_24b", LARGE, 256, {"expert": 32, "tensor": 8}),
    ("moe_24b", LARGE, 256, {"expert": 64, "tensor": 4}),
    ("moe_24b", LARGE, 256, {"expert": 16, "tensor": 16}),
    ("moe_24b", LARGE, 256, {"expert": 128, "expert_slice": 2}),
)


def main() -> None:
    lines = [
        "| | chips | sequences | mesh | HBM a chip | a token | attention | experts | collectives "
        "| bound | x bound |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    rows = []
    for name, topology, sequences, axes in PLANS:
        values = resolve(PAPER["get_config"](name))
        mesh = dataclasses.replace(values.mesh, **axes)
        result = plan(dataclasses.replace(values, mesh=mesh), topology, sequences)
        held = result["hbm_bytes_per_chip"]
        bound = (held["parameters"] + held["past"]) / chip_of(topology).hbm_bytes_per_s
        described = {"model": name, "sequences": sequences, "jax": jax.__version__}
        rows.append(described | result | {"bound_s": bound})
        shape = ", ".join(f"{axis} {n}" for axis, n in (axes or {"data": result["chips"]}).items())
        parts = [result["components"].get(p, 0) for p in ("attention", "experts", "collectives")]
        lines.append(
            f"| {name} | {result['chips']} | {sequences} | {shape} | "
            f"{sum(held.values()) / 2**30:.1f} GiB | "
            f"{result['modelled_step_s'] * 1e3:.1f} ms | "
            + " | ".join(f"{part * 1e3:.1f} ms" for part in parts)
            + f" | {bound * 1e3:.2f} ms | {result['modelled_step_s'] / bound:.1f} |"
        )
        print(lines[-1], flush=True)
    (HERE / "decode.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
