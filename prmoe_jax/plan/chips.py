"""The chips that a plan can be made for: their data sheets, and devices without hardware."""

import contextlib
import math
import re
import signal
from typing import NamedTuple

from jax.experimental import topologies

from prmoe_jax.errors import UserError, first_line
from prmoe_jax.run.metrics import PEAK_FLOPS


class Chip(NamedTuple):
    """The data sheet of one device, as far as a plan needs it.

    A device is a whole chip; on TPU7x, it is half a chip.
    """

    platform: str  # tpu | gpu
    flops_per_s: float  # dense bfloat16 peak
    hbm_bytes: int
    hbm_bytes_per_s: float
    # A device's share of one link, in one direction. On TPUs the link goes to a neighbour in the
    # torus, on GPUs to the switch of the host or rack (NVLink).
    link_bytes_per_s: float
    # A device's share of the network between slices (TPUs) or hosts (GPUs), in one direction.
    network_bytes_per_s: float
    hertz: float = 0.0  # clock rate of a TensorCore, from the peak and the matrix units
    devices: int = 1  # per chip
    die_bytes_per_s: float = 0.0  # between the devices of a chip, in one direction


# TPUs: Google Cloud's documentation. It states the data-centre network per chip for v5p (50 Gbit/s)
# and for v6e and TPU7x (100 Gbit/s), and per host of 8 chips for v5e (200 Gbit/s). The 50 Gbit/s of
# v4 are assumed. A TPU7x chip has six links with 1,200 GB/s in all, both directions together, and a
# die-to-die link that is six times as fast as one of them. Its peak and the cycle estimates of its
# compiler agree with 4 matrix units of 256 x 256 per device at 2.2 GHz.
# GPUs: NVIDIA's data sheets of HGX H100, DGX B200 and GB200 NVL72; 400 Gbit/s per GPU.
CHIPS = {
    "v4": Chip("tpu", PEAK_FLOPS["TPU v4"], 32 * 2**30, 1.2e12, 45e9, 6.25e9, hertz=1.05e9),
    "v5e": Chip("tpu", PEAK_FLOPS["TPU v5e"], 16 * 2**30, 0.82e12, 45e9, 3.125e9, hertz=1.5e9),
    "v5p": Chip("tpu", PEAK_FLOPS["TPU v5p"], 95 * 2**30, 2.77e12, 90e9, 6.25e9, hertz=1.75e9),
    "v6e": Chip("tpu", PEAK_FLOPS["TPU v6e"], 32 * 2**30, 1.64e12, 90e9, 12.5e9, hertz=1.75e9),
    "tpu7x": Chip("tpu", PEAK_FLOPS["TPU7x"], 96 * 2**30, 3.69e12, 50e9, 6.25e9, 2.2e9, 2, 600e9),
    "h100": Chip("gpu", PEAK_FLOPS["NVIDIA H100 80GB HBM3"], 80 * 10**9, 3.35e12, 450e9, 50e9),
    "b200": Chip("gpu", PEAK_FLOPS["NVIDIA B200"], 180 * 10**9, 8e12, 900e9, 50e9),
    "gb200": Chip("gpu", PEAK_FLOPS["NVIDIA GB200"], 186 * 10**9, 8e12, 900e9, 50e9),
}

# JAX's name of a device -> its chip.
KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA B200": "b200",
    "NVIDIA GB200": "gb200",
}

# The slices that exist, smallest first. For GPUs, 'Nx8' is N hosts with eight GPUs each. For GB200
# NVL72, 'NxM' is N racks, each with M of the 72 GPUs: a power of two suits most models.
TORUS = "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16".split()
PLANE = "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16".split()
HOSTS = "1x8 2x8 4x8 8x8 16x8 32x8 64x8 128x8".split()
SLICES = {
    "v4": TORUS,
    "v5e": PLANE,
    "v5p": TORUS,
    "v6e": PLANE,
    "tpu7x": TORUS,
    "h100": HOSTS,
    "b200": HOSTS,
    "gb200": "1x4 1x8 1x16 1x32 1x64 2x64 4x64 8x64 16x64".split(),
}

LARGEST = 16_384  # the most chips of a topology; no pod has this many

# The description of a GPU that XLA's compiler needs: a GpuTargetConfig in text form.
TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: {cache} clock_rate_ghz: {clock}
  device_memory_size: {memory} shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: {major} }} registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "NVIDIA {name}"
"""
# Device properties as the driver reports them; the H100 is the SXM version.
GPUS = {
    "h100": dict(cores=132, bandwidth=3352000000000, cache=52428800, clock=1.98)
    | dict(memory=84978434048, major=9, name="H100 80GB HBM3"),
    "b200": dict(cores=148, bandwidth=7672320000000, cache=132644864, clock=1.965)
    | dict(memory=191514411008, major=10, name="B200"),
    "gb200": dict(cores=152, bandwidth=7928064000000, cache=135528448, clock=2.062)
    | dict(memory=197897748480, major=10, name="GB200"),
}


def data_sheet(device_kind: str) -> Chip | None:
    """The data sheet of a device by its `device_kind` in JAX; None if unknown."""
    return CHIPS.get(KINDS.get(device_kind))


def split(topology: str) -> tuple[int, str, str]:
    """Slices, chip and shape: (2, 'v5p', '4x4x8') for '2xv5p:4x4x8', (1, 'v5p', '') for 'v5p'."""
    pattern = r"(?s)(?:([1-9][0-9]{0,3})x)?([^:]*):?(.*)"
    slices, name, shape = re.fullmatch(pattern, topology).groups()
    return int(slices or 1), name, shape


def chip_of(topology: str) -> Chip:
    """The chip of a topology such as 'v5p:4x4x8', or '2xv5p:4x4x8' for two such slices."""
    slices, name, shape = split(topology)
    more = SLICES[name][0].count("x") if name in CHIPS else 1  # dimensions beyond the first
    counts = rf"[1-9][0-9]{{0,5}}(x[1-9][0-9]{{0,5}}){{1,{more}}}"
    if name not in CHIPS or not re.fullmatch(counts, shape):
        raise UserError(
            f"--topology={topology} is unknown; use one of {', '.join(CHIPS)} and the chips of "
            "each dimension, such as v5p:4x4x8, v5e:16x16, or h100:16x8 for 16 hosts of 8; "
            "2xv5p:4x4x8 is two slices"
        )
    if slices > 1 and CHIPS[name].platform == "gpu":
        hosts, _, gpus = shape.partition("x")
        raise UserError(
            f"--topology={topology} asks for slices, which only TPUs have; use "
            f"{name}:{slices * int(hosts)}x{gpus} for so many hosts"
        )
    if chip_count(topology) > LARGEST:
        raise UserError(
            f"--topology={topology} has {chip_count(topology):,} chips; use {LARGEST:,} or fewer"
        )
    return CHIPS[name]


def chip_count(topology: str) -> int:
    """The number of chips of a topology that `chip_of` accepts."""
    slices, _, shape = split(topology)
    return slices * math.prod(map(int, shape.split("x")))


def device_count(topology: str) -> int:
    """The number of devices of a topology that `chip_of` accepts."""
    return chip_count(topology) * chip_of(topology).devices


def slice_shapes(chip: str) -> list[str]:
    """A chip's topologies, smallest first; '2xv5p' gives topologies of two slices each."""
    first, *others = (f"{chip}:{shape}" for shape in SLICES[split(chip)[1]])
    return [first, *(other for other in others if chip_count(other) <= LARGEST)]


def unit(topology: str) -> str:
    """The word for one device of a topology."""
    return "chip" if chip_of(topology).devices == 1 else "device"


def topology_devices(topology: str) -> tuple[Chip, list]:
    """The chip of a topology, and devices to compile for, without any hardware."""
    chip, (slices, name, shape) = chip_of(topology), split(topology)
    if chip.platform == "gpu":
        target = TARGET.format(**GPUS[name])
        asked = {"platform": "cuda", "topology_name": "", "target_config": target}
        asked["topology"] = f"1x{shape}"
    else:
        asked = {"platform": "tpu", "topology_name": f"{name}:{shape}"}
        if name == "v4":  # its two cores are one device, as in the rest of the package
            asked["chip_config_name"] = "megacore"
        if math.prod(map(int, shape.split("x"))) == 1:  # a host with a single chip
            asked["chips_per_host_bounds"] = (1, 1, 1)
        if slices > 1:
            asked["num_slices"] = slices
    handler = signal.getsignal(signal.SIGTERM)
    try:
        devices = topologies.get_topology_desc(**asked).devices
    except Exception as error:  # a missing or failing compiler raises anything
        reason = first_line(error)
        if "INVALID_ARGUMENT" in reason:
            raise UserError(
                f"--topology={topology} is no slice of a pod ({reason}); use one of "
                f"{', '.join(slice_shapes(topology.partition(':')[0]))}"
            ) from error
        extra = "tpu" if chip.platform == "tpu" else "cuda"
        raise UserError(
            f"--topology={topology} cannot be compiled for ({reason}); the compiler comes with "
            f"pip install 'prmoe_jax[{extra}]'"
        ) from error
    finally:
        with contextlib.suppress(ValueError):  # raised outside the main thread
            signal.signal(signal.SIGTERM, handler)  # libtpu's handler prints a stack trace
    return chip, list(devices)
