"""Plans of MoE-128 and PR-MoE 1.3B without drops, at uneven loads, and with experts over slices.

    pip install -e '.[tpu]'                               # an environment for TPUs
    python experiments/pod_plans/variants.py v5p:4x4x8 v5e:16x16 2xv5p:4x4x4
    pip install -e '.[cuda]'                              # another one for GPUs
    python experiments/pod_plans/variants.py h100:16x8

Plans that variants.jsonl has are not made again.
"""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax

from prmoe_jax.config.loading import resolve
from prmoe_jax.plan.report import plan

HERE = Path(__file__).parent
RESULTS = HERE / "variants.jsonl"
PAPER = runpy.run_path(str(HERE.parent.parent / "configs" / "paper.py"))
ONE = {"mesh.expert": 128, "mesh.expert_inner": 16}
DROPLESS = {"moe.capacity_factor": float("inf"), "moe.overflow": "position"}
V5E = {"mesh.fsdp": 2, "mesh.expert": 128}
OVER_SLICES = {
    "mesh.slices": 2, "mesh.data": 1, "mesh.expert": 128, "mesh.expert_inner": 64,
    "execution.exchange": "hierarchical",
}  # fmt: skip
# Topology, settings, load of the fullest device; each for the models below.
PLANS = (
    ("v5p:4x4x8", ONE, 1.0),
    ("v5p:4x4x8", ONE | DROPLESS, 1.0),
    ("v5p:4x4x8", ONE | DROPLESS, 1.5),
    ("v5p:4x4x8", ONE | DROPLESS, 3.0),
    ("v5e:16x16", V5E, 1.0),
    ("v5e:16x16", V5E | DROPLESS, 1.0),
    ("2xv5p:4x4x4", OVER_SLICES, 1.0),
    ("h100:16x8", ONE, 1.0),
    ("h100:16x8", ONE | DROPLESS, 1.0),
)


def main() -> None:
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    done = [
        (row["model"], row["topology"], row["settings"], row["load"])
        for row in map(json.loads, lines)
    ]
    command = ["git", "rev-parse", "--short", "HEAD"]
    revision = subprocess.run(command, capture_output=True, text=True, cwd=HERE).stdout.strip()
    for topology, settings, load in PLANS:
        for model in ("moe_1.3b", "prmoe_1.3b"):
            shown = {name: str(value) for name, value in settings.items()}
            if topology not in sys.argv[1:] or (model, topology, shown, load) in done:
                continue
            values = PAPER["get_config"](model)
            values.update_from_flattened_dict(settings)
            described = {"model": model, "settings": shown, "load": load}
            described |= {"commit": revision, "jax": jax.__version__}
            row = described | plan(resolve(values), topology, load=load)
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(model, topology, shown, load, row.get("modelled_step_s"), flush=True)


if __name__ == "__main__":
    main()
