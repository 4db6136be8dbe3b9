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
# # A student from its teacher
#
# MoS (section 4.2): a smaller PR-MoE, still sparse, that learns from a larger one, but not to the
# end. First the teacher, then two students with the same tokens: one alone, one taught.

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt

from prmoe_jax import architecture, default_config, evaluate, resolve, train
from prmoe_jax.distill import student
from prmoe_jax.run.metrics import read_metrics

STEPS = 200  # a taste; experiments/claims/mos has longer runs
folder = Path(tempfile.mkdtemp())


def recipe(text):
    settings = default_config()
    settings.model.update(architecture.parse_fields(text))
    settings.model.update(
        d_model=64, heads=4, d_ff=256, vocab_size=1024, length=128, dtype="float32"
    )
    settings.train.update(steps=STEPS, batch_size=8)
    settings.optimizer.update(kind="muon", learning_rate=16e-3, min_learning_rate=16e-4)
    settings.optimizer.warmup_tokens = 10 * 8 * 128
    settings.log.every = 4
    settings.data.validation_fraction = 0.01  # three documents, to be quick
    return settings


teacher = resolve(recipe("4 layers, E=4+8, residual"))
summary = train(teacher, folder / "teacher")
print(f"teacher: {summary['eval/loss']:.3f}")

# %% [markdown]
# ## What the student keeps
#
# A layer less. `prmoe distill-plan` shows the same table: which layers of the teacher the student's
# first parameters would come from, and what is saved.

# %%
settings = recipe("3 layers, layers 1 2, E=4+8, residual")
print(student.table(student.plan(teacher, resolve(settings))))

# %% [markdown]
# ## Alone, and taught for 70 % of the run
#
# The loss is CE + 0.01 · Σ aux + β · KL(teacher ‖ student). At the stop the step is compiled anew
# without the teacher, whose memory is let go.

# %%
alone = train(resolve(settings), folder / "alone")
settings.teacher.workdir = str(folder / "teacher")
settings.kd.stop = 0.7
taught = train(resolve(settings), folder / "taught")
for name, result in (("alone", alone), ("taught", taught)):
    print(f"{name:7} {result['eval/loss']:.4f}")

# %%
figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
for name in ("alone", "taught"):
    lines = [line for line in read_metrics(folder / name / "metrics.jsonl") if "lm_loss" in line]
    axes.plot([line["step"] for line in lines], [line["lm_loss"] for line in lines], label=name)
kd = [line for line in lines if "kd_loss" in line]
axes.plot(
    [line["step"] for line in kd], [line["kd_loss"] for line in kd], "--", label="KL to the teacher"
)
axes.axvline(0.7 * STEPS, color="black", linewidth=0.8)
axes.set(xlabel="step", ylabel="nats a token", yscale="log")
axes.legend(frameon=False)
plt.show()
assert max(line["step"] for line in kd) == round(0.7 * STEPS)  # none after the stop

# %% [markdown]
# ## How much they agree
#
# The divergence of each student from the teacher, and the share of tokens for which both find the
# same token likeliest. One run of each shows no more than the direction;
# `experiments/claims/mos` has more seeds.

# %%
for name in ("alone", "taught"):
    found = evaluate(folder / name, folder / "teacher")
    print(name, {key: round(value, 3) for key, value in found.items() if key.startswith("teacher")})
