"""The one training loop: data, steps, metrics, evaluation, checkpoints, interruption."""

import contextlib
import dataclasses
import datetime
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh
from tqdm import tqdm

from prmoe_jax import files, stores
from prmoe_jax.config.loading import save
from prmoe_jax.config.routers import capacity
from prmoe_jax.config.schema import Config, DataConfig
from prmoe_jax.data import cache
from prmoe_jax.data.corpora import check_on_disk
from prmoe_jax.data.pipeline import Data, load_data, pipeline_fingerprint, train_iterator
from prmoe_jax.distill.loss import Distiller
from prmoe_jax.distill.teacher import (
    Teacher,
    attach_predictions,
    cast_to_compute_dtype,
    init_from_teacher,
    restore_teacher,
)
from prmoe_jax.errors import TrainingStopped, UserError
from prmoe_jax.model.backends import check_backends
from prmoe_jax.model.loss import forward, token_losses
from prmoe_jax.model.sizes import cost
from prmoe_jax.model.state import TrainState
from prmoe_jax.model.transformer import init_model
from prmoe_jax.parallel import processes
from prmoe_jax.parallel.axes import local_rows, replicated, split_batch
from prmoe_jax.parallel.mesh import training_mesh
from prmoe_jax.run import directory as workdirs
from prmoe_jax.run.checkpoint import Checkpoints
from prmoe_jax.run.directory import METRICS, shared_settings
from prmoe_jax.run.metrics import (
    MetricsWriter,
    WandbRun,
    ailing,
    check_wandb,
    loss_parts,
    model_flops_utilisation,
    read_metrics,
    to_python,
)
from prmoe_jax.stores import expand
from prmoe_jax.stores.lock import locked
from prmoe_jax.training import start
from prmoe_jax.training.evaluate import evaluate_model
from prmoe_jax.training.optimizer import trained
from prmoe_jax.training.preemption import PreemptionGuard
from prmoe_jax.training.step import compile_train_step
from prmoe_jax.training.timing import Clock, Trace, stall_watch

log = logging.getLogger(__name__)


def train(
    config: Config,
    workdir: Path,
    profile: tuple[int, int] | None = None,
    on_metrics: Callable[[dict], None] | None = None,
) -> dict:
    """Trains to the last step of the config, and resumes a run that the workdir holds.

    Args:
      config: from `config.resolve`.
      workdir: the run's folder, local or in an object store, created if needed;
        `run/directory.py` lists its files.
      profile: (first, last) step for which a profiler trace is written to workdir/profile; last
        is a step of the run.
      on_metrics: called with every line of metrics.jsonl after it is written, for a live plot.

    Returns:
      The metrics that were written last. A finished run returns its final evaluation: step, and the
      results of `evaluate_model` with the prefix 'eval/'. A run that SIGTERM or Ctrl-C interrupts
      is saved without an evaluation. If the run was complete before, only the first process returns
      its metrics, and the others return {}.

    Raises:
      UserError: the settings cannot be used, contradict the run in the workdir, or are not the
        same in all processes.
      TrainingStopped: the loss or the gradient is no longer finite, or a checkpoint is damaged and
        the run has several processes.
    """
    workdir = stores.as_path(workdir)
    _check_arguments(config, workdir, profile)
    processes.agree("the settings", lambda: shared_settings(config))
    placed, mesh = training_mesh(config)
    check_backends(placed, jax.default_backend(), mesh)
    _log_capacity(config)
    _log_trained(config)
    _warn(config)
    first, batch_size = jax.process_index() == 0, config.train.batch_size
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        check_lock = enter(_shared_folder(workdir, config))
        keeping = config.checkpoint.keep, config.checkpoint.keep_every
        # The checkpoint before the WSD decay stays, since branches start from it.
        checkpoints = Checkpoints(workdir, *keeping, config.decay_start)
        enter(contextlib.closing(checkpoints))
        enter(compile_cache(config, workdir))
        resuming = start.check_same_run(config, workdir, checkpoints)
        data = _load_data(config, workdir / workdirs.TOKENIZER if resuming else None)
        # Preparing text may take long: until here, a signal ends a run of one process at once. From
        # here on, a signal stops the run with a checkpoint.
        interrupted = enter(PreemptionGuard())
        fingerprint = pipeline_fingerprint(data, batch_size, config.seed)
        processes.agree("the text", lambda: fingerprint)
        rows = local_rows(mesh, batch_size)
        batches = train_iterator(data.train, batch_size, config.seed, rows)
        enter(jax.set_mesh(mesh))
        step, state, record = start.initial_state(placed, mesh, checkpoints, data, fingerprint)
        if record:
            batches.set_state(record["iterator"])
        state, teacher = _teacher(placed, mesh, data, step, state, record)
        if first:
            _write_settings(config, workdir, data, resuming)
        last, evaluated = _last_metrics(workdir, step)
        if step >= config.total_steps and evaluated:
            log.info("the run is complete: step %d of %d", step, config.total_steps)
            return last
        begun, sync, sinks = time.time(), None, []
        if first:
            begun = workdirs.record_environment(workdir, jax.devices())
            writer = enter(contextlib.closing(MetricsWriter(workdir, step, check_lock)))
            sync, sinks = writer.sync, [writer.write]
            if config.log.wandb:
                sinks.append(enter(contextlib.closing(WandbRun(config, workdir, begun))).write)
            if on_metrics:
                sinks.append(on_metrics)
        shown = first and sys.stderr.isatty()
        progress = tqdm(
            total=config.total_steps, initial=step, unit="step", disable=not shown, leave=False
        )
        run = Run(
            config=placed,
            data=data,
            mesh=mesh,
            checkpoints=checkpoints,
            record={"fingerprint": fingerprint},
            sync=sync or (lambda: None),
            sinks=sinks,
            clock=Clock(begun, record.get("productive_s", 0.0)),
            alive=enter(stall_watch(config.log.stall_minutes)),
            progress=enter(progress),
            trace=Trace(profile, step, workdir / "profile"),
            teacher=teacher,
        )
        del teacher  # only `run` refers to it, so that its memory is freed when distillation ends
        return run.loop(step, state, batches, interrupted, evaluated)


def _check_arguments(config: Config, workdir: Path, profile: tuple[int, int] | None) -> None:
    """Checks what can be checked before any file is written."""
    if profile and not 1 <= profile[0] <= profile[1] <= config.total_steps:
        raise UserError(
            f"--profile={profile[0]}:{profile[1]} must be two steps in their order, from 1 to the "
            f"run's {config.total_steps}"
        )
    check_wandb(config)
    workdirs.check_outside_checkpoints("--workdir", workdir)
    check_on_disk(config.data)
    for folder in filter(None, (config.init.workdir, config.teacher.workdir, config.teacher.cache)):
        stores.as_path(folder)  # an object store needs a package


@contextlib.contextmanager
def _shared_folder(workdir: Path, config: Config) -> Iterator[Callable[[], None]]:
    """The run's folder, locked by process 0 and seen by all.

    Yields a function that checks the lock, for process 0 to call before it writes to a store.
    """
    first = jax.process_index() == 0
    with locked(workdir) if first else contextlib.nullcontext() as lock:
        if first and stores.is_local(workdir):
            files.remove_unfinished(workdir)
        processes.barrier()  # after it, the run's folder exists
        processes.check_folders(workdir, cache.root(config.data))
        yield lock


def _load_data(config: Config, tokenizer: Path | None) -> Data:
    """The text as windows of tokens; a resumed run gives the path of its tokenizer."""
    with processes.main_process_first(cache.root(config.data)):
        data = load_data(config.data, config.model.vocab_size, config.model.length, tokenizer)
    return attach_predictions(data, config) if config.teacher.cache else data


def _teacher(
    config: Config, mesh: Mesh, data: Data, step: int, state: TrainState, record: dict
) -> tuple[TrainState, Teacher | None]:
    """The state, which a new run may inherit from its teacher, and the teacher if one must run."""
    inherits = config.teacher.inherit and not record
    runs = step < config.kd_steps and not config.teacher.cache
    if not (inherits or runs):
        return state, None
    # A resumed run restores the same step of the teacher as before.
    teacher = restore_teacher(config, mesh, data.tokenizer, record.get("teacher_step"))
    if inherits:
        state = state._replace(model=init_from_teacher(config, teacher, data, mesh))
    return state, None if config.teacher.cache else cast_to_compute_dtype(teacher, mesh)


def _write_settings(config: Config, workdir: Path, data: Data, resuming: bool) -> None:
    """Writes tokenizer and config and, for a new run, what it takes over from its source run."""
    data.tokenizer.save(workdir / workdirs.TOKENIZER)
    save(config, workdir / workdirs.CONFIG)
    if resuming:
        return
    if config.init.step:
        start.copy_metrics(config, workdir)
    start.copy_released(config, workdir, data.chat_template)


def _last_metrics(workdir: Path, step: int) -> tuple[dict, bool]:
    """Process 0's last line of metrics ({} elsewhere), and whether `step` was evaluated."""
    lines = read_metrics(workdir / METRICS) if jax.process_index() == 0 else []
    evaluated = any(line["step"] == step and "eval/loss" in line for line in lines)
    return (lines[-1] if lines else {}), processes.of_first(evaluated)


def _log_capacity(config: Config) -> None:
    """Logs the experts' capacity, which rounding and `moe.min_capacity` may increase."""
    model, moe, tokens = config.model, config.moe, config.group_size
    counts = sorted(set(model.schedule.experts) - {0})
    factors = {"training": moe.capacity_factor, "evaluation": moe.eval_capacity_factor}
    for when, factor in factors.items():
        if counts and math.isfinite(factor):
            each = (
                f"{capacity(tokens, n, factor, model.top_k, moe.min_capacity)} ({n} experts)"
                for n in counts
            )
            log.info("capacity in %s, of %d tokens: %s", when, tokens, ", ".join(each))


def _log_trained(config: Config) -> None:
    """Logs how many parameters train if not all of them do; refuses a pattern without a match."""
    if pattern := config.optimizer.trainable:
        model = jax.eval_shape(lambda: init_model(config))
        total, count = (
            sum(x.size for x in jax.tree.leaves(m)) for m in (model, trained(config, model))
        )
        log.info(f"{count:,} of {total:,} parameters train (optimizer.trainable={pattern})")


def _warn(config: Config) -> None:
    """Tells of settings that are valid but seldom intended."""
    per_step, rises = config.tokens_per_step, config.optimizer.warmup_tokens
    length = config.total_steps * per_step
    if not config.loss_reaches_routers:
        log.warning(
            "a token's only expert (model.top_k=1) always has the weight 1, by "
            "model.normalize_top_k=always or since its layer has no other: the router learns from "
            "its auxiliary losses alone"
        )
    if 0 < rises <= per_step:
        log.warning(
            f"optimizer.warmup_tokens={rises} is no more than a step of {per_step:,} tokens, so "
            "that the learning rate does not warm up"
        )
    if config.total_steps < config.decay_end:
        log.info(
            f"the run ends at step {config.total_steps}, before its learning rate has fallen, at "
            f"step {config.decay_end} (optimizer.decay_tokens)"
        )
    if rises > length and not config.optimizer.decay_tokens:
        log.warning(
            f"the run ends before the learning rate is reached: {length:,} tokens, and "
            f"optimizer.warmup_tokens={rises}"
        )


@contextlib.contextmanager
def compile_cache(config: Config, workdir: Path) -> Iterator[None]:
    """Within the block, JAX keeps compiled programs in the folder `execution.compile_cache`."""
    setting = config.execution.compile_cache
    if setting == "auto" and jax.default_backend() == "cpu":
        setting = ""
    elif setting == "auto":
        # JAX runs the programs that it finds in this folder. A local workdir may come from a
        # stranger, and so may its settings; the default of `data.cache_dir` does not.
        parent = DataConfig.cache_dir if stores.is_local(workdir) else workdir
        setting = f"{parent}/compile_cache"
    if not setting:
        yield
        return
    folder = expand("execution.compile_cache", setting)
    stores.check_reachable(folder, "execution.compile_cache")  # else JAX warns for each program
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", str(folder))
    compilation_cache.reset_cache()  # JAX chooses the folder at the first compilation
    log.info("compiled programs are kept in %s", folder)
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()


@dataclasses.dataclass
class Run:
    """The training loop, with the objects that it uses at every step."""

    config: Config
    data: Data
    mesh: Mesh
    checkpoints: Checkpoints
    record: dict  # what every checkpoint's data record holds
    sync: Callable[[], None]  # writes the metrics so far to the object store, if it holds the run
    sinks: list[Callable[[dict], None]]  # they take each line of metrics; none but on process 0
    clock: Clock
    alive: Callable[[], None]  # tells `stall_watch` that the run goes on
    progress: tqdm
    trace: Trace
    # None if no teacher's model runs (no teacher, or cached predictions), and after distillation.
    teacher: Teacher | None

    def loop(
        self, step: int, state: TrainState, batches, interrupted: PreemptionGuard, evaluated: bool
    ) -> dict:
        """Trains from `step` to the end; `evaluated` tells whether `step` was evaluated before.

        Returns the metrics that were written last.
        """
        config, total = self.config, self.config.total_steps
        losses = token_losses if config.eval.documents else None
        measure = partial(forward, measure=losses, execution=config.execution)
        self.eval_step = jax.jit(measure, out_shardings=replicated(self.mesh))
        size = cost(config.model, config.moe)
        self.flops_per_token = size.train_flops_per_token
        to_come = (total - step) * config.tokens_per_step
        log.info(
            f"{size.total_params:,} parameters, {size.active_params:,} of them active in a token; "
            f"{to_come:,} tokens to come, in {total - step:,} steps"
        )
        self.last_metrics: dict = {}
        self.ailing: dict[str, int] = {}  # layer: evaluations in a row with an ailing router
        distilling = step < config.kd_steps
        distiller = None
        if distilling:
            log.info("distillation in %d of %d steps", config.kd_steps, total)
            distiller = Distiller(config, self.teacher and self.teacher.config)
        self.train_step = compile_train_step(config, self.mesh, distiller)
        pending = None  # the step just dispatched: its metrics are fetched one step later
        stopping = bool(interrupted)
        if step and not evaluated and not stopping and self.due(config.eval.every, step):
            self.evaluate(step, state)  # the run was interrupted before this evaluation
        while step < total and not stopping:
            self.trace.before(step + 1)
            if distilling and step == config.kd_steps:
                distilling = False
                self.stop_distillation(step)
            with self.clock.waiting():
                batch = next(batches)
                if not distilling:
                    batch = batch._replace(teacher_top_k=None)
                batch = split_batch(batch, self.mesh, config.train.batch_size)
            teacher = (self.teacher.model,) if self.teacher else ()
            state, metrics = self.train_step(state, batch, *teacher)
            step += 1
            stopping = interrupted.at(step)
            if pending:
                self.report(*pending)
            pending = step, metrics
            self.trace.after(step, metrics, stopping)

            checkpoint_due = self.due(config.checkpoint.every, step) or stopping
            checkpoint_due |= step == config.decay_start  # branches start here
            eval_due = self.due(config.eval.every, step)
            if checkpoint_due or eval_due:
                self.report(*pending)  # checks the loss before a checkpoint is written
                pending = None
                if checkpoint_due:  # before the evaluation, which may take long
                    self.save(step, state, batches)
                if step == total:  # so that a run with a final evaluation has its checkpoint
                    self.checkpoints.wait()
                if eval_due and (step == total or not stopping):
                    self.evaluate(step, state)
                self.clock.restart()
        self.sync()
        self.checkpoints.wait()
        if 0 < step < total:
            log.info("interrupted: saved at step %d of %d; the same command resumes", step, total)
        elif step < total:
            log.info("interrupted before the first step; the same command starts the run")
        return self.last_metrics

    def stop_distillation(self, step: int) -> None:
        """Lets the student learn from the text alone from here on (the paper's staged KD)."""
        self.say(step, "distillation ends; the teacher's memory is free")
        self.teacher = None
        self.train_step = compile_train_step(self.config, self.mesh)
        self.clock.start = None  # the next step compiles

    def save(self, step: int, state: TrainState, batches) -> None:
        record = self.record | {
            "iterator": batches.get_state(),
            "teacher_step": self.teacher and self.teacher.step,
            "productive_s": self.clock.productive,
        }
        self.sync()
        self.checkpoints.save(step, state, record)

    def due(self, every: int, step: int) -> bool:
        return step == self.config.total_steps or (every > 0 and step % every == 0)

    def report(self, step: int, metrics: dict) -> None:
        """Waits for a step's metrics, stops the run if they aren't finite, logs them if due."""
        # Step n computes its loss with the weights of step n - 1, which a checkpoint may hold.
        for name, broken in (("loss", step - 1), ("grad_norm", step)):
            self.check_finite(name, float(metrics[name]), step, broken)
        self.alive()
        slow = self.clock.step_done(self.config.tokens_per_step)
        if slow and jax.process_index() == 0:
            log.warning("step %d %s", step, slow)
        self.progress.update()
        if seconds := self.clock.estimate(self.config.total_steps - step):
            left = datetime.timedelta(seconds=round(seconds))
            line = f"about {left} (hours:minutes:seconds) to the last step, without evaluations"
            self.say(step, line, stays=True)
        if not self.due(self.config.log.every, step):
            return
        metrics = to_python(metrics, self.config)
        metrics["tokens"] = step * self.config.tokens_per_step
        metrics |= self.clock.rates()
        parts = loss_parts(metrics, self.config).items()
        line = f"loss {metrics['lm_loss']:.4f}" + "".join(f" + {x:.4f} {name}" for name, x in parts)
        line += f", {metrics['tokens_per_second']:,.0f} tokens/s"
        utilisation = model_flops_utilisation(metrics["tokens_per_second"] * self.flops_per_token)
        # The FLOPs are those of training all parameters.
        if utilisation is not None and not self.config.optimizer.trainable:
            metrics["model_flops_utilisation"] = utilisation
            line += f", MFU {utilisation:.1%}"
        self.write(step, metrics)
        self.say(step, line)

    def check_finite(self, name: str, value: float, step: int, broken: int) -> None:
        """Stops the run if a number is not finite; checkpoints from step `broken` on are bad."""
        if math.isfinite(value):
            return
        self.checkpoints.wait()
        steps = self.checkpoints.steps()
        good = max((one for one in steps if one < broken), default=None)
        bad = ", ".join(str(one) for one in steps if one >= broken)
        raise TrainingStopped(
            f"{name} is {value} at step {step}; the last good checkpoint is "
            + (f"step {good} in {self.checkpoints.workdir}" if good is not None else "none yet")
            + (f"; remove checkpoint {bad}, whose weights gave this" if bad else "")
        )

    def evaluate(self, step: int, state: TrainState) -> None:
        """Evaluates on the whole validation split at the end, else on `eval.batches` batches."""
        is_last = step == self.config.total_steps
        limit = 0 if is_last else self.config.eval.batches
        documents = is_last and self.config.eval.documents
        arguments = state.model, self.config, self.data, self.mesh
        metrics = evaluate_model(self.eval_step, *arguments, limit, documents)
        self.check_finite("the validation loss", metrics["loss"], step, step)
        self.write(step, {f"eval/{name}": value for name, value in metrics.items()})
        self.sync()
        found = ailing(metrics)
        self.ailing = {layer: self.ailing.get(layer, 0) + 1 for layer in found}
        for layer, times in self.ailing.items():
            if (times == 2 or step == self.config.total_steps) and jax.process_index() == 0:
                log.warning("step %d: layer %s: %s", step, layer, found[layer])
        line = f"validation loss {metrics['loss']:.4f}, perplexity {metrics['perplexity']:.1f}, "
        line += f"{metrics['bits_per_byte']:.4f} bits/byte, {metrics['drop_fraction']:.1%} dropped"
        self.say(step, line, stays=True)

    def write(self, step: int, metrics: dict) -> None:
        self.last_metrics = {"step": step, **metrics}
        for sink in self.sinks:
            sink(self.last_metrics)

    def say(self, step: int, line: str, stays: bool = False) -> None:
        """Shows a line beside a terminal's progress bar (above it if it `stays`), or logs it."""
        if jax.process_index() != 0:
            return
        if self.progress.disable:
            log.info("step %d/%d: %s", step, self.config.total_steps, line)
        elif stays:
            self.progress.write(f"step {step}: {line}", file=sys.stderr)
        else:
            self.progress.set_postfix_str(line)
