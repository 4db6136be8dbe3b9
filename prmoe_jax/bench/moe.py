"""`prmoe bench moe`: times forward and backward pass of an MoE layer beside baselines."""

import contextlib
import importlib.util
import logging
import math
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prmoe_jax.bench import memory
from prmoe_jax.bench.timing import Timed, compiled, interleaved, summary
from prmoe_jax.bench.worker import worker
from prmoe_jax.config.routers import capacity
from prmoe_jax.config.schema import ExecutionConfig, ModelConfig, MoeConfig
from prmoe_jax.errors import UserError
from prmoe_jax.model.transformer import cast
from prmoe_jax.moe import dispatch
from prmoe_jax.moe.layer import MoE
from prmoe_jax.moe.routing import route
from prmoe_jax.nn.mlp import MLP, MLPShape
from prmoe_jax.tables import blocks

log = logging.getLogger(__name__)


class Size(NamedTuple):
    """One layer: S tokens in one routing group, model width M, hidden width F, E experts."""

    S: int
    M: int
    F: int
    E: int


def bench_moe(sizes: list[Size], loads: list[str], dtype: str, repeats: int) -> list[dict]:
    """Times the layer and its baselines at every size and load, with top 1 and capacity factor 1.

    Our layer runs with `gather` and `einsum`, each also with `no experts` (routing, dispatch and
    combine alone), and as `dropless`. The baselines are `dense`, an MLP with the same active FLOPs,
    and `copy`, which reads and writes the experts' weights once. In float32 on CPUs, DeepSpeed's
    layer is another baseline, if it is installed. It runs in its own process, without random token
    selection, both with the default allocator and with `allocator.keep_freed_memory`, which
    `prmoe bench moe` also calls. Weights are in `dtype`, to which the model casts them once per
    step; the router is in float32.

    Returns:
      One row for each implementation, size and load: backend, S, M, F, E, load, dtype, device, jax,
      median_s, min_s, max_s, peak_bytes (arguments, results and temporaries; for DeepSpeed the
      process's peak), ratio_to_dense (of medians), drop_fraction, bytes_moved and gb_per_s.

    Raises:
      UserError: a size is not positive, needs too much memory or is too small for DeepSpeed's
        layer, or `repeats` is below 1.
    """
    if repeats < 1:
        raise UserError(f"--repeats={repeats} must be 1 or more")
    for size in sizes:
        # Weights, tokens, router scores, and the tokens-by-slots array of `einsum`.
        floats = 2 * size.E * size.M * size.F + size.S * (size.M + size.E) + size.S**2
        check_size(size, 4 * floats)
        if size.S <= MoeConfig.min_capacity and dtype == "float32" and _has_deepspeed():
            raise UserError(
                f"{flag(size)}: DeepSpeed's layer, which is timed beside ours, needs more than "
                f"{MoeConfig.min_capacity} tokens"
            )
    rows = []
    for size in sizes:
        for load in loads:
            log.info("S=%d M=%d F=%d E=%d, %s load", *size, load)
            rows += _bench_one(size, load, dtype, repeats)
    return rows


def check_size(size: Size, needed: int, room: int | None = None) -> None:
    """Refuses a size with a number below 1, or a layer that can't fit; see `memory.check`."""
    if min(size) < 1:
        raise UserError(f"{flag(size)} must be four counts above 0")
    memory.check(flag(size), needed, room)


def flag(size: Size) -> str:
    """The command line's flag for a size."""
    return f"--sizes={','.join(map(str, size))}"


def _bench_one(size: Size, load: str, dtype: str, repeats: int) -> list[dict]:
    x_SxM, w_router_MxE = loaded_input(size, load)
    with contextlib.ExitStack() as stack:
        layers = _our_layers(size, x_SxM, w_router_MxE, jnp.dtype(dtype))
        if dtype == "float32" and _has_deepspeed():
            for keep in (False, True):
                name = "deepspeed, memory kept" if keep else "deepspeed"
                theirs = stack.enter_context(_deepspeed(size, x_SxM, w_router_MxE, keep))
                # Router and capacity are ours, so the same number of tokens is dropped.
                layers[name] = theirs._replace(drop_fraction=layers["gather"].drop_fraction)
        times = interleaved({name: layer.seconds for name, layer in layers.items()}, repeats)
        dense = statistics.median(times["dense"])
        rows = []
        for name, layer in layers.items():
            median = statistics.median(times[name])
            rows.append(
                {
                    "backend": name,
                    **size._asdict(),
                    "load": load,
                    "dtype": dtype,
                    **summary(times[name]),
                    "peak_bytes": layer.peak_bytes(),
                    "ratio_to_dense": median / dense,
                    "drop_fraction": layer.drop_fraction,
                    "bytes_moved": layer.bytes_moved,
                    "gb_per_s": layer.bytes_moved / median / 1e9,
                }
            )
    return rows


def loaded_input(size: Size, load: str) -> tuple[np.ndarray, np.ndarray]:
    """Makes tokens, and a router that sends them to the experts with a given load.

    `uniform` draws each token's expert evenly; `zipf` draws expert n with probability ∝ 1/n.

    Returns:
      x [S, M] and w_router [M, E], float32.
    """
    rng = np.random.default_rng(0)
    w_MxE = rng.normal(size=(size.M, size.E)).astype(np.float32) / size.M**0.5
    share_E = np.ones(size.E) if load == "uniform" else 1 / np.arange(1, size.E + 1)
    expert_S = rng.choice(size.E, size.S, p=share_E / share_E.sum())
    x_SxM = rng.normal(size=(size.S, size.M)).astype(np.float32) + 8 * w_MxE.T[expert_S]
    return x_SxM, w_MxE


class _NoExperts(NamedTuple):
    """Replaces the experts by the identity, which leaves routing, dispatch and combine."""

    count: int

    def batched(self, x_ExRxD: jax.Array) -> jax.Array:
        return x_ExRxD


def _our_layers(size: Size, x_SxM, w_router_MxE, dtype) -> dict[str, Timed]:
    model = ModelConfig(
        layers=1, d_model=size.M, d_ff=size.F, heads=1, placement="every 1", experts=(size.E,)
    )
    x_1xSxM = jnp.asarray(x_SxM, dtype)[None]
    cotangent_1xSxM = jax.random.normal(jax.random.key(0), x_1xSxM.shape, dtype)
    valid_1xS = jnp.ones((1, size.S), bool)
    slots = capacity(size.S, size.E, 1.0, 1, MoeConfig().min_capacity)

    def timed(loss, parameters, *costs) -> Timed:
        # Return the loss, too, or XLA removes the dense MLP's second matmul as dead code.
        forward_and_backward = jax.value_and_grad(loss, argnums=(0, 1))
        return compiled(forward_and_backward, (parameters, x_1xSxM), *costs)

    def through(layer, by: str = "auto"):
        structure = jax.tree.structure(layer)

        def loss(leaves, x_1xSxM):
            layer = jax.tree.unflatten(structure, leaves)
            y_1xSxM, metrics = layer(x_1xSxM, valid_1xS, execution=ExecutionConfig(dispatch=by))
            return (y_1xSxM * cotangent_1xSxM).sum().astype(jnp.float32) + metrics.aux_loss

        return loss

    def without_experts(backend):
        def loss(w_router_MxE, x_1xSxM):
            logits_1xSxE = x_1xSxM.astype(jnp.float32) @ w_router_MxE
            routing, metrics = route(logits_1xSxE, valid_1xS, MoeConfig(), top_k=1, slots=slots)
            nothing = _NoExperts(size.E)
            y_1xSxM, _ = dispatch.through_experts(backend, x_1xSxM, routing, nothing, slots)
            return (y_1xSxM * cotangent_1xSxM).sum().astype(jnp.float32) + metrics.aux_loss

        return loss

    def dense(mlp, x_1xSxM):
        return (mlp(x_1xSxM) * cotangent_1xSxM).sum().astype(jnp.float32)

    def moe_layer(moe: MoeConfig) -> MoE:
        layer = MoE(size.E, model, moe, key)
        layer.w_router[...] = jnp.asarray(w_router_MxE)
        return cast({"mlp": layer}, dtype)["mlp"]

    key = jax.random.key(1)
    mlp = MLP.drawn(MLPShape(size.M, size.F), key)
    layers = {"dense": timed(dense, cast({"mlp": mlp}, dtype)["mlp"])}
    for backend in ("gather", "einsum"):
        layer = moe_layer(MoeConfig())
        _, metrics = layer(x_1xSxM, valid_1xS)
        dropped = float(metrics.dropped_E.sum() / size.S)
        # The weights are read forward and backward, and their gradients are written.
        weights = 2 * layer.experts.w_in[...].nbytes
        leaves = jax.tree.leaves(layer)
        layers[backend] = timed(through(layer, backend), leaves, 3 * weights, dropped)
        layers[f"{backend}, no experts"] = timed(
            without_experts(backend), jnp.asarray(w_router_MxE), 0, dropped
        )
    layer = moe_layer(MoeConfig(eval_capacity_factor=math.inf))
    layers["dropless"] = timed(through(layer), jax.tree.leaves(layer), 3 * weights)
    add_one = lambda experts: jax.tree.map(lambda w: w + 1.0, experts)  # noqa: E731
    return layers | {"copy": compiled(add_one, (layer.experts,), 2 * weights)}


def _has_deepspeed() -> bool:
    """Whether DeepSpeed is installed and JAX runs on CPUs, as DeepSpeed's process does."""
    return jax.default_backend() == "cpu" and bool(importlib.util.find_spec("deepspeed"))


@contextlib.contextmanager
def _deepspeed(size: Size, x_SxM, w_router_MxE, keep_memory: bool) -> Iterator[Timed]:
    """DeepSpeed's layer in a worker process."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "input.npz"
        np.savez(path, x=x_SxM, w_router=w_router_MxE)
        settings = {"path": str(path), "d_ff": size.F, "keep_memory": keep_memory}
        with worker("deepspeed_worker", **settings) as layer:
            yield layer._replace(bytes_moved=3 * 2 * size.E * size.M * size.F * 4)


def table(rows: list[dict]) -> str:
    """The rows as text, with one block for each size and load."""
    return blocks(
        [row | {"peak_mb": row["peak_bytes"] / 1e6} for row in rows],
        "S={S} M={M} F={F} E={E}, {load} load, {dtype}",
        {
            "backend": "{backend}",
            "median": "{median_s:.4f}s",
            "min": "{min_s:.4f}s",
            "max": "{max_s:.4f}s",
            "x dense": "{ratio_to_dense:.2f}",
            "peak": "{peak_mb:.0f}MB",
            "GB/s": "{gb_per_s:.1f}",
            "dropped": "{drop_fraction:.1%}",
        },
    )
