"""The distillation loss (MoS, paper section 4.2): a student's divergence from its teacher.

The teacher is any model with the student's vocabulary; `teacher.py` restores it. K: top k tokens.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from prmoe_jax.config.schema import Config, KdConfig
from prmoe_jax.model.batch import Batch, TopKLogProbs
from prmoe_jax.model.chunks import weighted_sums
from prmoe_jax.model.loss import Measure, token_nats
from prmoe_jax.model.transformer import Transformer, Unembedding, fold_in

LEAST_REST = 1e-7  # lower bound of P(any other token), which rounding can make 0


@dataclasses.dataclass(frozen=True)
class Distiller:
    """The distillation term that a train step adds to its loss, and the weight of that term."""

    config: Config  # the student's config
    # The config of a running teacher; None if the batches hold recorded predictions.
    teacher: Config | None = None

    def weight(self, step: jax.Array) -> jax.Array:
        """The weight of the divergence from the teacher at a step."""
        weight = jnp.float32(self.config.kd.weight)
        if self.config.kd.decay == "linear":
            weight *= 1 - step / self.config.kd_stop
        return weight

    def measure(
        self, teacher_model: Transformer | None, keys_B: jax.Array | None, weight: jax.Array
    ) -> Measure:
        """A `Measure` for `model.loss.forward` that adds the divergence from the teacher (kd_loss).

        No gradient reaches the running teacher's model, if there is one. `keys_B` are the student's
        random keys, and `weight` is that of the divergence in the loss.
        """

        def measure(model: Transformer, x_BxLxD: jax.Array, batch: Batch) -> dict[str, jax.Array]:
            output = batch.teacher_top_k
            if self.teacher:
                output = run_teacher(teacher_model, batch, self.config, keys_B)
            unembedding = model.unembedding(x_BxLxD.dtype)
            weights = 1.0, self.config.train.z_loss, weight
            return token_sums(x_BxLxD, unembedding, output, batch, self.config.kd, weights)

        return measure


class TeacherOutput(NamedTuple):
    """A teacher's final activations for a batch, and its map to logits."""

    x_BxLxD: jax.Array
    unembedding: Unembedding


def run_teacher(
    model: Transformer, batch: Batch, config: Config, keys_B: jax.Array | None
) -> TeacherOutput:
    """Runs a frozen teacher over the batch of a student with this config.

    A teacher in mode 'train' derives its random keys from the student's.
    """
    keys_B = fold_in(keys_B, 1 << 16) if config.teacher.mode == "train" else None
    x_BxLxD, _ = model(batch.tokens_BxL, batch.segments_BxL, keys_B, config.execution)
    return TeacherOutput(x_BxLxD, model.unembedding(x_BxLxD.dtype))


def token_sums(
    x_BxLxD,
    unembedding: Unembedding,
    output: TeacherOutput | TopKLogProbs,
    batch: Batch,
    kd: KdConfig,
    weights: tuple,
) -> dict[str, jax.Array]:
    """`loss`, `lm_loss`, `z_loss` and `kd_loss` of `model.loss.Sums`, in chunks of tokens.

    Both models' logits exist for only one chunk at a time. `x_BxLxD` and `unembedding` are the
    student's; `weights` are those of `lm_loss`, `z_loss` and `kd_loss` in `loss`.
    """
    recorded = isinstance(output, TopKLogProbs)

    def measure(x_BxTxD, unembedding, inputs, of_teacher):
        theirs, targets_BxT, mask_BxT = inputs
        logits_BxTxV = unembedding.logits(x_BxTxD)
        if recorded:
            distance_BxT = divergence_from_top_k(theirs, logits_BxTxV, kd)
        else:
            distance_BxT = divergence(of_teacher.logits(theirs), logits_BxTxV, kd)
        found = *token_nats(logits_BxTxV, targets_BxT), distance_BxT
        return tuple((nats_BxT * mask_BxT).sum() for nats_BxT in found)

    theirs, shared = (output, ()) if recorded else output
    inputs = theirs, batch.targets_BxL, batch.mask_BxL
    with jax.named_scope("logits"):
        loss, sums = weighted_sums(measure, x_BxLxD, unembedding, inputs, shared, weights)
    return {"loss": loss} | dict(zip(("lm_loss", "z_loss", "kd_loss"), sums, strict=True))


def divergence(teacher_BxTxV, student_BxTxV, kd: KdConfig) -> jax.Array:
    """Each token's divergence of student from teacher, by float32 logits, in nats: [B, T].

    Both distributions are softmax(logits / temperature), and the result is multiplied by
    temperature². The kind 'forward' is KL(teacher ‖ student), as in the paper; 'reverse' is
    KL(student ‖ teacher); 'top_k' is the forward KL over the teacher's top k tokens and one more
    outcome, any other token.
    """
    if kd.kind == "top_k":
        return divergence_from_top_k(top_k_log_probs(teacher_BxTxV, kd), student_BxTxV, kd)
    log_p, log_q = (
        jax.nn.log_softmax(logits / kd.temperature) for logits in (teacher_BxTxV, student_BxTxV)
    )
    return _kl(log_q, log_p, kd) if kd.kind == "reverse" else _kl(log_p, log_q, kd)


def top_k_log_probs(teacher_BxTxV, kd: KdConfig) -> TopKLogProbs:
    """The top k tokens of softmax(teacher / temperature), with float32 log-probabilities."""
    log_p, tokens = jax.lax.top_k(jax.nn.log_softmax(teacher_BxTxV / kd.temperature), kd.top_k)
    return TopKLogProbs(tokens, log_p)


def divergence_from_top_k(teacher: TopKLogProbs, student_BxTxV, kd: KdConfig) -> jax.Array:
    """`divergence` of kind 'top_k', from the teacher's top-k log-probabilities."""
    tokens_BxTxK, log_p_BxTxK = teacher
    log_q_BxTxV = jax.nn.log_softmax(student_BxTxV / kd.temperature)
    log_q_BxTxK = jnp.take_along_axis(log_q_BxTxV, tokens_BxTxK, -1)
    # The rest sums the other tokens, since 1 - Σ q would lose the gradient of a small rest.
    others_BxTxV = jnp.put_along_axis(log_q_BxTxV, tokens_BxTxK, -jnp.inf, -1, inplace=False)
    rest_BxTx1 = jax.nn.logsumexp(others_BxTxV, axis=-1, keepdims=True)
    log_q = jnp.concatenate([log_q_BxTxK, rest_BxTx1], axis=-1)
    some_BxTx1 = jax.nn.logsumexp(log_p_BxTxK, axis=-1, keepdims=True)
    rest_BxTx1 = jnp.log(-jnp.expm1(jnp.minimum(some_BxTx1, -LEAST_REST)))
    log_p = jnp.concatenate([log_p_BxTxK, rest_BxTx1], axis=-1)
    return _kl(log_p, log_q, kd)


def _kl(log_p, log_q, kd: KdConfig) -> jax.Array:
    return kd.temperature**2 * (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
