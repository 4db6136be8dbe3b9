"""`prmoe plan`: the whole train step, compiled for a TPU topology that isn't there, and its costs.

What is modelled: the TensorCore's time by the compiler's own cycle estimates, times the trips of
the loops; attention kernels, which carry none, by their FLOPs at `KERNEL_EFFICIENCY` of the peak;
and collectives by `collectives.collectives`, where those that the compiler starts and ends apart
count as hidden behind computation. What is not: small operations without an estimate, the hosts,
input, and whatever the chips do to each other's links.
"""

import math
import re
from collections import Counter
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from prmoe_jax.config import Config
from prmoe_jax.data.pipeline import Batch
from prmoe_jax.errors import UserError
from prmoe_jax.model import resolve_backends
from prmoe_jax.parallel import rules
from prmoe_jax.parallel.mesh import batch_axes, make_mesh
from prmoe_jax.plan.collectives import Collective, collectives
from prmoe_jax.plan.cycles import Cycles, Operation, cycles
from prmoe_jax.sizes import cost
from prmoe_jax.step import init_state, on_mesh

# The scopes of the model's code, innermost last in an operation's name.
COMPONENTS = "attention mlp experts routing dispatch exchange embedding logits optimizer".split()
KERNEL_EFFICIENCY = 0.5


class Chip(NamedTuple):
    """What a plan needs to know of one TPU chip, from its data sheet."""

    flops_per_s: float  # bfloat16 peak
    hertz: float  # of the TensorCore, from the peak and the matrix units
    hbm_bytes: int
    link_bytes_per_s: float  # of one ICI link in one direction


CHIPS = {
    "v4": Chip(275e12, 1.05e9, 32 * 2**30, 45e9),
    "v5e": Chip(197e12, 1.5e9, 16 * 2**30, 45e9),
    "v5p": Chip(459e12, 1.75e9, 95 * 2**30, 90e9),
}


def plan(config: Config, topology: str) -> dict:
    """Compiles the train step for a topology such as 'v5p:4x4x8' and models what it costs.

    Returns:
      topology, mesh, chips, fits; hbm_bytes_per_chip by use (and `needed` where it doesn't fit);
      modelled_step_s, modelled_mfu, components (seconds by part of the model), collectives (kind,
      axes, hidden, runs, bytes, seconds; summed by the first three), tokens_per_s, days (for the
      config's tokens) and chip_hours. The times are missing where it doesn't fit.

    Raises:
      UserError: the topology is unknown, the compiler is not installed, or the mesh does not fit.
    """
    chip, devices = _devices(topology)
    mesh = make_mesh(config, devices)
    resolved = resolve_backends(config, "tpu", mesh)
    result = {
        "topology": topology,
        "mesh": {name: size for name, size in mesh.shape.items() if size > 1},
        "chips": len(devices),
    }
    state, batch = _arguments(resolved, mesh)
    held = {
        "parameters": _bytes_per_chip(state.model),
        "optimizer": _bytes_per_chip(state.optimizer),
        "batch": _bytes_per_chip(batch),
    }
    try:
        with jax.set_mesh(mesh):
            compiled = on_mesh(resolved, mesh).lower(state, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed = re.search(r"Used ([\d.]+)G of", str(error))
        held["needed"] = round(float(needed[1]) * 2**30) if needed else None
        return result | {"fits": False, "hbm_bytes_per_chip": held}
    memory = compiled.memory_analysis()
    # Activations, gradients and what the compiler works with.
    held["temporaries"] = memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    counted = cycles(compiled.as_text())
    coordinates = np.array([device.coords for device in mesh.devices.flat])
    sent = collectives(counted.uncosted, dict(mesh.shape), coordinates, chip.link_bytes_per_s)
    components = _components(resolved, counted, sent, chip, len(devices))
    step_s = sum(components.values())
    tokens_per_s = config.tokens_per_step / step_s
    flops_per_s = cost(config.model).train_flops_per_token * tokens_per_s / len(devices)
    tokens = config.total_steps * config.tokens_per_step
    return result | {
        "fits": sum(held.values()) <= chip.hbm_bytes,
        "hbm_bytes_per_chip": held,
        "modelled_step_s": step_s,
        "modelled_mfu": flops_per_s / chip.flops_per_s,
        "components": components,
        "collectives": _summed(sent),
        "tokens_per_s": tokens_per_s,
        "days": tokens / tokens_per_s / 86400,
        "chip_hours": tokens / tokens_per_s / 3600 * len(devices),
    }


def _devices(topology: str) -> tuple[Chip, list]:
    name, _, shape = topology.partition(":")
    if name not in CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        raise UserError(
            f"--topology={topology} is unknown; use one of {', '.join(CHIPS)} and the chips of "
            "each dimension, such as v5p:4x4x8 or v5e:16x16"
        )
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:  # whatever a missing or mistaken libtpu raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(
            f"--topology={topology} cannot be compiled for ({reason}); the compiler comes with "
            "pip install -e '.[tpu]'"
        ) from error
    return CHIPS[name], list(described.devices)


def _arguments(config: Config, mesh: Mesh):
    """State and batch of the train step, as shapes with their places."""

    def place(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    state = jax.eval_shape(lambda: init_state(config))
    rows = NamedSharding(mesh, PartitionSpec(batch_axes(mesh)))
    shape = config.train.batch_size, config.model.length
    dtypes = Batch(jnp.int32, jnp.int32, bool, jnp.int32)
    batch = Batch(*(jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for dtype in dtypes))
    return jax.tree.map(place, state, rules.shardings(state, mesh)), batch


def _bytes_per_chip(tree) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _components(
    config: Config, counted: Cycles, sent: list[Collective], chip: Chip, chips: int
) -> dict[str, float]:
    """Seconds of a step by part of the model; attention kernels and collectives apart."""
    seconds = Counter()
    for operation in counted.costed:
        seconds[component(operation)] += operation.cycles / chip.hertz
    if config.model.attention == "splash":
        # Half of the square, forward once (twice with rematerialisation), backward 2.5 times.
        passes = 3.5 if config.model.remat == "none" else 4.5
        flops = 2 * config.model.length * config.model.d_model * config.model.layers * passes
        tokens = config.tokens_per_step / chips
        seconds["attention kernels"] = flops * tokens / chip.flops_per_s / KERNEL_EFFICIENCY
    seconds["collectives"] = sum(c.seconds for c in sent if not c.hidden)
    return dict(seconds.most_common())


def component(operation: Operation) -> str:
    """The innermost scope of the model's code that an operation comes from, or 'other'."""
    name = re.search(r'op_name="([^"]*)"', operation.text)
    scopes = [part for part in re.findall(r"\w+", name[1] if name else "") if part in COMPONENTS]
    return scopes[-1] if scopes else "other"


def _summed(sent: list[Collective]) -> list[dict]:
    totals: dict[tuple, list] = {}
    for collective in sent:
        total = totals.setdefault((collective.kind, collective.axes, collective.hidden), [0, 0, 0])
        for i, value in enumerate((collective.runs, collective.bytes, collective.seconds)):
            total[i] += value
    return [
        dict(zip(Collective._fields, (kind, list(axes), hidden, *total), strict=True))
        for (kind, axes, hidden), total in totals.items()
    ]


def table(result: dict) -> str:
    """The plan for people."""
    mesh = ", ".join(f"{name} {size}" for name, size in result["mesh"].items()) or "one chip"
    lines = [f"{result['topology']}: {result['chips']} chips, mesh {mesh}"]
    lines.append("fits" if result["fits"] else "does not fit")
    for name, size in result["hbm_bytes_per_chip"].items():
        lines.append(f"  {name:20} {size / 2**30:9.2f} GiB a chip" if size else f"  {name}")
    if "modelled_step_s" not in result:
        return "\n".join(lines)
    step_s = result["modelled_step_s"]
    lines.append(f"modelled step {step_s * 1e3:.0f} ms, MFU {result['modelled_mfu']:.1%}")
    for name, seconds in result["components"].items():
        lines.append(f"  {name:20} {seconds * 1e3:9.1f} ms {seconds / step_s:6.1%}")
    lines.append("collectives, a chip and step")
    for row in result["collectives"]:
        hidden = "hidden" if row["hidden"] else ""
        lines.append(
            f"  {row['kind']:20} {row['bytes'] / 1e6:9.0f} MB {row['runs']:5} x "
            f"{row['seconds'] * 1e3:7.1f} ms over {' '.join(row['axes']) or 'one device'} {hidden}"
        )
    lines.append(
        f"{result['tokens_per_s']:,.0f} tokens/s, {result['days']:.1f} days, "
        f"{result['chip_hours']:,.0f} chip-hours"
    )
    lines.append(
        "Modelled: the compiler's cycles; attention kernels at half the peak; rings for "
        "collectives, hidden ones free."
    )
    return "\n".join(lines)
