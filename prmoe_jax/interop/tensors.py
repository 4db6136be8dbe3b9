"""Folders of .safetensors files, which hold arrays by name and no code."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from prmoe_jax import files
from prmoe_jax.errors import UserError, refusing
from prmoe_jax.interop.settings import shown

# Larger exports are split into files of about this size, as by default in Hugging Face.
SHARD_BYTES = 5_000_000_000
# Types that weights may be stored as. Of numbers with fewer bits only MXFP4 is read.
DTYPES = "F16", "BF16", "F32", "F64"
# Name endings of the two arrays of bytes that hold a weight in MXFP4, and what the bytes stand for
# (OCP Microscaling Formats 1.0, section 5): 4 bits of a block for a number, 8 for a group's scale.
MXFP4 = "_blocks", "_scales"
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
E8M0 = np.array([*(2.0 ** np.arange(-127, 128)), np.nan], np.float32)


class Tensors:
    """The arrays of model.safetensors, or of the files that its index names, read one by one."""

    def __init__(self, folder: Path, ignored: tuple[str, ...] = ()):
        """Opens the files and reads the shapes, except of names that end as in `ignored`."""
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, tuple] = {}
        other = sorted(path.name for path in folder.glob("*.bin"))
        hint = f"; {other[0]} may run code when it is read: convert it" if other else ""
        for path in _files(folder):
            files.regular(path, hint)
            with _reading(path):
                # The file is read as JAX's arrays, because NumPy has no bfloat16.
                file = safe_open(path, framework="flax")
                for name in file.keys():
                    if not name.endswith(ignored):
                        self._add(name, path, file)
        for name in [name for name in self.shapes if name.endswith(MXFP4[0])]:
            self._add_packed(name.removesuffix(MXFP4[0]))

    def _add(self, name: str, path: Path, file) -> None:
        if name in self.shapes:
            raise UserError(f"{path} holds {shown(name)}, as another file does")
        part = file.get_slice(name)
        check_dtype(name, part.get_dtype(), ("U8",) if name.endswith(MXFP4) else DTYPES, path)
        self.shapes[name], self._files[name] = tuple(part.get_shape()), (path, file)

    def _add_packed(self, name: str) -> None:
        path, _ = self._files[name + MXFP4[0]]
        blocks, scales = (self.shapes.pop(name + ending, ()) for ending in MXFP4)
        if len(blocks) < 3 or blocks != (*scales, 16):
            raise UserError(
                f"{path}: {shown(name)} is no weight in MXFP4, whose blocks have the shape of its "
                f"scales and 16 bytes for each: they are {shown(blocks)} and {shown(scales)}"
            )
        *experts, rows, groups, _ = blocks
        self.shapes[name] = (*experts, 32 * groups, rows)

    def read(self, name: str) -> np.ndarray:
        """One array, float32."""
        if name in self._files:
            array = self._read(name, np.float32)
        else:
            array = unpacked(*(self._read(name + ending, np.uint8) for ending in MXFP4))
            name += MXFP4[0]
        check_finite(name, array, self._files[name][0])
        return array

    def _read(self, name: str, dtype: type) -> np.ndarray:
        path, file = self._files[name]
        with _reading(path), np.errstate(over="ignore"):
            return np.asarray(file.get_tensor(name), dtype)


def unpacked(blocks_ExRxGx16: np.ndarray, scales_ExRxG: np.ndarray) -> np.ndarray:
    """Weights [E, 32·G, R] from MXFP4, as gpt-oss stores them: R rows of G groups of 32 numbers.

    A byte of the blocks holds two numbers, the first one in its lower bits.
    """
    bits = np.stack([blocks_ExRxGx16 & 15, blocks_ExRxGx16 >> 4], -1)
    w_ExRxGx32 = E2M1[bits.reshape(*scales_ExRxG.shape, 32)]
    w_ExRxGx32 *= E8M0[scales_ExRxG][..., None]
    return w_ExRxGx32.reshape(*scales_ExRxG.shape[:-1], -1).swapaxes(-1, -2)


def _reading(path: Path):
    kinds = SafetensorError, OSError, ValueError
    return refusing(f"{path} can't be read as safetensors", kinds)


def _files(folder: Path) -> list[Path]:
    """model.safetensors, or the files that the index names."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [folder / "model.safetensors"]
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(n, str) for n in places.values()):
        raise UserError(f"{index} has no weight_map from names of tensors to names of files")
    for name in (names := sorted(set(places.values()))):
        if not files.is_plain(name):
            raise UserError(f"{index} names {shown(name)}, which isn't beside it")
    return [folder / name for name in names]


def read_json(path: Path) -> dict:
    """The object in another library's JSON file."""
    return files.read_json(files.regular(path), fix="copy it from its source again")


def write_tensors(tensors: dict[str, np.ndarray], folder: Path) -> None:
    """Writes model.safetensors or, above `SHARD_BYTES`, several files and their index."""
    shards, size = [{}], 0
    for name, array in tensors.items():
        size += array.nbytes
        if shards[-1] and size > SHARD_BYTES:
            shards.append({})
            size = array.nbytes
        shards[-1][name] = np.ascontiguousarray(array)
    places = {}
    for number, shard in enumerate(shards, 1):
        several = f"model-{number:05}-of-{len(shards):05}.safetensors"
        file = several if len(shards) > 1 else "model.safetensors"
        save_file(shard, folder / file, {"format": "pt"})
        places |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        total = sum(array.nbytes for array in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def check_dtype(name: str, dtype: str, allowed: tuple[str, ...], path: Path) -> None:
    """Raises UserError unless a tensor's type is allowed for weights."""
    if dtype not in allowed:
        raise UserError(f"{path}: {shown(name)} holds {dtype}; weights are {', '.join(allowed)}")


def check_finite(name: str, array: np.ndarray, path: Path) -> None:
    """Raises UserError if a weight is NaN, infinite, or a float64 beyond float32's range."""
    if not np.isfinite(array).all():
        raise UserError(
            f"{path}: {shown(name)} holds NaN, infinity or numbers too large for float32"
        )


def check_shapes(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], source: Path
) -> str:
    """Checks the shapes of a source's arrays, by name; returns a summary for the user."""
    missing, extra = expected.keys() - found.keys(), found.keys() - expected.keys()
    for names, what, text in (
        (missing, "lacks", str),
        (extra, "has what this architecture doesn't:", shown),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(f"{source} {what} {', '.join(map(text, sorted(names)[:3]))}{more}")
    for name, shape in expected.items():
        if found[name] != shape:
            raise UserError(f"{source}: {name} has shape {shown(found[name])}, not {shape}")
    return f"{len(expected)} tensors read, none missing"
