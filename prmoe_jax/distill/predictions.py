"""A teacher's predictions without gradients: compared with a model's, and recorded.

Logits exist for `CHUNK` tokens of each sequence at a time. K: top k tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from prmoe_jax.config.schema import KdConfig
from prmoe_jax.distill.loss import TeacherOutput, divergence, top_k_log_probs
from prmoe_jax.model.batch import Batch, TopKLogProbs
from prmoe_jax.model.chunks import cut
from prmoe_jax.model.transformer import Unembedding

CHUNK = 256


class Agreement(NamedTuple):
    """How close a model is to its teacher: sums over the targets in mask_BxL."""

    tokens: jax.Array
    kl: jax.Array  # KL(teacher ‖ model) in nats
    same: jax.Array  # targets where both have the same argmax
    teacher_loss: jax.Array  # the teacher's cross-entropy in nats


def agreement(x_BxLxD, unembedding: Unembedding, output: TeacherOutput, batch: Batch) -> Agreement:
    """Compares a model's final activations with its teacher's, `CHUNK` tokens at a time."""

    def add(sums, part):
        x_BxTxD, theirs_BxTxD, targets_BxT, mask_BxT = part
        ours_BxTxV = unembedding.logits(x_BxTxD)
        theirs_BxTxV = output.unembedding.logits(theirs_BxTxD)
        log_p_BxTxV = jax.nn.log_softmax(theirs_BxTxV)
        target_BxT = jnp.take_along_axis(log_p_BxTxV, targets_BxT[..., None], -1)[..., 0]
        found = (
            jnp.ones_like(target_BxT),
            divergence(theirs_BxTxV, ours_BxTxV, KdConfig()),
            ours_BxTxV.argmax(-1) == theirs_BxTxV.argmax(-1),
            -target_BxT,
        )
        return Agreement(*(s + (f * mask_BxT).sum() for s, f in zip(sums, found, strict=True))), ()

    parts = x_BxLxD, output.x_BxLxD, batch.targets_BxL, batch.mask_BxL
    return jax.lax.scan(add, Agreement(*[jnp.zeros(())] * 4), jax.tree.map(_cut, parts))[0]


def record_top_k(output: TeacherOutput, kd: KdConfig) -> TopKLogProbs:
    """A teacher's top-k log-probabilities for its cache, computed `CHUNK` tokens at a time."""

    def of_chunk(x_BxTxD):
        return top_k_log_probs(output.unembedding.logits(x_BxTxD), kd)

    batch, length = output.x_BxLxD.shape[:2]
    chunks = jax.lax.map(of_chunk, _cut(output.x_BxLxD))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(batch, -1, kd.top_k)[:, :length], chunks)


def _cut(x_BxL):
    return cut(x_BxL, min(CHUNK, x_BxL.shape[1]))
