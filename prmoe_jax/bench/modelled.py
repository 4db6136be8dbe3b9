"""`prmoe bench moe --topology=…`: estimates an MoE layer's cycles without TPU chips.

The TPU's compiler estimates the cycles of each operation of the program. Collectives and a few
small operations have no estimate, so the sum leaves them out. M is the model width.
"""

import math
from collections import Counter

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from prmoe_jax.bench.moe import Size
from prmoe_jax.config.loading import resolve
from prmoe_jax.errors import UserError
from prmoe_jax.model.transformer import cast
from prmoe_jax.moe.layer import MoE
from prmoe_jax.nn.mlp import MLP, MLPShape
from prmoe_jax.parallel import sharding
from prmoe_jax.parallel.axes import batch_axes
from prmoe_jax.parallel.mesh import make_mesh
from prmoe_jax.plan.chips import chip_of, split, topology_devices
from prmoe_jax.plan.program import Operation, operations
from prmoe_jax.tables import blocks


def model_moe(sizes: list[Size], dtype: str, topology: str) -> list[dict]:
    """Compiles a layer's forward and backward pass, including exchanges and auxiliary loss.

    Every chip has S tokens in one routing group. The experts are spread over as many chips as the
    greatest common divisor of chips and experts. The layer has top 1 and capacity factor 1.
    Weights are in `dtype`, to which the model casts them once per step; the router is in float32.
    `dense` is an MLP with the same active FLOPs. Each chip has its own MLP, so that no weight
    gradients are summed over chips.

    Returns:
      One row for each layer and size: backend, S, M, F, E, dtype, device, chips, jax, cycles,
      modelled_s, ratio_to_dense, and without_estimate (number of operations by opcode).
    """
    if not chip_of(topology).hertz:
        raise UserError(f"--topology={topology}: the compiler estimates cycles for TPUs only")
    if split(topology)[0] > 1:
        raise UserError(f"--topology={topology}: a layer's exchange stays in a slice; name one")
    chip, devices = topology_devices(topology)
    for size in sizes:
        # At least this is on a device: its experts' weights and its tokens, two bytes per number.
        experts = size.E // math.gcd(len(devices), size.E)
        numbers = 2 * size.M * size.F * experts + size.S * size.M
        size.check(2 * numbers, chip.hbm_bytes)
    rows = []
    for size in sizes:
        dense = None
        for backend in ("dense", "gather", "einsum"):
            program = _compile(size, dtype, backend, devices)
            cycles = sum((operation.cycles or 0) * operation.runs for operation in program)
            dense = dense or cycles
            rows.append(
                {
                    "backend": backend,
                    **size._asdict(),
                    "dtype": dtype,
                    "device": topology,
                    "chips": len(devices) // chip.devices,
                    "jax": jax.__version__,
                    "cycles": cycles,
                    "modelled_s": cycles / chip.hertz,
                    "ratio_to_dense": cycles / dense,
                    "without_estimate": Counter(o.opcode for o in program if o.cycles is None),
                }
            )
    return rows


def _compile(size: Size, dtype: str, backend: str, devices: list) -> list[Operation]:
    model = {"layers": 1, "heads": 1, "placement": "every 1", "experts": (size.E,), "dtype": dtype}
    config = resolve(
        {
            "model": model | {"length": size.S, "d_model": size.M, "d_ff": size.F},
            "execution": {"dispatch": "auto" if backend == "dense" else backend},
            "mesh": {"expert": math.gcd(len(devices), size.E)},
            "train": {"steps": 1},
        }
    )
    mesh = make_mesh(config, devices)
    rows = PartitionSpec(batch_axes(mesh))

    def new_layer():
        key = jax.random.key(0)
        if backend == "dense":
            mlp = lambda key: MLP.drawn(MLPShape(size.M, size.F), key)  # noqa: E731
            layer = jax.vmap(mlp)(jax.random.split(key, mesh.size))
        else:
            layer = MoE(size.E, config.model, config.moe, key)
        return cast({"mlp": layer}, jnp.dtype(dtype))

    def run(layer, x_BxLxD):
        if backend == "dense":
            return jax.vmap(MLP.__call__)(layer["mlp"], x_BxLxD), jnp.zeros(())
        valid_BxL = jnp.ones(x_BxLxD.shape[:2], bool)
        y_BxLxD, metrics = layer["mlp"](x_BxLxD, valid_BxL, execution=config.execution)
        return y_BxLxD, metrics.aux_loss

    def forward_and_backward(layer, x_BxLxD, dy_BxLxD):
        (y_BxLxD, _), pull = jax.vjp(run, layer, x_BxLxD)
        return y_BxLxD, pull((dy_BxLxD, jnp.ones(())))

    def place(x, spec):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    shapes = jax.eval_shape(new_layer)
    dense = backend == "dense"
    specs = jax.tree.map(lambda _: rows, shapes) if dense else sharding.specs(shapes, mesh)
    x_BxLxD = place(jax.ShapeDtypeStruct((mesh.size, size.S, size.M), jnp.dtype(dtype)), rows)
    with jax.set_mesh(mesh):
        step = jax.jit(forward_and_backward)
        lowered = step.lower(jax.tree.map(place, shapes, specs), x_BxLxD, x_BxLxD)
        try:
            return operations(lowered.compile().as_text())
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise UserError(
                f"{size.flag}: the {backend} layer needs more than a chip has"
            ) from error


def table(rows: list[dict]) -> str:
    """The rows as text, with one block for each size."""
    shown = []
    for row in rows:
        uncosted = ", ".join(f"{n} {opcode}" for opcode, n in row["without_estimate"].items())
        shown.append(row | {"ms": row["modelled_s"] * 1e3, "uncosted": uncosted or "none"})
    return blocks(
        shown,
        "S={S} a chip, M={M} F={F} E={E}, {dtype}, {chips} chips of {device}",
        {
            "backend": "{backend}",
            "cycles": "{cycles:,}",
            "modelled": "{ms:.3f} ms",
            "x dense": "{ratio_to_dense:.3f}",
            "not estimated": "{uncosted}",
        },
        texts=(0, 4),
    )
