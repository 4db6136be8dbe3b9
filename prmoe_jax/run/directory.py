"""A run's folder: its config, and the record of the environment that produced it.

config.json      the settings        environment.json  versions, devices, git revision
tokenizer.json   the tokenizer       metrics.jsonl     one line for each logged step
hugging_face/    files of the released model that the run comes from, as in data/released.py
checkpoints/     model, optimizer, position in the data; tensorboard/; profile/
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import prmoe_jax
from prmoe_jax import files, stores
from prmoe_jax.config.schema import Config, leaves
from prmoe_jax.errors import UserError

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
RECORDED_PACKAGES = (
    "prmoe_jax jax jaxlib flax optax orbax-checkpoint grain tensorflow-datasets tokenizers numpy"
).split()


def record_environment(workdir: Path, devices: list) -> float:
    """Adds this start of the run to environment.json; returns the time of the first start."""
    path = workdir / "environment.json"
    fix = "delete it (it only records how the run was started), or restore a copy"
    starts = files.read_json(path, list, fix) if path.exists() else []
    starts.append(environment(devices))
    files.replace(path, json.dumps(starts, indent=2) + "\n")
    # Records of older versions have no time.
    times = [s.get("time") for s in starts if isinstance(s, dict)]
    return min(time for time in times if isinstance(time, (int, float)))


def environment(devices: list) -> dict:
    """Time, command, git revision, platform, devices and versions of this process."""
    # The package may be installed inside another project's repository; ignore that one's revision.
    tracked = _git("ls-files", "--error-unmatch", "__init__.py") is not None
    return {
        "time": time.time(),
        "command": sys.argv,
        "git_revision": _git("rev-parse", "HEAD") if tracked else None,
        "git_changes": tracked and bool(_git("status", "--porcelain")),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device_name(devices[0]),
        "device_count": len(devices),
        "versions": {name: installed_version(name) for name in RECORDED_PACKAGES},
    }


def device_name(device) -> str:
    """The kind of a device; of CPUs the model, since they differ in speed and in last digits."""
    if device.platform != "cpu":
        return device.device_kind
    model, info = platform.processor(), Path("/proc/cpuinfo")
    if info.exists() and (found := re.search(r"^model name\s*: (.+)$", info.read_text(), re.M)):
        model = found[1]
    return f"cpu, {model}" if model else "cpu"


def versions() -> dict[str, str | None]:
    """A digest of this package's code, and the versions of the packages that it uses."""
    code = hashlib.sha256()
    folder = Path(prmoe_jax.__file__).parent
    for file in sorted(folder.rglob("*.py")):
        code.update(f"{file.relative_to(folder)}\n".encode() + file.read_bytes())
    found = {name: installed_version(name) for name in RECORDED_PACKAGES}
    return found | {"prmoe_jax": f"{found['prmoe_jax']}, code {code.hexdigest()[:12]}"}


def installed_version(package: str) -> str | None:
    """The version of an installed package; None if it is not installed."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _git(*arguments: str) -> str | None:
    """Output of git in this package's folder; None if git fails, as outside a repository."""
    command = ["git", "-C", str(Path(prmoe_jax.__file__).parent), *arguments]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()
    return None


def check_outside_checkpoints(named: str, folder: Path) -> None:
    """Refuses a folder inside a run's checkpoints, which Orbax could then not read any more."""
    real = Path(os.path.realpath(folder)) if stores.is_local(folder) else folder
    for place in (real, *real.parents):
        if place.name == CHECKPOINTS and (place.parent / CONFIG).exists():
            raise UserError(
                f"{named}={folder} lies among the checkpoints of the run {place.parent}, which "
                "holds nothing else; give another folder"
            )


def shared_settings(config: Config) -> dict:
    """The values that must be equal in all processes of a run before it starts."""
    # Each host may have its own cache.
    settings = {name: value for name, value in leaves(config).items() if name != "data.cache_dir"}
    return settings | versions()
