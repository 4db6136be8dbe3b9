"""Log-probabilities of continuations, from which the scores of tasks are computed.

A score depends only on its own text, not on the batch size, the order or other requests: no token
is dropped, and padding affects nothing. Axis letter: T tokens of a chunk.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from prmoe_jax.config.schema import AUTO, ExecutionConfig
from prmoe_jax.errors import UserError
from prmoe_jax.inference.restore import restore_for_inference
from prmoe_jax.model.chunks import each_token
from prmoe_jax.model.layerwise import dropless
from prmoe_jax.model.loss import token_nats
from prmoe_jax.model.transformer import Transformer
from prmoe_jax.parallel.axes import replicated, split_batch

# Lengths are rounded up to multiples of this, so that few shapes are compiled.
BUCKET = 64


class Scorer:
    """Scores texts with a model.

    Attributes:
      length: the model's context in tokens.
    """

    def __init__(
        self, model: Transformer, mesh: Mesh, batch_size: int, execution: ExecutionConfig = AUTO
    ):
        """Takes a model and its mesh; each device scores `batch_size` sequences at once.

        Devices along the axis `tensor` count as one, since they share their sequences.
        """
        self._model, self._mesh = dropless(model), mesh
        self._rows = batch_size * (mesh.size // mesh.shape["tensor"])
        self._score = jax.jit(partial(_score, execution), out_shardings=replicated(mesh))
        self.length = model.config.length

    @classmethod
    def restore(cls, workdir: Path, batch_size: int) -> "Scorer":
        """Restores a run's newest model onto this process's devices, on its mesh if that fits."""
        model, mesh, execution = restore_for_inference(workdir, jax.local_devices())
        return cls(model, mesh, batch_size, execution)

    def __call__(
        self, contexts: Sequence[list[int]], continuations: Sequence[list[int]]
    ) -> list[tuple[float, bool]]:
        """Scores each continuation after its context.

        Args:
          contexts: at least one token each; cut at the start to fit the model's context.
          continuations: at least one token each, and no more than the model's context.

        Returns:
          For each pair, in the given order: ln p of the continuation, and whether each of its
          tokens is the argmax.
        """
        if (longest := max(map(len, continuations), default=0)) > self.length:
            raise UserError(
                f"a continuation has {longest} tokens, and the run's context {self.length}; leave "
                "its task out"
            )
        whole = [a + b for a, b in zip(contexts, continuations, strict=True)]
        order = sorted(range(len(whole)), key=lambda i: -len(whole[i]))
        scores: list[tuple[float, bool]] = [(0.0, True)] * len(whole)
        for start in range(0, len(order), self._rows):
            rows = order[start : start + self._rows]
            longest = min(self.length, len(whole[rows[0]]) - 1)
            width = min(self.length, -(-longest // BUCKET) * BUCKET)
            shape = 4, self._rows, width
            tokens_BxL, targets_BxL, valid_BxL, counted_BxL = np.zeros(shape, np.int32)
            for row, i in enumerate(rows):
                kept = whole[i][-(self.length + 1) :]
                size = len(kept) - 1
                tokens_BxL[row, :size], targets_BxL[row, :size] = kept[:-1], kept[1:]
                valid_BxL[row, :size] = 1
                counted_BxL[row, max(0, size - len(continuations[i])) : size] = 1
            arrays = tokens_BxL, valid_BxL, targets_BxL
            with jax.set_mesh(self._mesh):
                found = self._score(self._model, *split_batch(arrays, self._mesh, self._rows))
            log_p_BxL, argmax_BxL = map(np.asarray, found)
            for row, i in enumerate(rows):
                counted_L = counted_BxL[row] == 1
                total = float(log_p_BxL[row, counted_L].sum(dtype=np.float64))
                scores[i] = total, bool(argmax_BxL[row, counted_L].all())
        return scores


def _score(execution: ExecutionConfig, model: Transformer, tokens_BxL, valid_BxL, targets_BxL):
    """ln p of each target, and whether it is the argmax; computed in chunks to save memory."""
    x_BxLxD, _ = model(tokens_BxL, valid_BxL, execution=execution)
    unembedding = model.unembedding(x_BxLxD.dtype)

    def score(x_BxTxD, targets_BxT):
        logits_BxTxV = unembedding.logits(x_BxTxD)
        nats_BxT, _ = token_nats(logits_BxTxV, targets_BxT)
        return -nats_BxT, targets_BxT == jnp.argmax(logits_BxTxV, axis=-1)

    return each_token(score, x_BxLxD, targets_BxL)
