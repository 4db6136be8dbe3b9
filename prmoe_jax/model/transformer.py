"""The decoder: embeddings, pre-norm blocks, scanned by stage, and logits.

A module is a pytree of float32 parameters, so that plain jax.jit, jax.grad and scan accept it.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax.experimental.layout import Layout, with_layout_constraint

from prmoe_jax.config import architecture
from prmoe_jax.config.schema import AUTO, Config, ExecutionConfig, ModelConfig, MoeConfig
from prmoe_jax.model.attention import Attention, KVCache
from prmoe_jax.model.attention_kernels import product
from prmoe_jax.moe.layer import MoE, sum_of_squares
from prmoe_jax.moe.routing import RouterMetrics
from prmoe_jax.nn import remat
from prmoe_jax.nn.matmul import cpu_scores
from prmoe_jax.nn.mlp import MLP, MLPShape
from prmoe_jax.nn.norms import norm
from prmoe_jax.nn.parameters import declaration, map_named, normal
from prmoe_jax.nn.precision import Precision
from prmoe_jax.nn.quantized import InferenceWeight
from prmoe_jax.parallel import sharding
from prmoe_jax.parallel.axes import platform

# On CPUs, this many layers or fewer are unrolled: the step takes longer to compile, but is 3 to
# 17 % faster than with a scan, which writes and reads stacked arrays.
UNROLLED_LAYERS = 8


class Block(nnx.Module):
    """One layer: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(
        self, layer: architecture.Layer, model: ModelConfig, moe: MoeConfig, key: jax.Array
    ):
        key_attention, key_mlp = jax.random.split(key)
        self.dropout = model.dropout
        self.norm_attention = norm(model.norm, model.d_model, model.norm_eps)
        self.attention = Attention(model, layer.window, key_attention)
        self.norm_mlp = norm(model.norm, model.d_model, model.norm_eps)
        self.mlp: MoE | MLP
        if layer.experts:
            self.mlp = MoE(layer.experts, model, moe, key_mlp)
        else:
            self.mlp = MLP.drawn(MLPShape.of(model, model.d_ff), key_mlp)

    def __call__(
        self,
        x_BxLxD,
        segments_BxL,
        keys_B=None,
        cache=None,
        position_BxL=None,
        execution: ExecutionConfig = AUTO,
        has_E=None,
    ) -> tuple[jax.Array, RouterMetrics | None, KVCache | None]:
        """Returns the activations, the router's statistics or None, and the extended `cache`."""
        keys = [None] * 3 if keys_B is None else [fold_in(keys_B, i) for i in range(3)]
        with jax.named_scope("attention"):
            normed_BxLxD = self.norm_attention(x_BxLxD)
            y_BxLxD, cache = self.attention(
                normed_BxLxD, segments_BxL, cache, position_BxL, execution
            )
            x_BxLxD = remat.save_matmul(x_BxLxD + dropout(y_BxLxD, self.dropout, keys[0]))
        y_BxLxD = self.norm_mlp(x_BxLxD)
        metrics = None
        if isinstance(self.mlp, MoE):
            # In decoding, `fsdp_experts` doesn't split the experts.
            split = cache is None
            valid_BxL = segments_BxL > 0
            y_BxLxD, metrics = self.mlp(y_BxLxD, valid_BxL, keys[1], split, execution, has_E)
            metrics = metrics._replace(stream_square=sum_of_squares(x_BxLxD, valid_BxL))
        else:
            with jax.named_scope("mlp"):
                y_BxLxD = self.mlp(y_BxLxD)
        return remat.save_matmul(x_BxLxD + dropout(y_BxLxD, self.dropout, keys[2])), metrics, cache


class Stage(nnx.Module):
    """A cell of layers that is repeated N times; each parameter is stacked over the repeats."""

    def __init__(self, stage: architecture.Stage, model: ModelConfig, moe: MoeConfig, key):
        self.config, self.repeats = model, stage.repeats
        keys = jax.random.split(key, len(stage.cell))
        self.blocks = nnx.List(
            [
                jax.vmap(partial(Block, layer, model, moe))(jax.random.split(key, stage.repeats))
                for layer, key in zip(stage.cell, keys, strict=True)
            ]
        )

    def __call__(self, x_BxLxD, segments_BxL, keys_NxB=None, position_BxL=None, execution=AUTO):
        """Returns the activations and, for each layer of the cell, statistics [N, …] or None."""

        def cell(x_BxLxD, stacked):
            blocks, keys_B = stacked
            x_BxLxD, metrics = sharding.constrain_batch(x_BxLxD), []
            if platform() == "tpu" and jax.__version_info__ >= (0, 11):
                # Otherwise XLA may store the activations transposed, and copy them in every layer's
                # backward pass: 9 of 238 ms of a dense 1.3B model's step on v5p (modelled).
                # With jax 0.10 the constraint gathers the whole batch on every device: 1,829 ms.
                x_BxLxD = with_layout_constraint(x_BxLxD, Layout((0, 1, 2)))
            # A MoE layer all-gathers its experts itself.
            for i, block in enumerate(sharding.all_gather_params(blocks, apart="experts")):
                keys = None if keys_B is None else fold_in(keys_B, i)
                x_BxLxD, m, _ = block(x_BxLxD, segments_BxL, keys, None, position_BxL, execution)
                metrics.append(m)
            return x_BxLxD, metrics

        kept, unrolled = resolve_remat(execution.remat, self.config.layers, platform())
        if kept != "none":
            # Inside a loop, CSE can't undo the rematerialisation.
            once = self.repeats == 1
            cell = jax.checkpoint(cell, policy=remat.POLICIES[kept], prevent_cse=once)
        with jax.named_scope("layers"):
            return jax.lax.scan(cell, x_BxLxD, (self.blocks, keys_NxB), unroll=unrolled)


def resolve_remat(name: str, layers: int, platform: str) -> tuple[str, bool]:
    """Resolves `execution.remat` to a policy or 'none', and whether layers are unrolled.

    Layers are unrolled only with 'none': otherwise XLA's CSE would undo the rematerialisation.
    """
    few = platform == "cpu" and layers <= UNROLLED_LAYERS
    if name == "auto":
        name = "none" if few else "dots"
    return name, few and name == "none"


class Transformer(nnx.Module):
    """A decoder whose MLPs are dense or MoE as its placement schedule says."""

    def __init__(self, model: ModelConfig, moe: MoeConfig, key: jax.Array):
        keys = jax.random.split(key, 2 + len(model.stages))
        table, std = (model.vocab_size, model.d_model), model.init_std
        self.config = model
        self.tokens = normal(keys[0], table, std)
        learned, tied = model.positions == "learned", model.output == "tied"
        self.positions = normal(keys[1], (model.length, model.d_model), std) if learned else None
        pairs = zip(model.stages, keys[2:], strict=True)
        self.stages = nnx.List([Stage(stage, model, moe, key) for stage, key in pairs])
        self.norm = norm(model.norm, model.d_model, model.norm_eps)
        self.output = None if tied else normal(jax.random.fold_in(keys[0], 1), table, std)

    def __call__(
        self,
        tokens_BxL: jax.Array,
        segments_BxL: jax.Array,
        keys_B: jax.Array | None = None,
        execution: ExecutionConfig = AUTO,
    ) -> tuple[jax.Array, list[RouterMetrics]]:
        """Returns the final activations [B, L, D] and the router statistics of each MoE layer.

        Args:
          tokens_BxL: int32 token ids.
          segments_BxL: document number within the row, 0 for padding. Attention stays inside a
            document, and positions start at 0 in each.
          keys_B: one key per sequence in training, for dropout, routing noise and the training
            capacity; None in evaluation.
          execution: which kernels compute it.
        """
        training = keys_B is not None
        precision = Precision.of(self.config.dtype, execution, platform(), training)
        x_BxLxD, position_BxL = self.embed(tokens_BxL, segments_BxL, precision.activations)
        x_BxLxD, metrics = dropout(x_BxLxD, self.config.dropout, keys_B), []
        for i, stage in enumerate(self.stages):
            # A stage is cast to the compute dtype once, not in every layer: with bfloat16, both
            # passes then read half the bytes. Experts that several devices hold are an exception:
            # the layer casts them, so that their gradients are summed over devices in float32.
            counts = [b.mlp.experts.count for b in stage.blocks if isinstance(b.mlp, MoE)]
            replicas = any(sharding.expert_replicas(count) > 1 for count in counts)
            with jax.named_scope("cast"):
                stage = cast(stage, precision.factors, apart="experts" if replicas else "")
            keys_NxB = None
            if keys_B is not None:
                repeats = jnp.arange(stage.repeats)
                keys_NxB = jax.vmap(fold_in, (None, 0))(fold_in(keys_B, 1 + i), repeats)
            x_BxLxD, by_cell = stage(x_BxLxD, segments_BxL, keys_NxB, position_BxL, execution)
            for n in range(stage.repeats):
                metrics += [jax.tree.map(lambda x: x[n], m) for m in by_cell if m is not None]  # noqa: B023
        return self.norm(x_BxLxD).astype(precision.factors), metrics

    def embed(self, tokens_BxL, segments_BxL, dtype) -> tuple[jax.Array, jax.Array]:
        """The first layer's input in a dtype, and the positions [B, L]."""
        position_BxL = positions(segments_BxL)
        with jax.named_scope("embedding"):
            x_BxLxD = sharding.embed("tokens", self.tokens[...], tokens_BxL)
            if self.positions is not None:
                x_BxLxD += sharding.embed("positions", self.positions[...], position_BxL)
        return x_BxLxD.astype(dtype), position_BxL

    def logits(self, x_BxLxD: jax.Array) -> jax.Array:
        """The next token's logits, float32 [B, L, V]."""
        return self.unembedding(x_BxLxD.dtype).logits(x_BxLxD)

    def unembedding(self, dtype) -> "Unembedding":
        """The map to logits in a dtype, split over `tensor` only."""
        own = Unembedding.of(self)
        return sharding.all_gather_params(jax.tree.map(lambda x: x.astype(dtype), own))


def _scores(x_D: jax.Array, table_VxD: jax.Array) -> jax.Array:
    if platform() == "cpu" and table_VxD.dtype == jnp.bfloat16:
        x_RxD = x_D.reshape(-1, x_D.shape[-1])
        return cpu_scores(x_RxD, table_VxD).reshape(*x_D.shape[:-1], -1)
    return product("...D,VD->...V", x_D, table_VxD)


@struct.dataclass
class Unembedding:
    """The map from final activations to logits; all that is done to logits is done here."""

    output: jax.Array | InferenceWeight  # [V, D], under its name in `PARAMETERS`

    @classmethod
    def of(cls, model) -> "Unembedding":
        """That of a `Transformer` or a `Decoder`, with the parameter as it is."""
        return cls((model.tokens if model.output is None else model.output)[...])

    def logits(self, x_D: jax.Array, scores: Callable = _scores) -> jax.Array:
        """Maps [..., D] to the next token's logits, float32 [..., V]; `scores` is x @ outputᵀ."""
        return scores(x_D, self.output)


def update_router_bias(model: Transformer, routers: list[RouterMetrics], rate: float) -> None:
    """Moves every router's bias by `rate` towards even load, in place (DeepSeek-V3, 2.1.2).

    `routers` has the statistics of a whole batch, one per MoE layer. A layer's mean bias has no
    effect and is kept at 0.
    """
    remaining = iter(routers)
    for stage in model.stages:
        mlps = [block.mlp for block in stage.blocks if isinstance(block.mlp, MoE)]
        by_repeat = [[next(remaining).assigned_E for _ in mlps] for _ in range(stage.repeats)]
        for mlp, loads_E in zip(mlps, zip(*by_repeat, strict=True), strict=True):
            load_NxE = jnp.stack(loads_E)
            step_NxE = jnp.sign(load_NxE.mean(-1, keepdims=True) - load_NxE)
            bias_NxE = mlp.bias_router[...] + rate * step_NxE
            mlp.bias_router[...] = bias_NxE - bias_NxE.mean(-1, keepdims=True)


def cast(modules, dtype, apart: str = ""):
    """Casts the parameters declared with `cast`, except those of the submodules named `apart`."""

    def held(name: str, leaf: jax.Array) -> jax.Array:
        casts = declaration(name).cast and apart not in name.split(".")
        return leaf.astype(dtype) if casts else leaf

    return map_named(held, modules)


def positions(segments_BxL: jax.Array) -> jax.Array:
    """Each token's distance from the first token of its segment in its row."""
    index_L = jnp.arange(segments_BxL.shape[1])
    previous_BxL = jnp.pad(segments_BxL[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    starts_BxL = jnp.where(segments_BxL != previous_BxL, index_L, 0)
    return index_L - jax.lax.cummax(starts_BxL, axis=1)


def fold_in(keys_B: jax.Array, number) -> jax.Array:
    """Folds the same number into every key."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys_B, number)


def dropout(x_BxLxD: jax.Array, rate: float, keys_B: jax.Array | None) -> jax.Array:
    """Zeroes a share of the activations and rescales the rest; each row has its own key."""
    if rate == 0 or keys_B is None:
        return x_BxLxD
    shape = x_BxLxD.shape[1:]
    keep_BxLxD = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, shape))(keys_B)
    return jnp.where(keep_BxLxD, x_BxLxD / (1 - rate), 0)


def init_model(config: Config) -> Transformer:
    """The model at step 0; its values depend only on the config and its seed."""
    return Transformer(config.model, config.moe, jax.random.key(config.seed))
