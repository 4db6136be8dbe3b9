"""The distillation term that a train step adds to its loss, and the weight of that term."""

import dataclasses

import jax
import jax.numpy as jnp

from prmoe_jax.config.schema import Config
from prmoe_jax.distill.loss import run_teacher, token_sums
from prmoe_jax.model.batch import Batch
from prmoe_jax.model.loss import Measure
from prmoe_jax.model.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class Distiller:
    """The distillation of a student, from a running teacher or from recorded predictions."""

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

        Args:
          teacher_model: a running teacher's model, or None; no gradient reaches it.
          keys_B: the student's keys; see `run_teacher`.
          weight: the weight of this divergence in the loss.
        """

        def measure(model: Transformer, x_BxLxD: jax.Array, batch: Batch) -> dict[str, jax.Array]:
            output = batch.teacher_top_k
            if self.teacher:
                output = run_teacher(teacher_model, batch, self.config, keys_B)
            unembedding = model.unembedding(x_BxLxD.dtype)
            weights = 1.0, self.config.train.z_loss, weight
            return token_sums(x_BxLxD, unembedding, output, batch, self.config.kd, weights)

        return measure
