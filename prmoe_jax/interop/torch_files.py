"""Reads torch's files without running any code in them."""

import importlib.util
from pathlib import Path

import numpy as np

from prmoe_jax import files
from prmoe_jax.errors import UserError, refusing
from prmoe_jax.interop.settings import shown
from prmoe_jax.interop.tensors import check_dtype, check_finite

# Types that weights may be stored as.
DTYPES = "torch.float16", "torch.bfloat16", "torch.float32", "torch.float64"
# A training script also stores objects of these modules: settings and the states of random number
# generators. No such module is imported; an `Inert` replaces each object.
HARMLESS = "_codecs", "argparse", "deepspeed", "megatron", "numpy"


class Inert:
    """Replaces an object in a file; it holds the object's attributes and has no behaviour."""

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
    """Reads a file of torch.save: tensors are on the CPU, other objects become `Inert`."""
    require_torch()
    import torch
    from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

    files.regular(path)
    with refusing(f"{path} can't be read as torch's"):  # for damaged files, torch raises any error
        foreign = get_unsafe_globals_in_checkpoint(path)
        for name in foreign:
            if name.partition(".")[0] not in HARMLESS:
                raise UserError(
                    f"{path} calls {shown(name)}, which no checkpoint needs; nothing of it was run"
                )
        with safe_globals([(Inert, name) for name in foreign]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no dict")
    return content


def flat_arrays(state: dict, path: Path) -> dict[str, np.ndarray]:
    """A file's tensors in float32 by name; the keys of nested dicts are joined by dots."""
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
    # With a stride of 0, a tensor in a small file can have any size.
    if tensor.numel() * tensor.element_size() > path.stat().st_size:
        raise UserError(f"{path}: {shown(name)} is larger than the file")
    with refusing(f"{path}: {shown(name)} is no plain tensor"):  # a sparse one, for example
        array = tensor.detach().float().numpy()
    check_finite(name, array, path)
    return array
