"""`prmoe bench moe`: times forward and backward pass of an MoE layer beside baselines."""

import contextlib
import logging
import math
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prmoe_jax.bench.timing import Timed, check_memory, compiled, interleaved, summary
from prmoe_jax.bench.worker import can_run, worker
from prmoe_jax.config.routers import capacity
from prmoe_jax.config.schema import ExecutionConfig, ModelConfig, MoeConfig
from prmoe_jax.errors import UserError
from prmoe_jax.model.transformer import cast
from prmoe_jax.moe import dispatch
from prmoe_jax.moe.layer import MoE
from prmoe_jax.moe.routing import route
from prmoe_jax.nn.mlp import MLP, MLPShape
from prmoe_jax.nn.precision import Precision
from prmoe_jax.tables import blocks

log = logging.getLogger(__name__)


class Size(NamedTuple):
    """One layer: S tokens in one routing group, model width M, hidden width F, E experts."""

    S: int
    M: int
    F: int
    E: int

    @property
    def flag(self) -> str:
        """The command line's flag for this size."""
        return f"--sizes={','.join(map(str, self))}"

    def check(self, needed: int, room: int | None = None) -> None:
        """Refuses a number below 1, and a layer that can't fit; see `check_memory`."""
        if min(self) < 1:
            raise UserError(f"{self.flag} must be four counts above 0")
        check_memory(self.flag, needed, room)


def bench_moe(sizes: list[Size], loads: list[str], dtype: str, repeats: int) -> list[dict]:
    """Times the layer and its baselines at every size and load, with top 1 and capacity factor 1.

    Our layer runs with `gather` and `einsum`, each also with `no experts` (routing, dispatch and
    combine alone), and as `dropless`. The baselines are `dense`, an MLP with the same active FLOPs,
    and `copy`, which reads and writes the experts' weights once. In float32 on CPUs, DeepSpeed's
    layer is another baseline, if it is installed. It runs in its own process, without random token
    selection, both with the default allocator and with `allocator.keep_freed_memory`, which
    `prmoe bench moe` also calls. Weights and activations have the dtypes that `Precision` gives a
    training step for `model.dtype=dtype`; the router is in float32.

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
        size.check(4 * floats)
        if size.S <= MoeConfig.min_capacity and dtype == "float32" and can_run("deepspeed"):
            raise UserError(
                f"{size.flag}: DeepSpeed's layer, which is timed beside ours, needs more than "
                f"{MoeConfig.min_capacity} tokens"
            )
    return [
        row for size in sizes for load in loads for row in _bench_one(size, load, dtype, repeats)
    ]


def _bench_one(size: Size, load: str, dtype: str, repeats: int) -> list[dict]:
    log.info("S=%d M=%d F=%d E=%d, %s load", *size, load)
    x_SxM, w_router_MxE = loaded_input(size, load)
    with contextlib.ExitStack() as stack:
        layers = _our_layers(size, x_SxM, w_router_MxE, dtype)
        if dtype == "float32" and can_run("deepspeed"):
            path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "input.npz"
            np.savez(path, x=x_SxM, w_router=w_router_MxE)
            # Weights, router and capacity are ours, so as much is moved and dropped.
            _, _, *same = layers["gather"]
            for name, keep in {"deepspeed": False, "deepspeed, memory kept": True}.items():
                theirs = worker("deepspeed_layer", path=str(path), d_ff=size.F, keep_memory=keep)
                layer = stack.enter_context(theirs)
                layers[name] = Timed(layer.seconds, layer.peak_bytes, *same)
        seconds = interleaved(layers, repeats)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        return [
            {
                "backend": name,
                **size._asdict(),
                "load": load,
                "dtype": dtype,
                **summary(seconds[name]),
                "peak_bytes": layer.peak_bytes(),
                "ratio_to_dense": medians[name] / medians["dense"],
                "drop_fraction": layer.drop_fraction,
                "bytes_moved": layer.bytes_moved,
                "gb_per_s": layer.bytes_moved / medians[name] / 1e9,
            }
            for name, layer in layers.items()
        ]


def loaded_input(size: Size, load: str) -> tuple[np.ndarray, np.ndarray]:
    """Makes tokens, and a router that sends them to the experts with a given load.

    `uniform` draws each token's expert evenly; `zipf` draws expert n with probability ∝ 1/n, and
    `skewed` ∝ (E + ½ - n)², so that the first has almost 3 times an even share.

    Returns:
      x [S, M] and w_router [M, E], float32.
    """
    rng = np.random.default_rng(0)
    w_MxE = rng.normal(size=(size.M, size.E)).astype(np.float32) / size.M**0.5
    n_E = np.arange(1, size.E + 1)
    share_E = {"uniform": n_E**0, "zipf": 1 / n_E, "skewed": (size.E + 0.5 - n_E) ** 2}[load]
    expert_S = rng.choice(size.E, size.S, p=share_E / share_E.sum())
    x_SxM = rng.normal(size=(size.S, size.M)).astype(np.float32) + 8 * w_MxE.T[expert_S]
    return x_SxM, w_MxE


class _NoExperts(NamedTuple):
    """Replaces the experts by the identity, which leaves routing, dispatch and combine."""

    count: int

    def batched(self, x_ExRxD: jax.Array) -> jax.Array:
        return x_ExRxD


def _our_layers(size: Size, x_SxM, w_router_MxE, dtype: str) -> dict[str, Timed]:
    model = ModelConfig(
        layers=1, d_model=size.M, d_ff=size.F, heads=1, placement="every 1", experts=(size.E,)
    )
    precision = Precision.of(dtype, ExecutionConfig(), jax.default_backend(), training=True)
    x_1xSxM = jnp.asarray(x_SxM, precision.activations)[None]
    cotangent_1xSxM = jax.random.normal(jax.random.key(0), x_1xSxM.shape, x_1xSxM.dtype)
    valid_1xS = jnp.ones((1, size.S), bool)
    slots = capacity(size.S, size.E, 1.0, 1, MoeConfig().min_capacity)

    def timed(run, parameters, *costs) -> Timed:
        def loss(parameters, x_1xSxM):
            y_1xSxM, aux_loss = run(parameters, x_1xSxM)
            return (y_1xSxM * cotangent_1xSxM).sum().astype(jnp.float32) + aux_loss

        # Return the loss, too, or XLA removes the dense MLP's second matmul as dead code.
        forward_and_backward = jax.value_and_grad(loss, argnums=(0, 1))
        return compiled(forward_and_backward, (parameters, x_1xSxM), *costs)

    def through(layer, x_1xSxM, by: str = "auto"):
        y_1xSxM, metrics = layer(x_1xSxM, valid_1xS, execution=ExecutionConfig(dispatch=by))
        return y_1xSxM, metrics.aux_loss

    def without_experts(w_router_MxE, x_1xSxM, by: str):
        logits_1xSxE = x_1xSxM.astype(jnp.float32) @ w_router_MxE
        routing, metrics = route(logits_1xSxE, valid_1xS, MoeConfig(), top_k=1, slots=slots)
        nothing = _NoExperts(size.E)
        return dispatch.through_experts(by, x_1xSxM, routing, nothing, slots)[0], metrics.aux_loss

    def moe_layer(moe: MoeConfig) -> MoE:
        layer = MoE(size.E, model, moe, key)
        layer.w_router[...] = jnp.asarray(w_router_MxE)
        return cast({"mlp": layer}, precision.factors)["mlp"]

    key = jax.random.key(1)
    mlp = cast({"mlp": MLP.drawn(MLPShape(size.M, size.F), key)}, precision.factors)["mlp"]
    layers = {"dense": timed(lambda mlp, x_1xSxM: (mlp(x_1xSxM), 0.0), mlp)}
    layer = moe_layer(MoeConfig())
    _, metrics = layer(x_1xSxM, valid_1xS)
    dropped = float(metrics.dropped_E.sum() / size.S)
    # The weights are read forward and backward, and their gradients are written.
    weights = 2 * layer.experts.w_in[...].nbytes
    for backend in ("gather", "einsum"):
        layers[backend] = timed(partial(through, by=backend), layer, 3 * weights, dropped)
        layers[f"{backend}, no experts"] = timed(
            partial(without_experts, by=backend), jnp.asarray(w_router_MxE), 0, dropped
        )
    layer = moe_layer(MoeConfig(eval_capacity_factor=math.inf))
    layers["dropless"] = timed(through, layer, 3 * weights)
    add_one = lambda experts: jax.tree.map(lambda w: w + 1.0, experts)  # noqa: E731
    return layers | {"copy": compiled(add_one, (layer.experts,), 2 * weights)}


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
