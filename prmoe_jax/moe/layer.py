"""The MoE layer: route, dispatch, experts, combine, and the residual branch beside them."""

import jax
import jax.numpy as jnp
from flax import nnx

from prmoe_jax.config import ModelConfig, MoeConfig
from prmoe_jax.moe import dispatch
from prmoe_jax.moe.experts import MLP, Experts
from prmoe_jax.moe.routing import RouterMetrics, capacity, route


class MoE(nnx.Module):
    """Top-k routed experts, optionally mixed with a fixed MLP (paper, section 4.1.2).

    With the residual, y = c₀ · experts(x) + c₁ · mlp(x), c = softmax(W x + b): a token that
    every expert dropped still gets its MLP.
    """

    def __init__(self, experts: int, model: ModelConfig, moe: MoeConfig, key: jax.Array):
        keys = jax.random.split(key, 5)
        d_model, std = model.d_model, model.init_std
        shape = (d_model, model.d_ff, std, std / (2 * model.layers) ** 0.5)
        # Router and coefficient start as torch's Linear does, which is what DeepSpeed leaves.
        bound = d_model**-0.5

        def uniform(key, *dims):
            return nnx.Param(jax.random.uniform(key, dims, minval=-bound, maxval=bound))

        self.top_k, self.moe = model.top_k, moe
        self.w_router = uniform(keys[0], d_model, experts)
        self.experts = Experts(experts, *shape, keys[1])
        self.mlp = MLP(*shape, keys[2]) if model.residual else None
        self.w_mix = uniform(keys[3], d_model, 2) if model.residual else None
        self.b_mix = uniform(keys[4], 2) if model.residual else None

    def __call__(
        self,
        x_BxLxD: jax.Array,
        valid_BxL: jax.Array,
        capacity_factor: float,
        keys_B: jax.Array | None = None,
    ) -> tuple[jax.Array, RouterMetrics]:
        """Returns the layer's output, shaped and typed as x, and its router's statistics.

        Args:
          x_BxLxD: normalised activations.
          valid_BxL: False for padding, which is not routed.
          capacity_factor: of an expert's even share of its group; inf drops nothing.
          keys_B: one key a sequence in training, None in evaluation.
        """
        batch, length, width = x_BxLxD.shape
        tokens = min(self.moe.group_size or length, batch * length)
        x_GxSxD = x_BxLxD.reshape(-1, tokens, width)
        valid_GxS = valid_BxL.reshape(-1, tokens)
        keys = {}
        if keys_B is not None:
            # A group inside a sequence folds its number into the sequence's key; a group of
            # several sequences goes by the first one's.
            within = jnp.arange(max(1, length // tokens))
            split = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
            keys_G = split(keys_B[:: max(1, tokens // length)], within).reshape(-1)
            if self.moe.random_token_selection:
                keys["random_selection_keys_G"] = keys_G
            if self.moe.second_expert_sampling:
                keys["sampling_keys_G"] = keys_G

        experts = self.experts.count
        slots = capacity(tokens, experts, capacity_factor, self.top_k, self.moe.min_capacity)
        logits_GxSxE = x_GxSxD.astype(jnp.float32) @ self.w_router[...]
        routing, metrics = route(logits_GxSxE, valid_GxS, top_k=self.top_k, slots=slots, **keys)
        y_GxSxD = dispatch.BACKENDS[self.moe.dispatch](x_GxSxD, routing, self.experts, slots)
        y_BxLxD = y_GxSxD.reshape(x_BxLxD.shape)
        if self.mlp is None:
            return y_BxLxD, metrics

        mix_BxLx2 = jax.nn.softmax(x_BxLxD.astype(jnp.float32) @ self.w_mix[...] + self.b_mix[...])
        coefficient = (mix_BxLx2[..., 0] * valid_BxL).sum()
        mix_BxLx2 = mix_BxLx2.astype(x_BxLxD.dtype)
        y_BxLxD = y_BxLxD * mix_BxLx2[..., :1] + self.mlp(x_BxLxD) * mix_BxLx2[..., 1:]
        return y_BxLxD, metrics._replace(coefficient=coefficient)
