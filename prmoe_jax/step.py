"""The compiled steps: initialise, train (with gradient accumulation), evaluate."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from prmoe_jax.config import Config, group_rows
from prmoe_jax.data.pipeline import Batch
from prmoe_jax.distill import teach
from prmoe_jax.loss import Sums, forward, totals, training_loss
from prmoe_jax.model import Transformer, balance
from prmoe_jax.optimizer import learning_rate, make_optimizer
from prmoe_jax.parallel import rules
from prmoe_jax.parallel.mesh import replicated

# A TPU's compiler leaves most of the vector memory unused unless told; with half of it the matrix
# products of a step take a tenth less.
COMPILER_OPTIONS = {"tpu": {"xla_tpu_scoped_vmem_limit_kib": "65536"}}


class TrainState(NamedTuple):
    """All that training changes."""

    step: jax.Array  # int32, updates done
    model: Transformer
    optimizer: optax.OptState


def init_model(config: Config) -> Transformer:
    """The model at step 0; a function of the seed alone."""
    return Transformer(config.model, config.moe, jax.random.key(config.seed))


def init_state(config: Config) -> TrainState:
    """The training state at step 0; call it under jit, or eval_shape for its shapes alone."""
    model = init_model(config)
    return TrainState(jnp.zeros((), jnp.int32), model, make_optimizer(config).init(model))


def make_train_step(
    config: Config, teacher: Config | None = None
) -> Callable[..., tuple[TrainState, dict]]:
    """A function of (state, batch) that makes one update; returns the state and its metrics.

    Those are loss, grad_norm, learning_rate, kd_weight where something teaches, and sums, of which
    `metrics.summarise` makes means.

    With a teacher's config it is one of (state, batch, the teacher's model). What a batch has of a
    teacher's recorded predictions is learnt, too.
    """
    optimizer = make_optimizer(config)
    rate = learning_rate(config)

    def train_step(
        state: TrainState, batch: Batch, teacher_model: Transformer | None = None
    ) -> tuple[TrainState, dict]:
        total = totals(batch, config)
        taught = teacher is not None or batch.taught is not None
        kd_weight = distillation_weight(config, state.step) if taught else 0.0
        # Randomness follows the row in the batch, so that portions don't change it.
        key = jax.random.fold_in(jax.random.key(config.seed + 1), state.step)
        rows = jnp.arange(config.train.batch_size)
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)

        def loss(model, batch_and_keys):
            batch, keys_B = batch_and_keys
            lesson = batch.taught
            if teacher:
                lesson = teach(teacher, teacher_model, batch, config.teacher, keys_B)
            sums = forward(model, batch, config.moe.capacity_factor, keys_B, lesson, config.kd)
            return training_loss(sums, total, config, kd_weight), sums

        gradient, sums = add_up(
            partial(jax.grad(loss, has_aux=True), state.model),
            (batch, keys_B),
            config.train.accumulate,
            group_rows(config, teacher),
            lambda sums: (rules.constrain(sums[0]), sums[1]),
        )
        gradient = rules.constrain(gradient)
        with jax.named_scope("optimizer"):
            updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.model)
            model = optax.apply_updates(state.model, updates)
        if config.moe.bias_update_rate:
            balance(model, sums.routers, config.moe.bias_update_rate)
        metrics = {
            "loss": training_loss(sums, total, config, kd_weight),
            "grad_norm": optax.tree.norm(gradient),
            "learning_rate": rate(state.step),
            "sums": sums,
        }
        if taught:
            metrics["kd_weight"] = kd_weight
        return TrainState(state.step + 1, model, optimizer_state), metrics

    return train_step


def add_up(
    measure: Callable[[Any], Any],
    batch: Any,
    portions: int,
    rows_together: int,
    place: Callable[[Any], Any] = lambda sums: sums,
) -> Any:
    """Adds up `measure(portion)` over the portions of a batch, computed one after the other.

    Every portion takes rows from all over the batch, so that no device sits idle.

    Args:
      measure: maps a portion of the batch to sums over its rows, a pytree of arrays.
      batch: a pytree of arrays [B, …].
      portions: their number; with 1, `measure` is called once, on the batch as it is.
      rows_together: neighbouring rows that share a portion, see `config.group_rows`. B is a
        multiple of portions · rows_together.
      place: constrains the sums to their partition of the mesh.
    """
    if portions == 1:
        return measure(batch)

    def cut(x_BxL):
        """[B, …] to [portions, B/portions, …]."""
        dims = x_BxL.shape[1:]
        x = x_BxL.reshape(-1, portions, rows_together, *dims).swapaxes(0, 1)
        return x.reshape(portions, -1, *dims)

    def add(sums, portion):
        return jax.tree.map(jnp.add, sums, measure(portion)), None

    parts = jax.tree.map(cut, batch)
    shapes = jax.eval_shape(measure, jax.tree.map(lambda x: x[0], parts))
    zeros = place(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))
    return jax.lax.scan(add, zeros, parts)[0]


def distillation_weight(config: Config, step: jax.Array) -> jax.Array:
    """What the distance from the teacher counts for at a step."""
    weight = jnp.float32(config.kd.weight)
    if config.kd.decay == "linear":
        weight *= 1 - step / config.kd_steps
    return weight


def sharded_state(config: Config, mesh: Mesh) -> TrainState:
    """The training state at step 0, each device making its own part."""
    return made(lambda: init_state(config), mesh)


def made(make: Callable, mesh: Mesh, *arguments):
    """What `make` makes of random numbers, each device its own part; placed by the rules."""
    places = rules.shardings(jax.eval_shape(make, *arguments), mesh)
    on_cpus = mesh.devices.flat[0].platform == "cpu"
    # Of a draw, LLVM's last two levels make the same code in seven times the time.
    options = {"xla_backend_optimization_level": 1} if on_cpus else None
    return jax.jit(make, out_shardings=places, compiler_options=options)(*arguments)


def on_mesh(
    config: Config, mesh: Mesh, teacher: Config | None = None
) -> Callable[..., tuple[TrainState, dict]]:
    """`make_train_step` compiled for a mesh; the state it is given is used up."""
    places = rules.shardings(jax.eval_shape(lambda: init_state(config)), mesh)
    return jax.jit(
        make_train_step(config, teacher),
        donate_argnums=0,
        out_shardings=(places, replicated(mesh)),
        compiler_options=compiler_options(mesh),
    )


def compiler_options(mesh: Mesh) -> dict[str, str] | None:
    """What to tell the compiler of this mesh's devices."""
    return COMPILER_OPTIONS.get(mesh.devices.flat[0].platform)


def make_eval_step(config: Config) -> Callable[[Transformer, Batch], Sums]:
    """A function of (model, batch) that measures a batch, without noise or dropout."""
    return lambda model, batch: forward(model, batch, config.moe.eval_capacity_factor)
