"""`prmoe bench decode`: times a model's decoding beside its baselines.

Weights are random, which doesn't change the time.
"""

import contextlib
import dataclasses
import itertools
import logging
import math
import statistics
import time
from collections.abc import Callable
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh

from prmoe_jax.bench.timing import check_memory, interleaved
from prmoe_jax.bench.worker import can_run, cores, worker
from prmoe_jax.config.schema import Config, MeshConfig, ModelConfig, MoeConfig
from prmoe_jax.config.validation import check_runs_without_limit
from prmoe_jax.errors import UserError
from prmoe_jax.inference.decoder import Decoder, decoder
from prmoe_jax.inference.generate import STEPS, Sampling, decode, room, start
from prmoe_jax.inference.restore import for_inference
from prmoe_jax.interop.families import FAMILIES
from prmoe_jax.interop.hugging_face import check_exportable, their_settings
from prmoe_jax.model.sizes import cost
from prmoe_jax.model.transformer import init_model
from prmoe_jax.parallel.mesh import make_mesh, with_mesh
from prmoe_jax.parallel.sharding import init_sharded
from prmoe_jax.run.directory import device_name
from prmoe_jax.tables import blocks

log = logging.getLogger(__name__)

GREEDY = Sampling(temperature=0)
# The larger dense model has at least this many times the model's active parameters. In the paper
# (section 5.5) a dense 6.7B model has the quality of a 1.3B + MoE-128.
LARGER = 5


def bench_decode(
    config: Config,
    batches: list[int],
    weights: list[str],
    prompt: int,
    repeats: int,
    layouts: dict[str, MeshConfig | None],
) -> list[dict]:
    """Times the config's model and its baselines; a turn is `generate.STEPS` tokens.

    The baselines are the dense base (the same model without experts), a dense model of the same
    depth with `LARGER` times the active parameters, and the family's class of the library
    transformers. It runs the model itself, with two implementations of its experts, or the base if
    it has no such experts. It needs a CPU and the library. Our models compute in float32 on CPUs.

    Args:
      config: the experiment.
      batches: batch sizes in sequences.
      weights: types of the large weights, from `inference.WEIGHTS`.
      prompt: number of tokens in the KV cache at the start.
      repeats: number of timed turns.
      layouts: meshes of all devices for our models, by name; None means one device. In a dense
        model's mesh, the devices of the expert axes move to the `data` axis.

    Returns:
      One row for each batch size, model, type of weights and mesh: model, weights, mesh, batch,
      device, jax, params, active_params, ms_per_token (median time of a decoding step, which adds
      one token to each sequence), min_ms, max_ms, and tokens_per_s of the whole batch.

    Raises:
      UserError: the context is too short, a mesh doesn't fit the devices, a batch doesn't fit the
        memory, a count is below 1, or the model can't decode (`check_runs_without_limit`).
    """
    if min(repeats, *batches) < 1:
        raise UserError("--repeats and --batch must be 1 or more")
    check_runs_without_limit(config)
    length = config.model.length
    if length <= STEPS:
        raise UserError(
            f"model.length={length} has no room for {STEPS} tokens after a prompt; use "
            f"{STEPS + 1} or more"
        )
    if not 1 <= prompt <= length - STEPS:
        raise UserError(
            f"--prompt={prompt} and {STEPS} tokens more must fit model.length={length}; use "
            f"--prompt={length - STEPS} or less"
        )
    base = dense(config)
    sliced = max((layout.tensor for layout in layouts.values() if layout), default=1)
    models = {"dense base": base, f"dense, {LARGER} times as active": larger(config, sliced)}
    if any(config.model.schedule.experts):
        models = {str(config.model.schedule): config} | models
    # Check every mesh first: to make a model may take long.
    placed = {
        (name, mesh): _placed(models[name], layouts[mesh])
        for name, mesh in itertools.product(models, layouts)
    }
    _check_memory(config, list(models.values()), max(batches), prompt)
    rows, others = [], {}
    if can_run("transformers", "torch"):
        for own in (config, base):
            their_models = _of_transformers(own)
            others |= their_models
            models |= dict.fromkeys(their_models, own)
    with contextlib.ExitStack() as stack:
        ours = {
            (name, kind, mesh): _ours(*place, kind)
            for kind in weights
            for (name, mesh), place in placed.items()
        }
        theirs = {
            (name, dtype, "one device"): stack.enter_context(
                worker("decoding", **settings, dtype=dtype, threads=cores())
            )
            for name, settings in others.items()
            for dtype in ("float32", "bfloat16")
        }
        for batch in batches:
            log.info("batch %d", batch)
            turns = {name: _turn(*held, batch, prompt) for name, held in ours.items()}
            turns |= {name: partial(other, batch, prompt, STEPS) for name, other in theirs.items()}
            for (name, kind, mesh), seconds in interleaved(turns, repeats).items():
                size = cost(models[name].model)
                ms = [value / STEPS * 1e3 for value in seconds]
                rows.append(
                    {
                        "model": name,
                        "weights": kind,
                        "mesh": mesh,
                        "batch": batch,
                        "device": device_name(jax.devices()[0]),
                        "jax": jax.__version__,
                        "params": size.total_params,
                        "active_params": size.active_params,
                        "ms_per_token": statistics.median(ms),
                        "min_ms": min(ms),
                        "max_ms": max(ms),
                        "tokens_per_s": batch / statistics.median(ms) * 1e3,
                    }
                )
    return rows


def _of_transformers(config: Config) -> dict[str, dict]:
    """The implementations of a model in transformers: arguments of `baselines.decoding` by name."""
    family, experts = config.model.family, any(config.model.schedule.experts)
    try:
        check_exportable(config, family)
    except UserError:
        log.info("transformers has no %s of %s; it is left out", family, config.model.schedule)
        return {}
    settings = their_settings(config, family) | {"bos_token_id": 0, "eos_token_id": 0}
    name = f"transformers' {FAMILIES[family].architecture}"
    if not experts:
        return {name: {"settings": settings, "experts": {}}}
    return {
        f"{name}, {kind}": {"settings": settings, "experts": {"experts_implementation": kind}}
        for kind in ("eager", "grouped_mm")
    }


def dense(config: Config) -> Config:
    """The same model without experts."""
    idle = "placement experts top_k normalize_top_k expert_d_ff residual residual_mix residual_d_ff"
    unset = {name: getattr(ModelConfig, name) for name in idle.split()}
    model = dataclasses.replace(config.model, **unset)
    return dataclasses.replace(config, model=model, moe=MoeConfig())


def larger(config: Config, sliced: int = 1) -> Config:
    """A dense model of the same depth and head width, with `LARGER` times the active parameters.

    It has the smallest number of heads for this that `sliced` (the size of the `tensor` axis) and
    the model's KV heads divide.
    """
    base, active = dense(config), cost(config.model).active_params
    model = base.model
    for heads in itertools.count(model.heads, math.lcm(sliced, model.kv_heads or 1)):
        wider = dataclasses.replace(
            model,
            heads=heads,
            d_model=heads * model.d_model // model.heads,
            d_ff=heads * model.d_ff // model.heads,
        )
        if cost(wider).total_params >= LARGER * active:
            return dataclasses.replace(base, model=wider)


def _placed(config: Config, layout: MeshConfig | None) -> tuple[Config, Mesh]:
    """The config for decoding on a layout's devices (None: on one device), and its mesh."""
    devices = jax.devices() if layout else jax.devices()[:1]
    if layout and not any(config.model.schedule.experts):
        layout = MeshConfig(fsdp=layout.fsdp, tensor=layout.tensor)
    config = with_mesh(config, layout)
    mesh = make_mesh(config, devices)
    return dataclasses.replace(config, model=for_inference(config.model)), mesh


def _ours(config: Config, mesh: Mesh, kind: str) -> tuple[Decoder, Mesh]:
    with jax.set_mesh(mesh):
        model = init_sharded(lambda: init_model(config), mesh)
        return decoder(model, kind, mesh, config.execution), mesh


def _check_memory(config: Config, models: list[Config], batch: int, prompt: int) -> None:
    """On CPUs, refuses models or a KV cache that exceed the memory in float32."""
    if jax.default_backend() == "cpu":
        check_memory("--config", 4 * max(cost(one.model).total_params for one in models))
        model = config.model
        a_token = 2 * 4 * model.layers * model.key_heads * model.head_width
        check_memory(f"--batch={batch}", batch * room(prompt, STEPS) * a_token)


def _turn(decoder: Decoder, mesh: Mesh, batch: int, prompt: int) -> Callable[[], float]:
    """A function that continues a prompt by `STEPS` tokens and returns the seconds it took."""
    vocabulary = decoder.config.vocab_size
    prompts = np.random.default_rng(0).integers(0, vocabulary, (batch, prompt))

    def turn() -> float:
        with jax.set_mesh(mesh):
            state = start(decoder, mesh, prompts, range(batch), STEPS)
            jax.block_until_ready(state)
            begun = time.perf_counter()
            # Without end marks, decoding never ends early.
            jax.block_until_ready(decode(decoder, state, GREEDY, vocabulary, ()))
            return time.perf_counter() - begun

    return turn


def table(rows: list[dict]) -> str:
    """The rows as text, with one block for each batch size."""
    return blocks(
        [
            row | {"params_m": row["params"] / 1e6, "active_m": row["active_params"] / 1e6}
            for row in rows
        ],
        "batch {batch}",
        {
            "model": "{model}",
            "weights": "{weights}",
            "mesh": "{mesh}",
            "params": "{params_m:.1f}M",
            "active": "{active_m:.1f}M",
            "ms/token": "{ms_per_token:.2f}",
            "min": "{min_ms:.2f}",
            "max": "{max_ms:.2f}",
            "tokens/s": "{tokens_per_s:.1f}",
        },
        texts=(0, 1, 2),
    )
