"""`prmoe bench step`: times a config's whole training step beside PyTorch's.

Each implementation repeats the step on one batch of random tokens. Each row is one document, since
PyTorch's model has no document mask. Both clip the gradient, apply AdamW, and keep the memory that
they free (`allocator.keep_freed_memory`; PyTorch gains 10 to 30 % from it, measured on Zen 5). Only
ours computes router statistics.
"""

import contextlib
import dataclasses
import functools
import logging
import math
import operator
import os
import shutil
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from prmoe_jax.bench.timing import (
    Timed,
    check_memory,
    compiled,
    interleaved,
    program_bytes,
    summary,
)
from prmoe_jax.bench.worker import can_run, check_no_build, cores, worker
from prmoe_jax.config.schema import Config
from prmoe_jax.errors import UserError
from prmoe_jax.interop.settings import check_gpt2_form
from prmoe_jax.model.batch import Batch
from prmoe_jax.model.sizes import cost
from prmoe_jax.nn.precision import Precision
from prmoe_jax.parallel.axes import split_batch
from prmoe_jax.parallel.mesh import make_mesh, with_mesh
from prmoe_jax.tables import blocks
from prmoe_jax.training.optimizer import least_state_bytes
from prmoe_jax.training.step import compile_train_step, sharded_state

log = logging.getLogger(__name__)


def bench_step(config: Config, repeats: int) -> list[dict]:
    """Times a training step of a config's model on one device.

    On CPUs, if torch is installed, the baseline is a PyTorch model of the same sizes, without and
    with torch.compile; an MoE model uses DeepSpeed's layer, if it is installed. For
    `model.dtype=bfloat16` ours is timed in float32, too (on CPUs), and PyTorch's in float32, by
    `torch.autocast`, and with weights and moments in bfloat16. PyTorch's step has AdamW, no
    microbatches and no dropout; it is left out if the config differs.

    Args:
      config: the experiment; its mesh and exchange are not used.
      repeats: number of timed steps.

    Returns:
      One row for each implementation: backend, architecture, the sizes, dtype (of the factors of
      its products), optimizer, accumulate, device, jax, median_s, min_s, max_s, tokens_per_s,
      peak_bytes (of our compiled program, or of PyTorch's process) and share_of_peak. The peak is
      the FLOP/s of a square matmul of that dtype with a float32 result, 2048 wide on a CPU and 8192
      elsewhere, measured in the same run.

    Raises:
      UserError: `repeats` is below 1, the step can't fit into memory, or PyTorch would wait for
        another process (`check_no_build`).
    """
    if repeats < 1:
        raise UserError(f"--repeats={repeats} must be 1 or more")
    model = config.model
    width = 2048 if jax.default_backend() == "cpu" else 8192  # of the square matmul
    product = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
    ours = {"prmoe_jax": config}
    if model.dtype != "float32" and jax.default_backend() == "cpu":
        whole = dataclasses.replace(model, dtype="float32")
        ours["prmoe_jax, float32"] = dataclasses.replace(config, model=whole)
    # 4 for the gradient in float32, which frozen parameters lack.
    bytes_each = least_state_bytes(config) + 4 * (not config.optimizer.trainable)
    check_memory("--config", len(ours) * bytes_each * cost(model).total_params)
    baselines = _torch_baselines(config)
    dtypes = {name: _factors(config) for name, config in ours.items()}
    dtypes |= {name: products for name, (products, *_) in baselines.items()}
    if config.kd_steps:
        log.info("the step is timed without its teacher")
    with contextlib.ExitStack() as stack:
        steps = {name: compiled_step(config) for name, config in ours.items()}
        for name, (products, weights, compiles) in baselines.items():
            theirs = worker(
                "torch_step", shape=_torch_shape(config), weights=weights,
                autocast=products != weights, compiled=compiles, threads=cores(),
            )  # fmt: skip
            steps[name] = stack.enter_context(theirs)
        for dtype in set(dtypes.values()):
            x = jax.random.normal(jax.random.key(0), (width, width), dtype)
            steps[dtype] = compiled(product, (x, x))
        log.info("%d steps of each of %s, interleaved", repeats, ", ".join(steps))
        times = interleaved(steps, repeats)
        peaks = {
            dtype: 2 * width**3 / statistics.median(times.pop(dtype))
            for dtype in set(dtypes.values())
        }
        tokens = config.tokens_per_step
        flops = cost(model, config.moe).train_flops_per_token * tokens
        return [
            {
                "backend": name,
                "architecture": str(model.schedule),
                "d_model": model.d_model,
                "d_ff": model.d_ff,
                "vocab_size": model.vocab_size,
                "length": model.length,
                "batch_size": config.train.batch_size,
                "dtype": dtypes[name],
                "optimizer": config.optimizer.kind,
                "accumulate": config.train.accumulate,
                **summary(seconds),
                "tokens_per_s": tokens / statistics.median(seconds),
                "peak_bytes": steps[name].peak_bytes(),
                "share_of_peak": flops / statistics.median(seconds) / peaks[dtypes[name]],
            }
            for name, seconds in times.items()
        ]


def _factors(config: Config) -> str:
    """The dtype of the factors of a step's products here."""
    backend = jax.default_backend()
    return Precision.of(config.model.dtype, config.execution, backend, training=True).factors.name


def _torch_baselines(config: Config) -> dict[str, tuple[str, str, bool]]:
    """The PyTorch steps that can run here.

    Each has the dtype of its products, that of its weights, and whether it uses torch.compile.
    """
    if not can_run("torch"):
        return {}
    needed = {
        "optimizer.kind": "adamw",
        "optimizer.trainable": "",
        "train.accumulate": 1,
        "model.dropout": 0.0,
    }
    for name, theirs in needed.items():
        asked = operator.attrgetter(name)(config)
        if asked != theirs:
            log.info("the PyTorch step has %s=%s, not %s; it is left out", name, theirs, asked)
            return {}
    try:
        check_gpt2_form(config.model, "the PyTorch model to compare with")
    except UserError as error:
        log.info("%s; it is left out", error)
        return {}
    layers = ""
    if any(config.model.schedule.experts):
        if not can_run("deepspeed"):
            return {}
        check_no_build()
        layers = " + deepspeed"
    forms = {"": ("float32", "float32")}
    if config.model.dtype == "bfloat16":
        forms[", autocast"] = ("bfloat16", "float32")
        forms[", bfloat16 weights"] = ("bfloat16", "bfloat16")
    compilers = {"pytorch": False}
    if shutil.which(os.environ.get("CXX", "c++")):
        compilers["torch.compile"] = True
    return {
        compiler + layers + form: (*dtypes, compiles)
        for form, dtypes in forms.items()
        for compiler, compiles in compilers.items()
    }


def _torch_shape(config: Config) -> dict:
    """What `baselines.torch_step` needs to know of a config."""
    return dataclasses.asdict(config.model) | {
        "schedule": config.model.schedule.experts,
        "batch_size": config.train.batch_size,
        "capacity_factor": min(config.moe.capacity_factor, 1e9),
        "min_capacity": config.moe.min_capacity,
        "drops": math.isfinite(config.moe.capacity_factor),
        "aux_loss_weight": config.moe.aux_loss_weight,
        "learning_rate": config.optimizer.learning_rate,
        "clip_norm": config.optimizer.clip_norm,
    }


def compiled_step(config: Config) -> Timed:
    """Our training step on one device, on random tokens."""
    config = with_mesh(config)
    mesh = make_mesh(config, jax.devices()[:1])
    shape = config.train.batch_size, config.model.length + 1
    ids = np.random.default_rng(0).integers(0, config.model.vocab_size, shape).astype(np.int32)
    ones = np.ones((shape[0], shape[1] - 1), np.int32)
    batch = Batch(ids[:, :-1], ids[:, 1:], ones.astype(bool), ones)
    with jax.set_mesh(mesh):
        batch = split_batch(batch, mesh, config.train.batch_size)
        state = [sharded_state(config, mesh)]
        step = compile_train_step(config, mesh).lower(state[0], batch).compile()

    def seconds() -> float:
        begun = time.perf_counter()
        state[0], _ = jax.block_until_ready(step(state[0], batch))
        return time.perf_counter() - begun

    return Timed(seconds, lambda: program_bytes(step))


def table(rows: list[dict]) -> str:
    """The rows of one call as text."""
    ours = rows[0]["tokens_per_s"]
    return blocks(
        [
            row | {"of_ours": row["tokens_per_s"] / ours, "peak_mb": row["peak_bytes"] / 1e6}
            for row in rows
        ],
        "{architecture}; d_model {d_model}, d_ff {d_ff}, vocabulary {vocab_size}, "
        "{batch_size} x {length} tokens, accumulate {accumulate}, {optimizer}, {device}",
        {
            "backend": "{backend}",
            "products": "{dtype}",
            "tokens/s": "{tokens_per_s:,.0f}",
            "median": "{median_s:.3f}s",
            "min": "{min_s:.3f}s",
            "max": "{max_s:.3f}s",
            "of ours": "{of_ours:.2f}",
            "peak memory": "{peak_mb:,.0f}MB",
            "of the peak": "{share_of_peak:.0%}",
        },
    )
