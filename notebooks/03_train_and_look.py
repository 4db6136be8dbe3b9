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
# # Train, and look inside
#
# A small PR-MoE on real text, with its losses drawn as it learns; then the question that everyone
# asks: which experts like which tokens?

# %%
import collections
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import display

from prmoe_jax import Generator, Sampling, architecture, default_config, resolve, train
from prmoe_jax.data.tokenizer import Tokenizer
from prmoe_jax.model.layerwise import dropless, routing
from prmoe_jax.run.restore import restore_run

STEPS = 200  # a taste, of 0.2 M tokens

settings = default_config()
settings.model.update(architecture.parse_fields("4 layers, E=4+8, residual"))
settings.model.update(d_model=64, heads=4, d_ff=256, vocab_size=1024, length=128, dtype="float32")
settings.train.update(steps=STEPS, batch_size=8)
settings.optimizer.update(kind="muon", learning_rate=16e-3, min_learning_rate=16e-4)
settings.optimizer.warmup_tokens = 10 * 8 * 128
settings.eval.update(every=STEPS // 4, batches=4)
settings.log.every = 4
settings.data.validation_fraction = 0.01  # three documents, to be quick
config = resolve(settings)
workdir = Path(tempfile.mkdtemp()) / "run"

# %% [markdown]
# `train` is what `prmoe train` calls. It calls `on_metrics` with every line it writes to
# `metrics.jsonl`; a run that was interrupted goes on when the cell is run again.

# %%
figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
picture = display(figure, display_id=True)
curves = {"lm_loss": ([], []), "eval/loss": ([], [])}


def draw(line):
    for name, (steps, losses) in curves.items():
        if name in line:
            steps.append(line["step"])
            losses.append(line[name])
    axes.clear()
    for name, (steps, losses) in curves.items():
        axes.plot(steps, losses, "o-" if name == "eval/loss" else "-", label=name)
    axes.set(xlabel="step", ylabel="nats a token", xlim=(0, STEPS))
    axes.legend(frameon=False)
    picture.update(figure)


summary = train(config, workdir, on_metrics=draw)
plt.close(figure)
print(
    f"validation loss {summary['eval/loss']:.3f}, {summary['eval/bits_per_byte']:.3f} bits a byte"
)

# %% [markdown]
# ## What it writes

# %%
generator = Generator.restore(workdir)
for text in generator(["Fellow citizens", "The war"], 24, Sampling(0.8, top_k=40), seeds=[1, 2]):
    print("…" + text)

# %% [markdown]
# ## Which experts like which tokens
#
# `routing` returns the decision of every MoE layer: each token's expert, its slot and its weight.

# %%
_, _, model, _ = restore_run(workdir)
tokenizer = Tokenizer.load(workdir / "tokenizer.json")
TEXT = """
The Congress shall have power to lay and collect taxes, duties, imposts and excises, to pay the debts
and provide for the common defence and general welfare of the United States; to borrow money on the
credit of the United States; to regulate commerce with foreign nations, and among the several states.
In 1913 and again in 1929 the people asked: what does this cost us, and who pays for it? We answered.
"""
ids = tokenizer.encode(TEXT)[: config.model.length]
words = [tokenizer.decode([i]) for i in ids]
ids_1xL = jnp.array(ids)[None]
segments_1xL = jnp.ones_like(ids_1xL)

decisions = jax.jit(lambda model: routing(dropless(model), ids_1xL, segments_1xL))(model)
chosen = {number: np.asarray(layer.expert_GxSxK)[0, :, 0] for number, layer in decisions.items()}

for number, experts_L in chosen.items():
    print(f"layer {number}")
    for e in range(config.model.schedule.experts[number]):
        liked = collections.Counter(w for w, c in zip(words, experts_L, strict=True) if c == e)
        print(
            f"  expert {e} ({sum(liked.values()):3}):", *(repr(w) for w, _ in liked.most_common(8))
        )

# %% [markdown]
# After a few steps the router chooses by the token itself rather than by its context, first in the
# shallow layer. The loads, from the same file that `prmoe report --workdir=…` draws:

# %%
from prmoe_jax.run.metrics import read_metrics

lines = [line for line in read_metrics(workdir / "metrics.jsonl") if "loss" in line]
figure, both = plt.subplots(1, 2, figsize=(8, 2.6), layout="constrained")
for axes, number in zip(both, chosen, strict=True):
    load_SxE = np.array([line[f"layers/{number:02}/expert_load"] for line in lines])
    axes.stackplot([line["step"] for line in lines], load_SxE.T)
    axes.set(title=f"layer {number}: share of tokens by expert", xlabel="step", ylim=(0, 1))
plt.show()
