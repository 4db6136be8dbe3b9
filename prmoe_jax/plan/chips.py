"""The chips that a plan can be made for: their data sheets, and devices without hardware."""

import math
import re
from typing import NamedTuple

from jax.experimental import topologies

from prmoe_jax.errors import UserError


class Chip(NamedTuple):
    """The data sheet of one chip, as far as a plan needs it."""

    platform: str  # tpu | gpu
    flops_per_s: float  # bfloat16 peak
    hbm_bytes: int
    hbm_bytes_per_s: float
    # One link in one direction: a TPU's to a neighbour in the torus, or a GPU's to its host's
    # switch (NVLink).
    link_bytes_per_s: float
    hertz: float = 0.0  # clock rate of a TensorCore, from the peak and the matrix units
    network_bytes_per_s: float = 0.0  # a GPU's share of its host's network, in one direction


CHIPS = {
    "v4": Chip("tpu", 275e12, 32 * 2**30, 1.2e12, 45e9, hertz=1.05e9),
    "v5e": Chip("tpu", 197e12, 16 * 2**30, 0.82e12, 45e9, hertz=1.5e9),
    "v5p": Chip("tpu", 459e12, 95 * 2**30, 2.77e12, 90e9, hertz=1.75e9),
    "v6e": Chip("tpu", 918e12, 32 * 2**30, 1.64e12, 90e9, hertz=1.75e9),
    "h100": Chip("gpu", 989e12, 80 * 10**9, 3.35e12, 450e9, network_bytes_per_s=50e9),
}

# The slices that exist, smallest first. For GPUs, 'Nx8' is N hosts with eight GPUs each.
TORUS = "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16".split()
PLANE = "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16".split()
SLICES = {
    "v4": TORUS,
    "v5e": PLANE,
    "v5p": TORUS,
    "v6e": PLANE,
    "h100": [f"{1 << i}x8" for i in range(8)],
}

LARGEST = 16_384  # the most chips of a topology; no pod has this many

# The description of an H100 (SXM) that XLA's GPU compiler needs: a GpuTargetConfig in text form.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def chip_of(topology: str) -> Chip:
    """The chip of a topology such as 'v5p:4x4x8'.

    Raises:
      UserError: the topology is unknown, or larger than any pod.
    """
    name, _, shape = topology.partition(":")
    dimensions = SLICES[name][0].count("x") + 1 if name in CHIPS else 0
    if not re.fullmatch(r"[1-9][0-9]{0,5}(x[1-9][0-9]{0,5}){1,2}", shape) or (
        shape.count("x") >= dimensions
    ):
        raise UserError(
            f"--topology={topology} is unknown; use one of {', '.join(CHIPS)} and the chips of "
            "each dimension, such as v5p:4x4x8, v5e:16x16, or h100:16x8 for 16 hosts of 8"
        )
    if chip_count(topology) > LARGEST:
        raise UserError(
            f"--topology={topology} has {chip_count(topology):,} chips; use {LARGEST:,} or fewer"
        )
    return CHIPS[name]


def chip_count(topology: str) -> int:
    """The number of chips of a topology that `chip_of` accepts."""
    return math.prod(map(int, topology.partition(":")[2].split("x")))


def topology_devices(topology: str) -> tuple[Chip, list]:
    """The chip and the devices of a topology, which need no hardware.

    Raises:
      UserError: the topology is unknown or no slice of a pod, or the compiler is not installed.
    """
    chip = chip_of(topology)
    name, _, shape = topology.partition(":")
    if chip.platform == "gpu":
        asked = ("cuda", "", {"topology": f"1x{shape}", "target_config": H100})
    else:
        # A v4's two cores count as one device, as everywhere else.
        options = {"chip_config_name": "megacore"} if name == "v4" else {}
        if chip_count(topology) == 1:  # a host with a single chip
            options["chips_per_host_bounds"] = (1, 1, 1)
        asked = ("tpu", topology, options)
    platform, topology_name, options = asked
    try:
        described = topologies.get_topology_desc(
            platform=platform, topology_name=topology_name, **options
        )
    except Exception as error:  # a missing or failing compiler raises anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        if "INVALID_ARGUMENT" in reason:
            raise UserError(
                f"--topology={topology} is no slice of a pod ({reason}); use one of "
                f"{', '.join(f'{name}:{shape}' for shape in SLICES[name])}"
            ) from error
        extra = "tpu" if chip.platform == "tpu" else "cuda"
        raise UserError(
            f"--topology={topology} cannot be compiled for ({reason}); the compiler comes with "
            f"pip install -e '.[{extra}]'"
        ) from error
    return chip, list(described.devices)
