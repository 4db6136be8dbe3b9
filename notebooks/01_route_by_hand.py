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
# # Routing by hand
#
# Eight tokens, four experts, and every number between them: scores, the choice, capacity and slots,
# the experts, and the weighted way back. At the end the layer itself must give the same result.
#
# Shapes are in the names: `G` routing groups, `S` tokens of a group, `E` experts, `C` slots of an
# expert, `K` choices of a token, `D` width.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from prmoe_jax.config.schema import MoeConfig
from prmoe_jax.moe import dispatch
from prmoe_jax.moe.experts import Experts, Local
from prmoe_jax.config.routers import capacity
from prmoe_jax.moe.routing import route
from prmoe_jax.nn.mlp import MLPShape

TOKENS = "the people of the United States have spoken".split()
S, E, D = len(TOKENS), 4, 6
keys = jax.random.split(jax.random.key(4), 3)
vectors = {
    word: jax.random.normal(jax.random.fold_in(keys[0], i), (D,))
    for i, word in enumerate(dict.fromkeys(TOKENS))
}
x_GxSxD = jnp.stack([vectors[word] for word in TOKENS])[None]  # equal words are equal vectors
w_router_DxE = jax.random.normal(keys[1], (D, E))

# %% [markdown]
# ## Scores
#
# The router is one matrix. A softmax over the experts gives each token's probabilities.

# %%
logits_GxSxE = x_GxSxD @ w_router_DxE
probs_SxE = np.asarray(jax.nn.softmax(logits_GxSxE))[0]


def show(values, title, columns, text="{:.2f}"):
    """A table as a picture, a row a token."""
    figure, axes = plt.subplots(figsize=(1 + 0.9 * values.shape[1], 3.2), layout="constrained")
    axes.imshow(values, cmap="Blues", vmin=0, vmax=max(1, values.max()), aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        axes.text(column, row, text.format(value), ha="center", va="center")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(S), TOKENS)
    axes.set_title(title)
    plt.show()


show(probs_SxE, "probabilities", [f"expert {e}" for e in range(E)])

# %% [markdown]
# ## The choice
#
# Top 1: each token goes to its likeliest expert, and will be weighed by that probability.

# %%
chosen_S = probs_SxE.argmax(1)
for word, e, p in zip(TOKENS, chosen_S, probs_SxE.max(1), strict=True):
    print(f"{word:8} to expert {e}, weight {p:.3f}")

# %% [markdown]
# ## Capacity
#
# So that all experts compute equally much, each has `max(ceil(S/E · factor · k), minimum)` slots.
# With factor 1 that is two slots for eight tokens and four experts. First come, first served: who
# finds its expert full is dropped.

# %%
C = capacity(S, E, capacity_factor=1.0, top_k=1, minimum=1)
taken = dict.fromkeys(range(E), 0)
slot_S = []
for e in chosen_S.tolist():
    slot_S.append(taken[e] if taken[e] < C else None)
    taken[e] += 1
for word, e, slot in zip(TOKENS, chosen_S, slot_S, strict=True):
    print(
        f"{word:8}",
        f"expert {e}, slot {slot}" if slot is not None else f"expert {e} is full: dropped",
    )

# %% [markdown]
# The library's decision, made for all tokens at once by a cumulative sum, is the same.

# %%
moe = MoeConfig(min_capacity=1)
routing, metrics = route(logits_GxSxE, jnp.ones((1, S), bool), moe, top_k=1, slots=C)
kept_S = np.asarray(routing.kept_GxSxK)[0, :, 0]
assert np.asarray(routing.expert_GxSxK)[0, :, 0].tolist() == chosen_S.tolist()
assert kept_S.tolist() == [slot is not None for slot in slot_S]
assert all(
    slot in (None, s)
    for slot, s in zip(slot_S, np.asarray(routing.slot_GxSxK)[0, :, 0], strict=True)
)
print("choices of each expert", metrics.assigned_E, "of which dropped", metrics.dropped_E)

# %% [markdown]
# ## Dispatch, experts, combine
#
# Every expert is given its C slots; empty ones hold zeros.

# %%
experts = Experts(E, MLPShape(D, 4 * D, 0.5, 0.5), keys[2])
slots_ExCxD = np.zeros((E, C, D), np.float32)
for s, (e, slot) in enumerate(zip(chosen_S, slot_S, strict=True)):
    if slot is not None:
        slots_ExCxD[e, slot] = x_GxSxD[0, s]
outputs_ExCxD = experts(jnp.asarray(slots_ExCxD))

y_SxD = np.zeros((S, D), np.float32)
for s, (e, slot) in enumerate(zip(chosen_S, slot_S, strict=True)):
    if slot is not None:
        y_SxD[s] = probs_SxE[s, e] * outputs_ExCxD[e, slot]

held_ExC = np.full((E, C), "–", object)
for s, (e, slot) in enumerate(zip(chosen_S, slot_S, strict=True)):
    if slot is not None:
        held_ExC[e, slot] = TOKENS[s]
figure, axes = plt.subplots(figsize=(4, 2.4), layout="constrained")
axes.axis("off")
axes.table(
    held_ExC,
    rowLabels=[f"expert {e}" for e in range(E)],
    colLabels=[f"slot {c}" for c in range(C)],
    loc="center",
)
plt.show()

# %% [markdown]
# A dropped token's output is zero: only the residual connection around the layer carries it on. With
# PR-MoE's residual branch it still has its dense MLP.
#
# Five ways to compute it, from GShard's one-hot products (`einsum`, the oracle) to maps of places
# (`gather`, the paper's section 5.4); all of them, and our hands, agree.

# %%
for name in dispatch.BACKENDS:
    ours_GxSxD, _ = dispatch.through_experts(name, x_GxSxD, routing, Local(experts), C)
    difference = jnp.abs(ours_GxSxD[0] - y_SxD).max()
    print(f"{name:8} differs by at most {difference:.1e}")
    assert difference < 1e-5

# %% [markdown]
# ## Balance
#
# The auxiliary loss, E · Σ mean probability · mean choice, is 1 where the load is even and grows with
# its unevenness. Its gradient reaches the router through the probabilities.

# %%
share_E = np.bincount(chosen_S, minlength=E) / S
by_hand = E * (probs_SxE.mean(0) * share_E).sum()
print(f"by hand {by_hand:.4f}, the library's {float(metrics.aux_loss):.4f}")
assert abs(by_hand - float(metrics.aux_loss)) < 1e-5

# %% [markdown]
# ## Try
#
# Change the capacity factor to 2, or to `inf`: who is dropped now? Then let tokens compete by
# probability instead of by place, `MoeConfig(overflow="probability")`.

# %%
for factor in (0.5, 1.0, 1.5, 2.0):
    slots = capacity(S, E, factor, 1, 1)
    dropped = {}
    for overflow in ("position", "probability"):
        rules = MoeConfig(min_capacity=1, overflow=overflow)
        decided, _ = route(logits_GxSxE, jnp.ones((1, S), bool), rules, top_k=1, slots=slots)
        lost_S = ~np.asarray(decided.kept_GxSxK)[0, :, 0]
        dropped[overflow] = [word for word, lost in zip(TOKENS, lost_S, strict=True) if lost]
    print(f"factor {factor}: {slots} slots, dropped", dropped)
