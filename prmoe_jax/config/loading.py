"""Turns a ConfigDict or a run's config.json into a checked `Config`, and back."""

import dataclasses
import difflib
import json
from collections.abc import Mapping
from pathlib import Path

from ml_collections import ConfigDict

from prmoe_jax import files
from prmoe_jax.config.effects import check_effects
from prmoe_jax.config.schema import Config, declarations, leaves
from prmoe_jax.config.validation import check
from prmoe_jax.errors import UserError, refusing, telling


def resolve(settings: ConfigDict | Mapping, trained: bool = False) -> Config:
    """Freezes settings into a `Config` and checks them.

    Args:
      settings: groups of settings; missing ones get their defaults.
      trained: whether these are an existing run's settings, which may have no effect.

    Raises:
      UserError: a key is unknown, a type is wrong, values do not fit together, or a setting has no
        effect.
    """
    if isinstance(settings, ConfigDict):
        settings = settings.to_dict()
    config = _build(Config, _renamed(settings), "config")
    check(config)
    if not trained:
        check_effects(config)
    return config


def save(config: Config, path: Path) -> None:
    """Writes a config as JSON, from which `load` makes an equal one."""
    files.replace(path, json.dumps(dataclasses.asdict(config), indent=2) + "\n")


def load(path: Path) -> Config:
    """Reads a config that `save` wrote."""
    with (
        refusing(f"{path} cannot be read", OSError),
        refusing(f"{path} is damaged", ValueError),  # not UTF-8, or not JSON
    ):
        if not path.exists():
            raise UserError(f"no run in {path.parent}: {path.name} is missing")
        settings = files.parse_json(files.read(path))
    with telling(f"{path}: "):
        return resolve(settings, trained=True)


# Settings that may differ when a run is resumed. They change parameters and training loss by
# rounding only, because another mesh or program sums in another order.
RESUMABLE = (
    "eval.", "checkpoint.", "log.", "data.cache_dir", "mesh.", "execution.", "train.accumulate",
)  # fmt: skip


def check_resume(saved: Config, given: Config) -> None:
    """Refuses to resume a run with settings that would change its result."""
    free: tuple[str, ...] = RESUMABLE
    longer = given.total_steps > saved.total_steps and given.kd_steps == saved.kd_steps
    if given.optimizer.decay_tokens and longer:  # on the same schedule
        free += "train.steps", "train.tokens"
    if details := _differences(saved, given, free):
        raise UserError(
            f"the run in this workdir has another config: {details}; "
            "give the same settings to resume it, or another --workdir to start afresh"
        )


def _differences(before: Config, after: Config, free: tuple[str, ...]) -> str:
    """The settings that differ and don't start with a name in `free`, each with both values."""
    old, new = leaves(before), leaves(after)
    changed = [k for k in sorted(old) if old[k] != new[k] and not k.startswith(free)]
    return ", ".join(f"{k} was {old[k]!r}, is {new[k]!r}" for k in changed)


# A decay branch (WSD schedule) continues its base run, `trunk`, from a checkpoint before the decay.
# Only these settings may differ between the two: before the decay they change results by rounding
# at most.
BRANCHABLE = (
    *RESUMABLE, "init.", "train.steps", "train.tokens", "optimizer.decay_tokens",
    "optimizer.decay_fraction", "optimizer.min_learning_rate",
)  # fmt: skip


def check_branch(trunk: Config, branch: Config, name: str) -> None:
    """Refuses a decay branch that differs from its base run, `name`, before `branch.init.step`."""
    if details := _differences(trunk, branch, BRANCHABLE):
        raise UserError(
            f"{name} has another config: {details}; a branch differs in its length alone"
        )
    if trunk.kd_steps != branch.kd_steps:
        raise UserError(
            f"{name} distills in {trunk.kd_steps} steps, its branch in {branch.kd_steps}; give "
            "kd.stop in tokens, so that it does not depend on the length of the run"
        )
    if branch.init.step > trunk.decay_start:
        raise UserError(
            f"init.step={branch.init.step}: {name} decays from step {trunk.decay_start} on, and "
            "its learning rate has fallen by then; use that step or an earlier one"
        )


def _build(cls, values, path: str):
    if not isinstance(values, Mapping):
        raise UserError(f"{path} must be a group of settings, not {values!r}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            close = difflib.get_close_matches(str(name), fields, 1)
            hint = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(fields)}"
            raise UserError(f"{path}.{name} is not a setting; {hint}")
    return cls(**{k: _convert(fields[k].type, v, f"{path}.{k}") for k, v in values.items()})


def _renamed(settings: Mapping) -> Mapping:
    """Renames settings that an older config has under an earlier name (`Setting.formerly`)."""
    if not isinstance(settings, Mapping):
        return settings  # `_build` refuses it
    settings = {k: dict(v) if isinstance(v, Mapping) else v for k, v in settings.items()}
    for name, setting in declarations().items():
        (before, _, earlier), (now, _, key) = setting.formerly.partition("."), name.partition(".")
        groups = settings.get(before), settings.get(now, {})  # `_build` refuses what is no mapping
        if all(isinstance(group, dict) for group in groups) and earlier in settings[before]:
            value = settings[before].pop(earlier)
            if settings.setdefault(now, {}).get(key, value) not in (setting.default, value):
                raise UserError(
                    f"config.{setting.formerly} is config.{name} today; give only the latter"
                )
            settings[now][key] = value
    return settings


def _convert(kind, value, path: str):
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, path)
    if kind == tuple[int, ...]:
        value = (value,) if isinstance(value, int) else value
        if isinstance(value, (tuple, list)) and all(type(v) is int for v in value):
            return tuple(value)
        raise UserError(f"{path}={value!r} must be whole numbers such as 8,8,16")
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise UserError(f"{path}={value!r} must be of type {kind.__name__}")
    return value
