"""Evaluation on the validation split: loss, perplexity, bits per byte, drops, expert load."""

import itertools
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from prmoe_jax import stores
from prmoe_jax.config.loading import load
from prmoe_jax.config.schema import Config, TeacherConfig, group_rows
from prmoe_jax.data.pipeline import (
    Data,
    Mixture,
    eval_batches,
    evaluated_windows,
    load_data,
    windows_fingerprint,
)
from prmoe_jax.distill.loss import run_teacher
from prmoe_jax.distill.predictions import Agreement, agreement
from prmoe_jax.distill.teacher import cast_to_compute_dtype, restore_teacher
from prmoe_jax.errors import UserError
from prmoe_jax.model.batch import Batch
from prmoe_jax.model.loss import Sums, forward
from prmoe_jax.model.transformer import Transformer
from prmoe_jax.moe.layer import MoE
from prmoe_jax.parallel import processes
from prmoe_jax.parallel.axes import local_rows, replicated, split_batch
from prmoe_jax.parallel.memory import free_bytes
from prmoe_jax.run.directory import CONFIG, TOKENIZER, shared_settings
from prmoe_jax.run.metrics import summarise
from prmoe_jax.run.restore import check_text, restore_run

log = logging.getLogger(__name__)

# The share of the free memory that a portion may take: other arrays and programs need some, too.
FREE_SHARE = 0.75


def evaluate_model(
    measure: Callable[[Transformer, Batch], Sums],
    model: Transformer,
    config: Config,
    data: Data,
    mesh: Mesh,
    limit: int = 0,
    documents: bool = False,
) -> dict:
    """Measures a model on the validation split, or `limit` batches of it, deterministically.

    Args:
      documents: whether to add up the loss of each document, too; only on the whole split, and
        `measure` then gives the loss of each target (`model.loss.token_losses`).

    Returns:
      loss (nats per token), perplexity, bits_per_byte (with the loss of EOS tokens), tokens,
      drop_fraction, aux_loss and the per-layer statistics of `metrics.summarise`. With `documents`
      also documents: for each document, in the order of the split, [nats, targets]; the nats are
      rounded to 0.01.
    """
    data = _cut(data, config)
    rows = _rows(config, data, mesh)
    limit = -(-limit * config.train.batch_size // rows)
    each_target: list = []  # nats and masks of every batch

    def measured(batch: Batch) -> Sums:
        sums = measure(model, batch)
        if documents:
            # The batch before is fetched while this one is computed.
            each_target[-1:] = jax.device_get(each_target[-1:])
            each_target.append(sums.targets)
        return sums._replace(targets=None)

    sums = _summed(measured, rows, data, mesh, limit)
    metrics = summarise(sums, config)
    if documents:
        document_T = data.validation.documents()
        places = (np.concatenate(x).reshape(-1) for x in zip(*each_target, strict=True))
        # Rows behind the last window are padding. NumPy adds up in float64.
        nats_N, targets_N = (np.bincount(document_T, x_T[: len(document_T)]) for x_T in places)
        pairs = zip(nats_N.tolist(), targets_N.tolist(), strict=True)
        metrics["documents"] = [[round(nats, 2), int(count)] for nats, count in pairs]
    loss = metrics.pop("lm_loss")
    windows = evaluated_windows(data.validation, limit * rows)
    tokens_per_byte = int(sums.tokens) / data.validation.bytes_of(windows)
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": loss / math.log(2) * tokens_per_byte,
        "tokens": int(sums.tokens),
        **metrics,
    }


def _cut(data: Data, config: Config, teacher: Config | None = None) -> Data:
    """The data with windows no longer than its longest validation text, which changes no loss.

    All that is cut off is padding. Routing groups stay what they are: the number of a group's
    places, padding included, decides an expert's capacity.

    Raises:
      UserError: the split has no text.
    """
    whole, unit = data.validation, 1
    if not (whole.tokens and whole.text_bytes):
        raise UserError(
            f"the validation split of data.corpus={config.data.corpus} has no text "
            f"({whole.tokens} tokens); use a corpus with some in it"
        )
    for one in filter(None, (config, teacher)):
        if any(one.model.schedule.experts):
            limited = not one.moe.routes.tokens_choose or math.isfinite(
                one.moe.eval_capacity_factor
            )
            unit = math.lcm(unit, one.moe.group_size or (whole.length if limited else 1))
    parts = whole.parts if isinstance(whole, Mixture) else [whole]
    longest = max(part.tokens for part in parts)
    length = min(whole.length, -(-longest // unit) * unit)
    parts = [replace(part, length=length) for part in parts]
    cut = replace(whole, parts=parts) if isinstance(whole, Mixture) else parts[0]
    return replace(data, validation=cut)


def _together(config: Config, mesh: Mesh, teacher: Config | None = None) -> int:
    """The fewest windows at once that give all devices as many and cut no routing group."""
    return mesh.size // mesh.shape["tensor"] * group_rows(config, teacher)


def _rows(config: Config, data: Data, mesh: Mesh, teacher: Config | None = None) -> int:
    """The number of windows that are evaluated at once: training's microbatch, or all if fewer.

    It is rounded up to a multiple of `_together`.
    """
    together = _together(config, mesh, teacher)
    microbatch = config.train.batch_size // config.train.accumulate
    return -(-min(microbatch, len(data.validation)) // together) * together


def _fitting(
    lower: Callable[[Batch], jax.stages.Lowered],
    config: Config,
    data: Data,
    mesh: Mesh,
    teacher: Config | None = None,
) -> Config:
    """The config with a batch as large as the free memory allows, up to training's microbatch.

    `lower` traces the evaluation of a batch. The compiler says how much memory it needs.
    """
    data, together = _cut(data, config, teacher), _together(config, mesh, teacher)
    rows = first = _rows(config, data, mesh, teacher)
    while rows > together:
        needed = lower(next(_batches(rows, data, mesh, 1))).compile().memory_analysis()
        free = FREE_SHARE * min(processes.gathered(free_bytes()))
        share = free / max(1, needed.temp_size_in_bytes)
        if share >= 1:
            break
        rows = max(1, min(int(rows * share), rows - 1) // together) * together
    if rows < first:
        log.info("evaluates %d windows at once, not %d, to fit the free memory", rows, first)
    return _with_batch(config, rows)


def _with_batch(config: Config, rows: int) -> Config:
    return replace(config, train=replace(config.train, batch_size=rows, accumulate=1))


def _batches(rows: int, data: Data, mesh: Mesh, limit: int) -> Iterator[Batch]:
    """The validation split's batches of so many windows, spread over the mesh."""
    batches = eval_batches(data.validation, rows, limit, local_rows(mesh, rows))
    return (split_batch(batch, mesh, rows) for batch in batches)


def _summed(
    measure: Callable[[Batch], Any], rows: int, data: Data, mesh: Mesh, limit: int = 0
) -> Any:
    """Adds up the results of `measure` over the validation split, `rows` windows at a time.

    `limit` is the number of such batches, 0 for all. Sums over batches are int64 and float64 on
    the host: int32 overflows at 2.1 billion tokens, and float32 counts exactly only to 17 million.
    """
    parts = map(measure, _batches(rows, data, mesh, limit))
    # The next batch is dispatched before this one's sums are fetched.
    pairs = itertools.pairwise(itertools.chain(parts, [None]))
    fetched = (jax.tree.map(_widened, jax.device_get(part)) for part, _ in pairs)
    return reduce(partial(jax.tree.map, np.add), fetched)


def _widened(x: np.ndarray) -> np.ndarray:
    return x.astype(np.int64 if np.issubdtype(x.dtype, np.integer) else np.float64)


def evaluate(
    workdir: Path,
    teacher: Path | None = None,
    corpus: str | None = None,
    worth: bool = False,
    length: int | None = None,
    batch_size: int | None = None,
) -> dict:
    """Evaluates a run's newest checkpoint on a whole validation split; see `evaluate_model`.

    Args:
      workdir: the run's folder.
      teacher: the folder of a run to compare predictions with; it need not have taught this run.
      corpus: the text to evaluate on, as in `data.corpus`; None is the run's own.
      worth: whether to measure what each MoE layer is worth, in two more evaluations for each.
      length: the tokens of a window, at most the run's context, which is the default. A shorter
        window leaves its tokens less context, which changes the loss.
      batch_size: the windows to evaluate at once, rounded up so that all devices have as many and
        no routing group is cut. It changes memory and speed, not the loss. By default it is that of
        training's microbatch, or as many as fit the free memory.

    Returns:
      step and the results of `evaluate_model`. With a teacher also teacher/step, teacher/loss,
      teacher/kl (KL(teacher ‖ run), nats per token) and teacher/agreement (the share of tokens
      where both have the same argmax). With `worth` also, for MoE layer N,
      layers/N/loss_without_experts and layers/N/loss_of_permuted_experts: by how many nats the loss
      grows if the layer's experts give 0, and if the router's choice e goes to expert e - 1.

    Raises:
      UserError: a folder holds no run, the teacher has another vocabulary or tokenizer, the length
        is none of this run, or the validation split can't be read or has no text.
    """
    workdir, teacher = stores.as_path(workdir), teacher and stores.as_path(teacher)
    options = {"--teacher": str(teacher), "--corpus": str(corpus)}
    options |= {"--length": str(length), "--batch-size": str(batch_size)}
    run = "the run that is evaluated"
    processes.agree(run, lambda: shared_settings(load(workdir / CONFIG)) | options)
    if length is not None:
        _check_length(load(workdir / CONFIG), length)
    if batch_size is not None and batch_size < 1:
        raise UserError(f"--batch-size={batch_size} must be 1 or more windows")
    config, step, model, mesh = restore_run(workdir)
    if corpus is not None:
        config = replace(config, data=replace(config.data, corpus=corpus))
    if length is not None:
        config = replace(config, model=replace(config.model, length=length))
    data = load_data(config.data, config.model.vocab_size, config.model.length, workdir / TOKENIZER)
    processes.agree("the text", lambda: windows_fingerprint(data))
    if corpus is None:
        check_text(workdir, config, data.corpus_fingerprint)
    with jax.set_mesh(mesh):
        forward_only = partial(forward, execution=config.execution)
        measure = jax.jit(forward_only, out_shardings=replicated(mesh))
        if batch_size is None:
            config = _fitting(partial(measure.lower, model), config, data, mesh)
        else:
            config = _with_batch(config, batch_size)
        metrics = {"step": step} | evaluate_model(measure, model, config, data, mesh)
        if worth:
            loss = partial(evaluate_model, measure, config=config, data=data, mesh=mesh)
            metrics |= _worth(model, config, metrics["loss"], loss)
        if teacher:
            metrics |= _beside_teacher(model, config, teacher, data, mesh, batch_size is None)
        return metrics


def _check_length(config: Config, length: int) -> None:
    context, group = config.model.length, config.moe.group_size
    if not 1 <= length <= context:
        raise UserError(
            f"--length={length} must be from 1 to the run's context of {context} tokens"
        )
    if group and length % group and group % length:
        raise UserError(
            f"--length={length}: the run's moe.group_size={group} neither divides nor is a "
            f"multiple of it; use {length // group * group or math.gcd(group, context)}"
        )


def _worth(model: Transformer, config: Config, loss: float, evaluated: Callable) -> dict:
    """What the loss grows by without each layer's experts, and with the experts permuted."""
    changes = {
        "loss_without_experts": jnp.zeros_like,
        "loss_of_permuted_experts": partial(jnp.roll, shift=1, axis=0),
    }
    return {
        f"layers/{layer:02d}/{name}": evaluated(with_experts(model, layer, change))["loss"] - loss
        for layer, experts in enumerate(config.model.schedule.experts)
        for name, change in changes.items()
        if experts
    }


def with_experts(model: Transformer, layer: int, change: Callable) -> Transformer:
    """A copy of the model whose experts of one layer are changed.

    Args:
      layer: the layer's index, among all layers.
      change: maps each parameter of the experts, [E, …], to one of the same shape.
    """
    model, first = jax.tree.map(lambda x: x, model), 0
    for stage in model.stages:
        repeat, place = divmod(layer - first, len(stage.blocks))
        if 0 <= repeat < stage.repeats:

            def changed(x):
                return jax.device_put(x.at[repeat].set(change(x[repeat])), x.sharding)  # noqa: B023

            moe = stage.blocks[place].mlp
            assert isinstance(moe, MoE)
            moe.experts = jax.tree.map(changed, moe.experts)
        first += stage.repeats * len(stage.blocks)
    return model


def _beside_teacher(
    model, config: Config, workdir: Path, data: Data, mesh: Mesh, fitting: bool
) -> dict:
    source = load(workdir / CONFIG)
    config = _with_batch(config, _rows(config, data, mesh, source))
    config = replace(config, teacher=TeacherConfig(workdir=str(workdir)))
    teacher = cast_to_compute_dtype(restore_teacher(config, mesh, data.tokenizer), mesh)

    @partial(jax.jit, out_shardings=replicated(mesh))
    def compare(model: Transformer, teacher_model: Transformer, batch: Batch) -> Agreement:
        output = run_teacher(teacher_model, batch, config, None)
        x_BxLxD, _ = model(batch.tokens_BxL, batch.segments_BxL, execution=config.execution)
        return agreement(x_BxLxD, model.unembedding(x_BxLxD.dtype), output, batch)

    data = _cut(data, config, source)
    if fitting:
        config = _fitting(partial(compare.lower, model, teacher.model), config, data, mesh, source)
    rows = _rows(config, data, mesh, source)
    sums = _summed(lambda batch: compare(model, teacher.model, batch), rows, data, mesh)
    return {
        "teacher/step": teacher.step,
        "teacher/loss": float(sums.teacher_loss / sums.tokens),
        "teacher/kl": float(sums.kl / sums.tokens),
        "teacher/agreement": float(sums.same / sums.tokens),
    }
