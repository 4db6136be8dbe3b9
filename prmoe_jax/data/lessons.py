"""A teacher's predictions of a training split, written once: many students learn from one reading.

A folder holds tokens.npy and log_p.npy, [windows, L, K] each (`pipeline.Likeliest`), and meta.json:
of which windows, by which teacher, at which temperature.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from prmoe_jax.config import Config
from prmoe_jax.data import cache
from prmoe_jax.data.pipeline import Data, Likeliest, Windows, windows_fingerprint
from prmoe_jax.errors import UserError

log = logging.getLogger(__name__)

PARTS = "tokens.npy", "log_p.npy"


def write(
    folder: Path, data: Data, config: Config, teacher: dict, predictions: Iterable[Likeliest]
) -> dict:
    """Writes a folder, whole or not at all.

    Args:
      folder: a new one.
      data: whose training split it is.
      config: a student's: which likeliest tokens (`kd`).
      teacher: what to record of the teacher.
      predictions: of the windows in their order, some at a time; rows past the last are left out.

    Returns:
      meta.json's content.

    Raises:
      UserError: the folder is there already, or cannot be written.
    """
    if folder.exists():
        raise UserError(f"--out={folder} exists; give another folder, or remove it")
    shape = len(data.train), data.train.length, config.kd.top_k
    token_type = np.uint16 if config.model.vocab_size <= 1 << 16 else np.uint32
    meta = {
        "windows": windows_fingerprint(data) | {"vocab_size": config.model.vocab_size},
        "teacher": teacher,
        "top_k": config.kd.top_k,
        "temperature": config.kd.temperature,
    }

    def build(temporary: Path) -> None:
        files = [
            np.lib.format.open_memmap(temporary / name, "w+", dtype, shape)
            for name, dtype in zip(PARTS, (token_type, np.float32), strict=True)
        ]
        digest, done = hashlib.sha256(), 0
        for part in predictions:
            rows = slice(done, min(done + len(part.tokens_BxLxK), len(data.train)))
            for file, values in zip(files, part, strict=True):
                file[rows] = values[: rows.stop - done]
                digest.update(file[rows].tobytes())
            done = rows.stop
        for file in files:
            file.flush()
        meta["fingerprint"] = digest.hexdigest()[:24]
        (temporary / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")

    cache.build_once(folder, build, setting="--out")
    return meta


def attach(data: Data, config: Config) -> Data:
    """The data with what `config.teacher.lessons` holds about its training split.

    Raises:
      UserError: no such folder, or one of other windows, of fewer tokens or another temperature.
    """
    folder, kd = Path(config.teacher.lessons).expanduser(), config.kd
    try:
        meta = json.loads((folder / "meta.json").read_text())
        known = meta["windows"]
        top_k, temperature = meta["top_k"], meta["temperature"]
        parts = [np.load(folder / name, mmap_mode="r") for name in PARTS]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"teacher.lessons={folder} can't be read ({error}); prmoe teacher-cache writes such a "
            "folder"
        ) from None
    current = windows_fingerprint(data) | {"vocab_size": config.model.vocab_size}
    changed = [name for name in current if known.get(name) != current[name]]
    if changed:
        details = ", ".join(f"{n} was {known.get(n)}, is {current[n]}" for n in changed)
        raise UserError(
            f"teacher.lessons={folder} is about other windows: {details}; write one for this data "
            "by prmoe teacher-cache"
        )
    if kd.top_k > top_k:
        raise UserError(
            f"kd.top_k={kd.top_k} exceeds the {top_k} tokens that {folder} keeps; use {top_k} or "
            "fewer"
        )
    if kd.temperature != temperature:
        raise UserError(f"kd.temperature={kd.temperature} is not that of {folder}: {temperature}")
    log.info("lessons of %s: the %d likeliest tokens", meta["teacher"], kd.top_k)
    # Plain views of the maps, as in Windows.
    taught = Likeliest(*(np.asarray(part)[..., : kd.top_k] for part in parts))
    train = data.train
    return dataclasses.replace(
        data,
        train=Windows(train.cache, train.length, train.cross_document_attention, taught),
        lessons_fingerprint=meta["fingerprint"],
    )
