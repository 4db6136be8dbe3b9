"""The library's MoE layer against a dense MLP on 64 TPU v5p chips, modelled by the compiler.

    pip install -e '.[tpu]'    # the compiler; no TPU is needed
    python experiments/benchmarks/tpu_moe.py    # JSON rows of modelled cycles

Forward and backward of one layer with both exchanges: 4096 tokens a chip, one routing group, width
2048, hidden 8192, 128 experts, 2 a chip, top 1, capacity factor 1, bfloat16 activations and
weights (which the model casts once a step), router in float32, auxiliary loss included. `dense` is
the MLP with the same active FLOPs, one a chip, so that neither sums weight gradients over chips.
The estimates cover the TensorCore: collectives have none, and come on top.
"""

import json
import os
from collections import Counter

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from prmoe_jax import config
from prmoe_jax.model import cast, resolve_backends
from prmoe_jax.moe.experts import MLP
from prmoe_jax.moe.layer import MoE
from prmoe_jax.parallel import rules
from prmoe_jax.parallel.mesh import batch_axes, make_mesh
from prmoe_jax.plan.cycles import Cycles, cycles

CHIPS, TOKENS, D_MODEL, D_FF, EXPERTS = 64, 4096, 2048, 8192, 128
HERTZ = 1.75e9


def model(dispatch: str | None) -> Cycles:
    """Compiles a layer, or without a dispatch the dense MLP."""
    settings = {
        "model": {
            "layers": 1,
            "d_model": D_MODEL,
            "d_ff": D_FF,
            "heads": 16,
            "length": TOKENS,
            "placement": "every 1",
            "experts": (EXPERTS,),
        },
        "moe": {"dispatch": dispatch or "auto"},
        "mesh": {"expert": CHIPS},
        "train": {"steps": 1, "batch_size": CHIPS},
    }
    values = config.resolve(settings)
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5p:4x4x4").devices
    mesh = make_mesh(values, devices)
    values = resolve_backends(values, "tpu", mesh)
    rows = PartitionSpec(batch_axes(mesh))

    def new_layer():
        key = jax.random.key(0)
        if dispatch:
            layer = MoE(EXPERTS, values.model, values.moe, key)
        else:
            layer = jax.vmap(lambda key: MLP(D_MODEL, D_FF, 0.02, 0.02, key))(
                jax.random.split(key, CHIPS)
            )
        return cast({"mlp": layer}, jnp.bfloat16)

    def run(layer, x_BxLxD):
        if dispatch:
            y_BxLxD, metrics = layer["mlp"](x_BxLxD, jnp.ones(x_BxLxD.shape[:2], bool), 1.0)
            return y_BxLxD, metrics.aux_loss
        return jax.vmap(MLP.__call__)(layer["mlp"], x_BxLxD), jnp.zeros(())

    def forward_and_backward(layer, x_BxLxD, dy_BxLxD):
        (y_BxLxD, _), pull = jax.vjp(run, layer, x_BxLxD)
        return y_BxLxD, pull((dy_BxLxD, jnp.ones(())))

    shapes = jax.eval_shape(new_layer)
    specs = rules.specs(shapes, mesh) if dispatch else jax.tree.map(lambda _: rows, shapes)
    place = lambda x, spec: jax.ShapeDtypeStruct(  # noqa: E731
        x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
    )
    x_BxLxD = place(jax.ShapeDtypeStruct((CHIPS, TOKENS, D_MODEL), jnp.bfloat16), rows)
    with jax.set_mesh(mesh):
        step = jax.jit(forward_and_backward)
        compiled = step.lower(jax.tree.map(place, shapes, specs), x_BxLxD, x_BxLxD).compile()
    return cycles(compiled.as_text())


def main():
    base = None
    for dispatch in (None, "einsum", "gather"):
        counted = model(dispatch)
        base = base or counted.total
        row = {
            "layer": dispatch or "dense",
            "cycles": counted.total,
            "ms": counted.total / HERTZ * 1e3,
            "ratio_to_dense": counted.total / base,
            "without_estimate": dict(Counter(o.opcode for o in counted.uncosted)),
            "largest": [(o.opcode, o.cycles) for o in counted.costed[:10]],
            "jax": jax.__version__,
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
