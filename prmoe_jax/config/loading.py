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
    """Reads a config that `save` wrote.

    Raises:
      UserError: the file is missing or is not a valid config.
    """
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
    """Refuses to resume a run with settings that would change its result.

    Raises:
      UserError: settings differ; the message gives each with both values.
    """
    before, after = leaves(saved), leaves(given)
    changed = {k for k in before if before[k] != after[k] and not k.startswith(RESUMABLE)}
    longer = given.total_steps > saved.total_steps and given.kd_steps == saved.kd_steps
    if given.optimizer.decay_tokens and longer:
        changed -= {"train.steps", "train.tokens"}  # a longer run on the same schedule
    if changed:
        details = ", ".join(f"{k} was {before[k]!r}, is {after[k]!r}" for k in sorted(changed))
        raise UserError(
            f"the run in this workdir has another config: {details}; "
            "give the same settings to resume it, or another --workdir to start afresh"
        )


# A decay branch (WSD schedule) continues its base run, here `trunk`, from a checkpoint before the
# decay. It may also differ in these settings, which change nothing before the decay.
BRANCHABLE = (
    *RESUMABLE, "init.", "train.steps", "train.tokens", "optimizer.decay_tokens",
    "optimizer.decay_fraction", "optimizer.min_learning_rate",
)  # fmt: skip


def check_branch(trunk: Config, branch: Config, name: str) -> None:
    """Refuses a decay branch that differs from its base run before `branch.init.step`.

    Args:
      trunk: the base run's config.
      branch: the branch's config.
      name: the base run's name or folder, for the message.

    Raises:
      UserError: settings differ, or the base run's decay starts before that step.
    """
    before, after = leaves(trunk), leaves(branch)
    changed = [k for k in before if before[k] != after[k] and not k.startswith(BRANCHABLE)]
    if changed:
        details = ", ".join(f"{k} is {before[k]!r} there, {after[k]!r} here" for k in changed)
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
    return cls(
        **{name: _convert(fields[name].type, v, f"{path}.{name}") for name, v in values.items()}
    )


def _renamed(settings: Mapping) -> Mapping:
    """Renames settings that an older config has under an earlier name (`Setting.formerly`)."""
    if not isinstance(settings, Mapping):
        return settings  # `_build` refuses it
    settings = {k: dict(v) if isinstance(v, Mapping) else v for k, v in settings.items()}
    for name, setting in declarations().items():
        before, _, earlier = setting.formerly.partition(".")
        if not isinstance(settings.get(before), dict) or earlier not in settings[before]:
            continue
        value = settings[before].pop(earlier)
        now, _, key = name.partition(".")
        values = settings.setdefault(now, {})
        if values.get(key, setting.default) not in (setting.default, value):
            raise UserError(
                f"config.{setting.formerly} is config.{name} today; give only the latter"
            )
        values[key] = value
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
