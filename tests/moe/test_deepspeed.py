"""Our layer against DeepSpeed's own: golden tensors of `goldens/generate_deepspeed.py`.

No torch is needed, but where it and DeepSpeed are installed the goldens are made anew.
"""

import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prmoe_jax.config.routers import capacity
from prmoe_jax.config.schema import ExecutionConfig, ModelConfig, MoeConfig
from prmoe_jax.moe import routing
from prmoe_jax.moe.layer import MoE
from prmoe_jax.moe.routing import assign
from tests.support.extras import needs_extra
from tests.support.paths import GOLDENS
from tests.support.quick import jit

DEEPSPEED = GOLDENS / "deepspeed"
CASES = sorted(path.stem for path in DEEPSPEED.glob("top*.npz"))
assert len(CASES) == 16
EXPERTS = ("w_in", "b_in", "w_out", "b_out")


def load(name):
    arrays = dict(np.load(DEEPSPEED / f"{name}.npz"))
    return json.loads(str(arrays.pop("settings"))), arrays


def capacity_factor(settings):
    if not settings["drop_tokens"]:
        return math.inf
    return settings["capacity_factor" if settings["training"] else "eval_capacity_factor"]


def build(settings, arrays):
    """The layer with a golden's parameters."""
    d_model, d_ff = arrays["w_in"].shape[1:]
    model = ModelConfig(
        layers=1, d_model=d_model, d_ff=d_ff, heads=1, placement="every 1",
        experts=(settings["experts"],), top_k=settings["top_k"], residual=settings["residual"],
    )  # fmt: skip
    factor = capacity_factor(settings)
    moe = MoeConfig(
        min_capacity=settings["min_capacity"], overflow=settings["priority"],
        capacity_factor=factor, eval_capacity_factor=factor,
    )  # fmt: skip
    layer = MoE(settings["experts"], model, moe, jax.random.key(0))
    for name, parameter in parameters(layer).items():
        parameter[...] = jnp.asarray(arrays[name])
    return layer


def parameters(layer):
    named = {"w_router": layer.w_router}
    named |= {name: getattr(layer.experts, name) for name in EXPERTS}
    if layer.mlp is not None:
        named |= {f"mlp_{name}": getattr(layer.mlp, name) for name in EXPERTS}
        named |= {"w_mix": layer.w_mix, "b_mix": layer.b_mix}
    return named


@pytest.mark.parametrize(
    ("name", "dispatch"),
    [(name, "gather") for name in CASES] + [(name, "einsum") for name in CASES[::6]],
)
def test_layer_equals_deepspeed(name, dispatch, monkeypatch):
    """Output, auxiliary loss, counts, who is kept, and the gradient of every tensor."""
    settings, golden = load(name)
    layer = build(settings, golden)
    keys_B = jax.random.split(jax.random.key(0), 1) if settings["training"] else None
    if settings["priority"] == "random":
        # DeepSpeed draws for each token and expert; what counts is the draw at the chosen one.
        expert_S = (golden["x"] @ golden["w_router"]).argmax(1)
        drawn_SxK = np.take_along_axis(golden["rts_uniform"], expert_S[:, None], 1)
        monkeypatch.setattr(routing.jax.random, "uniform", lambda key, shape: jnp.array(drawn_SxK))
    valid_BxL, by = jnp.ones((1, settings["tokens"]), bool), ExecutionConfig(dispatch=dispatch)

    def loss(layer, x_SxD):
        y_BxLxD, metrics = layer(x_SxD[None], valid_BxL, keys_B, execution=by)
        return (y_BxLxD[0] * golden["cotangent"]).sum() + metrics.aux_loss, (y_BxLxD[0], metrics)

    gradient = jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    (d_layer, d_x_SxD), (y_SxD, metrics) = gradient(layer, jnp.asarray(golden["x"]))
    close = lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)  # noqa: E731
    close(y_SxD, golden["y"])
    close(metrics.aux_loss, golden["aux_loss"])
    close(d_x_SxD, golden["d_x"])
    for parameter, d_parameter in parameters(d_layer).items():
        close(d_parameter[...], golden[f"d_{parameter}"])
    np.testing.assert_array_equal(metrics.assigned_E, golden["counts"])
    np.testing.assert_array_equal(
        metrics.assigned_E - metrics.dropped_E, golden["kept"].sum(0)
    )  # the very same tokens, or the outputs would differ


@pytest.mark.parametrize("name", CASES)
def test_capacity_of_the_goldens(name):
    settings, golden = load(name)
    shape = settings["tokens"], settings["experts"], capacity_factor(settings)
    ours = capacity(*shape, settings["top_k"], settings["min_capacity"])
    if settings["drop_tokens"]:
        assert ours == min(golden["capacity"], settings["tokens"])
    else:  # DeepSpeed takes the largest count, ours what no count exceeds
        assert ours == settings["tokens"] >= golden["capacity"]


def test_two_hundred_capacities():
    """DeepSpeed's may exceed the number of tokens; ours doesn't, since nothing could fill it."""
    table = np.load(DEEPSPEED / "capacities.npz")
    assert list(table["columns"]) == [
        "tokens",
        "experts",
        "capacity_factor",
        "min_capacity",
        "top_k",
    ]
    assert len(table["rows"]) == 200
    for (tokens, experts, factor, minimum, top_k), theirs in zip(
        table["rows"], table["capacity"], strict=True
    ):
        ours = capacity(int(tokens), int(experts), factor, int(top_k), int(minimum))
        assert ours == min(theirs, tokens)


def test_priority_decides_who_is_kept():
    """The RTS golden through `assign` alone: exactly DeepSpeed's tokens."""
    _, golden = load("top1_rts")
    choice_SxE = jax.nn.one_hot((golden["x"] @ golden["w_router"]).argmax(1), 4)
    priority_S = (golden["rts_uniform"] * choice_SxE).sum(1)
    slots = int(golden["capacity"])
    _, kept_GxSxK = assign(choice_SxE[None, :, None], slots, priority_S[None, :, None])
    np.testing.assert_array_equal(kept_GxSxK[0, :, 0], golden["kept"].any(1))


@needs_extra("interop", "deepspeed")
def test_goldens_are_deepspeeds(tmp_path):
    script = GOLDENS / "generate_deepspeed.py"
    subprocess.run([sys.executable, script, f"--out={tmp_path}"], check=True, timeout=600)
    for path in DEEPSPEED.glob("*.npz"):
        new, old = np.load(tmp_path / path.name), np.load(path)
        for name in set(old.files) - {"settings", "columns"}:
            np.testing.assert_allclose(new[name], old[name], rtol=1e-5, atol=1e-6, err_msg=name)
