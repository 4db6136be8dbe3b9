"""Measures matrix products, memory and collectives, and compares the rates with data sheets.

Each device is measured alone, so that a slow one can be named. The devices take turns, and a rate
is a device's best turn: other work on the machine slows down a turn, but hardly the rate. A device
that seems slow is measured again before it fails.

Axis letters: W is the width of a matrix; C devices that receive, R rows of all devices, S numbers.
"""

import logging
import socket
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec, SingleDeviceSharding

from prmoe_jax.bench.timing import TURN_SECONDS, interleaved, mean_seconds
from prmoe_jax.check.findings import FAIL, OK, Finding, Part, rate, slow
from prmoe_jax.parallel import processes
from prmoe_jax.plan.chips import data_sheet
from prmoe_jax.run.metrics import PEAK_FLOPS

log = logging.getLogger(__name__)

# Width of the square matrix product; bytes of the array that is read and written; bytes of each
# device's array in a collective. CPUs get smaller ones.
WIDTH, ARRAY_BYTES, SENT_BYTES = 8192, 1 << 30, 1 << 28
CPU_WIDTH, CPU_ARRAY_BYTES, CPU_SENT_BYTES = 1024, 1 << 27, 1 << 22
TURNS = 5
ROUNDS = 3  # a device that seems slow is measured this many times
# The check fails below these shares: SLOW of the median of all devices; SHEET of the data sheet's
# rates of products and memory; LINK_SHEET of the data sheet's link, for an all-reduce.
SLOW, SHEET, LINK_SHEET = 0.8, 0.5, 0.2
# The largest error allowed in a product, as a share of its largest number. Sound devices have 2e-3
# in bfloat16; in float32 1e-6, or 1e-3 if they round the factors.
ERROR = 1e-2
# What is measured of a device: in words, and the unit.
KINDS = {
    "matmul_bfloat16": ("product in bfloat16", "FLOP"),
    "matmul_float32": ("product in float32", "FLOP"),
    "memory": ("memory", "B"),
}


def check() -> Part:
    """Measures each device alone, then collectives within each host and over all devices."""
    devices = jax.local_devices()
    names = processes.gathered(socket.gethostname())
    host = f"{names[jax.process_index()]} (process {jax.process_index()})"
    local, errors = measure(devices)
    every = _gather(host, local)
    for _ in range(ROUNDS - 1):
        suspects = {name for kind in KINDS for name in _slow(every, kind)}
        if not suspects:
            break
        if again := [d for d in devices if (host, d.id) in suspects]:
            log.info("measuring again: devices %s", ", ".join(str(d.id) for d in again))
            for number, rates in measure(again)[0].items():
                local[number] = {kind: max(rates[kind], local[number][kind]) for kind in rates}
        every = _gather(host, local)
    findings = [_judge(every, kind, devices[0].device_kind) for kind in KINDS]
    findings.append(_judge_errors(errors))
    numbers = {"devices": [{"host": h, "device": d, **rates} for (h, d), rates in every.items()]}
    groups = _groups(names)
    measured = {name: collectives(members) for name, members in groups.items()}
    everywhere = processes.gathered({name: rates for name, (rates, _) in measured.items()})
    for name, members in groups.items():
        owners = {device.process_index for device in members}
        found = [everywhere[process][name] for process in owners]
        numbers[name] = {kind: min(rates[kind] for rates in found) for kind in found[0]}
        hosts, wrong = len({names[process] for process in owners}), measured[name][1]
        findings.append(_judge_collectives(name, numbers[name], wrong, members, hosts))
    return Part(findings, numbers)


def _gather(host: str, local: dict[int, dict]) -> dict[tuple[str, int], dict]:
    """The rates of all processes' devices: (host, device) -> rates."""
    gathered = processes.gathered([[host, number, rates] for number, rates in local.items()])
    return {(host, number): rates for part in gathered for host, number, rates in part}


def _slow(every: dict, kind: str) -> dict[tuple[str, int], float]:
    return slow({name: rates[kind] for name, rates in every.items()}, SLOW)


def measure(devices: list) -> tuple[dict[int, dict[str, float]], dict[str, dict[int, float]]]:
    """Rates of each device: {number: {name in `KINDS`: FLOP/s or bytes/s}}; errors of its matmuls.

    The errors are {name in `KINDS`: {number: largest, as a share of the largest number}}.
    """
    best: dict[int, dict[str, float]] = {device.id: {} for device in devices}
    errors = {}
    for kind, (name, _) in KINDS.items():
        log.info("rate: %s", name)
        if kind == "memory":
            made = {device.id: _copy(device) for device in devices}
        else:
            made = {device.id: _product(device, kind.split("_")[1]) for device in devices}
            errors[kind] = {number: error for number, (_, _, error) in made.items()}
        turns = {number: mean_seconds(run, TURN_SECONDS) for number, (run, *_) in made.items()}
        for number, seconds in interleaved(turns, TURNS).items():
            best[number][kind] = made[number][1] / min(seconds)
    return best, errors


def _product(device: jax.Device, dtype: str) -> tuple[Callable[[], jax.Array], float, float]:
    """A function that multiplies matrices, its FLOPs, and its error as in `measure`."""
    width = CPU_WIDTH if device.platform == "cpu" else WIDTH
    row_W = np.random.default_rng(0).normal(size=width).astype(jnp.dtype(dtype))
    # A circulant matrix, so that only its first row is copied to the device. Its square is also
    # circulant, and has as first row the cyclic convolution of this row with itself.
    exact_W = np.fft.irfft(np.fft.rfft(row_W.astype(np.float64)) ** 2, width)

    def turned(row_W):
        return jax.vmap(partial(jnp.roll, row_W))(jnp.arange(width))

    def largest_error(y_WxW, row_W):
        return jnp.abs(y_WxW.astype(jnp.float32) - turned(row_W)).max()

    x_WxW = jax.jit(turned)(jax.device_put(row_W, device))
    product = jax.jit(jnp.matmul)
    exact = jax.device_put(exact_W.astype(np.float32), device)
    error = float(jax.jit(largest_error)(product(x_WxW, x_WxW), exact))
    return partial(product, x_WxW, x_WxW), 2 * width**3, error / float(np.abs(exact_W).max())


def _copy(device: jax.Device) -> tuple[Callable[[], jax.Array], float]:
    """A function that reads and writes a large array in place, and the bytes that it moves."""
    size = (CPU_ARRAY_BYTES if device.platform == "cpu" else ARRAY_BYTES) // 4
    step = jax.jit(lambda x: 0.5 * x + 1, donate_argnums=0)
    place = SingleDeviceSharding(device)
    array = [jax.jit(partial(jnp.zeros, size), out_shardings=place)()]

    def run():
        array[0] = step(array[0])
        return array[0]

    return run, 2 * 4 * size


def _judge(every: dict, kind: str, device_kind: str) -> Finding:
    """Returns a failure if a rate is below `SLOW` times the median of all devices.

    A rate below `SHEET` times the data sheet's rate is a failure, too.
    """
    name, unit = KINDS[kind]
    rates = {device: found[kind] for device, found in every.items()}
    least, most = min(rates.values()), max(rates.values())
    line = rate(most, unit) if len(rates) == 1 else f"{rate(least, unit)} to {rate(most, unit)}"
    chip = data_sheet(device_kind)
    memory = chip.hbm_bytes_per_s if chip else None
    peaks = {"matmul_bfloat16": PEAK_FLOPS.get(device_kind), "memory": memory}
    if peak := peaks.get(kind):
        line += f", {least / peak:.0%} of the data sheet's {rate(peak, unit)}"
    elif kind in peaks:
        line += f"; no data sheet of {device_kind}"
    fix = "end other programs there; nvidia-smi -q -d PERFORMANCE shows whether a GPU is "
    fix += "throttled; if it stays so, leave the device out or replace its host"
    if behind := _slow(every, kind):
        slowest = ", ".join(
            f"device {number} of {host} {rate(rates[host, number], unit)}, {part:.2f} of the median"
            for (host, number), part in behind.items()
        )
        return Finding(name, FAIL, f"slow: {slowest}", fix)
    if peak and least < SHEET * peak:
        return Finding(name, FAIL, f"{line}, where {SHEET:.0%} is the least", fix)
    return Finding(name, OK, line)


def _judge_errors(errors: dict[str, dict[int, float]]) -> Finding:
    """Names this process's devices whose products are wrong; see `measure`."""
    name = "exact products"
    wrong = [
        f"{kind.split('_')[1]} on device {number} by {error:.2g}"
        for kind, found in errors.items()
        for number, error in found.items()
        if not error <= ERROR  # NaN is wrong
    ]
    if wrong:
        fix = "leave these devices out, or replace the host"
        return Finding(name, FAIL, f"off, of the largest number: {', '.join(wrong)}", fix)
    largest = max(error for found in errors.values() for error in found.values())
    return Finding(name, OK, f"within {largest:.2g} of the largest number")


def _groups(names: list[str]) -> dict[str, list]:
    """Devices whose collectives are measured: this host's, and all; names: of processes' hosts."""
    here, every = names[jax.process_index()], jax.devices()
    local = [device for device in every if names[device.process_index] == here]
    groups = {"collectives": local} if len(local) > 1 else {}
    return groups | ({"collectives of all hosts": every} if len(every) > len(local) else {})


def collectives(devices: list) -> tuple[dict[str, float], list[str]]:
    """Measures an all-to-all and an all-reduce: bytes per second that each device sends.

    An all-reduce is counted as a ring of n devices, which sends 2 (n - 1) / n of its array. The
    second result says in words where numbers are wrong.
    """
    count = len(devices)
    mesh = Mesh(np.array(devices), ("all",), axis_types=(AxisType.Auto,))
    sent = CPU_SENT_BYTES if devices[0].platform == "cpu" else SENT_BYTES
    size = max(1, sent // (4 * count))
    row_C = np.arange(count)
    over = partial(jax.shard_map, mesh=mesh, out_specs=PartitionSpec("all"))

    def rows_CxS():  # the rows that this device sends, one per receiver
        number_C = _number(jax.lax.axis_index("all"), jnp.arange(count)).astype(jnp.float32)
        return jnp.broadcast_to(number_C[:, None], (count, size))

    def all_to_all(x_CxS):
        return jax.lax.all_to_all(x_CxS, "all", 0, 0, tiled=True)

    def all_reduce(x_CxS):
        return jax.lax.pcast(jax.lax.psum(x_CxS, "all"), "all", to="varying")

    x_RxS = jax.jit(over(rows_CxS, in_specs=()))()
    turns, wrong = {}, []
    number_CxC = _number(row_C[:, None], row_C)  # by sender and receiver
    for run, expected_CxC in (
        (all_to_all, number_CxC.T),
        (all_reduce, np.broadcast_to(number_CxC.sum(0), (count, count))),
    ):
        name = run.__name__
        log.info("rate: %s over %d devices", name, count)
        compiled = jax.jit(over(run, in_specs=PartitionSpec("all")))
        for shard in compiled(x_RxS).addressable_shards:
            expected_C = jnp.asarray(expected_CxC[devices.index(shard.device)], jnp.float32)
            if not (shard.data == expected_C[:, None]).all():
                wrong.append(f"{name} on device {shard.device.id}")
        turns[name] = mean_seconds(partial(compiled, x_RxS), 0)
    best = {name: min(seconds) for name, seconds in interleaved(turns, TURNS).items()}
    sides = {"all_to_all": 1, "all_reduce": 2}
    return {name: sides[name] * (count - 1) * 4 * size / best[name] for name in best}, wrong


def _number(device, row):
    """The number that fills a device's row before a collective; float32 sums of it are exact."""
    return (31 * device + 17 * row) % 1009


def _judge_collectives(
    name: str, rates: dict, wrong: list[str], devices: list, hosts: int
) -> Finding:
    if wrong:
        fix = "run nothing over several devices here; report it with the versions above"
        return Finding(name, FAIL, f"wrong results: {', '.join(wrong)}", fix)
    chip = data_sheet(devices[0].device_kind)
    shown = (f"{kind.replace('_', '-')} {rate(value, 'B')}" for kind, value in rates.items())
    line = f"{', '.join(shown)} from each of {len(devices)} devices"
    if not chip:
        return Finding(name, OK, f"{line}; no data sheet of {devices[0].device_kind}")
    slices = {getattr(device, "slice_index", 0) for device in devices}
    across = hosts > 1 if chip.platform == "gpu" else len(slices) > 1
    link = chip.network_bytes_per_s if across else chip.link_bytes_per_s
    line += f"; one {'network' if across else 'link'} has {rate(link, 'B')} by the data sheet"
    if rates["all_reduce"] >= LINK_SHEET * link:
        return Finding(name, OK, line)
    fix = "see whether all chips of the slice are healthy"
    if across:
        fix = "see whether NCCL uses the fast network (NCCL_DEBUG=INFO), or what slices share"
    elif chip.platform == "gpu":
        fix = "see by nvidia-smi topo -m whether the GPUs have NVLink"
    return Finding(name, FAIL, f"{line}, of which an all-reduce reaches less than a fifth", fix)
