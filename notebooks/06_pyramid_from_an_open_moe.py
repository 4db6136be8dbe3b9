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
# # A pyramid from an open MoE
#
# Open MoEs have as many experts in every layer. Which of them matter? Here a model is imported from
# Hugging Face's format, its experts are weighed on real text, and half of them are cut. The layers
# whose experts matter more keep more of them: a pyramid, though not always the paper's, which has
# most experts in the last layers. It then learns from the model it came from (MoS).
#
# With a downloaded model, such as `allenai/OLMoE-1B-7B-0924`, set `SOURCE` to its folder. Without
# one, a small model of OLMoE's form is trained and exported first, so that there is one to import.

# %%
import dataclasses
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt

from prmoe_jax import architecture, default_config, evaluate, resolve, train
from prmoe_jax.config.loading import load
from prmoe_jax.distill.prune import prune_run
from prmoe_jax.errors import UserError
from prmoe_jax.interop.run import export_run, import_run

SOURCE = None
STEPS = 200  # a taste; experiments/prune has the real thing, with seeds
folder = Path(tempfile.mkdtemp())


def recipe(model):
    settings = default_config()
    settings.model.update(model)
    settings.moe.update(capacity_factor=float("inf"), eval_capacity_factor=float("inf"))
    settings.train.update(steps=STEPS, batch_size=8)
    settings.optimizer.update(kind="muon", learning_rate=16e-3, min_learning_rate=16e-4)
    settings.optimizer.warmup_tokens = 10 * 8 * 128
    return settings


if SOURCE is None:
    olmoe = architecture.parse_fields("4 layers, every 1, E=8, top 2") | {"family": "olmoe"}
    olmoe |= {"d_model": 64, "heads": 4, "d_ff": 128, "vocab_size": 1024, "length": 128}
    train(resolve(recipe(olmoe | {"dtype": "float32"})), folder / "trained")
    SOURCE = folder / "olmoe"
    export_run("hf", folder / "trained", SOURCE)
print(sorted(path.name for path in Path(SOURCE).iterdir()))

# %% [markdown]
# ## Import
#
# `config.json` names the model's class; tensors are read one by one, and each must fit.

# %%
print(import_run("hf", Path(SOURCE), folder / "open"))
full = load(folder / "open" / "config.json")
print(full.model.family, "|", full.model.schedule)
before = evaluate(folder / "open")
print(f"{before['loss']:.3f} nats a token")

# %% [markdown]
# ## What can go
#
# The plan of `prmoe prune --keep=0.5`: how many experts each layer keeps, and how much of the load,
# of what experts add to the tokens, and of the loss without them that is. The experts of all layers
# compete for the budget.

# %%
plan = prune_run(
    folder / "open",
    folder / "pyramid",
    budget=0.5,
    kind="activation",
    shape="pyramid",
    merge=False,
    corpus=None,
    batches=8,
)

# %%
figure, axes = plt.subplots(figsize=(6, 2.6), layout="constrained")
layers = [row["layer"] for row in plan["layers"]]
axes.bar(layers, [row["experts"] for row in plan["layers"]], color="lightgray", label="before")
axes.bar(layers, [len(row["kept"]) for row in plan["layers"]], width=0.5, label="kept")
axes.set(xlabel="layer", ylabel="experts", xticks=layers)
axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
plt.show()

# %% [markdown]
# ## What it costs, and what the teacher gives back
#
# The pyramid starts as the pruned model and learns from the whole one for 70 % of its steps.

# %%
pruned = load(folder / "pyramid" / "config.json")
settings = recipe(dataclasses.asdict(pruned.model))
settings.moe.update(dataclasses.asdict(pruned.moe))
settings.data.tokenizer = pruned.data.tokenizer
settings.init.workdir = str(folder / "pyramid")
settings.teacher.workdir = str(folder / "open")
settings.kd.stop = 0.7
summary = train(resolve(settings), folder / "student")
print(f"{summary['eval/loss']:.3f} nats a token")

# %%
names = {"open": "the whole model", "pyramid": "pruned", "student": "after distillation"}
found = [evaluate(folder / name) for name in names]
losses = [one["loss"] for one in found]
figure, axes = plt.subplots(figsize=(6, 2), layout="constrained")
axes.barh(list(names.values()), losses, color=["gray", "C1", "C0"])
axes.set(xlabel="validation loss, nats a token", xlim=(min(losses) - 0.3, max(losses) + 0.1))
axes.invert_yaxis()
plt.show()
assert len({one["tokens"] for one in found}) == 1  # of the same text

# %% [markdown]
# ## Back to Hugging Face's format
#
# Their classes have one number of experts for all layers, so a pyramid can't go back, and the error
# gives the reason; `--shape=uniform` can.

# %%
try:
    export_run("hf", folder / "student", folder / "back")
except UserError as error:
    print(error)
