"""Starts a run as another one: with the same model, or with experts in place of dense MLPs.

Sparse upcycling (Komatsuzaki et al., arXiv 2212.05055): every expert and the residual MLP start as
the dense MLP of their layer, with optional noise; routers and residual coefficients are
initialised as usual. If experts are narrower than that MLP, each is a slice of its hidden units
(fine-grained experts): with N slices, every N consecutive experts are the whole MLP and have the
same router column, so that tokens choose all of them or none ("virtual groups", He et al.,
arXiv 2410.07524, section 3.3), and their output weights are multiplied by N.

Where the weights of a token's experts add up to 1, as with top 2, the first loss is that of the
dense model, if there is no noise, no token is dropped, `moe.routed_scale` is 1, and a residual MLP
is mixed by weights that add up to 1, too (`model.residual_mix` 'learned' or 'half'). Top 1 weighs
its expert by the router's probability and starts with a higher loss.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from prmoe_jax import files
from prmoe_jax.config.loading import load
from prmoe_jax.config.schema import Config, ModelConfig
from prmoe_jax.config.validation import check_same_routing
from prmoe_jax.data.tokenizer import Tokenizer, check_same
from prmoe_jax.errors import UserError
from prmoe_jax.model.layout import of_layer, places, unstack_layers
from prmoe_jax.model.transformer import Transformer, init_model
from prmoe_jax.nn.parameters import declaration, named_leaves
from prmoe_jax.parallel.sharding import init_sharded
from prmoe_jax.run import directory as workdirs
from prmoe_jax.run.restore import restore_model
from prmoe_jax.stores import expand

log = logging.getLogger(__name__)


def init_from_run(config: Config, mesh: Mesh, tokenizer: Tokenizer) -> Transformer:
    """The initial model of a run with `config.init.workdir`.

    Args:
      config: the new run's config.
      mesh: the new run's mesh.
      tokenizer: the new run's tokenizer, which must be that of the run it starts as.

    Raises:
      UserError: the folder holds no run, or the run doesn't fit.
    """
    with reading_source():
        workdir, settings = source_of(config)
        files.regular(workdir / workdirs.TOKENIZER)
    check_fits(settings.model, config.model)
    check_same_routing(config, settings, "the run to start as")
    _check_choices(settings.model, config)
    check_same(workdir / workdirs.TOKENIZER, tokenizer, f"the run in {workdir}")
    grows = any(
        want and not have
        for have, want in zip(
            settings.model.schedule.experts, config.model.schedule.experts, strict=True
        )
    )
    if config.init.noise and not grows:
        raise UserError(
            f"init.noise={config.init.noise} has no effect: the run to start as has all experts, "
            "and only new ones get noise; leave it at 0"
        )
    settings = dataclasses.replace(settings, mesh=config.mesh)
    with reading_source():
        step, model = restore_model(workdir, settings, mesh)
    log.info("starts as step %d of %s, %s", step, workdir, settings.model.schedule)

    def start(model):
        return upcycled(model, init_model(config), jax.random.key(config.seed), config.init.noise)

    return init_sharded(start, mesh, model)


@contextlib.contextmanager
def reading_source() -> Iterator[None]:
    """Adds the setting that names the other run to errors about that run."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{error}; --config.init.workdir names the run to start as") from error


def source_of(config: Config) -> tuple[Path, Config]:
    """The folder that `config.init.workdir` names, and the config of the run in it.

    Raises:
      UserError: the folder holds no run.
    """
    workdir = expand("init.workdir", config.init.workdir)
    if (workdir / workdirs.CONFIG).exists():
        files.regular(workdir / workdirs.CONFIG)
    return workdir, load(workdir / workdirs.CONFIG)


def check_fits(source: ModelConfig, model: ModelConfig) -> None:
    """Checks that every part of a model can start as the other run's.

    Raises:
      UserError: a part can't; names the setting or the layer.
    """
    sizes = {name: name for name in ("layers", "d_model", "heads", "d_ff", "vocab_size")}
    sizes |= {"kv_heads": "key_heads", "head_dim": "head_width"}
    if any(source.schedule.experts):
        sizes |= {"expert_d_ff": "expert_width", "residual_d_ff": "residual_width"}
    pairs = {name: (getattr(model, size), getattr(source, size)) for name, size in sizes.items()}
    pairs |= model.differences(source)
    # Below, and by `check_same_routing`, these are compared where they matter.
    for name in ("residual_mix", "normalize_top_k"):
        pairs.pop(name, None)
    for name, (ours, theirs) in pairs.items():
        if ours != theirs:
            raise UserError(f"model.{name}={ours}, the run to start as has {theirs}; use the same")
    if model.positions == "learned" and model.length > source.length:
        raise UserError(
            f"model.length={model.length} exceeds the {source.length} positions of the run to "
            f"start as; use {source.length} or less"
        )
    counts = zip(source.schedule.experts, model.schedule.experts, strict=True)
    for layer, (have, want) in enumerate(counts):
        if have not in (0, want):
            raise UserError(
                f"layer {layer} has {want or 'no'} experts, that of the run to start as {have}; an "
                "MoE layer starts as a dense one or as one with as many experts"
            )
        mixes = [(m.residual, m.residual_mix) for m in (source, model)]
        if have and mixes[0] != mixes[1]:
            raise UserError(
                f"model.residual={mixes[1][0]}, residual_mix={mixes[1][1]}: the run to start as "
                f"has {mixes[0][0]}, {mixes[0][1]}; use the same"
            )
        if want and not have:
            _check_slices(source.d_ff, model, layer, want)


def _check_choices(source: ModelConfig, config: Config) -> None:
    """Checks that tokens choose slices of an MLP together."""
    slices = source.d_ff // config.model.expert_width
    counts = zip(source.schedule.experts, config.model.schedule.experts, strict=True)
    sliced = slices > 1 and any(want and not have for have, want in counts)
    if config.moe.second_expert_sampling and sliced:
        raise UserError(
            "moe.second_expert_sampling=True draws the second expert, and here it is the other "
            "half of an MLP; leave it off"
        )


def _check_slices(d_ff: int, model: ModelConfig, layer: int, experts: int) -> None:
    """Checks that slices of an MLP's hidden units can be the experts of a layer."""
    slices = d_ff // model.expert_width
    if slices * model.expert_width != d_ff:
        raise UserError(
            f"model.expert_d_ff={model.expert_width} doesn't divide the {d_ff} hidden units of the "
            "MLPs of the run to start as; use a number that does"
        )
    for name, count in (("model.top_k", model.top_k), (f"layer {layer}, experts", experts)):
        if count % slices:
            raise UserError(
                f"{name}={count}: with model.expert_d_ff={model.expert_width} an expert is one of "
                f"{slices} slices of an MLP, and tokens choose all of them; use a multiple of "
                f"{slices}"
            )
    if model.residual and model.residual_width != d_ff:
        raise UserError(
            f"model.residual_d_ff={model.residual_width}: the MLP beside the experts starts as one "
            f"of {d_ff} hidden units; use {d_ff}"
        )


def upcycled(source: Transformer, fresh: Transformer, key: jax.Array, noise: float) -> Transformer:
    """`fresh` with the parameters of `source`; call it under jit.

    Args:
      source: the model to start as.
      fresh: the new run's model with its usual initialisation.
      key: the random key of the noise.
      noise: standard deviation of the noise, relative to that of the weight; only experts get it.
    """
    named = unstack_layers(source.config, named_leaves(source))
    layer_of = {place: layer for layer, place in enumerate(places(fresh.config))}

    def part(layer: int, name: str, like, key):
        whole = of_layer(named, layer)
        if name in whole:
            return whole[name]
        slices = source.config.d_ff // fresh.config.expert_width
        if name == "mlp.w_router":
            return jnp.repeat(like[:, ::slices], slices, axis=1)
        if declaration(name).only_moe:
            return like
        base = whole[name.replace("mlp.experts.", "mlp.").replace("mlp.mlp.", "mlp.")]
        if not name.startswith("mlp.experts."):
            return base
        if slices > 1:
            base = _slices(name, base, slices, len(like))
        spread = noise * jnp.std(base)
        return base + spread * jax.random.normal(key, like.shape)

    leaves = []
    for number, (name, leaf) in enumerate(named_leaves(fresh).items()):
        words = name.split(".")
        if words[0] != "stages":
            leaves.append(named[name][: len(leaf)])  # the new run may have fewer positions
            continue
        stage, block, rest = int(words[1]), int(words[3]), ".".join(words[4:])
        keys = jax.random.split(jax.random.fold_in(key, number), len(leaf))
        layers = [layer_of[stage, block, n] for n in range(len(leaf))]
        parts = [part(i, rest, leaf[n], keys[n]) for n, i in enumerate(layers)]
        leaves.append(jnp.stack(parts))
    return jax.tree.unflatten(jax.tree.structure(fresh), leaves)


def _slices(name: str, base: jax.Array, slices: int, experts: int) -> jax.Array:
    """The experts' weights, or biases, as slices of an MLP's."""
    dims = declaration(name).dims[1:]
    if "F" not in dims:  # the output's bias, which the experts' weights average
        return base
    axis = dims.index("F")
    cut = jnp.stack(jnp.split(base, slices, axis))
    if dims == "FD":
        cut *= slices
    return jnp.tile(cut, (experts // slices, *[1] * base.ndim))
