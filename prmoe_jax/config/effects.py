"""Refuses settings that do nothing: with one of them, a study would compare a model with itself.

A run that was trained earlier may have them: its config.json is not checked for it.
"""

import math
from collections.abc import Iterator

from prmoe_jax.config.family import FAMILIES
from prmoe_jax.config.schema import Config, ModelConfig, leaves
from prmoe_jax.config.validation import show
from prmoe_jax.errors import UserError

_DEFAULTS = leaves(Config())

# A setting's name, the value that it should keep, and why others have no effect.
Idle = tuple[str, object, str]


def check_effects(config: Config) -> None:
    """Refuses settings that have no effect beside the others.

    Args:
      config: settings that `validation.check` found in order.

    Raises:
      UserError: a setting has no effect; names it, the reason, and the value to leave it at.
    """
    values = leaves(config)
    for name, idle, why in _idle(config):
        if values[name] != idle:
            fix = f"leave it at {idle}" if idle not in ("", ()) else "leave it out"
            raise UserError(f"{name}={_shown(values[name])} has no effect {why}; {fix}")


def _shown(value) -> str:
    """A value as text for a message, without quotes."""
    return value if isinstance(value, str) else show(value)


def _idle(config: Config) -> Iterator[Idle]:
    yield from _in_attention(config.model)
    if any(config.model.schedule.experts):
        yield from _in_moe_layers(config)
    else:
        yield from _in_dense_models(config.model)
    yield from _in_optimizer(config)
    yield from _in_init(config)
    yield from _in_distillation(config)


def _in_attention(model: ModelConfig) -> Iterator[Idle]:
    if model.form.positions != "rotary":
        why = f"with model.positions={model.form.positions}: it is for rotary ones"
        yield "model.rope_theta", 0.0, why
        yield "model.rope_scaling", (), why
    if model.sliding_window >= model.length:
        yield "model.sliding_window", 0, f"with model.length={model.length}"


def _in_dense_models(model: ModelConfig) -> Iterator[Idle]:
    why = "in a dense architecture: model.placement and model.experts give it experts"
    family = FAMILIES[model.family]
    names = "top_k", "normalize_top_k", "expert_d_ff", "residual", "residual_mix", "residual_d_ff"
    for name in names:
        default = getattr(ModelConfig, name)
        if getattr(model, name) != getattr(family, name, default):
            yield f"model.{name}", default, why
    for name, value in _DEFAULTS.items():
        if name.startswith("moe."):
            yield name, value, why


def _in_moe_layers(config: Config) -> Iterator[Idle]:
    model, moe = config.model, config.moe
    if not model.residual:
        why = "without model.residual=true"
        yield "model.residual_d_ff", 0, why
        if model.residual_mix != FAMILIES[model.family].residual_mix:
            yield "model.residual_mix", "auto", why
    yield from _in_capacity(config)
    if moe.router == "expert_choice":
        yield from _in_expert_choice(config)
    if model.top_k != 1 and moe.noise == "rsample":
        yield "moe.noise", "none", f"with model.top_k={model.top_k}: it is for top_k=1"
    if model.top_k != 2:
        why = f"with model.top_k={model.top_k}: it is for top_k=2"
        yield "moe.second_expert_sampling", False, why
    experts = [count for count in model.schedule.experts if count]
    if max(experts) <= 2:
        why = "with 2 experts in a layer: the second choice is the other one"
        yield "moe.second_expert_sampling", False, why
    if moe.router == "token_choice" and max(experts) == model.top_k:
        why = f"with model.top_k={model.top_k}: every token visits all experts of its layer"
        yield "moe.bias_update_rate", 0.0, why
        if moe.noise == "rsample":
            yield "moe.noise", "none", why
        if moe.aux_loss_weight and model.top_k != 2:  # GShard's balances first choices
            yield "moe.aux_loss_weight", 0.01, why
    if moe.aux_loss_weight == 0:
        yield "moe.balance", "group", "with moe.aux_loss_weight=0"


def _in_capacity(config: Config) -> Iterator[Idle]:
    """Settings of capacity, which some numbers of experts and tokens make the same."""
    model, moe, group = config.model, config.moe, config.group_size
    experts = [count for count in model.schedule.experts if count]

    def share(factor: float, count: int) -> float:
        return group / count * factor * model.top_k

    for name in ("capacity_factor", "eval_capacity_factor"):
        factor = getattr(moe, name)
        if math.isfinite(factor) and share(max(1.0, factor), min(experts)) <= moe.min_capacity:
            why = f"with {min(experts)} experts or more in a layer and groups of {group} tokens: "
            why += f"the capacity is moe.min_capacity={moe.min_capacity}, as with 1.0"
            yield f"moe.{name}", 1.0, why
    # A rule for overflow matters in training alone, or in evaluation, too.
    factors = [moe.capacity_factor]
    if moe.overflow == "probability":
        factors.append(moe.eval_capacity_factor)
    if moe.router == "token_choice" and all(
        share(factor, max(experts)) >= group or moe.min_capacity >= group for factor in factors
    ):
        why = f"with moe.capacity_factor={moe.capacity_factor:g}: no expert is ever full"
        yield "moe.overflow", "position", why


def _in_expert_choice(config: Config) -> Iterator[Idle]:
    why = "with moe.router=expert_choice: "
    full = why + "no expert overflows, and the load is even"
    yield "moe.overflow", "position", full
    yield "moe.balance", "group", full
    yield "moe.bias_update_rate", 0.0, full
    if config.moe.aux_loss_weight:
        yield "moe.aux_loss_weight", 0.01, full
    scores = why + "weights are the scores"
    yield "moe.routed_scale", 1.0, scores
    if config.model.form.normalize_top_k == "always":
        yield "model.normalize_top_k", "never", scores
    yield "moe.second_expert_sampling", False, why + "tokens choose none"
    if config.moe.noise == "rsample":
        yield "moe.noise", "none", why + "it is for tokens' choices"


def _in_optimizer(config: Config) -> Iterator[Idle]:
    optimizer = config.optimizer
    if optimizer.kind != "muon":
        why = f"with optimizer.kind={optimizer.kind}: it is Muon's"
        yield "optimizer.momentum", _DEFAULTS["optimizer.momentum"], why
    if optimizer.schedule != "wsd":
        why = f"with optimizer.schedule={optimizer.schedule}: it is for wsd"
        yield "optimizer.decay_fraction", _DEFAULTS["optimizer.decay_fraction"], why


def _in_init(config: Config) -> Iterator[Idle]:
    if not config.init.workdir:
        yield "init.noise", 0.0, "without init.workdir, the run to start as"
        yield "init.step", 0, "without init.workdir, the run to go on from"
    elif config.init.step:
        why = f"with init.step={config.init.step}, which takes the other run's parameters"
        yield "init.noise", 0.0, why
    else:
        why = "with init.workdir: experts start as those, or as the MLPs, of that run"
        yield "moe.expert_init", "independent", why


def _in_distillation(config: Config) -> Iterator[Idle]:
    teacher, kd = config.teacher, config.kd
    if not (teacher.workdir or teacher.cache):
        for name, value in _DEFAULTS.items():
            if name.startswith(("teacher.", "kd.")):
                yield name, value, "without a teacher, which teacher.workdir names"
        return
    if teacher.cache:
        why = "on a teacher cache, which is written"
        yield "teacher.mode", "eval", why
        yield "teacher.capacity_factor", 0.0, why
    if teacher.mode == "train":
        why = "with teacher.mode=train, which has the teacher's own"
        yield "teacher.capacity_factor", 0.0, why
    if teacher.inherit:
        why = "with teacher.inherit=true: experts start as the teacher's"
        yield "moe.expert_init", "independent", why
    else:
        for name in ("teacher.layers", "teacher.importance"):
            yield name, _DEFAULTS[name], "without teacher.inherit=true"
    if kd.kind != "top_k":
        yield "kd.top_k", 0, f"with kd.kind={kd.kind}: it is for kd.kind=top_k"
