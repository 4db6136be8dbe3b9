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
# # Pyramid and residual
#
# PR-MoE in two ideas: more experts where they help (a pyramid), and a dense MLP beside each token's
# one expert (a residual). Both are a string here, and what they cost can be counted without building
# anything.

# %%
import matplotlib.pyplot as plt

from prmoe_jax.config.architecture import Schedule, parse_fields
from prmoe_jax.config.schema import ModelConfig, MoeConfig
from prmoe_jax.model.sizes import cost

# %% [markdown]
# ## The string
#
# `24 layers` is the depth; every second layer is an MoE layer unless something else is said; `E=` has
# the experts, `count x layers` for each run of equal MoE layers.

# %%
for text in (
    "12 layers",
    "12 layers, E=32",
    "12 layers, second half, E=32",
    "12 layers, E=32, top 2",
    "12 layers, E=16x4+64x2",
    "12 layers, E=16x4+64x2, residual",
):
    schedule = Schedule.parse(text)
    print(f"{text:34}", schedule.experts)
    assert str(schedule) == text  # the string is a schedule's whole description

# %% [markdown]
# ## What each costs
#
# On the paper's smaller backbone: width 1024, context 2048. A token uses one expert of each layer, so
# that experts add parameters and hardly any FLOPs; the residual adds both.


# %%
def model_of(architecture):
    sizes = dict(d_model=1024, heads=16, d_ff=4096, vocab_size=50304, length=2048)
    return ModelConfig(**sizes, **parse_fields(architecture))


ARCHITECTURES = {
    "dense": "24 layers",
    "MoE-128": "24 layers, E=128",
    "Top2-MoE-128": "24 layers, E=128, top 2",
    "Residual-MoE-128": "24 layers, E=128, residual",
    "Pyramid-MoE-32/64": "24 layers, E=32x10+64x2",
    "PR-MoE-32/64": "24 layers, E=32x10+64x2, residual",
    "PR-MoE + MoS": "21 layers, E=32x8+64x2, residual",
}
costs = {name: cost(model_of(text)) for name, text in ARCHITECTURES.items()}
for name, size in costs.items():
    print(
        f"{name:18} {size.total_params / 1e9:6.2f} B parameters, {size.active_params / 1e9:.3f} B "
        f"active, {size.train_flops_per_token / 1e9:.2f} GFLOP a token"
    )

# %% [markdown]
# The paper's table, to the digit it prints: 13 B, 4 B and 3.5 B for MoE, PR-MoE and MoS.

# %%
printed = {name: f"{size.total_params / 1e9:.2g}" for name, size in costs.items()}
assert [printed[name] for name in ("MoE-128", "PR-MoE-32/64", "PR-MoE + MoS")] == [
    "13",
    "4.1",
    "3.5",
]

figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
for number, size in enumerate(costs.values()):
    axes.plot([size.active_params / 1e9, size.total_params / 1e9], [number] * 2, "-", color="C0")
    axes.plot(size.active_params / 1e9, number, "o", color="C1")
    axes.plot(size.total_params / 1e9, number, "s", color="C0")
axes.set_yticks(range(len(costs)), costs)
axes.invert_yaxis()
axes.set(xscale="log", xlabel="billion parameters: active (circles) and all (squares)")
plt.show()

# %% [markdown]
# ## Where the parameters are

# %%
figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
for name in ("MoE-128", "PR-MoE-32/64"):
    axes.step(
        range(24), [layer.params / 1e6 for layer in costs[name].layers], where="mid", label=name
    )
axes.set(xlabel="layer", ylabel="million parameters", yscale="log")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## The residual, built
#
# y = c₀ · expert(x) + c₁ · mlp(x) with a learned softmax c (section 4.1.2). Even a token that every
# expert dropped has its MLP. Here all tokens are dropped, by a capacity of nothing, and the output is
# exactly the MLP's share.

# %%
import jax
import jax.numpy as jnp

from prmoe_jax.moe.layer import MoE

small = ModelConfig(
    d_model=16, heads=2, d_ff=32, dtype="float32", **parse_fields("2 layers, E=4, residual")
)
layer = MoE(4, small, MoeConfig(), jax.random.key(0))
x_BxLxD = jax.random.normal(jax.random.key(1), (1, 8, 16))
everyone, nobody = jnp.ones((1, 8), bool), jnp.zeros((1, 8), bool)
y_BxLxD, served = layer(x_BxLxD, everyone)
alone_BxLxD, unserved = layer(x_BxLxD, nobody)  # padding goes to no expert
mix_BxLx2 = jax.nn.softmax(x_BxLxD @ layer.w_mix[...] + layer.b_mix[...])
assert jnp.allclose(alone_BxLxD, mix_BxLx2[..., 1:] * layer.mlp(x_BxLxD), atol=1e-6)
print(f"mean weight of the experts' branch: {float(served.coefficient / served.tokens):.3f}")
