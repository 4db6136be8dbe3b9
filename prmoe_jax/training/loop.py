"""The one training loop: data, steps, metrics, evaluation, checkpoints, interruption."""

import contextlib
import dataclasses
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
from prmoe_jax.config.loading import check_resume, load, save
from prmoe_jax.config.routers import capacity
from prmoe_jax.config.schema import Config, DataConfig
from prmoe_jax.data import cache
from prmoe_jax.data.corpora import check_on_disk
from prmoe_jax.data.pipeline import (
    Data,
    fingerprint_changes,
    load_data,
    pipeline_fingerprint,
    train_iterator,
)
from prmoe_jax.distill import teacher_cache
from prmoe_jax.distill.distiller import Distiller
from prmoe_jax.distill.teacher import (
    Teacher,
    cast_to_compute_dtype,
    init_from_teacher,
    restore_teacher,
)
from prmoe_jax.errors import TrainingStopped, UserError
from prmoe_jax.model.backends import check_backends
from prmoe_jax.model.loss import forward
from prmoe_jax.model.sizes import cost
from prmoe_jax.model.state import TrainState
from prmoe_jax.parallel import processes
from prmoe_jax.parallel.axes import local_rows, replicated, split_batch
from prmoe_jax.parallel.mesh import training_mesh
from prmoe_jax.run import directory as workdirs
from prmoe_jax.run import weights_and_biases
from prmoe_jax.run.checkpoint import Checkpoints
from prmoe_jax.run.directory import shared_settings
from prmoe_jax.run.metrics import (
    METRICS,
    MetricsWriter,
    finished,
    model_flops_utilisation,
    read_metrics,
    to_python,
)
from prmoe_jax.run.weights_and_biases import WandbRun
from prmoe_jax.stores import expand
from prmoe_jax.stores.lock import locked
from prmoe_jax.training import branch
from prmoe_jax.training.evaluate import evaluate_model
from prmoe_jax.training.preemption import PreemptionGuard
from prmoe_jax.training.step import compile_train_step, init_state, sharded_state
from prmoe_jax.training.timing import Clock, StallWatch, Trace
from prmoe_jax.training.upcycle import init_from_run

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
    _warn(config)
    first = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(_shared_folder(workdir, config))
        checkpoints = stack.enter_context(contextlib.closing(_checkpoints(workdir, config)))
        stack.enter_context(compile_cache(config, workdir))
        resuming = _check_same_run(config, workdir, checkpoints)
        data = _load_data(config, workdir / workdirs.TOKENIZER if resuming else None)
        # Preparing text may take long: until here, a signal ends a run of one process at once. From
        # here on, a signal stops the run with a checkpoint.
        interrupted = stack.enter_context(PreemptionGuard())
        fingerprint = pipeline_fingerprint(data, config.train.batch_size, config.seed)
        processes.agree("the text", lambda: fingerprint)
        rows = local_rows(mesh, config.train.batch_size)
        batches = train_iterator(data.train, config.train.batch_size, config.seed, rows)
        stack.enter_context(jax.set_mesh(mesh))
        step, state, record = _start(placed, mesh, checkpoints, data, fingerprint)
        if record:
            workdirs.check_step(workdir, step, config)
            batches.set_state(record["iterator"])
        state, teacher = _teacher(placed, mesh, data, step, state, record)
        if first:
            _write_settings(config, workdir, data, resuming)
        last, evaluated = _last_metrics(workdir, step)
        if step >= config.total_steps and evaluated:
            log.info("the run is complete: step %d of %d", step, config.total_steps)
            return last
        begun = workdirs.record_environment(workdir, jax.devices()) if first else time.time()
        writer, wandb, distiller = None, None, None
        if first:
            writer = stack.enter_context(contextlib.closing(MetricsWriter(workdir, step, lock)))
            if config.log.wandb:
                wandb = stack.enter_context(contextlib.closing(WandbRun(config, workdir, begun)))
        if step < config.kd_steps:
            log.info("distillation in %d of %d steps", config.kd_steps, config.total_steps)
            distiller = Distiller(placed, teacher and teacher.config)
        run = Run(
            config=placed,
            workdir=workdir,
            data=data,
            mesh=mesh,
            checkpoints=checkpoints,
            fingerprint=fingerprint,
            writer=writer,
            wandb=wandb,
            progress=stack.enter_context(_progress(step, config.total_steps)),
            clock=Clock(begun, record.get("productive_s", 0.0)),
            stall_watch=stack.enter_context(StallWatch(config.log.stall_minutes)),
            teacher=teacher,
            train_step=compile_train_step(placed, mesh, distiller),
            on_metrics=on_metrics,
        )
        del teacher  # only `run` refers to it, so that its memory is freed when distillation ends
        return run.loop(step, state, batches, interrupted, profile, evaluated)


def _check_arguments(config: Config, workdir: Path, profile: tuple[int, int] | None) -> None:
    """Checks what can be checked before any file is written."""
    if profile and not 1 <= profile[0] <= profile[1] <= config.total_steps:
        raise UserError(
            f"--profile={profile[0]}:{profile[1]} must be two steps in their order, from 1 to the "
            f"run's {config.total_steps}"
        )
    weights_and_biases.check_installed(config)
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


def _checkpoints(workdir: Path, config: Config) -> Checkpoints:
    """The run's checkpoints; the one before the WSD decay stays, since branches start from it."""
    kept_steps = () if config.decay_start is None else (config.decay_start,)
    settings = config.checkpoint
    return Checkpoints(workdir, settings.keep, settings.keep_every, kept_steps)


def _check_same_run(config: Config, workdir: Path, checkpoints: Checkpoints) -> bool:
    """If the folder holds a run, checks its config; returns whether it is resumed."""
    if checkpoints.latest() is not None:
        check_resume(load(workdir / workdirs.CONFIG), config)
        return True
    checkpoints.check_new()
    _check_new_start(workdir, config)
    if config.init.step:
        branch.check(config)
    return False


def _load_data(config: Config, tokenizer: Path | None) -> Data:
    """The text as windows of tokens; a resumed run gives the path of its tokenizer."""
    with processes.main_process_first(cache.root(config.data)):
        data = load_data(config.data, config.model.vocab_size, config.model.length, tokenizer)
    return teacher_cache.attach(data, config) if config.teacher.cache else data


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
    """Writes tokenizer and config and, for a new branch, the metrics of its base run."""
    data.tokenizer.save(workdir / workdirs.TOKENIZER)
    save(config, workdir / workdirs.CONFIG)
    if config.init.step and not resuming:
        branch.copy_metrics(config, workdir)


def _last_metrics(workdir: Path, step: int) -> tuple[dict, bool]:
    """Process 0's last line of metrics ({} elsewhere), and whether `step` was evaluated."""
    lines = read_metrics(workdir / METRICS) if jax.process_index() == 0 else []
    evaluated = any(line["step"] == step and "eval/loss" in line for line in lines)
    return (lines[-1] if lines else {}), processes.of_first(evaluated)


def _progress(step: int, total: int) -> tqdm:
    """A progress bar, if process 0 has a terminal."""
    shown = jax.process_index() == 0 and sys.stderr.isatty()
    return tqdm(total=total, initial=step, unit="step", disable=not shown, leave=False)


def _log_capacity(config: Config) -> None:
    """Logs the experts' capacity, which rounding and `moe.min_capacity` may increase."""
    model, moe = config.model, config.moe
    counts = sorted({count for count in model.schedule.experts if count})
    factors = {"training": moe.capacity_factor, "evaluation": moe.eval_capacity_factor}
    for when, factor in factors.items():
        if counts and math.isfinite(factor):
            slots = [
                capacity(config.group_size, count, factor, model.top_k, moe.min_capacity)
                for count in counts
            ]
            each = ", ".join(f"{n} ({e} experts)" for n, e in zip(slots, counts, strict=True))
            log.info("capacity in %s, of %d tokens: %s", when, config.group_size, each)


def _warn(config: Config) -> None:
    """Warns of settings that are valid but seldom intended."""
    if not config.loss_reaches_routers:
        log.warning(
            "a token's only expert (model.top_k=1) always has the weight 1, by "
            "model.normalize_top_k=always or since its layer has no other: the router learns from "
            "its auxiliary losses alone"
        )
    rises, length = config.optimizer.warmup_tokens, config.total_steps * config.tokens_per_step
    if 0 < rises <= config.tokens_per_step:
        log.warning(
            "optimizer.warmup_tokens=%d is no more than a step of %s tokens, so that the learning "
            "rate does not warm up",
            *(rises, f"{config.tokens_per_step:,}"),
        )
    if config.total_steps < config.decay_end:
        log.info(
            "the run ends at step %d, before its learning rate has fallen, at step %d "
            "(optimizer.decay_tokens)",
            *(config.total_steps, config.decay_end),
        )
    if rises > length and not config.optimizer.decay_tokens:
        log.warning(
            "the run ends before the learning rate is reached: %s tokens, and "
            "optimizer.warmup_tokens=%d",
            *(f"{length:,}", rises),
        )


def _start(
    config: Config, mesh: Mesh, checkpoints: Checkpoints, data: Data, fingerprint: dict
) -> tuple[int, TrainState, dict]:
    """The step at which a run starts, its state and its data record.

    They are from the run's newest checkpoint or, for a new branch, from its base run's
    (`training.branch`). A run without either starts at step 0 with the record {}.
    """
    shapes = jax.eval_shape(lambda: init_state(config))
    found = checkpoints.restore(shapes, mesh)
    how, fix = "resumed", "give another --workdir to start afresh"
    if not found and config.init.step:
        found = branch.restore(config, shapes, mesh)
        how = f"goes on from {config.init.workdir}"
        fix = f"leave out init.step={found[0]}, which is of the run in {config.init.workdir}"
    if not found:
        state = sharded_state(config, mesh)
        if config.init.workdir:
            state = state._replace(model=init_from_run(config, mesh, data.tokenizer))
        return 0, state, {}
    step, state, record = found
    check_fingerprint(record["fingerprint"], fingerprint, fix)
    log.info("%s at step %d of %d", how, step, config.total_steps)
    return step, state, record


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
    workdir: Path
    data: Data
    mesh: Mesh
    checkpoints: Checkpoints
    fingerprint: dict
    writer: MetricsWriter | None  # on the first process alone
    wandb: WandbRun | None
    progress: tqdm
    clock: Clock
    stall_watch: StallWatch
    teacher: Teacher | None  # None after distillation
    train_step: Callable[..., tuple[TrainState, dict]]
    on_metrics: Callable[[dict], None] | None

    def __post_init__(self):
        evaluated = partial(forward, execution=self.config.execution)
        self.eval_step = jax.jit(evaluated, out_shardings=replicated(self.mesh))
        self.flops_per_token = cost(self.config.model, self.config.moe).train_flops_per_token
        self.last_metrics: dict = {}

    def loop(
        self,
        step: int,
        state: TrainState,
        batches,
        interrupted,
        profile: tuple[int, int] | None,
        evaluated: bool,
    ) -> dict:
        """Trains from `step` to the end; `evaluated` tells whether `step` was evaluated before.

        Returns:
          The metrics that were written last.
        """
        total = self.config.total_steps
        pending = None  # the step just dispatched: its metrics are fetched one step later
        distilling = step < self.config.kd_steps
        stopping = bool(interrupted)
        trace = Trace(profile, step, self.workdir / "profile")
        if step and not evaluated and not stopping and self.due(self.config.eval.every, step):
            self.evaluate(step, state)  # the run was interrupted before this evaluation
        while step < total and not stopping:
            trace.before(step + 1)
            if distilling and step == self.config.kd_steps:
                distilling = False
                self.stop_distillation(step)
            with self.clock.waiting():
                batch = next(batches)
                if not distilling:
                    batch = batch._replace(teacher_top_k=None)
                batch = split_batch(batch, self.mesh, self.config.train.batch_size)
            teacher = (self.teacher.model,) if self.teacher else ()
            state, metrics = self.train_step(state, batch, *teacher)
            step += 1
            stopping = interrupted.at(step)
            if pending:
                self.report(*pending)
            pending = step, metrics
            trace.after(step, metrics, stopping)

            checkpoint_due = self.due(self.config.checkpoint.every, step) or stopping
            checkpoint_due |= step == self.config.decay_start  # branches start here
            eval_due = self.due(self.config.eval.every, step)
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
        record = {"fingerprint": self.fingerprint, "iterator": batches.get_state()}
        record["teacher_step"] = self.teacher and self.teacher.step
        record["productive_s"] = self.clock.productive
        self.sync()
        self.checkpoints.save(step, state, record)

    def sync(self) -> None:
        """Writes the metrics so far to the object store, if the run's folder is in one."""
        if self.writer:
            self.writer.sync()

    def due(self, every: int, step: int) -> bool:
        return step == self.config.total_steps or (every > 0 and step % every == 0)

    def report(self, step: int, metrics: dict) -> None:
        """Waits for a step's metrics, stops the run if they aren't finite, logs them if due."""
        # Step n computes its loss with the weights of step n - 1, which a checkpoint may hold.
        for name, broken in (("loss", step - 1), ("grad_norm", step)):
            self.check_finite(name, float(metrics[name]), step, broken)
        self.stall_watch.alive()
        slow = self.clock.step_done(self.config.tokens_per_step)
        if slow and jax.process_index() == 0:
            log.warning("step %d %s", step, slow)
        self.progress.update()
        if not self.due(self.config.log.every, step):
            return
        metrics = to_python(metrics, self.config)
        metrics["tokens"] = step * self.config.tokens_per_step
        metrics |= self.clock.rates()
        utilisation = model_flops_utilisation(metrics["tokens_per_second"] * self.flops_per_token)
        if utilisation is not None:
            metrics["model_flops_utilisation"] = utilisation
        self.write(step, metrics)
        line = f"loss {metrics['loss']:.4f}, {metrics['tokens_per_second']:,.0f} tokens/s"
        if utilisation is not None:
            line += f", MFU {utilisation:.1%}"
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
            + (f"step {good} in {self.workdir}" if good is not None else "none yet")
            + (f"; remove checkpoint {bad}, whose weights gave this" if bad else "")
        )

    def evaluate(self, step: int, state: TrainState) -> None:
        """Evaluates on the whole validation split at the end, else on `eval.batches` batches."""
        limit = 0 if step == self.config.total_steps else self.config.eval.batches
        arguments = state.model, self.config, self.data, self.mesh
        metrics = evaluate_model(self.eval_step, *arguments, limit)
        self.check_finite("the validation loss", metrics["loss"], step, step)
        self.write(step, {f"eval/{name}": value for name, value in metrics.items()})
        self.sync()
        line = f"validation loss {metrics['loss']:.4f}, perplexity {metrics['perplexity']:.1f}, "
        line += f"{metrics['bits_per_byte']:.4f} bits/byte, {metrics['drop_fraction']:.1%} dropped"
        self.say(step, line, stays=True)

    def write(self, step: int, metrics: dict) -> None:
        self.last_metrics = {"step": step, **metrics}
        if self.writer:
            self.writer.write(step, metrics)
            if self.wandb:
                self.wandb.write(step, metrics)
            if self.on_metrics:
                self.on_metrics(self.last_metrics)

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


def check_fingerprint(saved: dict, current: dict, fix: str) -> None:
    """Checks that the data did not change since a checkpoint; `fix` ends the message."""
    if changes := fingerprint_changes(saved, current):
        raise UserError(
            f"the data changed since the checkpoint was written: {changes}; restore the data, or "
            f"{fix}"
        )


def _check_new_start(workdir: Path, config: Config) -> None:
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
