# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %%
# Needs an environment with `pip install -e '.[data,plot]'` of a checkout, and a kernel in it.
import prmoe_jax

print("prmoe_jax", prmoe_jax.__version__)

# %% [markdown]
# # Planning a pod
#
# From a config to chips, gigabytes and days, before anything is rented. First by hand, from nothing
# but the config; then by XLA's own compiler for TPUs.

# %%
import importlib.util
import json
from pathlib import Path

import matplotlib.pyplot as plt

from prmoe_jax import default_config, resolve
from prmoe_jax.config.schema import ModelConfig
from prmoe_jax.config.architecture import parse_fields
from prmoe_jax.model.sizes import cost
from prmoe_jax.plan.chips import CHIPS


def model_of(architecture, **sizes):
    return ModelConfig(**parse_fields(architecture), vocab_size=50304, length=2048, **sizes)


# configs/paper.py:prmoe_1.3b
model = model_of("24 layers, E=64x10+128x2, residual", d_model=2048, heads=16, d_ff=8192)
size = cost(model)
TOKENS, BATCH = 300e9, 512
print(f"{size.total_params / 1e9:.1f} B parameters, {size.active_params / 1e9:.2f} B active")

# %% [markdown]
# ## Memory by hand
#
# A parameter takes 4 bytes, and AdamW 8 more; a gradient is 4. Experts are spread over as many chips
# as there are experts, everything else over all (FSDP). What activations take is the compiler's
# business; with rematerialisation, one layer's input a layer, at least.


# %%
def least_bytes(chips):
    a_token = model.layers * model.d_model * 2  # bfloat16 inputs of the layers
    return 16 * size.total_params / chips + BATCH * model.length / chips * a_token


for name, chip in CHIPS.items():
    chips = 1
    while least_bytes(chips) > 0.7 * chip.hbm_bytes:
        chips *= 2
    print(f"{name:5} {chip.hbm_bytes / 2**30:5.0f} GiB: {chips:4} chips at least")

# %% [markdown]
# ## Days by hand
#
# FLOPs a token, times tokens, over what the chips do a second at 40 % of their peak.

# %%
for name, chip in CHIPS.items():
    days = size.train_flops_per_token * TOKENS / (128 * chip.flops_per_s * 0.4) / 86400
    print(f"{name:5} 128 chips: {days:5.1f} days")

# %% [markdown]
# The dense model that the paper finds as good (6.7 B) computes several times as much for a token:

# %%
dense = cost(model_of("32 layers", d_model=4096, heads=32, d_ff=16384))
print(f"{dense.train_flops_per_token / size.train_flops_per_token:.1f} times the FLOPs a token")

# %% [markdown]
# ## By the compiler
#
# `prmoe plan --config=configs/paper.py:prmoe_1.3b --topology=v5p:4x4x8` compiles the real train step
# for 128 chips that aren't there and reads memory, collectives and cycles off the program. That takes
# minutes and libtpu (`pip install 'prmoe_jax[tpu]'`); the plans of all the paper's models are recorded
# in `experiments/pod_plans/results.jsonl`.

# %%
here = Path.cwd()
recorded = next(
    (
        f / "experiments/pod_plans/results.jsonl"
        for f in (here, here.parent)
        if (f / "experiments").is_dir()
    ),
    None,
)
plans = [json.loads(line) for line in recorded.read_text().splitlines()] if recorded else []
plans = [plan for plan in plans if plan["topology"] == "v5p:4x4x8" and plan["fits"]]
for plan in plans:
    used = sum(plan["hbm_bytes_per_chip"].values()) / 2**30
    print(
        f"{plan['model']:12} {plan['modelled_step_s'] * 1e3:7.0f} ms a step, {used:5.1f} GiB a chip"
    )

# %%
if plans:
    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    left = dict.fromkeys((plan["model"] for plan in plans), 0.0)
    parts = sorted({part for plan in plans for part in plan["components"]})
    for part in parts:
        widths = [plan["components"].get(part, 0) / plan["modelled_step_s"] for plan in plans]
        axes.barh(list(left), widths, left=list(left.values()), label=part)
        left = {
            name: value + width for (name, value), width in zip(left.items(), widths, strict=True)
        }
    axes.set(xlabel="share of the step on 128 TPU v5p")
    axes.legend(frameon=False, bbox_to_anchor=(1, 1))
    axes.invert_yaxis()
    plt.show()

# %% [markdown]
# ## A plan of your own
#
# Where libtpu is installed, this compiles a small model for four chips in well under a minute.

# %%
if importlib.util.find_spec("libtpu"):
    import os

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    from prmoe_jax.plan.report import plan, table

    small = default_config()
    small.model.update(parse_fields("4 layers, E=4, residual"))
    small.mesh.expert = 4
    small.train.steps = 1
    print(table(plan(resolve(small), "v5e:2x2")))
else:
    print("no libtpu here: pip install 'prmoe_jax[tpu]'")
