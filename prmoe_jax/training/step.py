"""The state of a run at step 0, and the training step with gradient accumulation."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from prmoe_jax.config.schema import Config, group_rows
from prmoe_jax.distill.loss import Distiller
from prmoe_jax.model.batch import Batch
from prmoe_jax.model.loss import cross_entropy, forward, totals, training_loss
from prmoe_jax.model.state import TrainState
from prmoe_jax.model.transformer import Transformer, init_model, update_router_bias
from prmoe_jax.parallel import sharding
from prmoe_jax.parallel.axes import replicated
from prmoe_jax.parallel.microbatches import add_up
from prmoe_jax.parallel.sharding import init_sharded
from prmoe_jax.training.optimizer import learning_rate, make_optimizer, trained, with_frozen

# By default a TPU's compiler leaves most of the vector memory unused. With half of it, the matrix
# products of a step take 10 % less time. SparseCores run collectives beside other work: in a dense
# 1.3B's step on v5p (modelled), this hides 21 of the 24 ms of collectives. Compilers for chips
# without SparseCores accept the options.
OFFLOADED = (
    "all_gather 2d_all_gather 3d_all_gather reduce_scatter nd_reduce_scatter all_reduce "
    "dense_all_to_all"
).split()
COMPILER_OPTIONS = {
    "tpu": {"xla_tpu_scoped_vmem_limit_kib": "65536"}
    | {f"xla_tpu_enable_sparse_core_collective_offload_{name}": "true" for name in OFFLOADED}
}


def init_state(config: Config) -> TrainState:
    """The training state at step 0; call it under jit, or under eval_shape for its shapes."""
    model = init_model(config)
    optimizer = make_optimizer(config).init(trained(config, model))
    return TrainState(jnp.zeros((), jnp.int32), model, optimizer)


def make_train_step(
    config: Config, distiller: Distiller | None = None
) -> Callable[..., tuple[TrainState, dict]]:
    """A function of (state, batch) that makes one update and returns the new state and metrics.

    The metrics are loss, grad_norm, learning_rate, kd_weight (with a distiller), and sums, which
    `metrics.summarise` turns into means. If a teacher runs beside the student, the teacher's model
    is the third argument.
    """
    optimizer = make_optimizer(config)
    rate = learning_rate(config)

    def train_step(
        state: TrainState, batch: Batch, teacher_model: Transformer | None = None
    ) -> tuple[TrainState, dict]:
        total = totals(batch, config)
        kd_weight = distiller.weight(state.step) if distiller else 0.0
        # A row's key depends on its index in the whole batch, so that microbatches don't change it.
        key = jax.random.fold_in(jax.random.key(config.seed + 1), state.step)
        rows = jnp.arange(config.train.batch_size)
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
        inputs, microbatches = (batch, keys_B), config.train.accumulate
        rows_together = group_rows(config, distiller and distiller.teacher)
        balanced = config.moe.balance == "batch" and config.moe.aux_loss_weight
        if balanced and microbatches > 1:

            def choices(batch_and_keys):
                sums = forward(state.model, *batch_and_keys, execution=config.execution)
                return [router.assigned_E for router in sums.routers]

            total = total._replace(assigned=add_up(choices, inputs, microbatches, rows_together))

        def loss(part, batch_and_keys):
            model, (batch, keys_B) = with_frozen(part, state.model), batch_and_keys
            measure = cross_entropy(config.train.z_loss)
            if distiller:
                measure = distiller.measure(teacher_model, keys_B, kd_weight)
            sums = forward(model, batch, keys_B, measure, config.execution)
            return training_loss(sums, total, config), sums

        part = trained(config, state.model)
        gradient, sums = add_up(
            partial(jax.grad(loss, has_aux=True), part),
            inputs,
            microbatches,
            rows_together,
            lambda sums: (sharding.constrain(sums[0]), sums[1]),
        )
        gradient = sharding.constrain(gradient)
        with jax.named_scope("optimizer"):
            updates, optimizer_state = optimizer.update(gradient, state.optimizer, part)
            model = with_frozen(optax.apply_updates(part, updates), state.model)
        if config.moe.bias_update_rate:
            update_router_bias(model, sums.routers, config.moe.bias_update_rate)
            model = with_frozen(trained(config, model), state.model)
        metrics = {
            "loss": training_loss(sums, total, config),
            "grad_norm": optax.tree.norm(gradient),
            "learning_rate": rate(state.step),
            "sums": sums,
        }
        if distiller:
            metrics["kd_weight"] = kd_weight
        return TrainState(state.step + 1, model, optimizer_state), metrics

    return train_step


def sharded_state(config: Config, mesh: Mesh) -> TrainState:
    """The training state at step 0; each device computes only its own part."""
    return init_sharded(lambda: init_state(config), mesh)


def compile_train_step(
    config: Config, mesh: Mesh, distiller: Distiller | None = None
) -> jax.stages.Wrapped:
    """`make_train_step` compiled for a mesh; its state argument is donated."""
    places = sharding.shardings(jax.eval_shape(lambda: init_state(config)), mesh)
    return jax.jit(
        make_train_step(config, distiller),
        donate_argnums=0,
        out_shardings=(places, replicated(mesh)),
        compiler_options=compiler_options(mesh),
    )


def compiler_options(mesh: Mesh) -> dict[str, str] | None:
    """Options for the compiler of this mesh's devices."""
    return COMPILER_OPTIONS.get(mesh.devices.flat[0].platform)
