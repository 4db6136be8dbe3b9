"""Initialises a student by structured pruning of its teacher: fewer layers, experts or channels.

Layers are matched by kind, so that a pyramid shrinks as in the paper: eight of ten layers with 32
experts stay, and both layers with 64. The experts with the highest load are kept, and the most
important channels, heads and hidden units, judged by their weights (`magnitudes`) or by the change
of the loss without them (`taylor`). In shapes, N counts the repeats of a stage.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from prmoe_jax.config.schema import Config, ModelConfig
from prmoe_jax.config.validation import check_same_routing
from prmoe_jax.errors import UserError
from prmoe_jax.model.layout import layer_shapes, unstack_layers
from prmoe_jax.model.sizes import cost
from prmoe_jax.model.surgery import build, check_equal, compared, size, take
from prmoe_jax.model.transformer import Transformer
from prmoe_jax.nn.parameters import declaration, named_leaves
from prmoe_jax.tables import aligned


def layer_map(teacher: ModelConfig, student: ModelConfig, chosen: str = "") -> list[int]:
    """The teacher's layer from which each layer of the student is initialised.

    `chosen` names a layer of the teacher for each layer of the student, such as '0 1 3'. By default
    each layer takes the teacher's layer of its kind (dense, or MoE with a number of experts) that
    is nearest in relative depth, in order and each at most once. If the teacher has too few layers
    of a kind, all MoE layers count as one kind.
    """
    _check_part(teacher, student)
    have, want = teacher.schedule.experts, student.schedule.experts
    layers = _chosen_layers(have, want, chosen) if chosen else _matched_layers(have, want)
    for i, layer in enumerate(layers):
        if bool(want[i]) != bool(have[layer]) or want[i] > have[layer]:
            raise UserError(
                f"layer {i} of the student has {want[i] or 'no'} experts, layer {layer} of the "
                f"teacher {have[layer] or 'none'}; name other layers by teacher.layers"
            )
    return layers


def _chosen_layers(have: Sequence[int], want: Sequence[int], chosen: str) -> list[int]:
    layers = [int(word) if word.isdecimal() else len(have) for word in chosen.split()]
    if len(layers) != len(want) or any(layer >= len(have) for layer in layers):
        raise UserError(
            f"teacher.layers='{chosen}' must be {len(want)} of the teacher's layers, 0 to "
            f"{len(have) - 1}, one for each of the student's"
        )
    return layers


def _matched_layers(have: Sequence[int], want: Sequence[int]) -> list[int]:
    found: dict[int, int] = {}
    exact = all(have.count(experts) >= want.count(experts) for experts in want)
    kind_of = int if exact else bool
    for kind in sorted(set(map(kind_of, want))):
        from_, to = ([i for i, e in enumerate(each) if kind_of(e) == kind] for each in (have, want))
        if len(from_) < len(to):
            what = "MoE layers" if kind else "dense layers"
            raise UserError(
                f"the student has {len(to)} {what}, the teacher {len(from_)}; use as many or fewer"
            )
        ends = [(s + 1) * len(have) // len(want) - 1 for s in to]
        found |= zip(to, _nearest(from_, ends), strict=True)
    return [found[i] for i in range(len(want))]


def _check_part(teacher: ModelConfig, student: ModelConfig) -> None:
    """Refuses a student that is wider than its teacher, or whose layers compute something else."""
    names = ["d_model", "d_ff", "heads", "length"]
    if any(student.schedule.experts):
        names += ["expert_d_ff", "residual_d_ff"]
    for name in names:
        ours, most = size(student, name), size(teacher, name)
        if ours > most:
            raise UserError(
                f"model.{name}={ours} is more than the teacher's, and a student that starts as a "
                f"part of its teacher has no more; use {most} or less"
            )
    if student.head_width != teacher.head_width:
        raise UserError(
            f"a head of the student is {student.head_width} wide, one of the teacher "
            f"{teacher.head_width}, and heads are kept whole; use "
            f"model.head_dim={teacher.head_width}"
        )
    grouped = any(model.key_heads < model.heads for model in (teacher, student))
    # Query heads that share keys cannot be separated.
    pairs = compared(student, teacher, ("heads", "kv_heads") if grouped else ())
    fix = "a student that starts as a part of its teacher needs the same"
    check_equal(pairs, "the teacher", fix)


def _nearest(layers: Sequence[int], places: Sequence[int]) -> tuple[int, ...]:
    """One of the layers for each of `places`, ascending, with the least sum of distances."""
    best: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}  # for the first n places, by n
    for layer in layers:
        for number in sorted(best, reverse=True):
            if number < len(places):
                distance, chosen = best[number]
                longer = distance + abs(layer - places[number]), (*chosen, layer)
                best[number + 1] = min(best.get(number + 1, longer), longer)
    return best[len(places)][1]


def source_layers(teacher: Config, student: Config) -> list[int]:
    """Checks that a student can be pruned from its teacher; returns `layer_map`'s result."""
    check_same_routing(student, teacher, "the teacher")
    layers = layer_map(teacher.model, student.model, student.teacher.layers)
    have, want = teacher.model.schedule.experts, student.model.schedule.experts
    fewer = any(count < have[layer] for count, layer in zip(want, layers, strict=True))
    if fewer and not teacher.moe.routes.tokens_choose:
        raise UserError(
            "the teacher's experts choose their tokens (moe.router=expert_choice) and all have the "
            "same load, by which experts are left out; give the student as many experts"
        )
    names = "d_model", "d_ff", "heads", "expert_d_ff", "residual_d_ff"
    narrower = any(size(student.model, name) < size(teacher.model, name) for name in names)
    if student.teacher.importance == "taylor" and not narrower:
        raise UserError(
            "teacher.importance=taylor has no effect: the student has its teacher's widths and "
            "heads; leave it at weights, or make the student narrower"
        )
    return layers


def plan(teacher: Config, student: Config) -> dict:
    """`prmoe distill-plan`: the student's layers and size, before anything is trained.

    The numbers of parameters are each [teacher's, student's], and `saved` is the share of the
    teacher's parameters that is left out.
    """
    layers = source_layers(teacher, student)
    costs = [cost(one.model, one.moe) for one in (teacher, student)]
    total = [c.total_params for c in costs]
    return {
        "layers": [
            {"from": layer, "experts": c.experts, "params": c.params}
            for layer, c in zip(layers, costs[1].layers, strict=True)
        ],
        "total_params": total,
        "active_params": [c.active_params for c in costs],
        "saved": 1 - total[1] / total[0],
    }


def table(plan: dict) -> str:
    """A plan as text."""
    rows = [
        (i, row["from"], row["experts"] or "", f"{row['params']:,}")
        for i, row in enumerate(plan["layers"])
    ]
    (total, ours), (active, ours_active) = plan["total_params"], plan["active_params"]
    return (
        aligned(("layer", "from", "experts", "parameters"), rows)
        + f"\nteacher {total:,} parameters, {active:,} of them active for a token"
        + f"\nstudent {ours:,} parameters, {ours_active:,} active: {plan['saved']:.1%} fewer"
    )


def magnitudes(model: Transformer) -> dict[str, jax.Array]:
    """The importance of hidden units, heads and channels by their weights.

    A hidden unit has ‖w_in‖²·‖w_out‖², times ‖w_gate‖² if there is a gate. A head has
    ‖w_v‖²·‖w_out‖², and a channel ‖embedding‖². Channels, [D], are under the name 'tokens'. Under
    the names that end in 'w_out' are heads, [N, H], and hidden units, [N, F] or [N, E, F].
    """
    named = named_leaves(model)
    importance = {"tokens": jnp.square(named["tokens"]).sum(0)}
    for name, w_out in named.items():
        if name.endswith("attention.w_out"):
            importance[name] = _value_norms(named, name) * jnp.square(w_out).sum((2, 3))
        elif name.endswith("w_out"):
            importance[name] = jnp.square(w_out).sum(-1)
            for other in ("w_in", "w_gate"):
                w_DxF = named.get(name.replace("w_out", other))
                if w_DxF is not None:
                    importance[name] *= jnp.square(w_DxF).sum(-2)
    return importance


def _value_norms(named: dict[str, jax.Array], w_out: str) -> jax.Array:
    """‖w_v‖² for each query head, [N, H], of the attention whose output matrix is `w_out`."""
    w_qkv = named.get(w_out.replace("w_out", "w_qkv"))
    if w_qkv is not None:
        return jnp.square(w_qkv[:, :, 2]).sum((1, 3))
    norm_NxJ = jnp.square(named[w_out.replace("w_out", "w_kv")][:, :, 1]).sum((1, 3))
    return jnp.repeat(norm_NxJ, named[w_out].shape[1] // norm_NxJ.shape[1], axis=1)


def taylor(model: Transformer, gradient: Transformer) -> dict[str, jax.Array]:
    """The importance of the parts of `magnitudes`, under the same names, by the loss.

    A part has (Σ weight · gradient)² over its output weights or embeddings: to first order, the
    squared change of the loss without it (Molchanov et al., arXiv 1906.10771). `gradient` is that
    of a batch's mean loss; add the importance up over batches.
    """
    found, slopes = {}, named_leaves(gradient)
    for name, weight in named_leaves(model).items():
        if name == "tokens" or name.endswith("w_out"):
            axes = 0 if name == "tokens" else (-2, -1) if ".attention." in name else -1
            found[name] = jnp.square((weight * slopes[name]).sum(axes))
    return found


def prune(
    teacher: Transformer,
    student: Transformer,
    layers: list[int],
    load: dict[int, list[float]],
    importance: dict[str, jax.Array],
) -> Transformer:
    """The student, given by its shapes, with a part of the teacher's parameters; call it under jit.

    `layers` is from `source_layers`, and `importance` from `magnitudes` or `taylor`. `load` has
    each expert's share of the choices, for each teacher layer that loses experts.
    """
    parameters = unstack_layers(teacher.config, named_leaves(teacher))
    values = unstack_layers(teacher.config, importance)
    shapes = layer_shapes(student)
    everywhere = {"D": importance["tokens"], "L": -jnp.arange(teacher.config.length)}

    def part(name: str) -> jax.Array:
        dims, shape, worth = declaration(name).dims, shapes[name], everywhere
        if name.startswith("layers."):
            _, number, rest = name.split(".", 2)
            layer = layers[int(number)]
            name = f"layers.{layer}.{rest}"
            heads = values[f"layers.{layer}.attention.w_out"]
            units = values.get(name.rpartition(".")[0] + ".w_out")  # of an MLP or its experts
            worth = worth | {"H": heads, "J": heads, "F": units, "E": load.get(layer)}
        if name not in parameters:  # a router's bias, which the teacher may lack
            return jnp.zeros(shape)
        whole = parameters[name]
        kept = {
            # The indices of the largest values along the last axis, in ascending order.
            letter: jnp.sort(jax.lax.top_k(jnp.asarray(worth[letter]), size)[1], -1)
            for letter, size, of in zip(dims, shape, whole.shape, strict=True)
            if size < of
        }
        return take(whole, dims, kept)

    return build(student, part)
