"""Reads settings from other libraries' files, and checks the type and range of each."""

import reprlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from prmoe_jax.config.family import FAMILIES
from prmoe_jax.config.loading import resolve
from prmoe_jax.config.schema import Config, ModelConfig
from prmoe_jax.errors import UserError

# No setting is a number above this.
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
    """Returns a setting after checking its type and range.

    Args:
      settings: the settings of a file, by name.
      name: the setting's name.
      kind: bool, int, float or str; a whole number is also accepted as a float.
      source: the file, for the message.
      default: replaces a setting that is missing or None; without a default it is required.
      low: the smallest number allowed.
      high: the largest number allowed.

    Raises:
      UserError: the setting is missing, of another type or out of range.
    """
    value = settings.get(name)
    value = default if value is None else value
    allowed = (int, float) if kind is float else (kind,)
    fits = type(value) in allowed
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


def resolved(settings: Any, source: Any) -> Config:
    """`config.resolve` for a trained model, with the settings' file named in its errors."""
    try:
        return resolve(settings, trained=True)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def check_gpt2_form(model: ModelConfig, theirs: str) -> None:
    """Raises UserError unless a model's parts are GPT-2's, which is all that `theirs` knows."""
    for name, only in FAMILIES["gpt2"].items():
        if (value := getattr(model, name)) != only:
            raise UserError(f"model.{name}={value}: {theirs} knows only {only}")
    for name in ("kv_heads", "head_dim", "clip_qkv", "sliding_window"):
        if value := getattr(model, name):
            raise UserError(f"model.{name}={value}: {theirs} knows only 0")
    for name in ("expert_d_ff", "residual_d_ff"):
        if (value := getattr(model, name)) not in (0, model.d_ff):
            raise UserError(f"model.{name}={value}: {theirs} knows only model.d_ff, {model.d_ff}")


def check_sizes(model: ModelConfig, tensors: Mapping[str, np.ndarray], source: Any) -> None:
    """Raises UserError unless each size that the model uses is a dimension of some tensor.

    The sizes are vocab_size, d_model, length (of learned positions) and the widths of MLPs and
    experts. Call this before anything is allocated.
    """
    held = {size for tensor in tensors.values() if tensor.size for size in tensor.shape}
    sizes = {"vocab_size": model.vocab_size, "d_model": model.d_model}
    if model.positions == "learned":
        sizes["length"] = model.length
    if 0 in model.schedule.experts:
        sizes["d_ff"] = model.d_ff
    if any(model.schedule.experts):
        sizes["expert_d_ff" if model.expert_d_ff else "d_ff"] = model.expert_width
        if model.residual and model.residual_d_ff:  # else it is the experts'
            sizes["residual_d_ff"] = model.residual_d_ff
    for name, size in sizes.items():
        if size not in held:
            raise UserError(f"{source}: {name} is {shown(size)}, a size that no tensor has")
