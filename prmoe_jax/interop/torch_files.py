"""torch's files, read without running anything that they hold."""

import importlib.util
from pathlib import Path

import numpy as np

from prmoe_jax import files
from prmoe_jax.errors import UserError
from prmoe_jax.interop.settings import shown
from prmoe_jax.interop.tensors import check_dtype, check_finite

# What weights may be stored as.
DTYPES = "torch.float16", "torch.bfloat16", "torch.float32", "torch.float64"
# Modules of what a training script keeps beside its tensors: settings and states of random numbers.
# None of it is imported: an `Inert` takes its place.
HARMLESS = "_codecs", "argparse", "deepspeed", "megatron", "numpy"


class Inert:
    """Stands for an object of a file: holds its attributes, and does nothing."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        if isinstance(state, dict):
            self.__dict__.update(state)


def require_torch() -> None:
    """Raises UserError unless torch is installed."""
    if not importlib.util.find_spec("torch"):
        raise UserError("DeepSpeed's checkpoints are torch files: pip install torch")


def read_torch(path: Path) -> dict:
    """What torch.save wrote; tensors on the CPU, objects of other classes as `Inert`.

    Raises:
      UserError: no such file, not one of torch's, no dict, or it wants to call something that is
        not of a checkpoint.
    """
    require_torch()
    import torch
    from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

    files.regular(path)
    try:
        foreign = get_unsafe_globals_in_checkpoint(path)
        for name in foreign:
            if name.partition(".")[0] not in HARMLESS:
                raise UserError(
                    f"{path} calls {name}, which no checkpoint needs; nothing of it was run"
                )
        with safe_globals([(Inert, name) for name in foreign]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UserError:
        raise
    except Exception as error:  # whatever a damaged file makes torch raise
        line = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise UserError(f"{path} can't be read as torch's: {line}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no dict")
    return content


def flat_arrays(state: dict, path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file by their whole names, since Megatron nests some; float32.

    Raises:
      UserError: one isn't of weights, or a part holds itself.
    """
    import torch

    arrays, parts, seen = {}, [("", state)], set()
    while parts:
        prefix, part = parts.pop()
        if id(part) in seen:
            raise UserError(f"{path} holds {shown(prefix)} twice")
        seen.add(id(part))
        for name, value in part.items():
            name = f"{prefix}{name}"
            if isinstance(value, dict):
                parts.append((f"{name}.", value))
            elif isinstance(value, torch.Tensor):
                arrays[name] = _array(name, value, path)
    return arrays


def _array(name: str, tensor, path: Path) -> np.ndarray:
    check_dtype(name, str(tensor.dtype), DTYPES, path)
    # A tensor of a stride of 0 is as large as it likes.
    if tensor.numel() * tensor.element_size() > path.stat().st_size:
        raise UserError(f"{path}: {shown(name)} is larger than the file")
    try:
        array = tensor.detach().float().numpy()
    except Exception as error:  # sparse ones, and whatever else has no numbers of its own
        raise UserError(f"{path}: {shown(name)} is no plain tensor: {error}") from None
    check_finite(name, array, path)
    return array
