"""Which options let a token that comes later change an output that came before: an audit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prmoe_jax.config import architecture
from prmoe_jax.config.loading import resolve
from prmoe_jax.model.backends import check_backends
from prmoe_jax.model.transformer import init_model
from prmoe_jax.parallel.mesh import make_mesh
from tests.support.quick import jit

LENGTH = 32
# Options of moe.*, whether randomness is on, and whether the future leaks.
AUDIT = {
    "evaluation, as configured": ({}, False, False),
    "evaluation of a model trained with random selection": ({"overflow": "random"}, False, False),
    "evaluation of a model trained with noise": ({"noise": "rsample"}, False, False),
    "evaluation, balanced without a loss": ({"bias_update_rate": 0.1}, False, False),
    "evaluation, groups in a sequence": ({"group_size": 8}, False, False),
    "training, as configured": ({}, True, False),
    "training with noise": ({"noise": "rsample"}, True, False),
    "training with jitter": ({"noise": "jitter"}, True, False),
    "training with random selection": ({"overflow": "random"}, True, True),
    "overflow by probability": ({"overflow": "probability"}, False, True),
    "expert choice": ({"router": "expert_choice"}, False, True),
    "dropless by probability": (
        {"overflow": "probability", "eval_capacity_factor": float("inf")}, False, False,
    ),
}  # fmt: skip


def model_of(text, **moe):
    shape = {"vocab_size": 384, "length": LENGTH, "d_model": 16, "heads": 2, "d_ff": 16}
    fields = architecture.parse_fields(text) | shape | {"dtype": "float32", "init_std": 0.5}
    moe = {"min_capacity": 1, "eval_capacity_factor": 0.7, "capacity_factor": 0.7} | moe
    values = {"model": fields, "moe": moe, "train": {"steps": 1}, "data": {"tokenizer": "bytes"}}
    config = resolve(values)
    return config, jit(init_model, static_argnums=0)(config)


def leak(text, training, **moe):
    """The largest change of an output at or before t when the tokens after t change, over t."""
    config, model = model_of(text, **moe)
    factor = config.moe.capacity_factor if training else config.moe.eval_capacity_factor
    keys_B = jax.random.split(jax.random.key(7), 4) if training else None
    segments_BxL = jnp.ones((4, LENGTH), jnp.int32)

    @jit
    def run(tokens_BxL):
        x_BxLxD, metrics = model(tokens_BxL, segments_BxL, keys_B)
        return x_BxLxD, sum(m.dropped_S.sum() for m in metrics)

    tokens_BxL = jax.random.randint(jax.random.key(1), (4, LENGTH), 0, 384)
    others_BxL = jax.random.randint(jax.random.key(2), (4, LENGTH), 0, 384)
    x_BxLxD, dropped = run(tokens_BxL)
    assert dropped > 0 or np.isinf(factor) or config.moe.router == "expert_choice"
    largest = 0.0
    for t in range(0, LENGTH - 1, 3):
        changed_BxL = jnp.where(jnp.arange(LENGTH) > t, others_BxL, tokens_BxL)
        y_BxLxD, _ = run(changed_BxL)
        assert np.abs(y_BxLxD - x_BxLxD)[:, t + 1 :].max() > 0.1
        largest = max(largest, float(np.abs(y_BxLxD - x_BxLxD)[:, : t + 1].max()))
    return largest


@pytest.mark.parametrize("case", AUDIT)
def test_audit(case):
    moe, training, leaks = AUDIT[case]
    change = leak("2 layers, every 1, E=4, residual", training, **moe)
    assert change > 1e-3 if leaks else change < 1e-5


def test_top_k():
    """Top 2 in training: a full expert prefers any first choice to any second one (GShard)."""
    top_2, top_3 = "2 layers, every 1, E=4, top 2", "2 layers, every 1, E=4, top 3"
    assert leak(top_2, training=True) > 1e-3
    assert leak(top_2, training=False) < 1e-5
    assert leak(top_3, training=True) < 1e-5
    assert leak(top_3, training=False) < 1e-5


@pytest.mark.parametrize(
    ("text", "moe", "causal"),
    [
        ("2 layers, E=4", {}, True),
        ("2 layers", {}, True),
        ("2 layers, E=4", {"overflow": "random"}, True),
        ("2 layers, E=4", {"overflow": "probability"}, False),
        ("2 layers, E=4", {"router": "expert_choice"}, False),
        ("2 layers, E=4, top 2", {}, True),
    ],
)
def test_a_router_that_is_not_causal_is_announced(text, moe, causal, caplog):
    values = {"model": architecture.parse_fields(text), "moe": moe, "train": {"steps": 1}}
    config = resolve(values)
    assert config.causal == causal
    check_backends(config, "cpu", make_mesh(config, jax.devices()[:1]))
    assert ("not causal" in caplog.text) != causal
