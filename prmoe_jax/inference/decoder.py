"""A model as inference holds it: layer by layer, with the keys and values of the past."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from prmoe_jax.model.attention import KVCache
from prmoe_jax.model.transformer import Transformer, unstacked_blocks
from prmoe_jax.moe.experts import UnstackedExperts
from prmoe_jax.moe.layer import MoE
from prmoe_jax.nn.matmul import scores
from prmoe_jax.nn.parameters import PARAMETERS
from prmoe_jax.nn.quantized import quantize
from prmoe_jax.parallel import sharding


class Decoder(nnx.Module):
    """The layers of a `Transformer`, for one token after the other.

    No token is dropped, so that no sequence depends on what shares its batch.
    """

    def __init__(self, model: Transformer, weights: str):
        """Takes a model apart; to be called under jit.

        Args:
          model: the model.
          weights: float32, bfloat16 or int8; the arithmetic is in `model.config.dtype`.
        """
        config = model.config
        self.config = config
        self.tokens, self.positions, self.norm = model.tokens, model.positions, model.norm
        self.layers = nnx.List(unstacked_blocks(model))
        if weights != "float32":
            self._narrow(weights)

    def empty_cache(self, batch: int, room: int) -> list[KVCache]:
        """Room for keys and values of so many tokens, of every layer."""
        config = self.config
        shape = batch, config.heads, config.d_model // config.heads, room
        return [KVCache.empty(*shape, config.dtype) for _ in self.layers]

    def __call__(
        self, tokens_BxQ: jax.Array, valid_BxQ: jax.Array, past: list[KVCache], length_B: jax.Array
    ) -> tuple[jax.Array, list[KVCache]]:
        """Goes on from what was seen: the final activations [B, Q, D], and the past with them.

        Args:
          tokens_BxQ: the next tokens of each sequence: of a prompt, or one a sequence.
          valid_BxQ: False for padding, which stands at the end.
          past: from `empty_cache` or an earlier call.
          length_B: tokens of each sequence in the past; these count from there.
        """
        place_BxQ = length_B[:, None] + jnp.arange(tokens_BxQ.shape[1])
        with jax.named_scope("embedding"):
            x_BxQxD = sharding.embed("tokens", self.tokens[...], tokens_BxQ)
            x_BxQxD += sharding.embed("positions", self.positions[...], place_BxQ)
        x_BxQxD = sharding.constrain_batch(x_BxQxD.astype(self.config.dtype))
        after = []
        for block, p in zip(self.layers, past, strict=True):
            x_BxQxD, _, p = block(
                x_BxQxD, valid_BxQ.astype(jnp.int32), math.inf, None, p, place_BxQ
            )
            after.append(p)
        return self.norm(x_BxQxD), after

    def logits(self, x_BxD: jax.Array) -> jax.Array:
        """Scores of the next token, float32 [B, V]."""
        with jax.named_scope("logits"):
            return scores(x_BxD, self.tokens[...])

    def _narrow(self, kind: str) -> None:
        """Holds the large weights in another type."""

        def hold(module, name: str, declared: str) -> None:
            parameter = PARAMETERS[declared]
            summed = tuple(
                axis - len(parameter.dims)
                for axis, letter in enumerate(parameter.dims)
                if letter in parameter.contracted
            )
            setattr(module, name, nnx.Param(quantize(getattr(module, name)[...], kind, summed)))

        hold(self, "tokens", "tokens")
        for layer in self.layers:
            hold(layer.attention, "w_qkv", "attention.w_qkv")
            hold(layer.attention, "w_out", "attention.w_out")
            moe = isinstance(layer.mlp, MoE)
            for mlp in (layer.mlp.experts, layer.mlp.mlp) if moe else (layer.mlp,):
                for name in ("w_in", "w_out") if mlp else ():
                    hold(mlp, name, f"mlp.{name}")


def decoder(model: Transformer, weights: str, mesh: Mesh) -> Decoder:
    """A model on the mesh that decodes, nothing split by FSDP."""
    shapes = jax.eval_shape(partial(Decoder, weights=weights), model)
    places = sharding.shardings(shapes, mesh, in_use=True)
    held = jax.jit(partial(Decoder, weights=weights), out_shardings=places)(model)
    for layer in held.layers:
        if isinstance(layer.mlp, MoE) and layer.mlp.moe.dispatch == "gather/blocked":  # a CPU's
            layer.mlp.experts = UnstackedExperts(layer.mlp.experts)
    return held
