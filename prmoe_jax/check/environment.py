"""Checks versions, devices, memory and drivers; finds accelerators that JAX does not use."""

import contextlib
import os
import platform
import re
from pathlib import Path

import jax

from prmoe_jax.check.findings import FAIL, OK, WARN, Finding, Part
from prmoe_jax.errors import first_line
from prmoe_jax.plan.chips import data_sheet
from prmoe_jax.run.directory import environment, installed_version

ROOT = Path("/")  # of /dev, /proc and /sys; tests replace it
NVIDIA, GOOGLE = "0x10de", "0x1ae0"
# PCI device ids of TPUs from v3 on; Google's other PCI devices are disks and network cards.
TPUS = "0x0027 0x0056 0x005e 0x0062 0x0063 0x006f 0x0076".split()
# JAX's GPU plugins, and the oldest driver version that each supports.
PLUGINS = {"jax-cuda12-plugin": 525, "jax-cuda13-plugin": 580}
RECORDED = *PLUGINS, "libtpu"
# For an accelerator that JAX does not use: its JAX_PLATFORMS, JAX's packages, how to install them.
UNUSED = {
    "gpu": ("cuda", PLUGINS, 'pip install -U "jax[cuda12]"'),
    "tpu": ("tpu", ["libtpu"], "pip install -U \"jax[tpu]\", or -e '.[tpu]' in a checkout"),
}
# JAX should have at least this share of a device's memory (by its data sheet). JAX preallocates
# three quarters of a GPU's memory, or less if other programs hold more than one quarter.
MEMORY_SHARE = 0.6


def check() -> Part:
    """Checks this process's machine. If JAX has no device, its error is a finding."""
    numbers: dict = {"accelerators": accelerators()}
    try:
        devices = jax.devices()
    except RuntimeError as error:
        line = f"JAX finds no device ({first_line(error)})"
        fix = "set JAX_PLATFORMS to a platform that is there, or unset it; "
        fix += "on a TPU, end the program that holds it"
        return Part([Finding("devices", FAIL, line, fix)], numbers)
    numbers |= environment(devices)
    found = {name: installed_version(name) for name in RECORDED}
    numbers["versions"] |= {name: version for name, version in found.items() if version}
    numbers["backend"] = devices[0].client.platform_version.splitlines()[0]
    findings = [
        _devices(devices, numbers["accelerators"]),
        _memory(jax.local_devices(), numbers),
        *_drivers(devices[0].platform, numbers),
        _versions(numbers["versions"]),
    ]
    return Part(findings, numbers)


def accelerators() -> dict[str, list[str]]:
    """The accelerators of this machine, whether JAX finds them or not.

    Returns:
      Platform ('gpu' for NVIDIA's, or 'tpu') -> paths in `ROOT` that show such a device.
    """
    gpus = [*ROOT.glob("dev/nvidia[0-9]*"), *ROOT.glob("proc/driver/nvidia/gpus/*")]
    if any(ROOT.glob("usr/lib/wsl/lib/libcuda.so*")):  # on WSL, /dev/dxg is any vendor's GPU
        gpus += ROOT.glob("dev/dxg")
    tpus = [*ROOT.glob("dev/accel[0-9]*")]
    for device in ROOT.glob("sys/bus/pci/devices/*"):
        vendor, number, kind = (_read(device / name) for name in ("vendor", "device", "class"))
        if vendor == NVIDIA and kind.startswith("0x03"):  # a display or 3D controller
            gpus.append(device)
        elif vendor == GOOGLE and number in TPUS:
            tpus.append(device)
    found = {"gpu": gpus, "tpu": tpus}
    return {kind: sorted(map(str, paths)) for kind, paths in found.items() if paths}


def _devices(devices: list, shown: dict[str, list[str]]) -> Finding:
    kind = devices[0].platform
    line = f"{len(devices)} x {devices[0].device_kind} ({kind})"
    if jax.process_count() > 1:
        line += f" of {jax.process_count()} processes"
    if kind != "cpu" or not shown:
        return Finding("devices", OK, line)
    missing, (path, *_) = next(iter(shown.items()))
    line += f", but this machine has a {missing.upper()} ({path}) that JAX does not use"
    name, packages, fix = UNUSED[missing]
    if hidden := os.environ.get("JAX_PLATFORMS"):
        fix = f"unset JAX_PLATFORMS, which is '{hidden}'"
    elif missing == "gpu" and not _has_driver():
        fix = "install NVIDIA's driver, until nvidia-smi lists the GPU"
    elif any(map(installed_version, packages)):
        fix = "JAX's package for it is installed: see the reason that JAX prints for "
        fix += f"JAX_PLATFORMS={name} python -c 'import jax; jax.devices()'"
    return Finding("devices", FAIL, line, fix)


def _memory(devices: list, numbers: dict) -> Finding:
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [_held(device) for device in devices]
    numbers |= {"host_memory_bytes": host, "device_memory_bytes": limits}
    line = f"host {host / 2**30:.1f} GiB"
    if None in limits:
        return Finding("memory", OK, line)
    least, chip = min(limits), data_sheet(devices[0].device_kind)
    if not chip or least >= MEMORY_SHARE * chip.hbm_bytes:
        return Finding("memory", OK, f"{line}, {least / 2**30:.1f} GiB for JAX on each device")
    line = f"device {devices[limits.index(least)].id}: JAX has {least / 2**30:.1f} of "
    line += f"{chip.hbm_bytes / 2**30:.1f} GiB"
    fix = "end the other programs on the device (nvidia-smi lists them), or unset "
    fix += "XLA_CLIENT_MEM_FRACTION and XLA_PYTHON_CLIENT_MEM_FRACTION"
    return Finding("memory", FAIL, line, fix)


def _held(device: jax.Device) -> int | None:
    """Bytes of a device's memory that JAX can use; None if unknown."""
    jax.block_until_ready(jax.device_put(0, device))  # JAX preallocates at the first use
    stats = device.memory_stats() or {}
    limit = stats.get("bytes_limit")
    grows = os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE", "true").lower() in ("false", "0")
    if not limit or device.platform != "gpu" or grows:
        return limit
    return min(limit, stats.get("pool_bytes") or limit)


def _drivers(kind: str, numbers: dict) -> list[Finding]:
    if kind == "tpu":
        version = installed_version("libtpu") or "of the system"
        return [Finding("driver", OK, f"libtpu {version}; {numbers['backend']}")]
    text = _read(ROOT / "proc/driver/nvidia/version")
    found = re.search(r"Kernel Module\s+(?:for \S+\s+)?(\d+(?:\.\d+)+)", text)
    if not found:
        return [] if kind == "cpu" else [Finding("driver", OK, numbers["backend"])]
    numbers["driver"] = found[1]
    for name, oldest in PLUGINS.items():
        if installed_version(name) and int(found[1].split(".")[0]) < oldest:
            line = f"NVIDIA's driver is {found[1]}, {name} needs {oldest} or newer"
            older = "" if oldest == min(PLUGINS.values()) else ', or pip install -U "jax[cuda12]"'
            return [Finding("driver", FAIL, line, f"install a newer driver{older}")]
    return [Finding("driver", OK, f"NVIDIA {found[1]}; {numbers['backend']}")]


def _versions(versions: dict) -> Finding:
    for name in PLUGINS:
        if versions.get(name) not in (None, versions["jaxlib"]):
            line = f"{name} is {versions[name]}, jaxlib {versions['jaxlib']}"
            return Finding("versions", WARN, line, f'pip install -U "jax[{name.split("-")[1]}]"')
    names = "jax jaxlib flax optax orbax-checkpoint".split()
    shown = [f"Python {platform.python_version()}", *(f"{name} {versions[name]}" for name in names)]
    return Finding("versions", OK, ", ".join(shown))


def _has_driver() -> bool:
    """Whether the kernel has loaded NVIDIA's driver."""
    places = "dev/nvidia[0-9]*", "dev/dxg", "proc/driver/nvidia/version"
    return any(True for name in places for _ in ROOT.glob(name))


def _read(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text().strip()
    return ""
