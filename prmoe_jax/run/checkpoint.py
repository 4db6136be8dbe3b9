"""Checkpoints of model, optimizer and position in the data, saved in the background by Orbax.

Every array is stored whole under its name, so that a checkpoint fits any number of devices.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from orbax.checkpoint import checkpoint_managers as preservation

from prmoe_jax import files, stores
from prmoe_jax.config.schema import Config
from prmoe_jax.data.tokenizer import Tokenizer
from prmoe_jax.errors import TrainingStopped, UserError, first_line, is_out_of_memory, refusing
from prmoe_jax.model.state import TrainState
from prmoe_jax.model.transformer import Transformer, init_model
from prmoe_jax.nn.parameters import from_named, named_leaves
from prmoe_jax.parallel.axes import replicated
from prmoe_jax.parallel.sharding import shardings
from prmoe_jax.run.directory import CHECKPOINTS, TOKENIZER

log = logging.getLogger(__name__)


# In an object store, Orbax writes this object last: a checkpoint without it is incomplete.
COMMITTED = "commit_success.txt"
# Orbax fills a file of arrays in memory before it writes it, by default 2 GB. With this size,
# writing an imported model of 1 GB takes 0.3 GB more.
FILE_BYTES = 2**26
LARGE_BYTES = 2**24  # the checksums of larger arrays are computed one by one


@contextlib.contextmanager
def _quiet_orbax():
    """Hides Orbax's three warnings about each folder that it opens to read."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(max(level, logging.ERROR))
    try:
        yield
    finally:
        logger.setLevel(level)


class Checkpoints:
    """The checkpoints of one run.

    It keeps the newest `keep` checkpoints, those whose step is a multiple of `keep_every`, and that
    of `kept_step`; it deletes others. Without `keep`, checkpoints can only be read.
    """

    def __init__(
        self, workdir: Path, keep: int | None = None, keep_every=0, kept_step: int | None = None
    ):
        self.workdir, self._local = workdir, stores.is_local(workdir)
        self._directory = (workdir.absolute() if self._local else workdir) / CHECKPOINTS
        kept = [] if kept_step is None else [kept_step]
        policies = [preservation.LatestN(keep), preservation.CustomSteps(kept)]
        if keep_every:
            policies.append(preservation.EveryNSteps(keep_every))
        for path in self._directory.rglob("*") if self._local else ():
            files.refuse_pipe(path)  # Orbax would wait for it
        advice = "delete the files _CHECKPOINT_METADATA in their folders, which only tell times"
        unlisted = f"the checkpoints in {self._directory} cannot be listed"
        with (
            _quiet_orbax() if keep is None else contextlib.nullcontext(),
            refusing(unlisted, _UNLISTED, fix=advice),
        ):
            options = ocp.CheckpointManagerOptions(
                preservation_policy=preservation.AnyPreservationPolicy(policies),
                cleanup_tmp_directories=keep is not None,
                read_only=keep is None,
            )
            self._manager = ocp.CheckpointManager(
                self._directory, options=options, item_names=("model", "optimizer", "data")
            )

    def save(self, step: int, state: TrainState, data: dict) -> None:
        """Starts writing a checkpoint; returns when the arrays may be overwritten."""
        self.wait()
        named = {"model": named_leaves(state.model), "optimizer": named_leaves(state.optimizer)}
        if self._local:  # Orbax would notice a full disk only after filling it
            needed = sum(leaf.nbytes for leaf in jax.tree.leaves(named))
            free = shutil.disk_usage(self._directory).free
            with self._writing():
                if free < needed:
                    raise OSError(f"it needs {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB are free")
        arrays = {part: ocp.args.StandardSave(leaves) for part, leaves in named.items()}
        self._save(step, named, arrays, data)

    def save_model(self, step: int, model: Transformer, data: dict) -> None:
        """Writes a checkpoint of a model alone, from which training cannot resume."""
        named = named_leaves(model)
        arrays = ocp.args.PyTreeSave(named, ocdbt_target_data_file_size=FILE_BYTES)
        self._save(step, {"model": named}, {"model": arrays}, data)
        self.wait()

    def _save(self, step: int, named: dict, arrays: dict, data: dict) -> None:
        """Starts writing arrays and a data record, with the checksums of both."""
        sums = {part: checksums(named[part]) for part in named} | {"record": _digest(data)}
        record = ocp.args.JsonSave(data | {"checksums": sums})
        with self._writing():
            saved = self._manager.save(step, args=ocp.args.Composite(**arrays, data=record))
        if not saved:
            raise UserError(f"checkpoint {step} was not written to {self._directory}")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns any error of writing into one line about the checkpoint."""
        try:
            yield
        except Exception as error:
            cause = _first_cause(error)
            if jax.process_count() > 1 and isinstance(cause, jax.errors.JaxRuntimeError):
                # A process was lost: they all wait for each other until a checkpoint is complete.
                raise jax.errors.JaxRuntimeError(str(cause)) from error
            good = self.latest()
            raise UserError(
                f"a checkpoint could not be written to {self._directory}: {first_line(error)}; "
                + (f"the last good one is step {good}" if good is not None else "there is none yet")
            ) from error

    def wait(self) -> None:
        """Waits until every checkpoint is complete on disk."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the checkpoint that is being written, if any."""
        with self._writing():
            self._manager.close()

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, in ascending order."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint, None without one."""
        return max(self.steps(), default=None)

    def restore(
        self, shapes: TrainState, mesh: Mesh, step: int | None = None
    ) -> tuple[int, TrainState, dict] | None:
        """Restores a checkpoint onto a mesh: its step, state and data record.

        Without `step` it is the newest checkpoint that can be read. A damaged one is moved to the
        workdir's folder damaged-STEP with a warning, and the one before it is used; a run of
        several processes stops instead. A failure for another reason (memory, permissions, a
        network) moves nothing. Returns None if there is no checkpoint; `check_new` then tells
        whether damaged ones were moved away before.
        """
        if step is not None:
            self._check_has(step)
            with self._refusing_damage(step):
                return step, *self._read_state(step, shapes, mesh)
        steps = self.steps()[::-1]
        if steps and self._is_model_alone(steps[0]):
            raise UserError(
                f"checkpoint {steps[0]} in {self._directory} holds a model alone; train another "
                "run that starts as it, by --config.init.workdir"
            )
        for one in steps:
            try:
                return one, *self._read_state(one, shapes, mesh)
            except Damaged as damage:
                self._set_aside(one, damage)
        if steps:  # all of them were moved away
            self.check_new()
        return None

    def _read_state(self, step: int, shapes: TrainState, mesh: Mesh) -> tuple[TrainState, dict]:
        record = self._record(step)
        for name in sorted({"fingerprint", "iterator"} - record.keys()):
            raise Damaged(f"its data record has no {name}")
        parts = {"model": shapes.model, "optimizer": shapes.optimizer}
        number = jax.device_put(jnp.int32(step), replicated(mesh))
        return TrainState(number, *self._read_arrays(step, mesh, record, parts)), _bare(record)

    def _read_arrays(self, step: int, mesh: Mesh, record: dict, parts: dict) -> list:
        """Reads trees of these shapes, whose numbers must have the checksums in `record`."""
        shapes = {part: named_leaves(tree) for part, tree in parts.items()}

        def placed(x, place):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

        arguments = {
            part: ocp.args.StandardRestore(jax.tree.map(placed, named, shardings(named, mesh)))
            for part, named in shapes.items()
        }
        items = self._read(step, **arguments)
        for part in parts:
            saved = record.get("checksums", {}).get(part)
            if saved is not None and checksums(items[part]) != saved:  # old ones have none
                raise Damaged(f"the numbers of its {part} are not those that were saved")
        return [from_named(items[part], tree) for part, tree in parts.items()]

    def _check_has(self, step: int) -> None:
        if step not in self.steps():
            raise UserError(
                f"checkpoint {step} is not in {self._directory}, which holds "
                f"{', '.join(map(str, self.steps())) or 'none'}"
            )

    def check_new(self) -> None:
        """Raises UserError if damaged checkpoints were moved away: the run would start anew."""
        aside = sorted(path.name for path in self._directory.parent.glob("damaged-*"))
        if aside:
            raise UserError(
                f"none of this run's checkpoints in {self._directory} can be read; they are beside "
                f"it as {', '.join(aside)}: put a copy of one back, or, to start from step 0, move "
                "these folders away"
            )

    def restore_model(
        self, config: Config, mesh: Mesh, step: int | None = None
    ) -> tuple[int, Transformer]:
        """Restores the model of a checkpoint, by default the newest; returns its step, too."""
        if step is not None:
            self._check_has(step)
        elif (step := self.latest()) is None:
            raise UserError(f"no checkpoint in {self._directory}; train the run first")
        shapes = jax.eval_shape(lambda: init_model(config))
        with self._refusing_damage(step):
            record = self._record(step)
            (model,) = self._read_arrays(step, mesh, record, {"model": shapes})
        path, expected = self.workdir / TOKENIZER, record.get("fingerprint", {}).get("tokenizer")
        if expected and Tokenizer.load(path).fingerprint != expected:
            raise UserError(
                f"{path} is not the tokenizer of checkpoint {step}; restore a copy of the run's own"
            )
        return step, model

    def _record(self, step: int) -> dict:
        """The data record that was saved beside a checkpoint's arrays; empty if there is none."""
        if not self._has(step, "data"):
            return {}
        record = self._read(step, data=ocp.args.JsonRestore())["data"]
        sums = isinstance(record, dict) and record.get("checksums", {})
        now = isinstance(sums, dict) and _digest(record)
        if not now or sums.get("record", now) != now:  # old ones have no digest
            raise Damaged("its data record is not as it was written")
        # Grain's iterators count batches.
        if record.get("iterator", position := {"next_index": step}) != position:
            raise Damaged(f"its position in the data is {record['iterator']!r:.60}, not {position}")
        return record

    def fingerprint(self) -> dict:
        """The newest checkpoint's fingerprints of text and tokenizer; empty if there are none."""
        step = self.latest()
        with self._refusing_damage(step):
            return self._record(step).get("fingerprint", {})

    def _refusing_damage(self, step: int):
        what = f"checkpoint {step} in {self._directory} cannot be read"
        fix = "restore a copy of it, or resume its run, which goes back to an earlier one if it can"
        return refusing(what, Damaged, fix)

    def _has(self, step: int, item: str) -> bool:
        return (self._directory / str(step) / item).is_dir()

    def _is_model_alone(self, step: int) -> bool:
        """Whether `save_model` wrote the checkpoint: without optimizer and position in the data."""
        with contextlib.suppress(Damaged):
            alone = self._has(step, "model") and not self._has(step, "optimizer")
            return alone and "iterator" not in self._record(step)
        return False

    def _read(self, step: int, **arguments) -> ocp.args.Composite:
        """Reads items of a checkpoint; raises Damaged if the files are not as they were written."""
        for item in arguments:
            if not self._has(step, item):
                raise Damaged(f"it has no {item}")
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**arguments))
        except Exception as error:  # truncated files can raise any exception
            cause = _first_cause(error)
            if isinstance(cause, _DAMAGE) or str(cause).startswith(_DAMAGE_CODES):
                raise Damaged(first_line(cause)) from error
            if is_out_of_memory(cause):
                raise cause from None
            raise UserError(
                f"checkpoint {step} in {self._directory} cannot be read now "
                f"({first_line(cause)}); it was left as it is: remove that cause, and start again"
            ) from error

    def _set_aside(self, step: int, damage: "Damaged") -> None:
        """Moves a damaged checkpoint out of the way."""
        log.warning("checkpoint %d cannot be read: %s", step, damage)
        source, parent = self._directory / str(step), self._directory.parent
        names = (f"damaged-{step}{f'-{n}' if n else ''}" for n in itertools.count())
        target = next(parent / name for name in names if not (parent / name).exists())
        if self._local:
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                source.rename(target)
        else:
            stores.client(source).move_folder(source, target, COMMITTED)
        if jax.process_count() > 1:
            raise TrainingStopped(
                f"checkpoint {step} in {self._directory} is damaged ({damage}) and was moved to "
                f"{target}; the same command goes on with the one before it"
            )
        log.warning("moved it to %s and go on with the checkpoint before it", target)
        self._manager.reload()


class Damaged(Exception):
    """A checkpoint's files are not as they were written."""


# Errors of Orbax when it lists checkpoints whose _CHECKPOINT_METADATA, with times, is damaged.
_UNLISTED = ArithmeticError, AttributeError, LookupError, TypeError, ValueError


def checksums(named: dict[str, jax.Array]) -> dict[str, int]:
    """A checksum for each array, which changes if any single element changes.

    It is the sum modulo 2³² of each element's bits times an odd number, which depends on the
    element's position. It is therefore the same on every mesh.
    """
    # Each checksum copies its array. To save memory, large arrays come one by one, and only the
    # others in one program.
    large = {name: x for name, x in named.items() if x.nbytes > LARGE_BYTES}
    small = {name: x for name, x in named.items() if name not in large}
    values = jax.device_get(_checksums(small))
    values |= {name: jax.device_get(_checksum(x)) for name, x in large.items()}
    return {name: int(values[name]) for name in named}


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(x, f"uint{x.dtype.itemsize * 8}").astype(jnp.uint32)
    position = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(x.ndim):
        along = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        position = position * jnp.uint32(2654435761) + along
    return (bits * (2 * position + 1)).sum(dtype=jnp.uint32)


_checksums = jax.jit(partial(jax.tree.map, _checksum))  # of a dict of arrays


def _digest(record: dict) -> str:
    """A digest of a data record without its checksums, which changes if any value changes."""
    return hashlib.sha256(json.dumps(_bare(record), sort_keys=True).encode()).hexdigest()


def _bare(record: dict) -> dict:
    return {name: value for name, value in record.items() if name != "checksums"}


# What means damaged files: errors of Python, which Orbax raises, and codes with which Tensorstore's
# messages begin.
_DAMAGE = FileNotFoundError, UnicodeDecodeError, json.JSONDecodeError, RecursionError
_DAMAGE_CODES = "DATA_LOSS", "OUT_OF_RANGE", "NOT_FOUND", "FAILED_PRECONDITION"


def _first_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error
