"""Plans of all nine models of the paper on several kinds of pod, and of one more.

    pip install -e '.[tpu,plot]'                          # an environment for TPUs
    python experiments/pod_plans/run.py v5p:4x4x8 v5p:4x4x4 2xv5p:4x4x4 tpu7x:4x4x4 v5e:16x16
    pip install -e '.[cuda,plot]'                         # another one for GPUs
    python experiments/pod_plans/run.py h100:16x8
    python experiments/pod_plans/run.py                   # the table and the picture

Plans that `results.jsonl` has are not made again. A model is planned with `remat=dots`; where that
does not fit, with `full`. Batches are the paper's.
"""

import dataclasses
import json
import os
import runpy
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax

from prmoe_jax.config.loading import resolve
from prmoe_jax.config.schema import Config
from prmoe_jax.errors import UserError
from prmoe_jax.parallel.mesh import on_slices, suggest_mesh
from prmoe_jax.plan.chips import chip_of, topology_devices
from prmoe_jax.plan.picture import draw
from prmoe_jax.plan.report import plan

# Cases with 8,192 tokens per chip and 64 experts in every other layer, which show the traffic of
# the exchange and whether expert weights stay in place, also if experts share the mesh with FSDP.
EXCHANGE = {"v5p:4x4x4": 256, "v5e:16x16": 1024}  # sequences a step

HERE = Path(__file__).parent
RESULTS = HERE / "results.jsonl"
PAPER = runpy.run_path(str(HERE.parent.parent / "configs" / "paper.py"))


def models(topology: str) -> dict[str, Config]:
    """The configs to plan for a topology: the paper's nine on whole pods, and the exchange's."""
    found = {}
    if topology != "v5p:4x4x4":
        found = {name: resolve(PAPER["get_config"](name)) for name in PAPER["ROWS"]}
    if topology in EXCHANGE:
        settings = PAPER["get_config"]("moe_1.3b")
        settings.model.experts = (64,)
        settings.train.batch_size = EXCHANGE[topology]
        found["1.3B + MoE-64"] = resolve(settings)
    if topology == "v5p:4x4x8":
        settings = PAPER["get_config"]("dense_1.3b")
        settings.train.batch_size *= 2
        found["dense_1.3b, 16,384 tokens a chip"] = resolve(settings)
    return found


def planned(values: Config, topology: str) -> dict:
    """The plan with the mesh of `suggest_mesh`, and the least rematerialisation that fits."""
    devices = topology_devices(topology)[1]
    mesh = suggest_mesh(on_slices(values, devices), len(devices))
    for remat in ("dots", "full"):
        execution = dataclasses.replace(values.execution, remat=remat)
        result = plan(dataclasses.replace(values, execution=execution, mesh=mesh), topology)
        if result["fits"]:
            break
    return result | {"remat": remat}


def load() -> dict[tuple[str, str], dict]:
    if not RESULTS.exists():
        return {}
    rows = map(json.loads, RESULTS.read_text().splitlines())
    return {(row["model"], row["topology"]): row for row in rows}


def table(rows) -> str:
    lines = [
        "| | pod | mesh | remat | HBM a chip | step | MFU | collectives | exchanged | days |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (model, topology), row in rows.items():
        if "why" in row:
            lines.append(f"| {model} | {topology} | {row['why']} |||||||")
            continue
        mesh = ", ".join(f"{name} {size}" for name, size in row["mesh"].items())
        held = row["hbm_bytes_per_chip"]
        needed = held.get("needed", sum(held.values())) / 2**30
        head = f"| {model} | {topology} | {mesh} | {row['remat']} | {needed:.1f} GiB |"
        if not row["fits"]:
            limit = chip_of(topology).hbm_bytes / 2**30
            lines.append(f"{head} does not fit {limit:.0f} GiB |||||")
            continue
        sent = sum(c["bytes"] for c in row["collectives"] if c["kind"] == "all-to-all")
        lines.append(
            f"{head} {row['modelled_step_s'] * 1e3:.0f} ms | {row['modelled_mfu']:.1%} | "
            f"{row['components']['collectives'] * 1e3:.0f} ms | {sent / 1e9:.2f} GB | "
            f"{row['days']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    rows = load()
    for topology in sys.argv[1:]:
        for model, values in models(topology).items():
            if (model, topology) in rows:
                continue
            row = {"model": model, "topology": topology, "jax": jax.__version__}
            try:
                row |= planned(values, topology)
            except UserError as error:
                row["why"] = str(error)
            with RESULTS.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(model, topology, row.get("modelled_step_s", row.get("why")), flush=True)
            rows = load()
    print(table(rows))
    draw([(m, row) for (m, _), row in rows.items() if "why" not in row], HERE / "plans.png")


if __name__ == "__main__":
    main()
