"""`prmoe prune`: removes experts of a MoE, chosen by measured importance.

A plan comes first: how many experts each layer keeps, and which. The pruned model is a new run,
which can be distilled from the original one (MoS, paper section 4.2). N: repeats of a stage.
"""

import dataclasses
import itertools
import logging
import math
from collections.abc import Mapping
from functools import partial, reduce
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import linear_sum_assignment

from prmoe_jax import stores
from prmoe_jax.config.loading import load
from prmoe_jax.config.schema import Config, ModelConfig, group_rows
from prmoe_jax.data import released
from prmoe_jax.data.pipeline import Data, load_data, train_iterator
from prmoe_jax.errors import UserError
from prmoe_jax.model.layout import unstack_layers
from prmoe_jax.model.loss import forward
from prmoe_jax.model.sizes import cost
from prmoe_jax.model.surgery import build, take
from prmoe_jax.model.transformer import Transformer, init_model
from prmoe_jax.nn.parameters import declaration, named_leaves
from prmoe_jax.parallel.microbatches import add_up
from prmoe_jax.run.directory import CONFIG, TOKENIZER
from prmoe_jax.run.new import check_free, write_run
from prmoe_jax.run.restore import restore_run, trained_text
from prmoe_jax.tables import aligned

log = logging.getLogger(__name__)

# load: the share of a layer's choices; activation: Σ ‖expert's output‖ · routing weight (REAP,
# arXiv 2510.13999, takes the mean); loss: (Σ parameter · gradient)², to first order the squared
# change of the loss without the expert.
IMPORTANCES = "load", "activation", "loss"
# The most tokens of a microbatch and, for a run without drops, of a window.
MICROBATCH_TOKENS = 4096


def measure(config: Config, model: Transformer, data: Data, batches: int) -> dict[str, dict]:
    """The importance of every expert on the first batches of training text, on one device.

    Returns:
      For each kind of `IMPORTANCES`, the importance of every MoE layer's experts, [E], by layer
      number. Each layer's loads add up to 1; the other kinds are comparable between layers.
    """
    layers = [i for i, experts in enumerate(config.model.schedule.experts) if experts]
    microbatches = _microbatches(config, data.train.length)

    @jax.jit
    def found(model, batch):
        tokens = jnp.maximum(batch.mask_BxL.sum(), 1)

        def microbatch_sums(microbatch):
            def loss(model):
                sums = forward(model, microbatch, execution=config.execution)
                return sums.loss / tokens, sums.routers

            gradient, routers = jax.grad(loss, has_aux=True)(model)
            return {
                "load": {i: r.assigned_E for i, r in zip(layers, routers, strict=True)},
                "activation": model.added_norms(microbatch.tokens_BxL, microbatch.segments_BxL),
                "loss": _first_order(config.model, model, gradient),
            }

        sums = add_up(microbatch_sums, batch, microbatches, group_rows(config))
        return sums | {"loss": jax.tree.map(jnp.square, sums["loss"])}

    iterator = train_iterator(data.train, config.train.batch_size, config.seed)
    parts = (
        jax.device_get(found(model, batch._replace(teacher_top_k=None)))
        for batch in itertools.islice(iterator, batches)
    )
    total = reduce(partial(jax.tree.map, np.add), parts)
    shares = {i: load_E / max(load_E.sum(), 1) for i, load_E in total["load"].items()}
    return total | {"load": shares}


def _microbatches(config: Config, length: int) -> int:
    """The fewest microbatches, from `train.accumulate` on, of at most `MICROBATCH_TOKENS` each.

    If none are small enough, they are as small as routing groups allow.
    """
    together = group_rows(config)
    most = config.train.batch_size // together
    for microbatches in range(config.train.accumulate, most):
        rows, rest = divmod(most, microbatches)
        if not rest and rows * together * length <= MICROBATCH_TOKENS:
            return microbatches
    return most


def _first_order(
    config: ModelConfig, model: Transformer, gradient: Transformer
) -> dict[int, jax.Array]:
    """Σ weight · gradient over each expert's output weights, [E], for each MoE layer.

    An expert's output is linear in these weights, so this is the derivative of the loss by a factor
    on that output.
    """
    slopes = named_leaves(gradient)
    products = {
        name: (leaf * slopes[name]).sum(tuple(range(2, leaf.ndim)))  # [N, E]
        for name, leaf in named_leaves(model).items()
        if name.endswith(("experts.w_out", "experts.b_out"))
    }
    changes: dict[int, jax.Array] = {}
    for name, change_E in unstack_layers(config, products).items():
        number = int(name.split(".")[1])
        changes[number] = changes.get(number, 0) + change_E
    return changes


def choose(
    importance: Mapping[int, np.ndarray], budget: float | tuple[int, ...], shape: str, least: int
) -> dict[int, np.ndarray]:
    """The kept experts of each layer, ascending, by the layer's number, like the importance, [E].

    `budget` is the share of all experts to keep, or the number in each MoE layer, or one for all.
    For a share, `shape` is 'pyramid', 'uniform' (the same in every layer) or 'inverse' (the
    pyramid's numbers in reverse order). A layer keeps at least `least` experts.
    """
    ranked = {layer: np.argsort(-of_E, kind="stable") for layer, of_E in importance.items()}
    sizes = {layer: len(order) for layer, order in ranked.items()}
    if isinstance(budget, tuple):
        counts = _given(budget, sizes, least)
    else:
        counts = _shared(importance, ranked, budget, shape, least)
    if counts == sizes:
        given = f"--keep={budget}" if isinstance(budget, float) else "--experts"
        raise UserError(f"{given} keeps all {sum(sizes.values())} experts; give less")
    return {layer: np.sort(order[: counts[layer]]) for layer, order in ranked.items()}


def _given(budget: tuple[int, ...], sizes: Mapping[int, int], least: int) -> dict[int, int]:
    """The number of experts to keep in each layer, as a user gave it."""
    if len(budget) not in (1, len(sizes)):
        raise UserError(
            f"--experts={','.join(map(str, budget))} has {len(budget)} numbers, and the run has "
            f"{len(sizes)} MoE layers; give one for each, or one for all"
        )
    each = budget * len(sizes) if len(budget) == 1 else budget
    counts = dict(zip(sizes, each, strict=True))
    for layer, count in counts.items():
        if not least <= count <= sizes[layer]:
            raise UserError(
                f"--experts: layer {layer} cannot keep {count}; give from {least} (model.top_k) to "
                f"{sizes[layer]}, which it has"
            )
    return counts


def _shared(importance, ranked, keep: float, shape: str, least: int) -> dict[int, int]:
    """The number of experts to keep in each layer, for a share `keep` of all experts.

    Experts are kept in units of a power of two, so that meshes can split them: the largest up to an
    eighth of the smallest layer's experts. In a pyramid, the units beyond `least` are those that
    matter most in all layers together.
    """
    sizes = {layer: len(values) for layer, values in importance.items()}
    total, smallest = sum(sizes.values()), min(sizes.values())
    unit = 1 << max(1, smallest // 8).bit_length() - 1
    units = {layer: size // unit for layer, size in sizes.items()}
    wanted = min(round(keep * total / unit), sum(units.values()))
    first = -(-least // unit)
    needed = first * len(sizes)
    if needed * unit >= total or first > min(units.values()):
        raise UserError(
            f"--keep={keep}: each layer needs {first * unit} experts for model.top_k={least}, and "
            f"the smallest has {smallest}; --keep has nothing to cut here"
        )
    if wanted < needed:
        raise UserError(
            f"--keep={keep} leaves {wanted * unit} experts for {len(sizes)} layers, and each needs "
            f"{first * unit}; use {needed * unit / total:.3g} or more"
        )
    if shape == "uniform":
        even = {layer: round(keep * size / unit) for layer, size in sizes.items()}
        return {layer: unit * max(first, min(units[layer], n)) for layer, n in even.items()}

    def worth(layer: int, number: int) -> float:
        """The importance of a layer's unit of experts; number 0 is the best unit."""
        experts = ranked[layer][number * unit : (number + 1) * unit]
        return float(importance[layer][experts].sum())

    counts = dict.fromkeys(sizes, first)
    more = sorted((-worth(layer, n), layer) for layer in sizes for n in range(first, units[layer]))
    for _, layer in more[: wanted - needed]:
        counts[layer] += 1
    if shape == "inverse":
        counts = dict(zip(counts, reversed(counts.values()), strict=True))
        for layer, count in counts.items():
            if count * unit > sizes[layer]:
                raise UserError(
                    f"--shape=inverse gives layer {layer} {count * unit} experts, and it has "
                    f"{sizes[layer]}; use --shape=uniform to compare with"
                )
    return {layer: count * unit for layer, count in counts.items()}


def pruned_config(config: Config, kept: Mapping[int, np.ndarray]) -> Config:
    """The pruned run's config; its mesh is the default, as the old one may not fit."""
    experts = tuple(len(kept[layer]) for layer in sorted(kept))
    unset = "teacher", "kd", "init", "mesh", "execution"
    groups = {name: getattr(Config(), name) for name in unset}
    groups["model"] = dataclasses.replace(config.model, experts=experts)
    return dataclasses.replace(config, **groups)


def pruned(
    config: Config,
    model: Transformer,
    kept: Mapping[int, np.ndarray],
    load: Mapping[int, np.ndarray] | None = None,
) -> Transformer:
    """The model with the experts that `choose` kept, and routers cut to fit.

    With `load`, each expert's share of the choices, a removed expert is merged, weighted by load,
    into the kept one with the most similar router column. Otherwise it is dropped.
    """
    # Copies, since merging changes them in place.
    leaves = {name: np.array(leaf) for name, leaf in named_leaves(model).items()}
    parameters = unstack_layers(config.model, leaves)
    if load is not None:
        for layer, experts in kept.items():
            _merge(parameters, f"layers.{layer}.mlp.", experts, load[layer])

    def part(name: str) -> jax.Array:
        dims = declaration(name).dims
        experts = {"E": kept[int(name.split(".")[1])]} if "E" in dims else {}
        return take(parameters[name], dims, experts)

    return build(jax.eval_shape(lambda: init_model(pruned_config(config, kept))), part)


def _merge(parameters: Mapping[str, np.ndarray], prefix: str, kept, load) -> None:
    """Merges each removed expert of a layer into the kept one most like it, in place."""
    router_DxE = parameters[f"{prefix}w_router"]
    router_DxE = router_DxE / np.linalg.norm(router_DxE, axis=0)
    like_ExE = router_DxE.T @ router_DxE
    groups = {int(e): [int(e)] for e in kept}
    for gone in sorted(set(range(len(like_ExE))) - groups.keys()):
        groups[int(kept[np.argmax(like_ExE[gone, kept])])].append(gone)
    weights = {n: x for n, x in parameters.items() if n.startswith(f"{prefix}experts.")}
    for e, members in groups.items():
        share = np.asarray(load)[members] + 1e-9
        _average(weights, e, members, share / share.sum())


def _average(weights: Mapping[str, np.ndarray], e: int, members: list[int], share) -> None:
    """Replaces expert e, in place, by the mean of the members, with hidden units matched."""
    axes = {name: declaration(name).dims[1:].find("F") for name in weights}
    hidden = {name: axis for name, axis in axes.items() if axis >= 0}  # the axis of hidden units

    def units(member: int) -> np.ndarray:  # [F, …]
        parts = [np.moveaxis(weights[name][member], axis, 0) for name, axis in hidden.items()]
        return np.concatenate([part.reshape(len(part), -1) for part in parts], 1)

    base = units(e)
    orders = [linear_sum_assignment(-base @ units(member).T)[1] for member in members]
    for name, w in weights.items():
        w[e] = sum(
            s * (np.take(w[m], order, hidden[name]) if name in hidden else w[m])
            for s, m, order in zip(share, members, orders, strict=True)
        )


def prune_run(
    workdir: Path,
    out: Path | None,
    budget: float | tuple[int, ...],
    kind: str,
    shape: str,
    merge: bool,
    corpus: str | None,
    batches: int,
) -> dict:
    """`prmoe prune`: plans which experts of a run to keep, and writes the run with them.

    Args:
      workdir: the run's folder.
      out: the folder of the new run; None plans only.
      budget, shape: as in `choose`.
      kind: one of `IMPORTANCES`.
      merge: whether removed experts are merged into others instead of dropped.
      corpus, batches: the text to measure on, as in `data.corpus` (None is the run's own), and how
        many batches of it.

    Returns:
      The plan: step, importance (the kind), architecture and total_params, each as [before, after],
      and layers (for each MoE layer: layer, experts, kept, and the kept share of each importance).
    """
    if out is not None:
        check_free("out", out)
    if not (isinstance(budget, tuple) or 0 < budget < 1):
        raise UserError(f"--keep={budget} must be between 0 and 1, exclusive; 0.5 keeps half")
    if batches < 1:
        raise UserError(f"--batches={batches} must be 1 or more")
    workdir = stores.as_path(workdir)
    own = load(workdir / CONFIG)  # `restore_run` may change mesh and exchange
    if not any(own.model.schedule.experts):
        raise UserError(f"{workdir}: this run is {own.model.schedule}; it has no experts")
    if not own.moe.routes.tokens_choose:
        raise UserError(
            f"{workdir}: moe.router={own.moe.router}; experts that choose their tokens all have "
            "the same load, and prmoe prune is for token_choice"
        )
    config, step, model, _ = restore_run(workdir, jax.local_devices()[:1])
    text = config.data if corpus is None else dataclasses.replace(config.data, corpus=corpus)
    length = config.model.length
    if math.isinf(config.moe.eval_capacity_factor):
        length = min(length, MICROBATCH_TOKENS)
    data = load_data(text, config.model.vocab_size, length, workdir / TOKENIZER)
    found = measure(config, model, data, batches)
    kept = choose(found[kind], budget, shape, config.model.top_k)
    small = pruned_config(own, kept)
    plan = {
        "step": step,
        "importance": kind,
        "architecture": [str(c.model.schedule) for c in (config, small)],
        "total_params": [cost(c.model, c.moe).total_params for c in (config, small)],
        "layers": [
            {"layer": i, "experts": len(found["load"][i]), "kept": kept[i].tolist()}
            | {f"{n}_kept": float(of[i][kept[i]].sum() / of[i].sum()) for n, of in found.items()}
            for i in kept
        ],
    }
    if out is not None:
        log.info("%s", table(plan))
        smaller = pruned(config, model, kept, found["load"] if merge else None)
        kept_files = released.read(workdir / released.FOLDER)
        write_run("out", out, small, smaller, data.tokenizer, trained_text(workdir), kept_files)
    return plan


def table(plan: dict) -> str:
    """A plan as text."""
    rows = [
        (row["layer"], row["experts"], len(row["kept"]))
        + tuple(f"{row[f'{kind}_kept']:.1%}" for kind in IMPORTANCES)
        for row in plan["layers"]
    ]
    before, after = plan["total_params"]
    head = ("layer", "experts", "kept", *(f"{kind} kept" for kind in IMPORTANCES))
    return (
        aligned(head, rows)
        + f"\n{plan['architecture'][0]}: {before:,} parameters"
        + f"\n{plan['architecture'][1]}: {after:,} parameters, {1 - after / before:.1%} fewer"
    )
