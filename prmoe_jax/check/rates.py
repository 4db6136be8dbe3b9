"""Rates of matrix products, memory and collectives, beside the data sheets.

Each device is measured alone, so that a slow one has a name. A rate is the best of several turns,
which the devices take one after the other: what else the machine does in a moment slows down one
turn and not the rate. A device that seems slow is measured again before it is called so.
"""

import logging
import math
import socket
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec, SingleDeviceSharding

from prmoe_jax.check.findings import FAIL, OK, Finding, Part, rate, slow
from prmoe_jax.parallel import processes
from prmoe_jax.plan.chips import data_sheet
from prmoe_jax.run.metrics import PEAK_FLOPS

log = logging.getLogger(__name__)

# Width of the square matrix product; bytes of the array that is read and written; bytes that each
# device sends in a collective. CPUs get smaller ones.
WIDTH, ARRAY_BYTES, SENT_BYTES = 8192, 1 << 30, 1 << 28
CPU_WIDTH, CPU_ARRAY_BYTES, CPU_SENT_BYTES = 1024, 1 << 27, 1 << 22
TURNS, TURN_SECONDS = 5, 0.02
ROUNDS = 3  # of measuring devices that seem slow
# A device is slow below this share of the median of all. It is worse than its data sheet allows
# below the other shares; square products and plain copies reach more on a sound device.
SLOW, SHEET, LINK_SHEET = 0.8, 0.5, 0.2
# The largest difference between devices that compute the same product, as a share of its largest
# number. They may use other kernels. Processes compare the sums of so many parts of it.
DIFFERENCE, PARTS = 3e-2, 64
UNITS = {"matmul_bfloat16": "FLOP", "matmul_float32": "FLOP", "memory": "B"}
NAMES = {
    "matmul_bfloat16": "product in bfloat16",
    "matmul_float32": "product in float32",
    "memory": "memory",
}


class Probe(NamedTuple):
    """Something that one device does in turns."""

    amount: float  # FLOPs or bytes of a turn
    turn: Callable[[], float]  # returns its seconds


def check() -> Part:
    """Measures each device of each process, and collectives between those of a host and all."""
    devices = jax.local_devices()
    names = processes.gathered(socket.gethostname())
    host = f"{names[jax.process_index()]} (process {jax.process_index()})"
    local, sums = measure(devices)
    every = _gather(host, local)
    for _ in range(ROUNDS - 1):
        suspects = {name for kind in UNITS for name in _slow(every, kind)}
        if not suspects:
            break
        again = [d for d in devices if (host, d.id) in suspects]
        if again:
            log.info("measuring again: devices %s", ", ".join(str(d.id) for d in again))
            for number, rates in measure(again)[0].items():
                better = {kind: max(rates[kind], local[number][kind]) for kind in rates}
                local[number] = better
        every = _gather(host, local)
    findings = [_judge(every, kind, devices[0].device_kind) for kind in UNITS]
    if jax.device_count() > 1:
        findings.append(_same_numbers(sums))
    numbers = {"devices": [{"host": h, "device": d, **rates} for (h, d), rates in every.items()]}
    groups = _groups(names)
    measured = {name: collectives(members) for name, members in groups.items()}
    everywhere = processes.gathered({name: rates for name, (rates, _) in measured.items()})
    for name, members in groups.items():
        found = [everywhere[process][name] for process in {d.process_index for d in members}]
        numbers[name] = {kind: min(rates[kind] for rates in found) for kind in found[0]}
        hosts = len({names[device.process_index] for device in members})
        wrong = measured[name][1]
        findings += _judge_collectives(name, numbers[name], wrong, members, hosts)
    return Part(findings, numbers)


def _gather(host: str, local: dict[int, dict]) -> dict[tuple[str, int], dict]:
    """The rates of all processes' devices: (host, device) -> rates."""
    gathered = processes.gathered([[host, number, rates] for number, rates in local.items()])
    return {(host, number): rates for part in gathered for host, number, rates in part}


def _slow(every: dict, kind: str) -> dict[tuple[str, int], float]:
    return slow({name: rates[kind] for name, rates in every.items()}, SLOW)


def measure(
    devices: list,
) -> tuple[dict[int, dict[str, float]], dict[str, dict[int, np.ndarray]]]:
    """Rates of each device, in FLOP/s and bytes/s, and what its products sum to.

    Returns:
      Device number -> rates by the names in `UNITS`; name of a product -> device number -> the
      sums of the product's rows.
    """
    best, sums = {}, {}
    for kind in UNITS:
        log.info("rate: %s", NAMES[kind])
        if kind == "memory":
            probes = {device.id: _copy(device) for device in devices}
        else:
            made = {device.id: _product(device, kind.split("_")[1]) for device in devices}
            probes = {number: probe for number, (probe, _) in made.items()}
            sums[kind] = {number: total for number, (_, total) in made.items()}
        for _ in range(TURNS):
            for number, probe in probes.items():
                reached = probe.amount / probe.turn()
                rates = best.setdefault(number, {})
                rates[kind] = max(reached, rates.get(kind, 0.0))
    return best, sums


def _product(device: jax.Device, dtype: str) -> tuple[Probe, np.ndarray]:
    """A square matrix product on a device, and the sums of its result over rows."""
    width = CPU_WIDTH if device.platform == "cpu" else WIDTH
    row_W = np.random.default_rng(0).normal(size=width).astype(np.float32)
    row_W = jax.device_put(row_W.astype(jnp.dtype(dtype)), device)
    # A matrix whose rows are one row, turned: nothing large is copied to the device.
    turned = jax.jit(lambda row_W: jax.vmap(partial(jnp.roll, row_W))(jnp.arange(width)))
    x_WxW = turned(row_W)
    product = jax.jit(jnp.matmul)
    total = np.asarray(jax.jit(lambda y: y.astype(jnp.float32).sum(0))(product(x_WxW, x_WxW)))
    return _probe(2 * width**3, partial(product, x_WxW, x_WxW)), total


def _copy(device: jax.Device) -> Probe:
    """A large array that is read, changed and written in place."""
    size = (CPU_ARRAY_BYTES if device.platform == "cpu" else ARRAY_BYTES) // 4
    step = jax.jit(lambda x: 0.5 * x + 1, donate_argnums=0)
    place = SingleDeviceSharding(device)
    array = [jax.jit(partial(jnp.zeros, size), out_shardings=place)()]

    def run():
        array[0] = step(array[0])
        return array[0]

    return _probe(2 * 4 * size, run)


def _probe(amount: float, run: Callable[[], jax.Array]) -> Probe:
    """Has a turn repeat `run` for `TURN_SECONDS`; a device works them off without a pause."""
    jax.block_until_ready(run())  # compiles
    begun = time.perf_counter()
    jax.block_until_ready(run())
    repeats = max(1, math.ceil(TURN_SECONDS / (time.perf_counter() - begun)))

    def turn() -> float:
        begun = time.perf_counter()
        for _ in range(repeats):
            y = run()
        jax.block_until_ready(y)
        return time.perf_counter() - begun

    return Probe(repeats * amount, turn)


def _judge(every: dict, kind: str, device_kind: str) -> Finding:
    """Names the devices that are slower than others, or than half of their data sheet."""
    name, unit = NAMES[kind], UNITS[kind]
    rates = {device: found[kind] for device, found in every.items()}
    least, most = min(rates.values()), max(rates.values())
    line = rate(most, unit) if len(rates) == 1 else f"{rate(least, unit)} to {rate(most, unit)}"
    chip = data_sheet(device_kind)
    peak = None
    if kind == "matmul_bfloat16":
        peak = PEAK_FLOPS.get(device_kind)
    elif kind == "memory" and chip:
        peak = chip.hbm_bytes_per_s
    if peak:
        line += f", {least / peak:.0%} of the data sheet's {rate(peak, unit)}"
    elif kind != "matmul_float32":
        line += f"; no data sheet of {device_kind}"
    others = (
        "end other programs there; nvidia-smi -q -d PERFORMANCE shows whether a GPU is throttled; "
        "if it stays so, leave the device out or replace its host"
    )
    if behind := _slow(every, kind):
        slowest = ", ".join(
            f"device {number} of {host} {rate(rates[host, number], unit)}, {part:.2f} of the median"
            for (host, number), part in behind.items()
        )
        return Finding(name, FAIL, f"slow: {slowest}", others)
    if peak and least < SHEET * peak:
        return Finding(name, FAIL, f"{line}, where {SHEET:.0%} is the least", others)
    return Finding(name, OK, line)


def _same_numbers(sums: dict[str, dict[int, np.ndarray]]) -> Finding:
    """Compares a process's devices, and the first one of each process with that of process 0."""
    first = jax.local_devices()[0].id
    differing = sorted(
        {
            number
            for found in sums.values()
            for number, total in found.items()
            if _differ(total, found[first])
        }
    )
    parts = {kind: found[first].reshape(PARTS, -1).sum(1).tolist() for kind, found in sums.items()}
    theirs = processes.gathered(parts)[0]
    if differing:
        line = f"devices {', '.join(map(str, differing))} do not compute what device {first} does"
    elif any(_differ(np.array(parts[kind]), np.array(theirs[kind])) for kind in parts):
        line = f"device {first} does not compute what the first one of process 0 does"
    else:
        return Finding("same product", OK, "all devices compute the same numbers")
    return Finding("same product", FAIL, line, "leave these devices out, or replace the host")


def _differ(x: np.ndarray, y: np.ndarray) -> bool:
    return not np.abs(x - y).max() <= DIFFERENCE * np.abs(y).max()  # NaN differs


def _groups(names: list[str]) -> dict[str, list]:
    """The devices that communicate: those of this host, and all of them.

    Args:
      names: each process's host.
    """
    here, every = names[jax.process_index()], jax.devices()
    local = [device for device in every if names[device.process_index] == here]
    groups = {"collectives": local} if len(local) > 1 else {}
    return groups | ({"collectives of all hosts": every} if len(every) > len(local) else {})


def collectives(devices: list) -> tuple[dict[str, float], list[str]]:
    """The rates of an all-to-all and an all-reduce, and the names of those with wrong results.

    Returns:
      Bytes that each device sends in a second. An all-reduce counts as a ring does it, which sends
      2 (n - 1) / n of the array.
    """
    count = len(devices)
    mesh = Mesh(np.array(devices), ("all",), axis_types=(AxisType.Auto,))
    sent = CPU_SENT_BYTES if devices[0].platform == "cpu" else SENT_BYTES
    size = max(1, sent // (4 * count))
    row_C = np.arange(count)
    over = partial(jax.shard_map, mesh=mesh, out_specs=PartitionSpec("all"))

    def rows_CxS():  # a device's rows, one for each device
        number_C = _number(jax.lax.axis_index("all"), jnp.arange(count)).astype(jnp.float32)
        return jnp.broadcast_to(number_C[:, None], (count, size))

    def all_to_all(x_CxS):
        return jax.lax.all_to_all(x_CxS, "all", 0, 0, tiled=True)

    def all_reduce(x_CxS):
        return jax.lax.pcast(jax.lax.psum(x_CxS, "all"), "all", to="varying")

    x_RxS = jax.jit(over(rows_CxS, in_specs=()))()
    rates, wrong = {}, []
    for run, times in ((all_to_all, 1), (all_reduce, 2)):
        name = run.__name__
        log.info("rate: %s over %d devices", name, count)
        compiled = jax.jit(over(run, in_specs=PartitionSpec("all")))
        y_RxS = compiled(x_RxS)
        for shard in y_RxS.addressable_shards:
            device = devices.index(shard.device)
            if run is all_to_all:
                expected_C = _number(row_C, device)
            else:
                expected_C = sum(_number(other, row_C) for other in range(count))
            if not np.array_equal(np.asarray(shard.data[:, -1]), expected_C):
                wrong.append(f"{name} on device {shard.device.id}")
        best = math.inf
        for _ in range(TURNS):
            begun = time.perf_counter()
            jax.block_until_ready(compiled(x_RxS))
            best = min(best, time.perf_counter() - begun)
        rates[name] = times * (count - 1) / count * 4 * count * size / best
    return rates, wrong


def _number(device, row):
    """What a device's row holds before a collective; sums of it are exact."""
    return (31 * device + 17 * row) % 1009


def _judge_collectives(
    name: str, rates: dict, wrong: list[str], devices: list, hosts: int
) -> list[Finding]:
    if wrong:
        fix = "run nothing over several devices here; report it with the versions above"
        return [Finding(name, FAIL, f"wrong results: {', '.join(wrong)}", fix)]
    chip = data_sheet(devices[0].device_kind)
    shown = {kind.replace("_", "-"): rate(value, "B") for kind, value in rates.items()}
    line = ", ".join(f"{kind} {value}" for kind, value in shown.items())
    line += f" from each of {len(devices)} devices"
    if not chip:
        return [Finding(name, OK, f"{line}; no data sheet of {devices[0].device_kind}")]
    slices = {getattr(device, "slice_index", 0) for device in devices}
    across = hosts > 1 if chip.platform == "gpu" else len(slices) > 1
    link = chip.network_bytes_per_s if across else chip.link_bytes_per_s
    line += f"; one {'network' if across else 'link'} has {rate(link, 'B')} by the data sheet"
    if rates["all_reduce"] >= LINK_SHEET * link:
        return [Finding(name, OK, line)]
    fix = "see whether all chips of the slice are healthy"
    if across:
        fix = "see whether NCCL uses the fast network (NCCL_DEBUG=INFO), or what slices share"
    elif chip.platform == "gpu":
        fix = "see by nvidia-smi topo -m whether the GPUs have NVLink"
    return [Finding(name, FAIL, f"{line}, of which an all-reduce reaches less than a fifth", fix)]
