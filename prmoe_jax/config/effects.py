"""Refuses settings without effect: a study that varies one would compare a model with itself.

`Setting.only` and `Setting.unless` declare conditions on other settings; `Router.ignores` lists
what a router does not read. This file adds the cases that depend on numbers.

An existing run may have such settings, so its config.json is not checked for them.
"""

from collections.abc import Iterator, Mapping

from prmoe_jax.config.routers import capacity
from prmoe_jax.config.schema import ONLY, Config, declarations, leaves, preset
from prmoe_jax.errors import UserError

Unused = tuple[str, str]  # a setting's name, and why it has no effect


def check_effects(config: Config) -> None:
    """Refuses settings of a checked config that differ from their defaults and have no effect."""
    values, defaults = leaves(config), preset(config)
    for name, why in _unused(config, values):
        value, default = values[name], defaults[name]
        if value != default and (name, value) != ("moe.aux_loss_weight", 0):
            fix = f"leave it at {default}" if default not in ("", ()) else "leave it out"
            raise UserError(f"{name}={value} has no effect {why}; {fix}")


def _unused(config: Config, values: Mapping[str, object]) -> Iterator[Unused]:
    for name, setting in declarations().items():
        for condition in filter(None, (ONLY.get(name.partition(".")[0]), setting.only)):
            if not _holding(condition, values):
                other, _, wanted = condition.partition("=")
                with_other = f"with {other}={values.get(other)}: it is for {condition}"
                yield name, with_other if wanted else f"without {condition}"
        if setting.unless and (holding := _holding(setting.unless, values)):
            yield name, f"with {holding}"
    if any(config.model.schedule.experts):
        for name in config.moe.routes.ignores:
            yield name, f"with moe.router={config.moe.router}"
        yield from _in_routing(config)
        yield from _in_capacity(config)
    if config.model.sliding_window >= config.model.length:
        yield "model.sliding_window", f"with model.length={config.model.length}"
    if not any(config.model.windows):
        yield "model.sliding_window", f"with model.full_attention={config.model.full_attention}"


def _holding(condition: str, values: Mapping[str, object]) -> str:
    """The first alternative of a condition that holds, as NAME=VALUE; '' if none holds."""
    for name, _, wanted in (one.partition("=") for one in condition.split(" or ")):
        value = values[name]
        if str(value).lower() == wanted if wanted else value:
            return f"{name}={value}"
    return ""


def _in_routing(config: Config) -> Iterator[Unused]:
    model, moe = config.model, config.moe
    sampled = moe.noise == "rsample"
    if sampled and not moe.routes.tokens_choose:
        yield "moe.noise", f"with moe.router={moe.router}: it is for tokens' choices"
    if sampled and model.top_k != 1:
        yield "moe.noise", f"with model.top_k={model.top_k}: it is for top_k=1"
    most = max(model.schedule.experts)
    if most <= 2:
        yield "moe.second_expert_sampling", "with 2 experts in a layer: the second is the other one"
    if moe.routes.tokens_choose and most == model.top_k:
        why = f"with model.top_k={model.top_k}: every token visits all experts of its layer"
        yield "moe.bias_update_rate", why
        if sampled:
            yield "moe.noise", why
        if model.top_k != 2:  # with top 2 the loss balances first choices (GShard)
            yield "moe.aux_loss_weight", why


def _in_capacity(config: Config) -> Iterator[Unused]:
    """Capacity settings without effect for these numbers of experts and tokens."""
    model, moe, group = config.model, config.moe, config.group_size
    experts = [count for count in model.schedule.experts if count]

    def slots(factor: float, count: int) -> int:
        return capacity(group, count, factor, model.top_k, moe.min_capacity)

    least = min(moe.min_capacity, group)
    for name in ("capacity_factor", "eval_capacity_factor"):
        if slots(max(1.0, getattr(moe, name)), min(experts)) <= least:
            why = f"with {min(experts)} experts or more in a layer and groups of {group} tokens: "
            yield f"moe.{name}", f"{why}the capacity is moe.min_capacity={moe.min_capacity}"
    # In evaluation, `random` drops the same tokens as `position`; only `probability` differs.
    factors = [moe.capacity_factor]
    if moe.overflow == "probability":
        factors.append(moe.eval_capacity_factor)
    if all(slots(factor, max(experts)) >= group for factor in factors):
        yield "moe.overflow", f"with moe.capacity_factor={moe.capacity_factor:g}: no expert is full"
