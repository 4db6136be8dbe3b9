"""Distillation (MoS, paper section 4.2): what a teacher says of a batch, and how far a student is.

The teacher is any model with the student's vocabulary; `teacher.py` restores it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from prmoe_jax.config import Config, KdConfig, TeacherConfig
from prmoe_jax.data.pipeline import Batch
from prmoe_jax.model import Transformer, fold_in

# Tokens of a sequence whose logits are alive at once, the student's and the teacher's.
CHUNK = 256


class Lesson(NamedTuple):
    """What a teacher says of a batch: its final activations, and its output matrix."""

    x_BxLxD: jax.Array
    table_VxD: jax.Array


def teach(
    teacher: Config, model: Transformer, batch: Batch, settings: TeacherConfig, keys_B
) -> Lesson:
    """Runs a frozen teacher over a batch.

    Args:
      teacher: its config.
      model: its parameters; no gradient reaches them.
      batch: the student's.
      settings: of the student's config: in which mode it teaches, with which capacity.
      keys_B: the student's keys, from which a teacher in training mode makes its own.
    """
    model = jax.lax.stop_gradient(model)
    capacity_factor = settings.capacity_factor or teacher.moe.eval_capacity_factor
    keys_B = fold_in(keys_B, 1 << 16)
    if settings.mode == "train":
        capacity_factor = teacher.moe.capacity_factor
    x_BxLxD, _ = model(
        batch.tokens_BxL,
        batch.segments_BxL,
        capacity_factor=capacity_factor,
        keys_B=keys_B if settings.mode == "train" else None,
    )
    return Lesson(x_BxLxD, model.output_table(x_BxLxD.dtype))


class TokenSums(NamedTuple):
    """Sums over the targets that count."""

    lm_loss: jax.Array  # cross-entropy in nats
    z_loss: jax.Array  # log(Z)²
    kd_loss: jax.Array  # T² · KL in nats


def token_sums(x_BxLxD, table_VxD, lesson: Lesson, batch: Batch, kd: KdConfig) -> TokenSums:
    """Cross-entropy and distance from the teacher, `CHUNK` tokens of every sequence at a time.

    Neither model's logits are ever alive for more than those; the backward pass makes them again.
    """
    length = x_BxLxD.shape[1]
    chunk = min(CHUNK, length)

    def cut(x_BxL):
        """[B, L, …] to [chunks, B, chunk, …]; what is padded is masked."""
        x = jnp.pad(x_BxL, [(0, 0), (0, -length % chunk)] + [(0, 0)] * (x_BxL.ndim - 2))
        return x.reshape(x.shape[0], -1, chunk, *x.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def add(sums, part):
        x_BxTxD, taught_BxTxD, targets_BxT, mask_BxT = part
        with jax.named_scope("logits"):
            logits_BxTxV = product(x_BxTxD, table_VxD)
            taught_BxTxV = product(taught_BxTxD, lesson.table_VxD)
            log_z_BxT = jax.nn.logsumexp(logits_BxTxV, axis=-1)
            target_BxT = jnp.take_along_axis(logits_BxTxV, targets_BxT[..., None], -1)[..., 0]
            found = (
                log_z_BxT - target_BxT,
                jnp.square(log_z_BxT),
                divergence(taught_BxTxV, logits_BxTxV, kd),
            )
        return TokenSums(*(s + (f * mask_BxT).sum() for s, f in zip(sums, found, strict=True))), ()

    parts = x_BxLxD, lesson.x_BxLxD, batch.targets_BxL, batch.mask_BxL
    return jax.lax.scan(add, TokenSums(*[jnp.zeros(())] * 3), jax.tree.map(cut, parts))[0]


def product(x_BxTxD: jax.Array, table_VxD: jax.Array) -> jax.Array:
    """Logits, float32."""
    return jnp.einsum("BTD,VD->BTV", x_BxTxD, table_VxD, preferred_element_type=jnp.float32)


def divergence(teacher_BxTxV, student_BxTxV, kd: KdConfig) -> jax.Array:
    """T² times the divergence of softmax(student / T) from softmax(teacher / T); nats, [B, T].

    'forward' is KL(teacher ‖ student), as in the paper, 'reverse' KL(student ‖ teacher), 'top_k'
    the forward one over the teacher's k likeliest tokens and all others as one more outcome.
    Logits are float32.
    """
    teacher, student = (
        jax.nn.log_softmax(logits / kd.temperature) for logits in (teacher_BxTxV, student_BxTxV)
    )
    if kd.kind == "top_k":
        teacher, tokens_BxTxK = jax.lax.top_k(teacher, kd.top_k)
        student = jnp.take_along_axis(student, tokens_BxTxK, -1)
        teacher, student = _with_the_rest(teacher), _with_the_rest(student)
    if kd.kind == "reverse":
        teacher, student = student, teacher
    return kd.temperature**2 * (jnp.exp(teacher) * (teacher - student)).sum(-1)


def _with_the_rest(log_p_BxTxK: jax.Array) -> jax.Array:
    """Log-probabilities, with that of none of them behind."""
    some_BxTx1 = jax.nn.logsumexp(log_p_BxTxK, axis=-1, keepdims=True)
    rest_BxTx1 = jnp.log(-jnp.expm1(jnp.minimum(some_BxTx1, -1e-7)))  # rounding may make it 0
    return jnp.concatenate([log_p_BxTxK, rest_BxTx1], axis=-1)
