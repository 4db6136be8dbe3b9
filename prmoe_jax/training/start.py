"""Where a run starts: at step 0, at its newest checkpoint, or as another run.

A decay branch goes on from a checkpoint of a base run (`trunk`). With `optimizer.schedule=wsd` the
learning rate does not depend on a run's length until it decays. A branch therefore equals, to the
last bit, a run of the same length that started at step 0.

Sparse upcycling (Komatsuzaki et al., arXiv 2212.05055) copies a layer's dense MLP to every expert,
with optional noise, and to the residual MLP (shared expert). Routers and residual coefficients are
initialised as usual. If experts are narrower than the MLP, each is a slice of the MLP's hidden
units (fine-grained experts). With N slices, N consecutive experts form the whole MLP. They share a
router column, so that tokens choose all of them or none ("virtual groups", He et al., arXiv
2410.07524, section 3.3), and their output weights are multiplied by N.

The first loss equals the dense model's if there is no noise, no token is dropped,
`moe.routed_scale` is 1 and all weights of a mixture add up to 1: those of a token's experts (as
with top 2), and those of experts and residual MLP (`model.residual_mix` 'learned' or 'half'). Top 1
weighs its expert by the router's probability and starts with a higher loss.
"""

import contextlib
import dataclasses
import logging
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from prmoe_jax.config.loading import check_branch, check_resume, load
from prmoe_jax.config.schema import Config
from prmoe_jax.config.validation import check_same_routing
from prmoe_jax.data import released, template
from prmoe_jax.data.pipeline import Data, fingerprint_changes
from prmoe_jax.data.template import ChatTemplate
from prmoe_jax.data.tokenizer import Tokenizer, check_same
from prmoe_jax.errors import UserError, telling
from prmoe_jax.model.layout import unstack_layers
from prmoe_jax.model.state import TrainState
from prmoe_jax.model.surgery import build, check_equal, compared
from prmoe_jax.model.transformer import Transformer, init_model
from prmoe_jax.nn.parameters import declaration, named_leaves
from prmoe_jax.parallel.sharding import init_sharded
from prmoe_jax.run import directory as workdirs
from prmoe_jax.run.checkpoint import Checkpoints
from prmoe_jax.run.metrics import METRICS, finished, read_metrics, write_metrics
from prmoe_jax.run.restore import restore_model
from prmoe_jax.stores import expand
from prmoe_jax.training.step import init_state, sharded_state

log = logging.getLogger(__name__)


def check_same_run(config: Config, workdir: Path, checkpoints: Checkpoints) -> bool:
    """If the folder holds a run, checks its config; returns whether it is resumed."""
    if checkpoints.latest() is not None:
        check_resume(load(workdir / workdirs.CONFIG), config)
        return True
    checkpoints.check_new()
    check_new_start(workdir, config)
    if config.init.step:
        with _reading_source():
            source, trunk = _source_of(config)
            check_branch(trunk, config, f"the run in {source}")
    return False


def check_new_start(workdir: Path, config: Config) -> None:
    """Refuses to restart a run whose checkpoints are gone, which would delete its metrics.

    A run that stopped before its second checkpoint was due may never have had one.
    """
    settings, lines = workdir / workdirs.CONFIG, read_metrics(workdir / METRICS)
    if not (lines and settings.exists()):
        return
    saved, last = load(settings), lines[-1]["step"]
    over = finished(saved, workdir)
    if over or last - saved.init.step > 2 * saved.checkpoint.every > 0:
        state = "is finished" if over else f"came to step {last}"
        raise UserError(
            f"the run in {workdir} {state}, and its checkpoints are gone; give another "
            f"--workdir, or, to train it again from step 0, move its {METRICS} away"
        )
    if saved.init.step or config.init.step:
        # A branch equals the run from step 0, so it may now start from another checkpoint.
        saved = dataclasses.replace(saved, init=config.init)
    check_resume(saved, config)
    log.info("starts again: the run in %s has no checkpoint yet", workdir)


def initial_state(
    config: Config, mesh: Mesh, checkpoints: Checkpoints, data: Data, fingerprint: dict
) -> tuple[int, TrainState, dict]:
    """The step at which a run starts, its state and its data record.

    They are from the run's newest checkpoint or, for a new branch, from its base run's. A run
    without either starts at step 0 with the record {}.
    """
    shapes = jax.eval_shape(lambda: init_state(config))
    found = checkpoints.restore(shapes, mesh)
    how, fix = "resumed", "give another --workdir to start afresh"
    if not found and config.init.step:
        found = _from_trunk(config, shapes, mesh)
        how = f"goes on from {config.init.workdir}"
        fix = f"leave out init.step={found[0]}, which is of the run in {config.init.workdir}"
    if not found:
        state = sharded_state(config, mesh)
        if config.init.workdir:
            state = state._replace(model=init_from_run(config, mesh, data.tokenizer))
        return 0, state, {}
    step, _, record = found
    if changes := fingerprint_changes(record["fingerprint"], fingerprint):
        raise UserError(
            f"the data changed since the checkpoint was written: {changes}; restore the data, or "
            f"{fix}"
        )
    log.info("%s at step %d of %d", how, step, config.total_steps)
    return found


def _from_trunk(config: Config, shapes: TrainState, mesh: Mesh) -> tuple[int, TrainState, dict]:
    trunk = expand("init.workdir", config.init.workdir)
    with _reading_source(), contextlib.closing(Checkpoints(trunk)) as checkpoints:
        step, state, record = checkpoints.restore(shapes, mesh, config.init.step)
    record.pop("productive_s", None)  # the base run's; the branch's wall time starts now
    return step, state, record


def copy_metrics(config: Config, workdir: Path) -> None:
    """Starts the branch's metrics.jsonl with the base run's lines up to `config.init.step`."""
    with _reading_source():
        lines = read_metrics(expand("init.workdir", config.init.workdir) / METRICS)
    write_metrics(workdir, [line for line in lines if line["step"] <= config.init.step])


def copy_released(config: Config, workdir: Path, chat_template: ChatTemplate | None) -> None:
    """Copies the released model's files that the run to start as has kept.

    `chat_template`, that of the data, is kept, too.
    """
    inherited = config.teacher.workdir if config.teacher.inherit else ""
    source = config.init.workdir or inherited
    kept = released.read(expand("init.workdir", source) / released.FOLDER) if source else {}
    known = template.of_files(kept)
    if chat_template and not (known and known.fingerprint == chat_template.fingerprint):
        kept |= chat_template.files
    released.write(kept, workdir)


def init_from_run(config: Config, mesh: Mesh, tokenizer: Tokenizer) -> Transformer:
    """The initial model of a run, from the run in `config.init.workdir`."""
    with _reading_source():
        workdir, source = _source_of(config)
        check_same(workdir / workdirs.TOKENIZER, tokenizer, f"the run in {workdir}")
    check_fits(source, config)
    source = dataclasses.replace(source, mesh=config.mesh)
    with _reading_source():
        step, model = restore_model(workdir, source, mesh)
    log.info("starts as step %d of %s, %s", step, workdir, source.model.schedule)

    def start(model):
        return upcycled(model, init_model(config), jax.random.key(config.seed), config.init.noise)

    return init_sharded(start, mesh, model)


def _reading_source():
    return telling(fix="--config.init.workdir names the run to start as")


def _source_of(config: Config) -> tuple[Path, Config]:
    workdir = expand("init.workdir", config.init.workdir)
    return workdir, load(workdir / workdirs.CONFIG)


def check_fits(source: Config, config: Config) -> None:
    """Raises UserError unless a run can be initialised from the source run."""
    whose, old, model = "the run to start as", source.model, config.model
    sizes = ["layers", "d_model", "heads", "d_ff", "vocab_size", "kv_heads", "head_dim"]
    if any(old.schedule.experts):
        sizes += ["expert_d_ff", "residual_d_ff"]
    check_equal(compared(model, old, sizes), whose, "use the same")
    check_same_routing(config, source, whose)
    if model.positions == "learned" and model.length > old.length:
        raise UserError(
            f"model.length={model.length} exceeds the {old.length} positions of the run to "
            f"start as; use {old.length} or less"
        )
    grown = {}  # the number of experts of each layer that was dense
    counts = zip(old.schedule.experts, model.schedule.experts, strict=True)
    for layer, (have, want) in enumerate(counts):
        if have not in (0, want):
            raise UserError(
                f"layer {layer} has {want or 'no'} experts, that of the run to start as {have}; an "
                "MoE layer starts as a dense one or as one with as many experts"
            )
        if want > have:
            grown[layer] = want
    if grown:
        _check_slices(old.d_ff, config, grown)
    elif config.init.noise:
        raise UserError(
            f"init.noise={config.init.noise} has no effect: the run to start as has all experts, "
            "and only new ones get noise; leave it at 0"
        )


def _check_slices(d_ff: int, config: Config, experts: dict[int, int]) -> None:
    """Checks that these layers' experts can be slices of an MLP with `d_ff` hidden units."""
    model = config.model
    slices = d_ff // model.expert_width
    if slices * model.expert_width != d_ff:
        raise UserError(
            f"model.expert_d_ff={model.expert_width} doesn't divide the {d_ff} hidden units of the "
            "MLPs of the run to start as; use a number that does"
        )
    counts = {"model.top_k": model.top_k}
    counts |= {f"layer {layer}, experts": count for layer, count in experts.items()}
    for name, count in counts.items():
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
    if config.moe.second_expert_sampling and slices > 1:
        raise UserError(
            "moe.second_expert_sampling=True draws the second expert, and here it is the other "
            "half of an MLP; leave it off"
        )


def upcycled(source: Transformer, fresh: Transformer, key: jax.Array, noise: float) -> Transformer:
    """`fresh` with parameters copied from `source`; call it under jit.

    `noise` is the standard deviation of the noise on new experts, relative to the weight's.
    """
    old, new = (unstack_layers(m.config, named_leaves(m)) for m in (source, fresh))
    stacked = {
        name: jax.random.split(jax.random.fold_in(key, number), len(leaf))
        for number, (name, leaf) in enumerate(named_leaves(fresh).items())
        if name.startswith("stages.")
    }
    keys = unstack_layers(fresh.config, stacked)
    slices = source.config.d_ff // fresh.config.expert_width

    def part(name: str) -> jax.Array:
        like = new[name]
        if name in old:
            return old[name][: len(like)]  # the new run may have fewer positions
        if name.endswith("mlp.w_router"):
            return jnp.repeat(like[:, ::slices], slices, axis=1)
        if declaration(name).only_moe:
            return like
        base = old[name.replace("mlp.experts.", "mlp.").replace("mlp.mlp.", "mlp.")]
        if ".experts." not in name:
            return base
        if slices > 1:
            base = _slices(name, base, slices, len(like))
        return base + noise * jnp.std(base) * jax.random.normal(keys[name], like.shape)

    return build(fresh, part)


def _slices(name: str, base: jax.Array, slices: int, experts: int) -> jax.Array:
    dims = declaration(name).dims[1:]
    if "F" not in dims:  # the output bias: routing weights average its copies
        return base
    axis = dims.index("F")
    cut = jnp.stack(jnp.split(base, slices, axis))
    if dims == "FD":
        cut *= slices
    return jnp.tile(cut, (experts // slices, *[1] * base.ndim))
