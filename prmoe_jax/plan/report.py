"""`prmoe plan`: a whole step, compiled for chips that aren't there, and a model of its cost.

On TPUs, the time of an operation is the compiler's estimate in cycles, times the trips of the loops
around it; without an estimate, it is that of its bytes at the memory's speed. On GPUs it is the
longer of the FLOPs at the peak and the bytes at the memory's speed, which gives a lower bound.
Attention kernels take their FLOPs at `KERNEL_EFFICIENCY` of the peak. So do grouped products on
TPUs, unless their bytes take longer. `collectives.torus`, `slices` and `hosts` model the time of
collectives. On TPUs, asynchronous ones cost only the time that the compiler's schedule waits for
them (`collectives.exposed`); on GPUs, all cost their whole time. Hosts and input are left out.
"""

import dataclasses
import functools
import logging
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from prmoe_jax.config.schema import Config, MeshConfig, TeacherConfig
from prmoe_jax.config.validation import check_runs_without_limit
from prmoe_jax.distill.loss import Distiller
from prmoe_jax.errors import UserError
from prmoe_jax.inference.decoder import Decoder
from prmoe_jax.model.backends import check_backends
from prmoe_jax.model.batch import Batch, TopKLogProbs
from prmoe_jax.model.sizes import cost
from prmoe_jax.model.transformer import cast, init_model
from prmoe_jax.moe.exchange import (
    FEW_TOKENS,
    LEAST_ROWS,
    lacks_ragged_exchange,
    piece_rows,
    resolve,
)
from prmoe_jax.parallel import sharding
from prmoe_jax.parallel.axes import batch_axes, crosses_slices
from prmoe_jax.parallel.mesh import check_fits, check_teacher_fits, make_mesh, on_slices
from prmoe_jax.plan.chips import Chip, topology_devices, unit
from prmoe_jax.plan.collectives import (
    Collective,
    Network,
    collectives,
    exposed,
    hosts,
    slices,
    torus,
)
from prmoe_jax.plan.program import END, Operation, field, is_grouped, is_kernel, operations
from prmoe_jax.training.step import compile_train_step, compiler_options, init_state

# The named scopes of the model's code; an operation's name lists them, innermost last. Operations
# in `layers` alone belong to the scan over layers: residual additions, and reads and writes of
# stacked arrays (parameters, gradients, and the values that are kept for the backward pass).
COMPONENTS = (
    "attention mlp experts routing dispatch exchange norm layers cast embedding logits optimizer"
).split()
KERNEL_EFFICIENCY = 0.5

log = logging.getLogger(__name__)


def plan(
    config: Config, topology: str, decode: int = 0, teacher: Config | None = None, load: float = 1.0
) -> dict:
    """Compiles a training or decoding step for a topology such as 'v5p:4x4x8' and models its cost.

    Args:
      config: the experiment; its mesh must fit the topology.
      topology: a topology of `chips.topology_devices`.
      decode: if above 0, plans the decoding of one token for this many sequences at full context,
        with weights in the compute dtype, without FSDP and without dropped tokens.
      teacher: the config of a model that teaches in the step, from `config.teacher.adapt_teacher`.
      load: where no token is dropped, the rows of the most loaded device, relative to the even
        share. It decides how many rounds the exchange takes on all devices.

    Returns:
      topology, mesh, chips, fits, and hbm_bytes_per_chip by use, with the total `needed` if the
      arguments alone don't fit or the compiler refuses the step. Otherwise also:
        modelled_step_s, tokens_per_s, and components: seconds by part of the model;
        collectives: runs, bytes, seconds and exposed_seconds, summed by kind, axes, asynchronous
          and network ('ici' or 'dcn' of TPUs, 'nvlink' or 'network' of GPUs);
        in training: modelled_mfu if all parameters train, days and chip_hours of the run, and
          step_without_teacher_s if the teacher stops before the run ends.
      For a TPU7x, mesh and hbm_bytes_per_chip count devices, which are half chips.

    Raises:
      UserError: the topology is unknown, the compiler is not installed, the mesh does not fit, or
        the load has no effect.
    """
    check_load(config, decode, load)
    chip, devices = topology_devices(topology)
    config = on_slices(decoding(config, decode) if decode else config, devices)
    check_fits(config, len(devices), decode > 0)
    mesh = make_mesh(config, devices)
    with jax.set_mesh(mesh):
        pieces = lacks_ragged_exchange(tuple(n for n in mesh.axis_names if n.startswith("expert")))
    rounds = _rounds(config, mesh, decode, load, pieces)
    for model in filter(None, (config, teacher)):
        check_backends(model, chip.platform, mesh)
    taught = teacher or (_is_cached(config) and not decode)
    distiller = Distiller(config, teacher) if taught else None
    arguments = _arguments(config, mesh, decode, teacher)
    held = _held(arguments, decode)
    result = {
        "topology": topology,
        "mesh": {name: size for name, size in mesh.shape.items() if size > 1},
        "chips": len(devices) // chip.devices,
        "fits": False,
        "hbm_bytes_per_chip": held,
    }
    total = sum(held.values())
    if total > chip.hbm_bytes:  # the compiler may not report this
        held["needed"] = total
        return result
    step = _decode_step(config, mesh) if decode else compile_train_step(config, mesh, distiller)
    log.info("compiling the step for %s", topology)
    try:
        with jax.set_mesh(mesh):
            compiled = step.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        held["needed"] = needed_bytes(str(error), total, chip.hbm_bytes)
        return result
    memory = compiled.memory_analysis()
    padding = memory.argument_size_in_bytes - total
    if padding > 0.01 * total:  # from the tiled layouts of TPUs
        held["padding"] = padding
    # Activations, gradients and the program's working memory.
    held["temporaries"] = memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    length = config.model.length
    models = [c.model for c in (config, teacher) if c]
    window = max(min(w or length, length) for model in models for w in model.windows)
    program = operations(compiled.as_text(), rounds, window)
    components, sent = _modelled(program, chip, mesh, load / rounds)
    step_s = sum(components.values())
    result |= {
        "fits": sum(held.values()) <= chip.hbm_bytes,
        "modelled_step_s": step_s,
        "components": components,
        "collectives": _summed(sent, chip),
    }
    if decode:
        return result | {"tokens_per_s": decode / step_s}
    tokens_per_s = config.tokens_per_step / step_s
    flops_per_s = cost(config.model, config.moe).train_flops_per_token * tokens_per_s / len(devices)
    whole_s = config.total_steps * step_s
    if taught and config.kd_steps < config.total_steps:
        log.info("compiling the step without its teacher")
        alone = dataclasses.replace(config, teacher=TeacherConfig())
        alone_s = plan(alone, topology, load=load)["modelled_step_s"]
        whole_s += (config.total_steps - config.kd_steps) * (alone_s - step_s)
        result["step_without_teacher_s"] = alone_s
    if not config.optimizer.trainable:  # the FLOPs are those of training all parameters
        result["modelled_mfu"] = flops_per_s / chip.flops_per_s
    return result | {
        "tokens_per_s": tokens_per_s,
        "days": whole_s / 86400,
        "chip_hours": whole_s / 3600 * (len(devices) // chip.devices),
    }


def _modelled(
    program: list[Operation], chip: Chip, mesh: Mesh, share: float
) -> tuple[dict[str, float], list[Collective]]:
    """The seconds of a compiled step by part of the model, and its collectives.

    Attention kernels and collectives are parts of their own. `share` is load / rounds: a round's
    rows of the most loaded device, divided by the rows that each device would get in all rounds at
    even load. It scales ragged exchanges.
    """
    sent = collectives(program, dict(mesh.shape), *_network(chip, mesh))
    for place, collective in sent.items():
        if collective.kind == "ragged-all-to-all":
            sent[place] = collective._replace(
                bytes=round(collective.bytes * share), seconds=collective.seconds * share
            )
    seconds = [_seconds(operation, chip) for operation in program]
    if chip.platform == "tpu":
        sent = exposed(program, seconds, sent)
    else:
        sent = {i: c._replace(exposed_seconds=c.seconds) for i, c in sent.items()}
    total = Counter()
    for place, operation in enumerate(program):
        if place not in sent:
            part = "attention kernels" if is_kernel(operation) else component(operation)
            total[part] += seconds[place]
    total["collectives"] = sum(collective.exposed_seconds for collective in sent.values())
    return dict(total.most_common()), list(sent.values())


def needed_bytes(message: str, held: int, room: int) -> int:
    """Bytes per chip that a step needs, from the compiler's message that it doesn't fit.

    Without a number in the message it is a lower bound. `held` are the bytes of the step's
    arguments, which some messages leave out, and `room` those of a chip's memory.
    """
    if used := field(message, r"Used ([\d.]+)G of"):
        return round(float(used) * 2**30)
    if temporaries := field(message, r"temporaries \(([\d.]+)G\)"):
        return held + round(float(temporaries) * 2**30)
    return max(held, room)


def held_bytes(
    config: Config, mesh: Mesh | AbstractMesh, decode: int = 0, teacher: Config | None = None
) -> dict[str, int]:
    """Bytes per chip of a step's arguments, by use, without compiling the step; see `plan`."""
    config = decoding(config, decode) if decode else config
    return _held(_arguments(config, mesh, decode, teacher), decode)


def decoding(config: Config, sequences: int) -> Config:
    """The config with that many sequences as its batch, which need not fill routing groups."""
    check_runs_without_limit(config)
    train = dataclasses.replace(config.train, batch_size=sequences, accumulate=1)
    moe = dataclasses.replace(config.moe, group_size=0)
    return dataclasses.replace(config, train=train, moe=moe)


def check_load(config: Config, decode: int, load: float) -> None:
    """Refuses a load that changes nothing on any mesh."""
    if load == 1:
        return
    if not any(config.model.schedule.experts):
        raise UserError(f"--load={load:g} has no effect: the architecture is dense; leave it out")
    if not (decode or math.isinf(config.moe.capacity_factor)):
        raise UserError(
            f"--load={load:g} has no effect with moe.capacity_factor={config.moe.capacity_factor:g}"
            ", by which no expert takes more rows; use --config.moe.capacity_factor=inf"
        )


def _rounds(config: Config, mesh: Mesh, decode: int, load: float, pieces: bool) -> int:
    """Rounds of a dropless exchange if the most loaded device gets `load` times the even share.

    With `pieces`, pairs of devices exchange equal pieces, and `load` is for the most loaded pair.
    """
    shape, execution = mesh.shape, config.execution
    tokens = config.train.batch_size * (1 if decode else config.model.length)
    tokens *= shape["tensor"] / mesh.size / config.train.accumulate  # on each device
    axes = tuple(name for name, size in shape.items() if name.startswith("expert") and size > 1)
    sizes = [shape[name] for name in axes]
    if not axes or decode and tokens * math.prod(sizes) * shape["slice"] <= FEW_TOKENS:
        return 1  # no rows are exchanged, or each device gets all tokens
    rows, exchange = tokens * config.model.top_k, resolve(execution.exchange, mesh)
    if exchange == "coordinated":
        rows /= shape["tensor"]
    buffer = max(LEAST_ROWS, execution.buffer_factor * rows)
    if pieces:
        devices = max(sizes) if exchange == "hierarchical" else math.prod(sizes)
        buffer = devices * piece_rows(math.ceil(rows), devices, execution.buffer_factor)
    return math.ceil(load * rows / buffer)


def _arguments(
    config: Config, mesh: Mesh | AbstractMesh, decode: int, teacher: Config | None
) -> list:
    """A step's arguments as shapes with shardings: state, batch, teacher, or those of decoding."""
    if decode:
        model, caches = _decode_shapes(_off_mesh(config))
        places = sharding.shardings(model, mesh, in_use=True)
        caches = jax.tree.map(lambda leaf: _place(leaf, _split(mesh, "tensor")), caches)
        return [jax.tree.map(_place, model, places), caches, _rows(mesh, (decode,), jnp.int32)]
    state = _state_shapes(_off_mesh(config))
    shape = config.train.batch_size, config.model.length
    dtypes = jnp.int32, jnp.int32, bool, jnp.int32
    batch = Batch(*(_rows(mesh, shape, dtype) for dtype in dtypes))
    arguments = [jax.tree.map(_place, state, sharding.shardings(state, mesh)), batch]
    if teacher:
        check_teacher_fits(teacher, config, mesh)
        model = _teacher_shapes(_off_mesh(teacher))
        arguments.append(jax.tree.map(_place, model, sharding.shardings(model, mesh)))
    elif _is_cached(config):
        top_k = *shape, config.kd.top_k
        recorded = (_rows(mesh, top_k, dtype) for dtype in (jnp.int32, jnp.float32))
        arguments[1] = batch._replace(teacher_top_k=TopKLogProbs(*recorded))
    return arguments


def _is_cached(config: Config) -> bool:
    """Whether a run learns from a teacher's recorded predictions."""
    return config.kd_steps > 0 and config.teacher.cache != ""


def _off_mesh(config: Config) -> Config:
    """The config without its mesh: the key of the cached shapes, which don't depend on meshes."""
    return dataclasses.replace(config, mesh=MeshConfig())


@functools.lru_cache(maxsize=4)
def _state_shapes(config: Config):
    return jax.eval_shape(lambda: init_state(config))


@functools.lru_cache(maxsize=4)
def _teacher_shapes(config: Config):
    return jax.eval_shape(lambda: cast(init_model(config), jnp.dtype(config.model.dtype)))


@functools.lru_cache(maxsize=4)
def _decode_shapes(config: Config):
    model = jax.eval_shape(
        lambda: Decoder(init_model(config), config.model.dtype, config.execution)
    )
    batch, length = config.train.batch_size, config.model.length
    return model, jax.eval_shape(lambda: model.empty_cache(batch, length))


def _decode_step(config: Config, mesh: Mesh):
    """The jitted step that computes each sequence's next token."""
    batch = config.train.batch_size
    model, _ = _decode_shapes(_off_mesh(config))
    rows = _split(mesh)

    def step(model, caches, tokens_B):
        length_B = jnp.full(batch, config.model.length - 1)
        x_Bx1xD, caches = model(tokens_B[:, None], jnp.ones((batch, 1), bool), caches, length_B)
        return jnp.argmax(model.logits(x_Bx1xD[:, 0]), axis=-1), caches

    # The compiler chooses the KV cache's layout, as in `generate.decode`.
    by_head = Format(Layout.AUTO, _split(mesh, "tensor"))
    return jax.jit(
        step,
        donate_argnums=1,
        in_shardings=(sharding.shardings(model, mesh, in_use=True), by_head, rows),
        out_shardings=(rows, by_head),
        compiler_options=compiler_options(mesh),
    )


def _place(leaf, sharding):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _rows(mesh: Mesh, shape: tuple[int, ...], dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=_split(mesh))


def _split(mesh: Mesh | AbstractMesh, *others: str) -> NamedSharding:
    """Splits the first axis, a batch, over the devices, and other axes over `others`."""
    return NamedSharding(mesh, PartitionSpec(batch_axes(mesh), *others))


def _held(arguments: list, decode: int) -> dict[str, int]:
    """Bytes per chip of a step's arguments, by use."""
    if decode:
        parts = dict(zip(("parameters", "past", "batch"), arguments, strict=True))
    else:
        state, *others = arguments
        parts = {"parameters": state.model, "optimizer": state.optimizer}
        parts |= zip(("batch", "teacher"), others, strict=False)
    return {
        use: sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(part)
        )
        for use, part in parts.items()
    }


def _network(chip: Chip, mesh: Mesh) -> tuple[Network, np.ndarray, int]:
    """The last three arguments of `collectives`: network, island and partitions."""
    if chip.platform == "gpu":
        host = np.array([device.process_index for device in mesh.devices.flat])
        return hosts(host, chip.link_bytes_per_s, chip.network_bytes_per_s), host, mesh.size
    coordinates = np.array([device.coords for device in mesh.devices.flat])
    links = torus(coordinates, chip.link_bytes_per_s, chip.die_bytes_per_s)
    inside = math.prod(size for name, size in mesh.shape.items() if not crosses_slices(name))
    network = slices(links, inside, chip.network_bytes_per_s)
    return network, np.arange(mesh.size) // inside, inside


def _seconds(operation: Operation, chip: Chip) -> float:
    """The time of an operation other than a collective, all runs together."""
    computing, moving = operation.flops / chip.flops_per_s, operation.bytes / chip.hbm_bytes_per_s
    if operation.opcode == END:
        once = 0.0
    elif is_kernel(operation):
        once = computing / KERNEL_EFFICIENCY
    elif is_grouped(operation):  # few rows read all weights
        once = max(computing / KERNEL_EFFICIENCY, moving)
    elif operation.cycles is not None:
        once = operation.cycles / chip.hertz
    else:
        once = max(computing, moving) if chip.platform == "gpu" else moving
    return once * operation.runs


def component(operation: Operation) -> str:
    """The innermost scope of the model's code that an operation comes from, or 'other'."""
    words = re.findall(r"\w+", field(operation.text, r'op_name="([^"]*)"'))
    return next((word for word in reversed(words) if word in COMPONENTS), "other")


def _summed(sent: Iterable[Collective], chip: Chip) -> list[dict]:
    """Sums collectives by kind, axes, asynchronous and network; those with most seconds first."""
    networks = {"tpu": ("ici", "dcn"), "gpu": ("nvlink", "network")}[chip.platform]
    totals: dict[tuple, Counter] = defaultdict(Counter)
    for collective in sent:
        total = totals[*collective[:3], networks[collective.away]]
        for name in ("runs", "bytes", "seconds", "exposed_seconds"):
            total[name] += getattr(collective, name)
    rows = [
        {"kind": kind, "axes": list(axes), "asynchronous": begun, "network": network, **total}
        for (kind, axes, begun, network), total in totals.items()
    ]
    return sorted(rows, key=lambda row: -row["seconds"])


def _instead(result: dict) -> str:
    other = result["instead"]
    if not other:
        chip = result["topology"].partition(":")[0]
        return f"nothing that was tried fits: no mesh of these chips, no slice of {chip}"
    held = sum(other["hbm_bytes_per_chip"].values()) / 2**30
    return (
        f"this fits: --topology={other['topology']}{other['flags'] and ' '}{other['flags']} "
        f"({held:.2f} GiB a chip, modelled step {other['modelled_step_s'] * 1e3:.4g} ms)"
    )


def table(result: dict) -> str:
    """The plan as text."""
    mesh = ", ".join(f"{name} {size}" for name, size in result["mesh"].items()) or "one chip"
    each = unit(result["topology"])
    lines = [f"{result['topology']}: {result['chips']} chips, mesh {mesh}"]
    if result.get("flags"):
        lines.append(f"the mesh is the suggested one: {result['flags']}")
    lines.append("fits" if result["fits"] else "does not fit")
    held = result["hbm_bytes_per_chip"].items()
    lines += [f"  {name:20} {size / 2**30:9.2f} GiB a {each}" for name, size in held]
    if "instead" in result:
        lines.append(_instead(result))
    if "modelled_step_s" not in result:
        return "\n".join(lines)
    step_s = result["modelled_step_s"]
    mfu = f", MFU {result['modelled_mfu']:.1%}" if "modelled_mfu" in result else ""
    alone_s = result.get("step_without_teacher_s")
    alone = f"; without its teacher {alone_s * 1e3:.4g} ms" if alone_s else ""
    lines.append(f"modelled step {step_s * 1e3:.4g} ms{mfu}{alone}")
    lines += [
        f"  {name:20} {seconds * 1e3:9.1f} ms {seconds / step_s:6.1%}"
        for name, seconds in result["components"].items()
    ]
    lines.append(f"collectives, a {each} and step")
    lines += [
        f"  {row['kind']:20} {row['bytes'] / 1e6:9.0f} MB {row['runs']:5} x "
        f"{row['seconds'] * 1e3:7.1f} ms, {row['exposed_seconds'] * 1e3:.1f} exposed, by "
        f"{row['network']} over {' '.join(row['axes']) or 'one device'}"
        for row in result["collectives"]
    ]
    whole = ", {days:.1f} days, {chip_hours:,.0f} chip-hours" if "days" in result else ""
    lines.append(("{tokens_per_s:,.0f} tokens/s" + whole).format(**result))
    lines.append(
        "Modelled, not measured: the compiler's cycles on TPUs, a roofline on GPUs; attention "
        "kernels at half the peak; on TPUs, asynchronous collectives cost the compiler's waits."
    )
    if any(row["network"] == "dcn" for row in result["collectives"]):
        lines.append("A host's network (dcn) is divided evenly between its chips.")
    return "\n".join(lines)
