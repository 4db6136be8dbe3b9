"""Log-probabilities of continuations, from which the scores of tasks are computed.

No token is dropped and padding affects nothing, so that a score depends on its own text alone, not
on the batch size, the order or the other requests.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from prmoe_jax.config import MeshConfig, check_runs_without_limit
from prmoe_jax.errors import UserError
from prmoe_jax.model.transformer import Transformer, dropless
from prmoe_jax.run.restore import restore_run

# Lengths are rounded up to multiples of this, so that few shapes are compiled.
BUCKET = 64


class Scorer:
    """Scores texts by a run's newest model on one device.

    Attributes:
      length: the model's context in tokens.
    """

    def __init__(self, model: Transformer, batch_size: int):
        """Takes a model; `batch_size` sequences are scored at once."""
        self._model, self._batch_size = dropless(model), batch_size
        self.length = model.config.length

    @classmethod
    def restore(cls, workdir: Path, batch_size: int) -> "Scorer":
        """Restores a run.

        Raises:
          UserError: the folder holds no run or no readable checkpoint, or the run's experts choose
            their tokens.
        """
        config, _, model, _ = restore_run(workdir, jax.local_devices()[:1], MeshConfig())
        check_runs_without_limit(config)
        if jax.default_backend() == "cpu":  # bfloat16 is many times slower there
            model.config = dataclasses.replace(model.config, dtype="float32")
        return cls(model, batch_size)

    def __call__(
        self, contexts: Sequence[list[int]], continuations: Sequence[list[int]]
    ) -> list[tuple[float, bool]]:
        """Scores each continuation after its context.

        Args:
          contexts: at least one token each; cut at the start to fit the model's context.
          continuations: at least one token each, and no more than the model's context.

        Returns:
          For each pair, in the given order: ln p of the continuation, and whether each of its
          tokens is the likeliest.

        Raises:
          UserError: a continuation has more tokens than the model's context.
        """
        if (longest := max(map(len, continuations), default=0)) > self.length:
            raise UserError(
                f"a continuation has {longest} tokens, and the run's context {self.length}; leave "
                "its task out"
            )
        whole = [a + b for a, b in zip(contexts, continuations, strict=True)]
        order = sorted(range(len(whole)), key=lambda i: -len(whole[i]))
        scores: list[tuple[float, bool]] = [(0.0, True)] * len(whole)
        for start in range(0, len(order), self._batch_size):
            rows = order[start : start + self._batch_size]
            longest = min(self.length, len(whole[rows[0]]) - 1)
            width = min(self.length, -(-longest // BUCKET) * BUCKET)
            tokens_BxL, targets_BxL = np.zeros((2, self._batch_size, width), np.int32)
            counted_BxL = np.zeros((self._batch_size, width), bool)
            valid_BxL = np.zeros((self._batch_size, width), np.int32)
            for row, i in enumerate(rows):
                kept = whole[i][-(self.length + 1) :]
                size = len(kept) - 1
                tokens_BxL[row, :size], targets_BxL[row, :size] = kept[:-1], kept[1:]
                valid_BxL[row, :size] = 1
                counted_BxL[row, max(0, size - len(continuations[i])) : size] = True
            log_p_BxL, likeliest_BxL = map(
                np.asarray, _score(self._model, tokens_BxL, valid_BxL, targets_BxL)
            )
            for row, i in enumerate(rows):
                counted_L = counted_BxL[row]
                total = float(log_p_BxL[row, counted_L].sum(dtype=np.float64))
                scores[i] = total, bool(likeliest_BxL[row, counted_L].all())
        return scores


@jax.jit
def _score(model: Transformer, tokens_BxL, valid_BxL, targets_BxL):
    """ln p of each target, and whether it is the likeliest token; one sequence at a time."""
    x_BxLxD, _ = model(tokens_BxL, valid_BxL)

    def sequence(inputs):
        x_LxD, targets_L = inputs
        logits_LxV = model.logits(x_LxD)
        target_L = jnp.take_along_axis(logits_LxV, targets_L[:, None], -1)[:, 0]
        log_p_L = target_L - jax.nn.logsumexp(logits_LxV, axis=-1)
        return log_p_L, targets_L == jnp.argmax(logits_LxV, axis=-1)

    return jax.lax.map(sequence, (x_BxLxD, targets_BxL))
