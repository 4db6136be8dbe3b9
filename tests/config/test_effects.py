"""Settings that have no effect are refused, and what each needs to have one is named."""

import pytest

from prmoe_jax.config import architecture
from prmoe_jax.config.loading import load, resolve, save
from prmoe_jax.config.schema import default_config
from prmoe_jax.errors import UserError


def settings(text, *changes):
    values = default_config()
    values.model.update(architecture.parse_fields(text))
    values.train.steps = 100
    for change in changes:
        values.update_from_flattened_dict(change)
    return values


MIN = "the capacity is moe.min_capacity=4; leave it at 1.0"
FULL = "no expert is full; leave it at position"
ALL = "every token visits all experts of its layer"

# Architecture, settings that are fine beside it, one that has no effect, and the reason.
IDLE = {
    "few tokens": ("4 layers, E=64", {}, {"moe.capacity_factor": 0.5}, MIN),
    "more of few tokens": ("4 layers, E=128", {}, {"moe.eval_capacity_factor": 2.0}, MIN),
    "groups": ("4 layers, E=8", {"moe.group_size": 16}, {"moe.capacity_factor": 0.5}, MIN),
    "all slots": ("4 layers, E=4", {"moe.capacity_factor": 4.0}, {"moe.overflow": "random"}, FULL),
    "two of all": (
        "4 layers, E=4, top 2",
        {"moe.capacity_factor": 2.0, "moe.eval_capacity_factor": 2.0},
        {"moe.overflow": "probability"},
        FULL,
    ),
    "large minimum": (
        "4 layers, E=4", {"moe.min_capacity": 256}, {"moe.overflow": "random"}, FULL
    ),
    "second of two": (
        "4 layers, E=2, top 2", {}, {"moe.second_expert_sampling": True}, "is the other one"
    ),
    "bias": ("4 layers, E=4, top 4", {}, {"moe.bias_update_rate": 0.001}, ALL),
    "balance": ("4 layers, E=4, top 4", {}, {"moe.aux_loss_weight": 0.1}, ALL),
    "one expert": ("4 layers, E=1", {}, {"moe.noise": "rsample"}, ALL),
    "no weight": (
        "4 layers, E=8",
        {"moe.aux_loss_weight": 0.0},
        {"moe.balance": "batch"},
        "without moe.aux_loss_weight; leave it at group",
    ),
    "experts choose": (
        "4 layers, E=8",
        {"moe.router": "expert_choice"},
        {"moe.aux_loss_weight": 0.1},
        "with moe.router=expert_choice; leave it at 0.01",
    ),
    "upcycled": (
        "4 layers, E=8",
        {"init.workdir": "runs/dense"},
        {"moe.expert_init": "tied"},
        "with init.workdir=runs/dense; leave it at independent",
    ),
    "inherited": (
        "4 layers, E=8",
        {"teacher.workdir": "runs/teacher", "teacher.inherit": True},
        {"moe.expert_init": "tied"},
        "with teacher.inherit=True; leave it at independent",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "fine", "idle", "why"), IDLE.values(), ids=IDLE)
def test_a_setting_without_effect_is_refused(text, fine, idle, why, tmp_path):
    resolve(settings(text, fine))
    both = settings(text, fine, idle)
    with pytest.raises(UserError) as error:
        resolve(both)
    assert str(error.value).startswith(*idle)
    assert "has no effect with" in str(error.value)
    assert why in str(error.value)
    assert "\n" not in str(error.value)
    # A run that has it can still be read.
    save(resolve(both, trained=True), tmp_path / "config.json")
    assert load(tmp_path / "config.json") == resolve(both, trained=True)


@pytest.mark.parametrize(
    ("text", "given"),
    [
        ("4 layers, E=32", {"moe.capacity_factor": 0.5}),  # 4 slots instead of 8
        ("4 layers, E=64", {"moe.capacity_factor": 2.0}),  # 8 instead of 4
        ("4 layers, E=32+64", {"moe.capacity_factor": 0.5}),  # in one layer of two
        ("4 layers, E=64", {"moe.capacity_factor": 0.5, "moe.min_capacity": 1}),
        ("4 layers, E=4", {"moe.capacity_factor": 3.9, "moe.overflow": "random"}),
        ("4 layers, E=4+8", {"moe.capacity_factor": 4.0, "moe.overflow": "random"}),
        ("4 layers, E=4", {"moe.capacity_factor": 4.0, "moe.overflow": "probability"}),
        ("4 layers, E=2+4, top 2", {"moe.second_expert_sampling": True}),
        ("4 layers, E=4+8, top 4", {"moe.bias_update_rate": 0.001}),
        ("4 layers, E=2, top 2", {"moe.aux_loss_weight": 0.1}),  # of first choices
        ("4 layers, E=4, top 4", {"moe.aux_loss_weight": 0.0}),
        ("4 layers, E=8", {"moe.router": "expert_choice", "moe.aux_loss_weight": 0.0}),
    ],
)
def test_a_setting_with_an_effect_stays(text, given):
    resolve(settings(text, given))
