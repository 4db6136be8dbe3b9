"""The model that inference uses: unstacked layers, each with a KV cache."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from prmoe_jax.config.schema import AUTO, ExecutionConfig
from prmoe_jax.model.attention import KVCache
from prmoe_jax.model.layerwise import dropless, unstacked_blocks
from prmoe_jax.model.transformer import Transformer, Unembedding
from prmoe_jax.moe.experts import UnstackedExperts
from prmoe_jax.moe.layer import MoE
from prmoe_jax.nn.matmul import scores
from prmoe_jax.nn.parameters import declaration, map_named
from prmoe_jax.nn.quantized import InferenceWeight, quantize
from prmoe_jax.parallel import sharding
from prmoe_jax.parallel.axes import platform, splits_experts


class Decoder(nnx.Module):
    """A `Transformer` that decodes one token after the other.

    No token is dropped, so a sequence does not depend on the others in its batch.
    """

    def __init__(self, model: Transformer, weights: str, execution: ExecutionConfig = AUTO):
        """Unstacks a model's layers; call it under jit.

        `weights` is the type of the large weights, float32, bfloat16 or int8. The compute dtype is
        `model.config.dtype`.
        """
        self.execution = execution
        self.config, self.positions, self.norm = model.config, model.positions, model.norm
        layers = unstacked_blocks(dropless(model))
        parts = {"tokens": model.tokens, "output": model.output, "layers": layers}
        held = map_named(partial(_held, weights=weights, dtype=model.config.dtype), parts)
        self.tokens, self.output = held["tokens"], held["output"]
        self.layers = nnx.List(held["layers"])

    def empty_cache(self, batch: int, room: int) -> list[KVCache]:
        """An empty KV cache for each layer, with space for `room` tokens of each sequence."""
        shape = batch, self.config.key_heads, self.config.head_width, room
        return [KVCache.empty(*shape, self.config.dtype) for _ in self.layers]

    def __call__(
        self,
        tokens_BxQ: jax.Array,
        valid_BxQ: jax.Array,
        caches: list[KVCache],
        length_B: jax.Array,
    ) -> tuple[jax.Array, list[KVCache]]:
        """Computes the next tokens' final activations [B, Q, D], and caches that hold them too.

        Args:
          tokens_BxQ: the next tokens of each sequence: a chunk of its prompt, or a single token.
          valid_BxQ: False for padding, which must be at the end.
          caches: KV caches from `empty_cache` or an earlier call.
          length_B: each sequence's number of tokens in the cache; the next tokens follow them.
        """
        position_BxQ = length_B[:, None] + jnp.arange(tokens_BxQ.shape[1])
        with jax.named_scope("embedding"):
            x_BxQxD = sharding.embed("tokens", self.tokens[...], tokens_BxQ, in_use=True)
            if self.positions is not None:
                table_LxD = self.positions[...]
                x_BxQxD += sharding.embed("positions", table_LxD, position_BxQ, in_use=True)
        x_BxQxD = sharding.constrain_batch(x_BxQxD.astype(self.config.dtype))
        segments_BxQ, extended = valid_BxQ.astype(jnp.int32), []
        for block, cache in zip(self.layers, caches, strict=True):
            x_BxQxD, _, cache = block(
                x_BxQxD, segments_BxQ, None, cache, position_BxQ, self.execution
            )
            extended.append(cache)
        return self.norm(x_BxQxD), extended

    def logits(self, x_BxD: jax.Array) -> jax.Array:
        """Logits of the next token, float32 [B, V]."""
        with jax.named_scope("logits"):
            return Unembedding.of(self).logits(x_BxD, scores)


def _held(name: str, leaf: jax.Array, weights: str, dtype: str) -> jax.Array | InferenceWeight:
    """Stores a large weight in the type `weights`, and casts biases and the like to `dtype`."""
    declared = declaration(name)
    if declared.contracted and (weights != "float32" or platform() == "cpu"):
        dims = enumerate(declared.dims)
        summed = tuple(i - len(declared.dims) for i, dim in dims if dim in declared.contracted)
        return quantize(leaf, weights, summed)
    if declared.cast and not declared.contracted:
        return leaf.astype(dtype)
    return leaf


def decoder(
    model: Transformer, weights: str, mesh: Mesh, execution: ExecutionConfig = AUTO
) -> Decoder:
    """Makes the decoder of a model on a mesh; nothing is split by FSDP."""
    make = partial(Decoder, weights=weights, execution=execution)
    shapes = jax.eval_shape(make, model)
    places = sharding.shardings(shapes, mesh, in_use=True)
    held = jax.jit(make, out_shardings=places)(model)
    if execution.dispatch == "auto" and platform() == "cpu" and not splits_experts(mesh):
        for layer in held.layers:
            if isinstance(layer.mlp, MoE):
                layer.mlp.experts = UnstackedExperts(layer.mlp.experts)
    return held
