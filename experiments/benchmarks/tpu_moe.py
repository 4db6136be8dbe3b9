"""An expert-parallel MoE layer against a dense MLP on 64 TPU v5p chips, modelled by the compiler.

    pip install 'jax[tpu]'    # the compiler; no TPU is needed
    python experiments/benchmarks/tpu_moe.py            # JSON rows of modelled cycles
    python experiments/benchmarks/tpu_moe.py --check    # outputs and gradients, 8 CPU devices

Forward and backward of one layer with both exchanges: 4096 tokens a chip (S), width 2048 (M),
hidden 8192 (F), 128 experts, 2 a chip, top 1, capacity factor 1, bfloat16 activations and
weights. `dense` is the MLP with the same active FLOPs. No gradient is summed over chips in
either. The estimates cover the TensorCore: collectives have none, and come on top.

Shapes: n chips, E experts, el = E/n of them on a chip, C slots an expert and source chip,
P = E·C places, R = n·C rows of an expert.
"""

import json
import os
import sys
from collections import Counter
from functools import partial

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from prmoe_jax.plan.cycles import cycles

HERTZ = 1.75e9
gelu = jax.nn.gelu
exchange = partial(jax.lax.all_to_all, axis_name="expert", split_axis=0, concat_axis=0)


def route(x_SxM, w_router, slots, rank):
    """Expert, slot, whether kept, and gate of every token."""
    logits_SxE = x_SxM.astype(jnp.float32) @ w_router
    expert_S = jnp.argmax(logits_SxE, -1)
    chosen_SxE = expert_S[:, None] == jnp.arange(logits_SxE.shape[-1])
    slot_S = rank(chosen_SxE)
    kept_S = slot_S < slots
    gate_S = jnp.where(chosen_SxE, jax.nn.softmax(logits_SxE), 0).sum(-1) * kept_S
    return expert_S, slot_S, kept_S, gate_S


def rank_by_cumsum(chosen_SxE):
    one_SxE = chosen_SxE.astype(jnp.int32)
    return (jnp.cumsum(one_SxE, 0) * one_SxE).sum(-1) - 1


def rank_by_blocks(chosen_SxE, block=128):
    """How many earlier tokens chose the same expert: exact, on the matrix unit."""
    tokens, experts = chosen_SxE.shape
    block = min(block, tokens)
    one = chosen_SxE.reshape(-1, block, experts).astype(jnp.bfloat16)
    earlier = jnp.tril(jnp.ones((block, block), jnp.bfloat16), -1)
    within = jnp.einsum("tu,bue->bte", earlier, one, preferred_element_type=jnp.float32)
    count = one.sum(1, dtype=jnp.float32)
    before = jnp.cumsum(count, 0) - count
    rank = jnp.where(one > 0, within + before[:, None], 0).sum(-1)
    return rank.reshape(tokens).astype(jnp.int32)


def slot_maps(expert_S, slot_S, kept_S, places, slots):
    """A token's place in the exchange's buffer, and a place's token; past the end for none."""
    tokens = len(expert_S)
    place_S = jnp.where(kept_S, expert_S * slots + slot_S, places)
    empty_P = jnp.full(places, tokens, jnp.int32)
    return place_S, empty_P.at[place_S].set(jnp.arange(tokens), mode="drop")


def take(x, index):
    """Rows by index; one past the end gives some row, which nobody may read."""
    return jnp.take(x, index, axis=0, mode="clip")


# --- the experts: x [n, el, C, M] as received -> y [n, el, C, M] as sent -----------------------


def batched_experts(x, weights):
    """One batched product over the local experts, and JAX's own derivative."""
    w_in, b_in, w_out, b_out = weights
    n, local, slots, width = x.shape
    x = x.swapaxes(0, 1).reshape(local, n * slots, width)
    y = gelu(x @ w_in + b_in[:, None]) @ w_out + b_out[:, None]
    return y.reshape(local, n, slots, width).swapaxes(0, 1)


def join(parts, axis):
    """`jnp.stack` that XLA fuses into the products that make the parts: they write in place."""
    shape = list(parts[0].shape)
    shape.insert(axis, len(parts))
    whole = jax.lax.empty(tuple(shape), parts[0].dtype)
    for i, part in enumerate(parts):
        whole = jax.lax.dynamic_update_index_in_dim(whole, part, i, axis)
    return whole


@jax.custom_vjp
def unrolled_experts(x, weights):
    """One expert after the other, so that every product is as plain as a dense MLP's."""
    return unrolled_forward(x, weights)[0]


def unrolled_forward(x, weights):
    n, local, slots, width = x.shape
    ys, saved = [], []
    for e in range(local):
        w_in, b_in, w_out, b_out = (w[e] for w in weights)
        x_RxM = x[:, e].reshape(n * slots, width)
        z_RxF = x_RxM @ w_in + b_in
        # The bias after the reshape, or the write into the result isn't fused.
        ys.append((gelu(z_RxF) @ w_out).reshape(n, slots, width) + b_out)
        saved.append((x_RxM, z_RxF))
    return join(ys, 1), (saved, weights)


def unrolled_backward(residuals, dy):
    saved, weights = residuals
    n, local, slots, width = dy.shape
    dxs, gradients = [], []
    for e, (x_RxM, z_RxF) in enumerate(saved):
        w_in, _, w_out, _ = (w[e] for w in weights)
        dy_RxM = dy[:, e].reshape(n * slots, width)
        h_RxF, through_gelu = jax.vjp(gelu, z_RxF)  # h again, inside the product that needs it
        (dz_RxF,) = through_gelu(dy_RxM @ w_out.T)
        gradients.append((x_RxM.T @ dz_RxF, dz_RxF.sum(0), h_RxF.T @ dy_RxM, dy_RxM.sum(0)))
        dxs.append((dz_RxF @ w_in.T).reshape(n, slots, width))
    return join(dxs, 1), tuple(join(part, 0) for part in zip(*gradients, strict=True))


unrolled_experts.defvjp(unrolled_forward, unrolled_backward)


# --- the layers, on one chip inside shard_map ---------------------------------------------------


def dense(x_SxM, w_router, weights):
    w_in, b_in, w_out, b_out = (w[0] for w in weights)
    return gelu(x_SxM @ w_in + b_in) @ w_out + b_out


def einsum(x_SxM, w_router, weights, *, n, slots):
    experts, width = w_router.shape[1], x_SxM.shape[1]
    expert_S, slot_S, kept_S, gate_S = route(x_SxM, w_router, slots, rank_by_cumsum)
    slot_SxExC = (
        jax.nn.one_hot(expert_S, experts)[:, :, None] * jax.nn.one_hot(slot_S, slots)[:, None]
    )
    dispatch_SxExC = (slot_SxExC * kept_S[:, None, None]).astype(x_SxM.dtype)
    x = jnp.einsum("SEC,SM->ECM", dispatch_SxExC, x_SxM).reshape(n, -1, slots, width)
    y = exchange(batched_experts(exchange(x), weights)).reshape(experts, slots, width)
    return jnp.einsum("SEC,ECM->SM", (slot_SxExC * gate_S[:, None, None]).astype(y.dtype), y)


@jax.custom_vjp
def take_rows(x, index, inverse):
    """A gather whose gradient gathers too, zeros past the end: the library's `_take_rows`."""
    return jnp.take(x, index, axis=0, mode="fill", fill_value=0)


take_rows.defvjp(
    lambda x, index, inverse: (take_rows(x, index, inverse), (index, inverse)),
    lambda maps, dy: (take_rows(dy, maps[1], maps[0]), None, None),
)


def gather(x_SxM, w_router, weights, *, n, slots):
    experts, width = w_router.shape[1], x_SxM.shape[1]
    expert_S, slot_S, kept_S, gate_S = route(x_SxM, w_router, slots, rank_by_cumsum)
    place_S, token_P = slot_maps(expert_S, slot_S, kept_S, experts * slots, slots)
    x = take_rows(x_SxM, token_P, place_S).reshape(n, -1, slots, width)
    y = exchange(batched_experts(exchange(x), weights))
    y_SxM = take_rows(y.reshape(-1, width), place_S, token_P)
    return y_SxM * gate_S.astype(y.dtype)[:, None]


def unrolled(x_SxM, w_router, weights, *, n, slots):
    """What the layer should be: no mask forward, gates on slots backward, experts unrolled."""
    experts = w_router.shape[1]
    expert_S, slot_S, kept_S, gate_S = route(x_SxM, w_router, slots, rank_by_blocks)
    place_S, token_P = slot_maps(expert_S, slot_S, kept_S, experts * slots, slots)
    gate_P = jnp.where(token_P < len(x_SxM), take(jax.lax.stop_gradient(gate_S), token_P), 0)
    maps = place_S, token_P, kept_S, gate_P.astype(x_SxM.dtype)
    shape = n, experts // n, slots
    y = unrolled_experts(send(shape, x_SxM, maps), weights)
    return combine(shape, y, gate_S, maps)


def to_experts(shape, x_PxM):
    return exchange(x_PxM.reshape(*shape, -1))


def to_tokens(y, place_S):
    return take(exchange(y).reshape(-1, y.shape[-1]), place_S)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def send(shape, x_SxM, maps):
    """Every place's row, to its expert's chip. An empty place gets some row: no mask."""
    return to_experts(shape, take(x_SxM, maps[1]))


def send_backward(shape, maps, dx):
    place_S, _, kept_S, _ = maps
    return jnp.where(kept_S[:, None], to_tokens(dx, place_S), 0), None


send.defvjp(lambda shape, x, maps: (send(shape, x, maps), maps), send_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def combine(shape, y, gate_S, maps):
    """Every token's row times its gate, which is 0 for a dropped one."""
    return combine_forward(shape, y, gate_S, maps)[0]


def combine_forward(shape, y, gate_S, maps):
    y_SxM = to_tokens(y, maps[0])
    return y_SxM * gate_S.astype(y.dtype)[:, None], (y_SxM, maps)


def combine_backward(shape, residuals, dy_SxM):
    y_SxM, maps = residuals
    _, token_P, _, gate_P = maps
    dgate_S = (y_SxM.astype(jnp.float32) * dy_SxM.astype(jnp.float32)).sum(-1)
    return to_experts(shape, take(dy_SxM, token_P) * gate_P[:, None]), dgate_S, None


combine.defvjp(combine_forward, combine_backward)

LAYERS = {"dense": dense, "einsum": einsum, "gather": gather, "unrolled": unrolled}


def on_mesh(layer, mesh):
    """(x, w_router, weights, dy) -> (y, dx, dw_router, dweights), each chip's own."""

    def local(x, w_router, weights, dy):
        y, pull = jax.vjp(layer, x[0], w_router, weights)
        dx, dw_router, dweights = pull(dy[0])
        return y[None], dx[None], dw_router[None], dweights

    sharded, shared = P("expert"), P()
    specs = (sharded, shared, sharded, sharded)
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=sharded, check_vma=False)


def model(name, n=64, S=4096, M=2048, F=8192, E=128):
    """Compiles a layer for `n` chips; the counted cycles and what they don't cover."""
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5p:4x4x4")
    mesh = Mesh(np.array(topology.devices), ("expert",))
    layer, stacked = dense, n  # one MLP a chip
    if name != "dense":
        layer, stacked = partial(LAYERS[name], n=n, slots=S // E), E

    def array(shape, dtype=jnp.bfloat16, axis="expert"):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(axis)))

    shapes = (stacked, M, F), (stacked, F), (stacked, F, M), (stacked, M)
    x, w_router = array((n, S, M)), array((M, E), jnp.float32, None)
    step = jax.jit(on_mesh(layer, mesh))
    return cycles(step.lower(x, w_router, tuple(map(array, shapes)), x).compile().as_text())


def check():
    """Every layer against one-hot products in float32: relative errors on 8 CPU devices."""
    n, S, M, F = 8, 64, 16, 32
    mesh = Mesh(np.array(jax.devices()), ("expert",))
    for E, slots, skew in ((16, 4, 0.0), (16, 4, 3.0), (8, 8, 1.0), (32, 1, 0.0), (16, 64, 2.0)):
        keys = jax.random.split(jax.random.key(E * slots), 7)
        x, dy = (jax.random.normal(key, (n, S, M)) for key in keys[:2])
        w_router = jax.random.normal(keys[2], (M, E)) + skew * jnp.linspace(1, -1, E) / M**0.5
        shapes = (E, M, F), (E, F), (E, F, M), (E, M)
        weights = tuple(jax.random.normal(k, s) / 4 for k, s in zip(keys[3:], shapes, strict=True))

        def reference(x_SxM, w_router, weights, slots=slots):
            w_in, b_in, w_out, b_out = weights
            expert_S, slot_S, kept_S, gate_S = route(x_SxM, w_router, slots, rank_by_cumsum)
            h = gelu(jnp.einsum("SM,EMF->SEF", x_SxM, w_in) + b_in)
            y_SxExM = jnp.einsum("SEF,EFM->SEM", h, w_out) + b_out
            chosen_SxE = jax.nn.one_hot(expert_S, len(w_in)) * gate_S[:, None]
            return jnp.einsum("SEM,SE->SM", y_SxExM, chosen_SxE)

        everywhere = jax.vmap(reference, (0, None, None))
        y, pull = jax.vjp(everywhere, x, w_router, weights)
        expected = y, *pull(dy)
        for name in LAYERS.keys() - {"dense"}:
            layer = on_mesh(partial(LAYERS[name], n=n, slots=slots), mesh)
            y, dx, dw_router, dweights = jax.jit(layer)(x, w_router, weights, dy)
            error = jax.tree.map(
                lambda a, b: float(abs(a - b).max() / abs(b).max()),
                (y, dx, dw_router.sum(0), dweights),
                expected,
            )
            worst = max(jax.tree.leaves(error))
            print(f"E={E} C={slots} {name}: largest relative error {worst:.1e}")
            assert worst < 1e-5


def main():
    base = None
    for name in LAYERS:
        counted = model(name)
        base = base or counted.total
        row = {
            "layer": name,
            "cycles": counted.total,
            "ms": counted.total / HERTZ * 1e3,
            "ratio_to_dense": counted.total / base,
            "without_estimate": dict(Counter(o.opcode for o in counted.uncosted)),
            "largest": [(o.opcode, o.cycles) for o in counted.costed[:10]],
            "jax": jax.__version__,
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    if "--check" in sys.argv:
        jax.config.update("jax_num_cpu_devices", 8)
        check()
    else:
        main()
