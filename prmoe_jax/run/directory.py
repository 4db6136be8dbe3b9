"""A run's folder: its lock, its config, and the record of the environment that produced it.

config.json      the settings        environment.json  versions, devices, git revision
tokenizer.json   the tokenizer       metrics.jsonl     one line for each logged step
checkpoints/     model, optimizer, position in the data; tensorboard/; profile/
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import prmoe_jax
from prmoe_jax import files
from prmoe_jax.config import Config, leaves
from prmoe_jax.errors import UserError

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
RECORDED_PACKAGES = (
    "prmoe_jax jax jaxlib flax optax orbax-checkpoint grain tensorflow-datasets tokenizers numpy"
)


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Creates the folder and holds its lock, which the kernel frees when the process dies.

    Raises:
      UserError: the folder cannot be written, or another run holds the lock.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        handle = os.open(workdir / ".lock", os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written: {error.strerror}") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"--workdir={workdir} is in use by another run (process {_number(handle)}); "
                "wait for it, or give another --workdir"
            ) from None
        os.truncate(handle, 0)
        os.write(handle, str(os.getpid()).encode())
        yield
    finally:
        os.close(handle)


def holder(workdir: Path) -> str:
    """The number of the process that holds a folder's lock, or 'unknown'; '' if none holds it."""
    try:
        with open(workdir / ".lock", "rb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return ""
            except BlockingIOError:
                return _number(lock.fileno())
    except FileNotFoundError:
        return ""


def _number(lock: int) -> str:
    """The number of a process that an open lock file holds."""
    number = os.read(lock, 100).decode("ascii", "replace").strip()
    return number if number.isdecimal() else "unknown"


def record_environment(workdir: Path, devices: list) -> None:
    """Adds a record of this start of the run to environment.json."""
    path = workdir / "environment.json"
    fix = "delete it (it only records how the run was started), or restore a copy"
    starts = files.read_json(path, list, fix) if path.exists() else []
    starts.append(
        {
            "command": sys.argv,
            "git_revision": _git("rev-parse", "HEAD"),
            "git_changes": bool(_git("status", "--porcelain")),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "device": devices[0].device_kind,
            "device_count": len(devices),
            "versions": {name: _version(name) for name in RECORDED_PACKAGES.split()},
        }
    )
    files.replace(path, json.dumps(starts, indent=2) + "\n")


def versions() -> dict[str, str | None]:
    """A digest of this package's code, and the versions of the packages that it uses."""
    code = hashlib.sha256()
    folder = Path(prmoe_jax.__file__).parent
    for file in sorted(folder.rglob("*.py")):
        code.update(f"{file.relative_to(folder)}\n".encode() + file.read_bytes())
    packages = {name: _version(name) for name in RECORDED_PACKAGES.split()}
    return packages | {"prmoe_jax": f"{_version('prmoe_jax')}, code {code.hexdigest()[:12]}"}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(Path(prmoe_jax.__file__).parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def shared_settings(config: Config) -> dict:
    """The values that must be equal in all processes of a run before it starts."""
    # Each host may have its own cache.
    settings = {name: value for name, value in leaves(config).items() if name != "data.cache_dir"}
    return settings | versions()
