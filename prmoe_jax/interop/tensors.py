"""Folders of .safetensors files, which hold arrays by name and nothing that could run."""

import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from prmoe_jax.errors import UserError

# Of one file of an export; Hugging Face's own default.
SHARD_BYTES = 5_000_000_000


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """All arrays of model.safetensors, or of the files that its index names; float32.

    Raises:
      UserError: no such file, or one that is not what it says.
    """
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
    tensors = {}
    for name in names:
        if Path(name).name != name:
            raise UserError(f"{index} names {name!r}, which isn't beside it")
        tensors |= _read_file(folder / name)
    return tensors


def _read_file(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        other = sorted(p.name for p in path.parent.glob("*.bin"))
        hint = f"; {other[0]} may run code when it is read: convert it" if other else ""
        raise UserError(f"{path} is missing{hint}")
    try:
        # By way of JAX's arrays, since NumPy has no bfloat16 of its own.
        with safe_open(path, framework="flax") as file:
            return {name: np.asarray(file.get_tensor(name), np.float32) for name in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} can't be read as safetensors: {error}") from None


def read_json(path: Path) -> dict:
    """An object from a JSON file.

    Raises:
      UserError: no such file, or something else in it.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object")
    return value


def write_tensors(tensors: dict[str, np.ndarray], folder: Path) -> None:
    """Writes model.safetensors, or several files of `SHARD_BYTES` with their index."""
    shards, size = [{}], 0
    for name, array in tensors.items():
        if shards[-1] and size + array.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = np.ascontiguousarray(array)
        size += array.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", {"format": "pt"})
        return
    places = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file, {"format": "pt"})
        places |= dict.fromkeys(shard, file)
    total = sum(array.nbytes for array in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def check_shape(name: str, array: np.ndarray, shape: tuple[int, ...], source: Path) -> None:
    """Raises UserError unless an array has this shape."""
    if array.shape != shape:
        raise UserError(f"{source}: {name} has shape {array.shape}, not {shape}")


def check_coverage(found: dict, expected: set[str], source: Path, ignored=()) -> str:
    """Compares names; returns what to tell the user.

    Args:
      found: arrays by name.
      expected: the names that must be there.
      source: where from.
      ignored: ends of names that may be there and mean nothing.

    Raises:
      UserError: some are missing, or there are others.
    """
    missing = sorted(expected - found.keys())
    extra = sorted(n for n in found.keys() - expected if not n.endswith(tuple(ignored)))
    for names, what in ((missing, "lacks"), (extra, "has what this architecture doesn't:")):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(f"{source} {what} {', '.join(names[:3])}{more}")
    left = len(found.keys() - expected)
    return f"{len(expected)} tensors read, none missing, {left} of no meaning left out"
