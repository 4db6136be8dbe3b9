"""The training loss and its parts, as sums that add up over the microbatches of a batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from prmoe_jax.config.schema import AUTO, Config, ExecutionConfig
from prmoe_jax.model.batch import Batch
from prmoe_jax.model.chunks import each_token, weighted_sums
from prmoe_jax.model.transformer import Transformer
from prmoe_jax.moe.routing import RouterMetrics


class Sums(NamedTuple):
    """The measurements of one forward pass, as sums."""

    tokens: jax.Array  # unmasked targets
    loss: jax.Array  # without the routers' losses; only this and `routers` have gradients
    lm_loss: jax.Array  # cross-entropy in nats
    z_loss: jax.Array  # log(Z)²
    routers: list[RouterMetrics]  # one per MoE layer
    kd_loss: jax.Array | None = None  # T² · KL from the teacher in nats; None without one
    # Cross-entropy and mask of each target, both [B, L]; of `token_losses` alone.
    targets: tuple[jax.Array, jax.Array] | None = None


class Totals(NamedTuple):
    """The counts of a whole batch by which `training_loss` divides sums."""

    tokens: jax.Array  # unmasked targets
    routed: jax.Array  # tokens that are not padding
    groups: jax.Array  # routing groups that hold a token
    # Tokens assigned to each expert, per MoE layer; None if `Sums.routers` counts the whole batch.
    assigned: list[jax.Array] | None = None


def totals(batch: Batch, config: Config) -> Totals:
    """Counts a batch before it is cut into microbatches."""
    groups_GxS = batch.segments_BxL.reshape(-1, config.group_size)
    return Totals(
        tokens=jnp.maximum(batch.mask_BxL.sum(), 1),
        routed=jnp.maximum((batch.segments_BxL > 0).sum(), 1),
        groups=jnp.maximum((groups_GxS > 0).any(1).sum(), 1),
    )


Measure = Callable[[Transformer, jax.Array, Batch], dict[str, Any]]


def cross_entropy(z_weight: float = 0.0) -> Measure:
    """A measure of three fields of `Sums`; its `loss` is lm_loss + z_weight · z_loss."""

    def measure(model: Transformer, x_BxLxD: jax.Array, batch: Batch) -> dict[str, Any]:
        inputs, unembedding = (batch.targets_BxL, batch.mask_BxL), model.unembedding(x_BxLxD.dtype)
        with jax.named_scope("logits"):
            loss, sums = weighted_sums(_nats, x_BxLxD, unembedding, inputs, (), (1.0, z_weight))
        return {"loss": loss, "lm_loss": sums[0], "z_loss": sums[1]}

    return measure


def token_losses(model: Transformer, x_BxLxD: jax.Array, batch: Batch) -> dict[str, Any]:
    """A measure like `cross_entropy()` for evaluation, with the cross-entropy of each target."""
    unembedding = model.unembedding(x_BxLxD.dtype)
    with jax.named_scope("logits"):
        found = each_token(
            lambda x_BxTxD, targets_BxT: token_nats(unembedding.logits(x_BxTxD), targets_BxT),
            *(x_BxLxD, batch.targets_BxL),
        )
    nats_BxL, z_loss_BxL = (x_BxL * batch.mask_BxL for x_BxL in found)
    sums = {"loss": nats_BxL.sum(), "lm_loss": nats_BxL.sum(), "z_loss": z_loss_BxL.sum()}
    return sums | {"targets": (nats_BxL, batch.mask_BxL)}


def _nats(x_BxTxD, unembedding, inputs, _) -> tuple[jax.Array, ...]:
    """Cross-entropy and log(Z)², summed over unmasked targets."""
    targets_BxT, mask_BxT = inputs
    found = token_nats(unembedding.logits(x_BxTxD), targets_BxT)
    return tuple((nats_BxT * mask_BxT).sum() for nats_BxT in found)


def token_nats(logits_BxTxV: jax.Array, targets_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy and log(Z)² of each token, [B, T]."""
    log_z_BxT = jax.nn.logsumexp(logits_BxTxV, axis=-1)
    target_BxT = jnp.take_along_axis(logits_BxTxV, targets_BxT[..., None], -1)[..., 0]
    return log_z_BxT - target_BxT, jnp.square(log_z_BxT)


def forward(
    model: Transformer,
    batch: Batch,
    keys_B: jax.Array | None = None,
    measure: Measure | None = None,
    execution: ExecutionConfig = AUTO,
) -> Sums:
    """Runs the model over a batch or a microbatch.

    Args:
      keys_B: one key per sequence for training; None for evaluation.
      measure: maps final activations [B, L, D] to sums of losses, `cross_entropy()` by default; the
        measure of a distiller adds `kd_loss`.
    """
    measure = measure or cross_entropy()
    x_BxLxD, routers = model(batch.tokens_BxL, batch.segments_BxL, keys_B, execution)
    return Sums(tokens=batch.mask_BxL.sum(), routers=routers, **measure(model, x_BxLxD, batch))


def batch_balance(router: RouterMetrics, assigned_E: jax.Array) -> jax.Array:
    """E · Σ (an expert's share of the batch's assignments) · (its probability, summed over tokens).

    `router` may be of a microbatch; `assigned_E` counts the assignments in the whole batch.
    """
    share_E = assigned_E / jnp.maximum(assigned_E.sum(), 1)
    return len(share_E) * (share_E * router.prob_E).sum()


def training_loss(sums: Sums, total: Totals, config: Config) -> jax.Array:
    """Cross-entropy (+ z-loss, + distillation) + the routers' losses, summed over MoE layers.

    The losses of the microbatches add up to the loss of the whole batch.
    """
    zero, groups = jnp.zeros(()), total.groups
    balances = [router.aux_loss for router in sums.routers]
    if config.moe.balance == "batch":
        groups = total.routed
        assigned = total.assigned or [router.assigned_E for router in sums.routers]
        pairs = zip(sums.routers, assigned, strict=True)
        balances = [batch_balance(*pair) for pair in pairs]
    balance = sum(balances, zero)
    router_z = sum((router.z_loss for router in sums.routers), zero)
    return (
        sums.loss / total.tokens
        + config.moe.aux_loss_weight * balance / groups
        + config.moe.z_loss_weight * router_z / total.routed
    )
