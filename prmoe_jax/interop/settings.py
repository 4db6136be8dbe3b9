"""Settings out of other libraries' files, each checked where it enters: its type, and its size."""

import reprlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from prmoe_jax.config import Config, ModelConfig, resolve
from prmoe_jax.errors import UserError

# No setting is a number above this.
LARGEST = 2**63 - 1
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 120  # a tensor's whole name


def setting(
    settings: Mapping[str, Any],
    name: str,
    kind: type,
    source: Any,
    default: Any = None,
    low: float = 0,
    high: float = LARGEST,
) -> Any:
    """A setting of the right type and in range.

    Args:
      settings: a file's, by name.
      name: the setting's.
      kind: bool, int, float or str; a whole number serves as a float, too.
      source: the file, for the message.
      default: what stands for a missing setting or None; without it there must be one.
      low: the smallest number.
      high: the largest number.

    Raises:
      UserError: it is missing, of another type or out of range.
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
    """Whether a setting of any type is another than this plain value."""
    return not isinstance(theirs, (bool, int, float, str)) or theirs != value


def shown(value: Any) -> str:
    """A value of any type and size, for a message."""
    try:
        return _REPR.repr(value)
    except Exception:  # a number of too many digits, or whatever a foreign object raises
        return type(value).__name__


def resolved(settings: Any, source: Any) -> Config:
    """`config.resolve`, whose errors name the file that the settings come from."""
    try:
        return resolve(settings)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def check_sizes(model: ModelConfig, tensors: Mapping[str, np.ndarray], source: Any) -> None:
    """Raises UserError if a size of the model is in no tensor; before anything is made of it."""
    held = {size for tensor in tensors.values() if tensor.size for size in tensor.shape}
    for name in ("vocab_size", "length", "d_model", "d_ff"):
        size = getattr(model, name)
        if size not in held:
            raise UserError(f"{source}: {name} is {shown(size)}, a size that no tensor has")
