"""Chooses the sizes of a run's mesh, given or suggested, and checks that the config fits them."""

import contextlib
import itertools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from prmoe_jax.config.schema import Config, MeshConfig, group_rows
from prmoe_jax.errors import UserError, telling
from prmoe_jax.parallel.axes import crosses_slices

log = logging.getLogger(__name__)


def choose_mesh(
    config: Config, devices: int, any_batch: bool = False, decode: bool = False
) -> Config:
    """The config with the mesh to run on: its own or, without one, a suggested mesh.

    `suggest_mesh` makes the suggestion, with as few devices on the `tensor` axis as the batch
    allows. It depends only on the config and the number of devices, and is logged.

    Args:
      config: the experiment, after `on_slices` if there may be several slices.
      devices: the number of devices.
      any_batch: whether the batch may be of another size than the config's, as outside training.
      decode: whether the mesh is for decoding `train.batch_size` sequences.
    """
    if has_own_mesh(config):
        width = config.model.d_model
        if config.mesh.fsdp != 1 and width % (size := axis_sizes(config, devices)["fsdp"]):
            told = "mesh.fsdp=%d splits hardly anything, since it doesn't divide d_model=%d"
            log.warning(told, size, width)
        return config
    problem = None
    for tensor in _divisors(devices // slice_count(config, devices)):
        suggested = replace(config, mesh=suggest_mesh(config, devices, tensor))
        try:
            if any_batch:
                axis_sizes(suggested, devices)
            else:
                check_fits(suggested, devices, decode)
        except UserError as error:
            problem = problem or error
            continue
        if devices > 1:
            log.info("mesh: suggested: %s; give other sizes for another", flags(suggested.mesh))
        return suggested
    raise problem


def has_own_mesh(config: Config) -> bool:
    """Whether the config sets the size of an axis."""
    return replace(config.mesh, slices=0) != MeshConfig()


def with_mesh(config: Config, mesh: MeshConfig | None = None) -> Config:
    """The config on another mesh (by default replicas only), with an exchange that suits any."""
    execution = replace(config.execution, exchange="auto")
    return replace(config, mesh=mesh or MeshConfig(), execution=execution)


def on_slices(config: Config, devices: Sequence[jax.Device] | None = None) -> Config:
    """Sets `mesh.slices` to the number of slices that the devices form, if there are several.

    Only TPUs report their slice. Other devices form as many slices as the config says; neighbours
    in the list of devices, by default all, are in one slice.
    """
    devices = jax.devices() if devices is None else devices
    asked, found = config.mesh.slices, len(set(map(_slice_index, devices)))
    if asked not in (0, found) and devices[0].platform == "tpu":
        raise UserError(
            f"mesh.slices={asked}, but the devices form {found}; use {found}, or 0 to find them"
        )
    if found == 1:
        return config
    return replace(config, mesh=replace(config.mesh, slices=found))


def _slice_index(device: jax.Device) -> int:
    """A TPU's slice; 0 for other devices, since a GPU's `slice_index` is its NVLink domain."""
    return getattr(device, "slice_index", 0) if device.platform == "tpu" else 0


def slice_count(config: Config, devices: int) -> int:
    """`mesh.slices`, or 1 if it is 0."""
    slices = config.mesh.slices or 1
    if devices % slices:
        raise UserError(
            f"mesh.slices={slices} does not divide {devices} devices; use "
            f"{math.gcd(slices, devices)}, or 0 to find the slices"
        )
    return slices


def flags(mesh: MeshConfig) -> str:
    """The command-line flags of a mesh: '--config.mesh.data=8 --config.mesh.fsdp=16'."""
    sizes = asdict(mesh).items()
    return " ".join(f"--config.mesh.{name}={size}" for name, size in sizes if size > 1)


def make_mesh(config: Config, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh that `config.mesh` describes, of all devices by default."""
    devices = jax.devices() if devices is None else devices
    config = on_slices(config, devices)
    sizes = axis_sizes(config, len(devices))
    inside = [size for name, size in sizes.items() if not crosses_slices(name)]
    # An axis may take part of a torus dimension: 64 of 4 x 4 x 8 chips need half of the last one.
    placed = [
        mesh_utils.create_device_mesh(inside, list(one_slice), allow_split_physical_axes=True)
        for one_slice in np.reshape(sorted(devices, key=_slice_index), (-1, math.prod(inside)))
    ]
    placed = np.reshape(placed, tuple(sizes.values()))
    return Mesh(placed, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def axis_sizes(config: Config, devices: int) -> dict[str, int]:
    """The number of devices on each axis of the mesh, outermost first."""
    slices = slice_count(config, devices)
    sizes = asdict(config.mesh)
    inner = sizes.pop("expert_inner")
    del sizes["slices"]
    given = math.prod(size for size in sizes.values() if size != -1)
    rest = next((name for name, size in sizes.items() if size == -1), None)
    if devices % given or (rest is None and given != devices):
        text = _axes_text(sizes) or "a mesh of 1"
        fix = "use sizes whose product divides it"
        if rest is None:
            fix = "leave one at -1, which means the rest"
        raise UserError(f"{text} makes {given} devices, there are {devices}; {fix}")
    if rest:
        sizes[rest] = devices // given
    check_splits(config, sizes)
    across = _slices_of_experts(config, sizes, devices // slices)
    factors = _expert_factors(config, sizes["expert"], inner, devices)
    experts = {f"expert_{i}": size for i, size in reversed(list(enumerate(factors)))}
    outer = {}
    while across > math.prod(outer.values()):  # the outermost expert axes
        name = next(iter(experts))
        outer[name.replace("expert", "expert_across")] = experts.pop(name)
    if slices > math.prod(outer.values()):
        outer = {"data_across": slices // across} | outer
    return {
        **outer,
        "data": sizes["data"] * across // slices,
        "fsdp": sizes["fsdp"],
        **({"fsdp_experts": sizes["fsdp_experts"]} if sizes["fsdp_experts"] > 1 else {}),
        **experts,
        "slice": sizes["expert_slice"],
        "tensor": sizes["tensor"],
    }


def _axes_text(sizes: Mapping[str, int]) -> str:
    return " x ".join(f"mesh.{name}={size}" for name, size in sizes.items() if size > 1)


def _slices_of_experts(config: Config, sizes: Mapping[str, int], devices: int) -> int:
    """The number of slices, of `devices` each, over which experts are spread.

    It is 1 unless the config asks for more. `sizes` has the devices on each axis of `config.mesh`.
    """
    slices, expert = config.mesh.slices or 1, sizes["expert"]
    across = slices // math.gcd(slices, sizes["data"])
    inner = 1 if expert % across else expert // across
    hierarchical = config.execution.exchange == "hierarchical" and config.mesh.expert_inner == inner
    if across == 1 or (hierarchical and inner > 1):
        return across
    fix = f"use sizes whose product divides {devices}"
    if inner > 1:
        fix += (
            ", or, for experts across slices, execution.exchange=hierarchical with "
            f"mesh.expert_inner={inner}"
        )
    within = {name: size for name, size in sizes.items() if name != "data"}
    raise UserError(
        f"{_axes_text(within)} spans {math.prod(within.values())} devices, but a slice has "
        f"{devices} (mesh.slices={slices}) and only mesh.data crosses slices; {fix}"
    )


def check_fits(config: Config, devices: int, decode: bool = False) -> None:
    """Refuses a mesh on which the config can't train or, with `decode`, can't decode its batch."""
    check_batch(config, devices // axis_sizes(config, devices)["tensor"], decode)


def training_mesh(config: Config) -> tuple[Config, Mesh]:
    """Chooses the mesh for training on all devices; returns the config with it, and the mesh."""
    devices = jax.device_count()
    config = choose_mesh(on_slices(config), devices)
    check_fits(config, devices)
    return config, make_mesh(config)


# FSDP over more devices isn't worth its all-gathers, unless memory requires it.
FSDP_DEVICES = 16


def suggest_mesh(
    config: Config,
    devices: int,
    tensor: int = 1,
    expert_slice: int = 1,
    fsdp_devices: int = FSDP_DEVICES,
) -> MeshConfig:
    """Suggests a mesh: experts over as many devices as they can use, then FSDP, then replicas.

    Experts and FSDP stay inside a slice.

    Args:
      config: the experiment; its width, experts, slices and exchange matter.
      devices: the number of all devices.
      tensor: devices on the `tensor` axis.
      expert_slice: devices on the `slice` axis; tensor · expert_slice divides those of a slice.
      fsdp_devices: the most devices on the `fsdp` axis.
    """
    slices = slice_count(config, devices)
    rest = devices // slices // tensor // expert_slice
    expert = next(d for d in reversed(_divisors(rest)) if not _problem(config, d, 1))
    rest //= expert
    # FSDP splits the model's width, so an axis must divide it.
    width = config.model.d_model // tensor
    fsdp = max(d for d in _divisors(rest) if d <= fsdp_devices and width % d == 0)
    inner = 1
    if expert == devices // slices:
        # Make two expert axes instead of one: FSDP leaves out the smaller if they fill a slice.
        most = min(FSDP_DEVICES, expert - (config.execution.exchange == "hierarchical"))
        fits = (d for d in _divisors(expert) if not _problem(config, expert, d))
        inner = max((d for d in fits if d <= most), default=1)
    data = slices * rest // fsdp
    return MeshConfig(
        data=data,
        fsdp=fsdp,
        expert=expert,
        expert_inner=inner,
        expert_slice=expert_slice,
        tensor=tensor,
        slices=config.mesh.slices,
    )


def lower_memory_configs(
    config: Config, devices: int, microbatches: bool = False
) -> Iterator[Config]:
    """Configs to try for less memory per device; the cheapest come first.

    The first one has the mesh of `suggest_mesh`, if it fits. Later ones have, in this order:
    FSDP over more devices; FSDP over the experts, too; more microbatches (`train.accumulate`), if
    `microbatches`; each expert split over devices; more devices on `tensor`.
    Each fits the config's sizes and batch, but may need more memory than an earlier one.
    """
    moe = any(config.model.schedule.experts)
    inside = devices // slice_count(config, devices)
    numbers = [config.train.accumulate]
    while microbatches and config.train.batch_size % (2 * numbers[-1]) == 0:
        numbers.append(2 * numbers[-1])
    for tensor in _divisors(inside):
        for expert_slice in _divisors(inside // tensor) if moe else [1]:
            most = [d for d in _divisors(inside) if d >= FSDP_DEVICES or d == inside]
            found = [suggest_mesh(config, devices, tensor, expert_slice, fsdp) for fsdp in most]
            if moe:
                found += [replace(mesh, fsdp=1, fsdp_experts=mesh.fsdp) for mesh in found]
            for number, mesh in itertools.product(numbers, dict.fromkeys(found)):
                train = replace(config.train, accumulate=number)
                changed = replace(config, mesh=mesh, train=train)
                with contextlib.suppress(UserError):
                    check_fits(changed, devices)
                    yield changed


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _expert_factors(config: Config, expert: int, inner: int, devices: int) -> list[int]:
    """Sizes of the expert axes, innermost first; every layer uses as many devices as it can.

    A layer of E experts is spread over gcd(E, mesh.expert) devices, which the innermost axes must
    make up. Example: layers of 32, 64 and 128 experts on 128 devices need axes of 32, 2 and 2.
    """
    if problem := _problem(config, expert, inner):
        divisors = [d for d in reversed(_divisors(devices)) if d <= expert]
        works = next(d for d in divisors if not _problem(config, d, 1))
        fix = f"mesh.expert={works}"
        if works == expert:
            staged = config.execution.exchange == "hierarchical"
            fits = (d for d in divisors if not _problem(config, expert, d))
            found = next((d for d in fits if not (staged and d in (1, expert))), None)
            fix = f"mesh.expert_inner={found}" if found else "execution.exchange=auto"
        raise UserError(f"mesh.expert={expert}: {problem}; use {fix}")
    counts = filter(None, config.model.schedule.experts)
    degrees = sorted({1, inner, *(math.gcd(count, expert) for count in counts)})
    return [large // small for small, large in itertools.pairwise(degrees)] or [1]


def _problem(config: Config, expert: int, inner: int) -> str | None:
    """Why the experts can't be spread, or None."""
    layers = {count: layer for layer, count in enumerate(config.model.schedule.experts) if count}
    degrees = {math.gcd(count, expert) for count in layers}
    for count, layer in layers.items():
        if math.gcd(count, expert) == 1 < min(count, expert):
            return f"the {count} experts of layer {layer} share no divisor with it"
    most = max(degrees, default=1)
    if expert > most:
        return f"no layer can spread its experts over more than {most} devices"
    for small, large in itertools.pairwise(sorted({inner, *degrees})):
        if large % small:
            return f"its layers or stages spread over {small} and over {large} devices: not nested"
    if inner > most:
        return f"mesh.expert_inner={inner} exceeds it"
    return None


def check_splits(config: Config, sizes: Mapping[str, int]) -> None:
    """Checks that the mesh divides the dimensions that it splits, and suits the exchange.

    Args:
      config: the experiment, or its teacher on the same mesh.
      sizes: devices on `tensor`, `expert_slice` and `fsdp_experts`.
    """
    model, tensor = config.model, sizes["tensor"]
    experts = model.schedule.experts
    values = {"heads": model.heads, "kv_heads": model.key_heads, "vocab_size": model.vocab_size}
    if 0 in experts:
        values["d_ff"] = model.d_ff
    if any(experts) and model.residual:
        values["residual_d_ff"] = model.residual_width
    splits = [(name, value, "mesh.tensor", tensor) for name, value in values.items()]
    if any(experts):
        units = tensor * sizes["expert_slice"]
        axes = "mesh.tensor" if units == tensor else "mesh.tensor x mesh.expert_slice"
        splits.append(("expert_d_ff", model.expert_width, axes, units))
    splits.append(("d_model", model.d_model, "mesh.fsdp_experts", sizes["fsdp_experts"]))
    for name, value, axes, parts in splits:
        if value % parts:
            raise UserError(
                f"model.{name}={value} is not divisible by {axes}={parts}; use "
                f"{math.gcd(value, parts)} of them"
            )
    if config.execution.exchange == "coordinated" and tensor == 1:
        raise UserError("execution.exchange=coordinated has no effect with mesh.tensor=1; use auto")
    inner = config.mesh.expert_inner
    if config.execution.exchange == "hierarchical" and inner in (1, sizes.get("expert")):
        raise UserError(
            "execution.exchange=hierarchical needs mesh.expert_inner above 1 and below "
            f"mesh.expert, not {inner}: the devices of its inner stage (those of one host, say)"
        )


def check_batch(config: Config, devices: int, decode: bool = False) -> None:
    """Checks that every device gets the same number of whole routing groups in every microbatch."""
    batch, rows = config.train.batch_size, devices * config.train.accumulate * group_rows(config)
    if batch % rows == 0:
        return
    fix = f"use {max(1, batch // rows) * rows}"
    if decode:
        raise UserError(f"--decode={batch} sequences are not divisible by {rows} devices; {fix}")
    raise UserError(
        f"train.batch_size={batch} is not divisible by {devices} devices x train.accumulate="
        f"{config.train.accumulate} x routing groups of {config.group_size} tokens; {fix}"
    )


def check_teacher_fits(teacher: Config, student: Config, mesh: Mesh | AbstractMesh) -> None:
    """Checks that a teacher fits its student's mesh.

    The teacher's routing groups must fit the student's batch.
    """
    shape = mesh.shape
    sizes = {"tensor": shape["tensor"], "expert_slice": shape["slice"]}
    model = replace(teacher.model, length=student.model.length)
    taught = replace(teacher, model=model, train=student.train)
    with telling("the teacher, on its student's mesh and batches: "):
        check_splits(teacher, sizes | {"fsdp_experts": shape.get("fsdp_experts", 1)})
        check_batch(taught, mesh.size // mesh.shape["tensor"])
