"""Evaluation on the validation split: loss, perplexity, bits per byte, drops, expert load."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
from jax.sharding import Mesh

from prmoe_jax import workdir as workdirs
from prmoe_jax.checkpoint import Checkpoints
from prmoe_jax.config import Config, check_devices, load
from prmoe_jax.data.pipeline import Batch, Data, eval_batches, load_data
from prmoe_jax.loss import Sums
from prmoe_jax.metrics import perplexity, summarise, to_python
from prmoe_jax.model import Transformer, resolve_backends
from prmoe_jax.parallel.mesh import data_mesh, replicated, split_batch
from prmoe_jax.step import make_eval_step


def evaluate_model(
    eval_step: Callable[[Transformer, Batch], Sums],
    model: Transformer,
    batches: Iterable[Batch],
    config: Config,
    data: Data,
    mesh: Mesh,
) -> dict:
    """Measures a model on batches of the validation split, deterministically.

    Returns:
      loss (nats a token), perplexity, bits_per_byte (of the text, document ends included),
      tokens, drop_fraction, aux_loss and the per-layer statistics of `metrics.summarise`.
    """
    sums = None
    for batch in batches:
        part = eval_step(model, split_batch(batch, mesh))
        sums = part if sums is None else jax.tree.map(jax.numpy.add, sums, part)
    metrics = to_python(summarise(sums, config))
    loss = metrics.pop("lm_loss")
    # Exact over the whole split; of a part, its tokens stand for their share of the bytes.
    tokens_per_byte = data.validation.tokens / data.validation_bytes
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        "bits_per_byte": loss / math.log(2) * tokens_per_byte,
        "tokens": int(sums.tokens),
        **metrics,
    }


def evaluate(workdir: Path) -> dict:
    """Evaluates a run's newest checkpoint on its whole validation split; see `evaluate_model`.

    Raises:
      UserError: the folder holds no run or no checkpoint.
    """
    config, step, model, mesh = restore_run(workdir)
    check_devices(config, jax.device_count())
    data = load_data(
        config.data, config.model.vocab_size, config.model.length, workdir / workdirs.TOKENIZER
    )
    with jax.set_mesh(mesh):
        batches = eval_batches(
            data.validation,
            config.train.batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        eval_step = jax.jit(make_eval_step(config))
        return {"step": step} | evaluate_model(eval_step, model, batches, config, data, mesh)


def restore_run(workdir: Path) -> tuple[Config, int, Transformer, Mesh]:
    """A run's config, step, model and a mesh to run it on.

    Raises:
      UserError: the folder holds no run or no readable checkpoint.
    """
    config = resolve_backends(load(workdir / workdirs.CONFIG), jax.default_backend())
    mesh = data_mesh()
    checkpoints = Checkpoints(workdir)
    step, model = checkpoints.restore_model(config, replicated(mesh))
    checkpoints.close()
    return config, step, model, mesh
