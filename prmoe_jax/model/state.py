"""What a training step changes."""

from typing import NamedTuple

import jax
import optax

from prmoe_jax.model.transformer import Transformer


class TrainState(NamedTuple):
    """Everything that training changes."""

    step: jax.Array  # int32, number of updates so far
    model: Transformer
    optimizer: optax.OptState
