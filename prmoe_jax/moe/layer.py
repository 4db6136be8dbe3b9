"""The MoE layer: route, dispatch, experts, combine, and the residual MLP (shared expert)."""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from prmoe_jax.config.routers import capacity
from prmoe_jax.config.schema import AUTO, ExecutionConfig, ModelConfig, MoeConfig
from prmoe_jax.moe import dispatch, exchange
from prmoe_jax.moe.exchange import ExpertParallel, mark_varying
from prmoe_jax.moe.experts import Experts, Local
from prmoe_jax.moe.routing import RouterMetrics, Routing, route
from prmoe_jax.nn import remat
from prmoe_jax.nn.mlp import MLP, MLPShape, add_bias, broadcast
from prmoe_jax.nn.precision import Precision
from prmoe_jax.nn.quantized import narrowed
from prmoe_jax.parallel import sharding
from prmoe_jax.parallel.axes import batch_axes, expert_axes, platform, splits_experts

NEVER = -1e30  # a router's score of an expert that the layer doesn't have


class ExpertSums(NamedTuple):
    """Sums over the tokens that each expert keeps in evaluation, float32 [E].

    The gate is the token's weight for the expert; with a residual MLP, times the experts' share of
    the mix.
    """

    tokens: jax.Array
    norm: jax.Array  # ‖output‖
    norm_square: jax.Array  # ‖output‖²
    added_norm: jax.Array  # gate · ‖output‖


class MoE(nnx.Module):
    """Top-k routed experts, optionally mixed with a residual MLP (paper, section 4.1.2).

    With the MLP, y = c₀ · experts(x) + c₁ · mlp(x) and c = softmax(W x + b), so that a token that
    all experts dropped still passes the MLP. `model.residual_mix` may fix c at (1, 1) or (½, ½), or
    make it (1, σ(w x)), as for the shared expert of Qwen2-MoE.
    Training (calls with keys) and evaluation have separate capacities.
    """

    def __init__(self, experts: int, model: ModelConfig, moe: MoeConfig, key: jax.Array):
        keys = jax.random.split(key, 5)
        d_model = model.d_model
        # Router and mix are initialised like torch.nn.Linear, as in DeepSpeed.
        bound = d_model**-0.5

        def uniform(key, *dims):
            return nnx.Param(jax.random.uniform(key, dims, minval=-bound, maxval=bound))

        self.top_k, self.moe, self.residual_mix = model.top_k, moe, model.residual_mix
        self.normalize, self.dtype = model.normalizes, model.dtype
        self.w_router = uniform(keys[0], d_model, experts)
        biased = model.biases == "every"
        self.b_router = nnx.Param(jnp.zeros(experts)) if biased else None
        tied = moe.expert_init == "tied"
        self.experts = Experts(experts, MLPShape.of(model, model.expert_width), keys[1], tied)
        shape = MLPShape.of(model, model.residual_width)
        self.mlp = MLP.drawn(shape, keys[1] if tied else keys[2]) if model.residual else None
        learned = model.residual and model.residual_mix == "learned"
        gated = model.residual and model.residual_mix == "sigmoid"
        self.w_mix = uniform(keys[3], d_model, 2) if learned else None
        self.b_mix = uniform(keys[4], 2) if learned else None
        self.w_shared = uniform(keys[3], d_model) if gated else None
        # The train step updates it (`transformer.update_router_bias`); it has no gradient.
        self.bias_router = nnx.Variable(jnp.zeros(experts)) if moe.bias_update_rate else None

    def __call__(
        self,
        x_BxLxD: jax.Array,
        valid_BxL: jax.Array,
        keys_B: jax.Array | None = None,
        split: bool = False,
        execution: ExecutionConfig = AUTO,
        has_E: jax.Array | None = None,
    ) -> tuple[jax.Array, RouterMetrics]:
        """Returns the layer's output, with x's shape and dtype, and the router's statistics.

        Args:
          x_BxLxD: normalised activations.
          valid_BxL: False for padding, which is not routed.
          keys_B: one key per sequence in training, None in evaluation.
          split: whether the devices of `fsdp_experts` hold parts of the experts.
          execution: how tokens are brought to their experts.
          has_E: False for experts that the layer is computed without, on one device. The others
            keep their capacity.
        """
        y_BxLxD, kept_BxL, metrics = self._spread(
            x_BxLxD, valid_BxL, keys_B, split, execution, has_E
        )
        if self.mlp is None:
            return y_BxLxD, metrics._replace(added_square=sum_of_squares(y_BxLxD, valid_BxL))

        with jax.named_scope("routing"):
            mix_BxLx2 = self._mix(x_BxLxD)
        unserved_BxL = valid_BxL & ~kept_BxL
        metrics = metrics._replace(
            coefficient=(mix_BxLx2[..., 0] * valid_BxL).sum(),
            coefficient_unserved=(mix_BxLx2[..., 0] * unserved_BxL).sum(),
        )
        with jax.named_scope("mlp"):
            residual_BxLxD = remat.save_matmul(self.mlp(x_BxLxD))
        of_experts, of_mlp = (broadcast(mix_BxLx2[..., i, None], x_BxLxD) for i in (0, 1))
        y_BxLxD = y_BxLxD * of_experts
        metrics = metrics._replace(added_square=sum_of_squares(y_BxLxD, valid_BxL))
        return y_BxLxD + residual_BxLxD * of_mlp, metrics

    def decide(self, x_BxLxD: jax.Array, valid_BxL: jax.Array) -> Routing:
        """The routing decision for these activations in evaluation, on one device.

        Args:
          x_BxLxD, valid_BxL: as for a call.

        Returns:
          The decision, in arrays [G, S, K]. Their tokens are in the order of x, so that they can
          be reshaped to [B, L, K]. With expert choice, K is E.
        """
        batch, length, width = x_BxLxD.shape
        tokens = self._group_size(batch, length, self.moe.eval_capacity_factor)
        x_GxSxD, valid_GxS = x_BxLxD.reshape(-1, tokens, width), valid_BxL.reshape(-1, tokens)
        return self._route(self._router(), x_GxSxD, valid_GxS, None)[0]

    def expert_sums(self, x_BxLxD: jax.Array, valid_BxL: jax.Array) -> ExpertSums:
        """What each expert does for the tokens in evaluation, on one device.

        Args:
          x_BxLxD, valid_BxL: as for a call.
        """
        parts, experts, norms = self._router(), Local(self.experts), []
        for first in range(0, self.experts.count, x_BxLxD.shape[-1]):
            measure = partial(_norms_in_columns, first)
            norm_BxLxD, _, _ = self._routed(
                parts, experts, "auto", x_BxLxD, valid_BxL, None, measure
            )
            norms.append(norm_BxLxD.astype(jnp.float32).reshape(-1, norm_BxLxD.shape[-1]))
        added_NxE = jnp.concatenate(norms, -1)[:, : self.experts.count]
        routing = jax.tree.map(
            lambda x: x.reshape(len(added_NxE), -1), self.decide(x_BxLxD, valid_BxL)
        )
        choice_NxKxE = jax.nn.one_hot(routing.expert_GxSxK, self.experts.count)
        gate_NxE = jnp.einsum("NK,NKE->NE", routing.weight_GxSxK, choice_NxKxE)
        norm_NxE = jnp.where(gate_NxE > 0, added_NxE / gate_NxE, 0)
        if self.mlp is not None:
            added_NxE *= self._mix(x_BxLxD)[..., 0].reshape(-1, 1)
        return ExpertSums(
            tokens=jnp.einsum("NK,NKE->E", routing.kept_GxSxK.astype(jnp.float32), choice_NxKxE),
            norm=norm_NxE.sum(0),
            norm_square=jnp.square(norm_NxE).sum(0),
            added_norm=added_NxE.sum(0),
        )

    def _router(self) -> dict:
        """The parameters that decide where tokens go."""
        return {name: getattr(self, name) for name in ("w_router", "b_router", "bias_router")}

    def _capacity_factor(self, keys) -> float:
        """An expert's capacity divided by its even share of a group; inf drops nothing."""
        return self.moe.eval_capacity_factor if keys is None else self.moe.capacity_factor

    def _group_size(self, batch: int, length: int, capacity_factor: float) -> int:
        """Tokens of a routing group when [batch, length] tokens are computed together."""
        tokens = min(self.moe.group_size or length, batch * length)
        if math.isinf(capacity_factor) and batch * length % tokens:
            return length  # nothing is dropped, so groups make no difference
        return tokens

    def _spread(self, x_BxLxD, valid_BxL, keys_B, split, execution, has_E):
        """Calls `_routed`; on a mesh, each device calls it for its own rows."""
        parts = self._router() | {"experts": self.experts}
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            parts["has_E"] = has_E
            return self._routed(
                parts, Local(self.experts), execution.dispatch, x_BxLxD, valid_BxL, keys_B
            )
        axes = batch_axes(mesh)
        rows = PartitionSpec(axes)
        places = sharding.specs(parts, mesh, in_use=True)
        if split:
            places["experts"] = sharding.specs(parts, mesh)["experts"]

        def local(parts, *inputs):
            parts = mark_varying(parts, axes)
            training = keys_B is not None
            factors = Precision.of(self.dtype, execution, platform(), training).factors
            own = sharding.all_gather_experts(parts["experts"], places["experts"], factors)
            own = narrowed(own, factors)
            experts: Local | ExpertParallel = Local(own)
            if splits_experts(mesh):
                experts = ExpertParallel(
                    own,
                    expert_axes(mesh, experts.count),
                    exchange.resolve(execution.exchange, mesh),
                    execution.buffer_factor,
                )
            y_BxLxD, kept_BxL, metrics = self._routed(parts, experts, execution.dispatch, *inputs)
            return y_BxLxD, kept_BxL, jax.lax.psum(mark_varying(metrics, axes), axes)

        return jax.shard_map(
            local,
            in_specs=(places, rows, rows, None if keys_B is None else rows),
            out_specs=(rows, rows, PartitionSpec()),
        )(parts, x_BxLxD, valid_BxL, keys_B)

    def _routed(self, parts: dict, experts, by: str, x_BxLxD, valid_BxL, keys_B, measure=None):
        """Returns the experts' output, which tokens were kept, and the router's statistics."""
        batch, length, width = x_BxLxD.shape
        capacity_factor = self._capacity_factor(keys_B)
        tokens = self._group_size(batch, length, capacity_factor)
        x_GxSxD = x_BxLxD.reshape(-1, tokens, width)
        valid_GxS = valid_BxL.reshape(-1, tokens)
        keys_G = None
        if keys_B is not None:
            # A group's key is the key of its first sequence, with the group's index in that
            # sequence folded in.
            within = jnp.arange(max(1, length // tokens))
            split = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
            keys_G = split(keys_B[:: max(1, tokens // length)], within).reshape(-1)

        with jax.named_scope("routing"):
            routing, metrics, slots = self._route(parts, x_GxSxD, valid_GxS, keys_G)
        dropless, top_k = math.isinf(capacity_factor), routing.expert_GxSxK.shape[-1]
        chosen = by == "auto" and dropless and not measure
        rounds: jax.Array | int = 0
        with jax.named_scope("dispatch"):
            if chosen and experts.are_few(batch * length, top_k):
                y_GxSxD = dispatch.few_through_experts(x_GxSxD, routing, experts)
            else:
                name = dispatch.resolve(by, platform(), dropless)
                y_GxSxD, rounds = dispatch.through_experts(
                    name, x_GxSxD, routing, experts, slots, measure
                )
        metrics = metrics._replace(rounds=rounds * metrics.tokens)
        kept_BxL = routing.kept_GxSxK.any(-1).reshape(batch, length)
        return y_GxSxD.reshape(x_BxLxD.shape), kept_BxL, metrics

    def _route(self, parts: dict, x_GxSxD, valid_GxS, keys_G):
        """Returns the decision, its statistics, and the number of slots of an expert per group."""
        x_GxSxD = x_GxSxD.astype(jnp.float32)
        if self.moe.noise == "jitter" and keys_G is not None:
            keys_G, jitter_keys_G = jax.vmap(jax.random.split, out_axes=1)(keys_G)
            x_GxSxD = jax.vmap(_jitter)(x_GxSxD, jitter_keys_G)
        w_router_DxE, bias = parts["w_router"][...], parts["bias_router"]
        experts, tokens = w_router_DxE.shape[-1], x_GxSxD.shape[1]
        factor = self._capacity_factor(keys_G)
        slots = capacity(tokens, experts, factor, self.top_k, self.moe.min_capacity)
        bias_E = None if bias is None else jax.lax.stop_gradient(bias[...])
        logits_GxSxE = add_bias(dot32(x_GxSxD, w_router_DxE), parts["b_router"])
        if (has_E := parts.get("has_E")) is not None:
            logits_GxSxE = jnp.where(has_E, logits_GxSxE, NEVER)
            bias_E = None if bias_E is None else jnp.where(has_E, bias_E, NEVER)
        routing, metrics = route(
            logits_GxSxE,
            valid_GxS,
            self.moe,
            top_k=self.top_k,
            normalize=self.normalize,
            slots=slots,
            bias_E=bias_E,
            keys_G=keys_G,
        )
        return routing, metrics, slots

    def _mix(self, x_BxLxD: jax.Array) -> jax.Array:
        """The mixing weights of the experts and of the residual MLP, float32 [B, L, 2]."""
        if self.residual_mix == "learned":
            x_BxLxD = x_BxLxD.astype(jnp.float32)
            return jax.nn.softmax(dot32(x_BxLxD, self.w_mix[...]) + self.b_mix[...])
        if self.residual_mix == "sigmoid":
            shared_BxL = jax.nn.sigmoid(dot32(x_BxLxD.astype(jnp.float32), self.w_shared[...]))
            return jnp.stack([jnp.ones_like(shared_BxL), shared_BxL], -1)
        weight = {"sum": 1.0, "half": 0.5}[self.residual_mix]
        return jnp.full((*x_BxLxD.shape[:-1], 2), weight)


def sum_of_squares(x_BxLxD: jax.Array, valid_BxL: jax.Array) -> jax.Array:
    """The squared norms of the valid tokens, summed, in float32."""
    return (jnp.square(x_BxLxD.astype(jnp.float32)).sum(-1) * valid_BxL).sum()


def _norms_in_columns(first: int, y_RxD: jax.Array, expert_R: jax.Array) -> jax.Array:
    """The norm of each output of expert `first + d` in column d of D, and zeros elsewhere."""
    norm_Rx1 = jnp.linalg.norm(y_RxD.astype(jnp.float32), axis=-1, keepdims=True)
    return norm_Rx1 * jax.nn.one_hot(expert_R - first, y_RxD.shape[-1])


def _jitter(x_SxD: jax.Array, key: jax.Array) -> jax.Array:
    """Multiplies each value by its own draw from U(0.99, 1.01)."""
    return x_SxD * jax.random.uniform(key, x_SxD.shape, minval=0.99, maxval=1.01)


def dot32(x_D: jax.Array, w_DxN: jax.Array) -> jax.Array:
    """A product in full float32; by default, TPUs and GPUs round its factors."""
    return jnp.matmul(x_D, w_DxN, precision=jax.lax.Precision.HIGHEST)
