"""A teacher's predictions for a training split, recorded once for many students.

A folder holds tokens.npy and log_p.npy, each [windows, L, K] (`batch.TopKLogProbs`), and
meta.json, which identifies the windows, the teacher and the temperature.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from prmoe_jax import files, stores
from prmoe_jax.config.schema import Config
from prmoe_jax.data import cache, copies
from prmoe_jax.data.arrays import ArrayWriter, open_array
from prmoe_jax.data.pipeline import (
    Data,
    TopKLogProbs,
    fingerprint_changes,
    windows_fingerprint,
)
from prmoe_jax.errors import UserError, refusing
from prmoe_jax.run.directory import check_outside_checkpoints
from prmoe_jax.stores import expand

log = logging.getLogger(__name__)

_FIX = "delete it, and write it again by prmoe teacher-cache"
_LARGEST_LOG_P = 1e-3  # log 1, and some rounding


@dataclasses.dataclass(frozen=True)
class _Checked:
    """An array [windows, …] that checks the range of a window's numbers when it is read."""

    array: np.ndarray
    low: float
    high: float
    name: str

    def __getitem__(self, window: int) -> np.ndarray:
        found = self.array[window]
        if not ((self.low <= found) & (found <= self.high)).all():  # NaN is in no range
            raise UserError(
                f"{self.name}: window {window} has numbers from {found.min()} to {found.max()}, "
                f"which must be from {self.low} to {self.high}; {_FIX}"
            )
        return found


def _parts(config: Config) -> tuple[tuple[str, type], ...]:
    """Name and dtype of each file, in the order of `TopKLogProbs`."""
    token_type = np.uint16 if config.model.vocab_size <= 1 << 16 else np.uint32
    return ("tokens.npy", token_type), ("log_p.npy", np.float32)


def write(
    folder: Path, data: Data, config: Config, teacher: dict, predictions: Iterable[TopKLogProbs]
) -> dict:
    """Writes a cache folder completely, or not at all.

    Args:
      folder: a new folder.
      data: the text, whose training split the predictions are for.
      config: a student's config; its `kd` has the top k and the temperature.
      teacher: a description of the teacher for meta.json.
      predictions: batches of predictions, for all windows in order; rows past the last window are
        left out.

    Returns:
      The content of meta.json.

    Raises:
      UserError: the folder exists already, or cannot be written.
    """
    local = stores.is_local(folder)
    check_outside_checkpoints("--out", folder)
    if not local:
        files.check_free_in_store(folder, "--out")
    elif folder.exists():
        raise UserError(f"--out={folder} exists; give another folder, or remove it")
    shape = len(data.train), data.train.length, config.kd.top_k
    meta = {
        "windows": windows_fingerprint(data) | {"vocab_size": config.model.vocab_size},
        "teacher": teacher,
        "top_k": config.kd.top_k,
        "temperature": config.kd.temperature,
    }

    def build(temporary: Path) -> None:
        digest = hashlib.sha256()
        with contextlib.ExitStack() as stack:
            writers = [
                stack.enter_context(ArrayWriter(temporary / name, dtype, shape))
                for name, dtype in _parts(config)
            ]
            for part in predictions:
                for writer, rows in zip(writers, part, strict=True):
                    digest.update(writer.append(rows[: shape[0] - writer.rows]))
        meta["fingerprint"] = digest.hexdigest()[:24]
        (temporary / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")

    def build_and_seal(temporary: Path) -> None:
        build(temporary)
        cache.seal(temporary)

    if local:
        cache.build_once(folder, build, setting="--out")
        if "fingerprint" not in meta:  # `build` did not run
            raise UserError(f"--out={folder}: another command has just written it; give another")
        return meta
    scratch = cache.root(config.data)
    unwritten = f"--out={folder}, which is made in {scratch} and copied, cannot be written"
    with refusing(unwritten, OSError):
        scratch.mkdir(parents=True, exist_ok=True)
        files.build_in_store(folder, "--out", build_and_seal, cache.DIGESTS, scratch)
    return meta


def attach(data: Data, config: Config) -> Data:
    """Adds the predictions in `config.teacher.cache` to the windows of the training split.

    Raises:
      UserError: the folder is missing or damaged, or it has other windows, fewer tokens than
        `kd.top_k` or another temperature.
    """
    folder, kd = expand("teacher.cache", config.teacher.cache), config.kd
    if not stores.is_local(folder):
        names = [name for name, _ in _parts(config)]
        folder = copies.sealed(folder, [*names, "meta.json"], cache.root(config.data))
    reading = functools.partial(
        cache.reading,
        folder,
        named="teacher.cache={}",
        fix=_FIX,
    )
    with reading():
        meta = files.parse_json(files.read(folder / "meta.json"))
        known, top_k, temperature = meta["windows"], meta["top_k"], meta["temperature"]
        fingerprint = str(meta["fingerprint"])
        recorded = dict(meta["teacher"]).get("workdir")
        if type(known) is not dict or type(top_k) is not int:
            raise ValueError("meta.json is not as it was written")
    current = windows_fingerprint(data) | {"vocab_size": config.model.vocab_size}
    if changes := fingerprint_changes(known, current):
        raise UserError(
            f"teacher.cache={folder} is about other windows: {changes}; write one for this data "
            "by prmoe teacher-cache"
        )
    if kd.top_k > top_k:
        raise UserError(
            f"kd.top_k={kd.top_k} exceeds the {top_k} tokens that {folder} keeps; use {top_k} or "
            "fewer"
        )
    if kd.temperature != temperature:
        raise UserError(f"kd.temperature={kd.temperature} is not that of {folder}: {temperature}")
    with reading():
        cache.check(folder)
        shape = len(data.train), data.train.length, top_k
        parts = [open_array(folder / name, dtype, shape) for name, dtype in _parts(config)]
    log.info("teacher cache of %.300s: the top %d tokens", meta["teacher"], kd.top_k)
    if config.teacher.workdir not in ("", recorded):
        log.warning(
            "teacher.cache has the predictions of %s, not of %s", recorded, config.teacher.workdir
        )
    ranges = (0, config.model.vocab_size - 1), (-math.inf, _LARGEST_LOG_P)
    predictions = TopKLogProbs(
        *(
            _Checked(part[..., : kd.top_k], *ends, f"teacher.cache={folder / name}")
            for part, ends, (name, _) in zip(parts, ranges, _parts(config), strict=True)
        )
    )
    return dataclasses.replace(
        data,
        train=dataclasses.replace(data.train, teacher_top_k=predictions),
        teacher_cache_fingerprint=fingerprint,
    )
