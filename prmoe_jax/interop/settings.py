"""Reads settings from other libraries' files, and checks the type and range of each."""

import reprlib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from prmoe_jax.config.loading import resolve
from prmoe_jax.config.schema import Config, ModelConfig, default_config
from prmoe_jax.errors import UserError, telling
from prmoe_jax.model.surgery import OPEN_SIZES, check_equal, compared

# The largest number that a setting may have.
LARGEST = 2**63 - 1
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 120  # enough for a tensor's whole name


def setting(
    settings: Mapping[str, Any],
    name: str,
    kind: type,
    source: Any,
    default: Any = None,
    low: float = 0,
    high: float = LARGEST,
) -> Any:
    """Returns a setting of a file, `source`, after checking its type and range.

    A whole number is also accepted as a float. `default` replaces a setting that is missing or
    None; without a default it is required.
    """
    value = default if settings.get(name) is None else settings[name]
    fits = type(value) in ((int, float) if kind is float else (kind,))
    wanted = {bool: "true or false", str: "text", int: "a whole number", float: "a number"}[kind]
    if kind in (int, float):
        fits = fits and low <= value <= high
        wanted += f" of {low} or more" if high == LARGEST else f" from {low} to {high}"
    if not fits:
        raise UserError(f"{source}: no usable {name}: it is {shown(value)}, not {wanted}")
    return kind(value)


def differs(theirs: Any, value: Any) -> bool:
    """Whether a setting, of any type, is different from this plain value."""
    return not isinstance(theirs, (bool, int, float, str)) or theirs != value


def shown(value: Any) -> str:
    """A short text for a value of any type and size, for a message."""
    try:
        return _REPR.repr(value)
    except Exception:  # a number has too many digits, or a foreign object raises anything
        return type(value).__name__


def import_settings() -> ConfigDict:
    """Default settings of an imported run, into which the model's settings are then read."""
    settings = default_config()
    settings.model.dtype = "float32"
    settings.data.tokenizer = "tokenizer.json"  # the file in the same folder
    settings.train.steps = 1
    return settings


def resolved(settings: Any, source: Any) -> Config:
    """Resolves a trained model's settings; errors name `source`, their file."""
    with telling(f"{source}: "):
        return resolve(settings, trained=True)


def check_expressed(config: Config, there: Config, whose: str) -> None:
    """Raises UserError unless another library's model, `there`, computes the same as a run's.

    It has experts in the same layers, and the message calls it `whose`.
    """
    fix = "use --kind=safetensors"
    model, theirs = config.model, there.model
    pairs = compared(model, theirs, OPEN_SIZES)
    experts = any(model.schedule.experts)
    if experts and model.normalizes != theirs.normalizes:
        pairs["normalize_top_k"] = model.normalize_top_k, theirs.normalize_top_k
    check_equal(pairs, whose, fix)
    for name in ("router", "scores", "routed_scale", "bias_update_rate") if experts else ():
        value, only = getattr(config.moe, name), getattr(there.moe, name)
        if value != only and not (name == "bias_update_rate" and value and only):
            raise UserError(f"moe.{name}={value}, {whose} has {only}; {fix}")


def gpt2_shaped(model: ModelConfig) -> ModelConfig:
    """A model of GPT-2's architecture with this model's sizes and experts."""
    names = "vocab_size length layers d_model heads d_ff placement experts top_k residual".split()
    return ModelConfig(**{name: getattr(model, name) for name in names})


def check_gpt2_form(model: ModelConfig, whose: str) -> None:
    """Raises UserError unless a model has GPT-2's architecture; its message names `whose`."""
    check_equal(compared(model, gpt2_shaped(model), OPEN_SIZES), whose, "use the same")
