"""`prmoe prune`: removes experts of a MoE, chosen by measured importance.

A plan comes first: how many experts each layer keeps, and which. The pruned model is a new run,
which can be distilled from the original one (MoS, paper section 4.2). N: repeats of a stage.
"""

import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import jax
import numpy as np
from scipy.optimize import linear_sum_assignment

from prmoe_jax import files, stores
from prmoe_jax.config.loading import load
from prmoe_jax.config.schema import Config
from prmoe_jax.data import released
from prmoe_jax.data.pipeline import load_data
from prmoe_jax.distill.budget import choose, ranked, unit
from prmoe_jax.distill.importance import MICROBATCH_TOKENS, measure, prices
from prmoe_jax.errors import UserError
from prmoe_jax.model.layout import unstack_layers
from prmoe_jax.model.sizes import cost
from prmoe_jax.model.surgery import build, take
from prmoe_jax.model.transformer import Transformer, init_model
from prmoe_jax.nn.parameters import declaration, named_leaves
from prmoe_jax.run.directory import CONFIG, TOKENIZER
from prmoe_jax.run.new import check_free, write_run
from prmoe_jax.run.restore import restore_run, trained_text
from prmoe_jax.tables import aligned

log = logging.getLogger(__name__)


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
    scores: Path | None = None,
) -> dict:
    """`prmoe prune`: plans which experts of a run to keep, and writes the run with them.

    Args:
      workdir: the run's folder.
      out: the folder of the new run; None plans only.
      budget, shape: as in `choose`.
      kind: one that `measure` returns.
      merge: whether removed experts are merged into others instead of dropped.
      corpus, batches: the text to measure on, as in `data.corpus` (None is the run's own), and how
        many batches of it.
      scores: a file for the importance, which is read if it exists, and else written.

    Returns:
      The plan: step, importance (the kind), architecture and total_params, each as [before, after],
      and layers (for each MoE layer: layer, experts, kept, the kept share of each importance, and
      with the shape 'measured' the prices).
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
    measured = {"routers": _digest(model), "text": data.corpus_fingerprint, "batches": batches}
    found = _scores(scores, measured, partial(measure, config, model, data, batches))
    costs, least = {}, config.model.top_k
    if shape == "measured":
        costs = prices(config, model, data, ranked(found[kind]), unit(found[kind]), least)
    kept = choose(found[kind], budget, shape, least, costs)
    small = pruned_config(own, kept)
    plan = {
        "step": step,
        "importance": kind,
        "architecture": [str(c.model.schedule) for c in (config, small)],
        "total_params": [cost(c.model, c.moe).total_params for c in (config, small)],
        "layers": [
            {"layer": i, "experts": len(found["load"][i]), "kept": kept[i].tolist()}
            | {f"{n}_kept": float(of[i][kept[i]].sum() / of[i].sum()) for n, of in found.items()}
            | ({"prices": costs[i].tolist()} if costs else {})
            for i in kept
        ],
    }
    if out is not None:
        log.info("%s", table(plan))
        smaller = pruned(config, model, kept, found["load"] if merge else None)
        kept_files = released.read(workdir / released.FOLDER)
        write_run("out", out, small, smaller, data.tokenizer, trained_text(workdir), kept_files)
    return plan


def _digest(model: Transformer) -> str:
    """Identifies a model by its routers, wherever its run lies."""
    digest = hashlib.sha256()
    for name, leaf in named_leaves(model).items():
        if name.endswith("w_router"):
            digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def _scores(
    path: Path | None, measured: dict, measure: Callable[[], dict]
) -> dict[str, dict[int, np.ndarray]]:
    """The importance in a file; without it, as measured, which is written to the file."""
    if path is None or not path.exists():
        found = measure()
        if path is not None:
            lists = jax.tree.map(lambda of_E: of_E.tolist(), found)
            files.replace(path, json.dumps(measured | {"importance": lists}) + "\n")
        return found
    kept = files.read_json(path, fix="delete it, and it will be written")
    files.require(kept, {"importance": dict}, str(path), "delete it, and it will be written")
    for name, value in measured.items():
        if kept.get(name) != value:
            raise UserError(
                f"--scores={path} is of other {name} ({kept.get(name)!r:.12}, here {value!r:.12}); "
                "give another file, which will be written"
            )
    return {
        kind: {int(layer): np.array(of_E) for layer, of_E in layers.items()}
        for kind, layers in kept["importance"].items()
    }


def table(plan: dict) -> str:
    """A plan as text."""
    kinds = dict.fromkeys(("load", "activation", "loss", plan["importance"]))
    rows = [
        (row["layer"], row["experts"], len(row["kept"]))
        + tuple(f"{row[f'{kind}_kept']:.1%}" for kind in kinds)
        for row in plan["layers"]
    ]
    before, after = plan["total_params"]
    head = ("layer", "experts", "kept", *(f"{kind} kept" for kind in kinds))
    return (
        aligned(head, rows)
        + f"\n{plan['architecture'][0]}: {before:,} parameters"
        + f"\n{plan['architecture'][1]}: {after:,} parameters, {1 - after / before:.1%} fewer"
    )
