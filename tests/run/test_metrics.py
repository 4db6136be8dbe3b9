"""The metrics of a step, worked out by hand from its sums; and the share of a device's peak."""

import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from prmoe_jax.model.loss import Sums
from prmoe_jax.moe.routing import RouterMetrics
from prmoe_jax.run.metrics import ailing, model_flops_utilisation, router_table, summarise
from tests.support.configs import settings


def test_sums_by_hand():
    """20 tokens in 3 groups of up to 8, one choice each; no expert kept 5 of them."""
    router = RouterMetrics(
        aux_loss=6.0, z_loss=40.0, groups=3, tokens=20, unserved=5, entropy=10.0,
        weight=8.0, weight_square=4.0, added_square=9.0, stream_square=900.0,
        assigned_E=np.array([12, 8, 0]), dropped_E=np.array([3, 2, 0]),
        choices_S=np.array([3, 3, 3, 3, 2, 2, 2, 2]), dropped_S=np.array([0, 0, 0, 1, 1, 0, 1, 2]),
        coefficient=8.0, coefficient_unserved=1.0, rounds=60,
    )  # fmt: skip
    sums = Sums(loss=0.0, lm_loss=36.0, z_loss=9.0, tokens=18, kd_loss=4.5, routers=[router])
    found = summarise(sums, settings("2 layers, E=3, residual"))
    layer = {
        "aux_loss": 2.0,
        "router_z_loss": 2.0,
        "drop_fraction": 5 / 20,
        "expert_load": [0.6, 0.4, 0],
        "expert_drop_fraction": [3 / 12, 2 / 8, 0],
        "position_drop_fraction": [0, 0, 0, 1 / 3, 1 / 2, 0, 1 / 2, 1],
        "unserved_fraction": 5 / 20,
        "router_entropy": 0.5,
        "router_weight": 0.4,
        "router_weight_std": 0.2,
        "added_norm": 0.1,
        "dead_experts": 1,
        "residual_coefficient": 8 / 20,
        "residual_coefficient_kept": 7 / 15,
        "residual_coefficient_dropped": 1 / 5,
        "exchange_rounds": 3.0,
    }
    expected = {"lm_loss": 2.0, "z_loss": 0.5, "kd_loss": 0.25, "aux_loss": 2.0}
    expected |= {"drop_fraction": 5 / 20}
    expected |= {f"layers/01/{name}": value for name, value in layer.items()}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-6), name


def test_the_load_of_a_whole_batch_by_hand():
    """E times the sum of load and probability: 2 · (0.75 · 0.6 + 0.25 · 0.4)."""
    router = RouterMetrics(
        *(0.0, 0.0, 1, 4, 0, 0.0, 0.0, 0.0), np.array([3, 1]), np.zeros(2), np.array([1] * 4),
        *(np.zeros(4), 0.0, 0.0, 0, 0.0, 0.0), prob_E=np.array([2.4, 1.6]),
    )  # fmt: skip
    sums = Sums(loss=0.0, lm_loss=0.0, z_loss=0.0, tokens=4, kd_loss=None, routers=[router])
    found = summarise(sums, settings("1 layers, every 1, E=2", moe={"balance": "batch"}))
    assert found["aux_loss"] == pytest.approx(2 * (0.75 * 0.6 + 0.25 * 0.4), rel=1e-6)
    assert "kd_loss" not in found and "layers/00/exchange_rounds" not in found


def test_ailing_routers_by_hand():
    """Uniform over four experts; almost no output; healthy; a single expert, which is no vice."""
    layers = {
        "01": {"router_entropy": 0.985 * math.log(4), "expert_load": [0.25] * 4},
        "03": {"router_entropy": 0.9, "expert_load": [0.25] * 4, "added_norm": 0.009},
        "05": {"router_entropy": 0.97 * math.log(4), "expert_load": [1, 0, 0, 0]},
        "07": {"router_entropy": 0.0, "expert_load": [1.0]},
    }
    layers = {n: {"added_norm": 0.5} | layer for n, layer in layers.items()}
    metrics = {f"layers/{n}/{name}": x for n, layer in layers.items() for name, x in layer.items()}
    found = ailing(metrics)
    assert found.keys() == {"01", "03"}
    assert "98.5% of ln E" in found["01"] and "0.90%" in found["03"]


def test_columns_of_the_router_table():
    """Columns of drops only if there are some, of worth only where it was measured."""
    layer = {
        "drop_fraction": 0.0, "unserved_fraction": 0.0, "router_entropy": math.log(2) / 2,
        "expert_load": [0.75, 0.25], "expert_drop_fraction": [0.0, 0.0],
        "position_drop_fraction": [0.0, 0.0],
    }  # fmt: skip

    def table(**more):
        return router_table({f"layers/02/{name}": x for name, x in (layer | more).items()})

    old = table()
    assert old.split("\n")[-1].split() == ["02", "0.500", "1.50x", "even"]
    assert "dropped" in table(drop_fraction=0.5) and "dropped" not in old
    new = table(router_weight=0.5, router_weight_std=0.25, loss_without_experts=0.0625)
    assert "0.500 ± 0.250" in new and "+0.0625 nats" in new and "permuted" not in new


@pytest.mark.parametrize(("kind", "share"), [("TPU v5p", 0.25), ("cpu", None)])
def test_the_share_of_the_peak(kind, share, monkeypatch):
    """Four devices of 459 TFLOP/s each that do 459 in all."""
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind=kind)])
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    found = model_flops_utilisation(459e12)
    assert found == share or math.isclose(found, share)
