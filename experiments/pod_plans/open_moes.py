"""Plans of open MoEs, in training and for the next token, on TPU v5p and on H100s.

    pip install -e '.[tpu]'                               # an environment for TPUs
    python experiments/pod_plans/open_moes.py v5p
    pip install -e '.[cuda]'                              # another one for GPUs
    python experiments/pod_plans/open_moes.py h100
    python experiments/pod_plans/open_moes.py             # the tables

Plans that open_moes.jsonl has are not made again. Batches are those of configs/open_moes.py, with
the least rematerialisation that fits. The tables have the fastest of six plans: a batch in one
portion or in four, experts over as many devices as they can use, or over eight neighbours. The next
token is that of 64 full contexts of 4,096 tokens on eight chips, in bfloat16. The bound is the time
in which a chip reads its weights and its part of the KV cache once.
"""

import dataclasses
import json
import math
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
from prmoe_jax.config.schema import Config, MeshConfig
from prmoe_jax.parallel.mesh import lower_memory_configs
from prmoe_jax.plan.chips import chip_of, topology_devices
from prmoe_jax.plan.report import plan

HERE = Path(__file__).parent
RESULTS = HERE / "open_moes.jsonl"
OPEN = runpy.run_path(str(HERE.parent.parent / "configs" / "open_moes.py"))
TRAINING = {"v5p": "v5p:4x4x8", "h100": "h100:16x8"}
# The GPUs of a node, or a line of the torus; farther, the exchange of eight rows a token is slow.
NEIGHBOURS = 8
DECODING = {"v5p": "v5p:2x2x2", "h100": "h100:1x8"}
PORTIONS = 1, 4  # of a batch: 32,768 and 8,192 tokens a chip
SEQUENCES = 64
DECODING_MESH = {"expert": 4, "tensor": 2}


def trained(values: Config, topology: str) -> list[dict]:
    """Six plans: in one portion and four, experts over many devices and over neighbours."""
    devices = len(topology_devices(topology)[1])
    expert = math.gcd(NEIGHBOURS, *filter(None, values.model.schedule.experts))
    replicas = devices // expert
    axes = "fsdp", "fsdp_experts"
    near = [MeshConfig(data=1, expert=expert, **{axis: replicas}) for axis in axes]
    meshes = next(iter(lower_memory_configs(values, devices))).mesh, *near
    return [
        least_remat(values, topology, mesh, portions) for portions in PORTIONS for mesh in meshes
    ]


def least_remat(values: Config, topology: str, mesh: MeshConfig, portions: int) -> dict:
    """The plan with `remat=dots` or, if that doesn't fit, with `full`."""
    train = dataclasses.replace(values.train, accumulate=portions)
    for remat in ("dots", "full"):
        execution = dataclasses.replace(values.execution, remat=remat)
        changes = {"execution": execution, "train": train, "mesh": mesh}
        result = plan(dataclasses.replace(values, **changes), topology)
        if result["fits"]:
            break
    return result | {"remat": remat, "portions": portions}


def decoded(values: Config, topology: str) -> list[dict]:
    mesh = dataclasses.replace(values.mesh, **DECODING_MESH)
    result = plan(dataclasses.replace(values, mesh=mesh), topology, SEQUENCES)
    held = result["hbm_bytes_per_chip"]
    bound = (held["parameters"] + held["past"]) / chip_of(topology).hbm_bytes_per_s
    return [result | {"sequences": SEQUENCES, "bound_s": bound}]


def load() -> list[dict]:
    return list(map(json.loads, RESULTS.read_text().splitlines())) if RESULTS.exists() else []


def fastest(rows: list[dict]) -> list[dict]:
    """The fastest plan of each model and pod, in the order of the rows."""
    found: dict[tuple, dict] = {}
    for row in sorted(rows, key=lambda row: (not row["fits"], row.get("modelled_step_s", 0))):
        found.setdefault((row["model"], row["topology"]), row)
    return sorted(found.values(), key=rows.index)


def table(rows: list[dict]) -> str:
    lines = [
        "| training | pod | mesh | portions | remat | HBM a chip | step | MFU | tokens/s |",
        "|---" * 9 + "|",
    ]
    ends = [
        "",
        "| decoding | chips | mesh | HBM a chip | a token | bound | x bound |",
        "|---" * 7 + "|",
    ]
    for row in fastest(rows):
        mesh = ", ".join(f"{name} {size}" for name, size in row["mesh"].items())
        held = row["hbm_bytes_per_chip"]
        used = held.get("needed", sum(held.values())) / 2**30
        if not row["fits"]:
            limit = chip_of(row["topology"]).hbm_bytes / 2**30
            parts = [row["topology"], mesh, f"{used:.1f} GiB, does not fit {limit:.0f} GiB"]
        elif "sequences" in row:
            step, bound = row["modelled_step_s"], row["bound_s"]
            parts = [row["topology"], mesh, f"{used:.1f} GiB", f"{step * 1e3:.1f} ms"]
            parts += [f"{bound * 1e3:.1f} ms", f"{step / bound:.1f}"]
        else:
            parts = [row["topology"], mesh, str(row["portions"]), row["remat"], f"{used:.1f} GiB"]
            parts += [f"{row['modelled_step_s']:.2f} s", f"{row['modelled_mfu']:.1%}"]
            parts += [f"{row['tokens_per_s']:,.0f}"]
        (ends if "sequences" in row else lines).append(
            "| " + " | ".join([row["model"], *parts]) + " |"
        )
    return "\n".join(lines + ends)


def main() -> None:
    rows = load()
    done = {(row["model"], row["topology"]) for row in rows}
    for chip in sys.argv[1:]:
        for topologies, make in ((DECODING, decoded), (TRAINING, trained)):
            for name in OPEN["MODELS"]:
                topology = topologies[chip]
                if (name, topology) in done:
                    continue
                values = resolve(OPEN["get_config"](name))
                about = {"model": name, "jax": jax.__version__}
                made = [about | result for result in make(values, topology)]
                with RESULTS.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(row) + "\n" for row in made)
                print(name, topology, fastest(made)[0].get("modelled_step_s"), flush=True)
    print(table(load()))


if __name__ == "__main__":
    main()
