"""Checks versions, devices, memory and drivers; finds accelerators that JAX does not use."""

import contextlib
import os
import re
import sys
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
# JAX should have at least this share of a device's memory (by its data sheet). JAX preallocates
# three quarters of a GPU's memory, or less if other programs hold more than one quarter.
MEMORY_SHARE = 0.6


def check() -> Part:
    """Checks this process's machine. If JAX has no device, its error is a finding."""
    findings, numbers = [], {"accelerators": accelerators()}
    try:
        devices = jax.devices()
    except RuntimeError as error:
        findings.append(
            Finding(
                "devices",
                FAIL,
                f"JAX finds no device ({first_line(error)})",
                "set JAX_PLATFORMS to a platform that is there, or unset it; on a TPU, end the "
                "program that holds it",
            )
        )
        return Part(findings, numbers)
    numbers |= environment(devices)
    found = {name: installed_version(name) for name in RECORDED}
    numbers["versions"] |= {name: version for name, version in found.items() if version}
    numbers["backend"] = devices[0].client.platform_version.splitlines()[0]
    findings.append(_devices(devices, numbers["accelerators"]))
    findings += _memory(jax.local_devices(), numbers)
    findings += _drivers(devices[0].platform, numbers)
    findings.append(_versions(numbers["versions"]))
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
    return {platform: sorted(map(str, paths)) for platform, paths in found.items() if paths}


def _devices(devices: list, shown: dict[str, list[str]]) -> Finding:
    platform = devices[0].platform
    line = f"{len(devices)} x {devices[0].device_kind} ({platform})"
    if jax.process_count() > 1:
        line += f" of {jax.process_count()} processes"
    missing = [name for name in shown if name != platform]
    if platform != "cpu" or not missing:
        return Finding("devices", OK, line)
    hidden = os.environ.get("JAX_PLATFORMS")
    fix = {
        "gpu": 'pip install -U "jax[cuda12]"',
        "tpu": "pip install -U \"jax[tpu]\", or -e '.[tpu]' in a checkout",
    }[missing[0]]
    if hidden:
        fix = f"unset JAX_PLATFORMS, which is '{hidden}'"
    elif missing[0] == "gpu" and not _driver_files():
        fix = "install NVIDIA's driver, until nvidia-smi lists the GPU"
    elif any(installed_version(name) for name in (PLUGINS if missing[0] == "gpu" else ["libtpu"])):
        fix = (
            "JAX's package for it is installed: see the reason that JAX prints for "
            f"JAX_PLATFORMS={'cuda' if missing[0] == 'gpu' else 'tpu'} python -c 'import jax; "
            "jax.devices()'"
        )
    line += f", but this machine has a {missing[0].upper()} ({shown[missing[0]][0]})"
    return Finding("devices", FAIL, f"{line} that JAX does not use", fix)


def _memory(devices: list, numbers: dict) -> list[Finding]:
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    numbers["host_memory_bytes"] = host
    line = f"host {host / 2**30:.1f} GiB"
    limits = [_held(device) for device in devices]
    numbers["device_memory_bytes"] = limits
    if None in limits:
        return [Finding("memory", OK, line)]
    line += f", {min(limits) / 2**30:.1f} GiB for JAX on each device"
    chip = data_sheet(devices[0].device_kind)
    if not chip or min(limits) >= MEMORY_SHARE * chip.hbm_bytes:
        return [Finding("memory", OK, line)]
    least = limits.index(min(limits))
    return [
        Finding(
            "memory",
            FAIL,
            f"device {devices[least].id}: JAX has {min(limits) / 2**30:.1f} of "
            f"{chip.hbm_bytes / 2**30:.1f} GiB",
            "end the other programs on the device (nvidia-smi lists them), or unset "
            "XLA_CLIENT_MEM_FRACTION and XLA_PYTHON_CLIENT_MEM_FRACTION",
        )
    ]


def _held(device: jax.Device) -> int | None:
    """Bytes of a device's memory that JAX can use; None if unknown."""
    jax.block_until_ready(jax.device_put(0, device))  # JAX preallocates at the first use
    stats = device.memory_stats() or {}
    limit = stats.get("bytes_limit")
    grows = os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE", "true").lower() in ("false", "0")
    if device.platform != "gpu" or grows:
        return limit
    return min(limit, stats.get("pool_bytes") or limit) if limit else limit


def _drivers(platform: str, numbers: dict) -> list[Finding]:
    if platform == "tpu":
        version = installed_version("libtpu") or "of the system"
        return [Finding("driver", OK, f"libtpu {version}; {numbers['backend']}")]
    text = _read(ROOT / "proc/driver/nvidia/version")
    found = re.search(r"Kernel Module\s+(?:for \S+\s+)?(\d+(?:\.\d+)+)", text)
    if not found:
        return [] if platform == "cpu" else [Finding("driver", OK, numbers["backend"])]
    numbers["driver"] = found[1]
    for name, oldest in PLUGINS.items():
        if installed_version(name) and int(found[1].split(".")[0]) < oldest:
            return [
                Finding(
                    "driver",
                    FAIL,
                    f"NVIDIA's driver is {found[1]}, {name} needs {oldest} or newer",
                    "install a newer driver"
                    + (', or pip install -U "jax[cuda12]"' if oldest > 525 else ""),
                )
            ]
    return [Finding("driver", OK, f"NVIDIA {found[1]}; {numbers['backend']}")]


def _versions(versions: dict) -> Finding:
    shown = "jax jaxlib flax optax orbax-checkpoint".split()
    line = f"Python {sys.version.split()[0]}, "
    line += ", ".join(f"{name} {versions[name]}" for name in shown)
    for name in PLUGINS:
        if versions.get(name) not in (None, versions["jaxlib"]):
            return Finding(
                "versions",
                WARN,
                f"{name} is {versions[name]}, jaxlib {versions['jaxlib']}",
                f'pip install -U "jax[{name.split("-")[1]}]"',
            )
    return Finding("versions", OK, line)


def _driver_files() -> bool:
    """Whether the kernel has loaded NVIDIA's driver."""
    places = "dev/nvidia[0-9]*", "dev/dxg", "proc/driver/nvidia/version"
    return any(True for name in places for _ in ROOT.glob(name))


def _read(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text().strip()
    return ""
