"""Checkpoints: model, optimizer and position in the data, saved in the background by Orbax.

Arrays are stored under their names, whole, so that a checkpoint knows nothing of devices.
"""

import logging
import shutil
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding

from prmoe_jax.config import Config
from prmoe_jax.errors import UserError
from prmoe_jax.model import Transformer
from prmoe_jax.parallel import processes, rules
from prmoe_jax.parallel.mesh import replicated
from prmoe_jax.step import TrainState, init_model, init_state
from prmoe_jax.tree import named_leaves

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run; the newest `keep` stay."""

    def __init__(self, workdir: Path, keep: int | None = None):
        self._directory = workdir.absolute() / "checkpoints"
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, cleanup_tmp_directories=keep is not None, read_only=keep is None
        )
        self._manager = ocp.CheckpointManager(
            self._directory, options=options, item_names=("model", "optimizer", "data")
        )

    def save(self, step: int, state: TrainState, data: dict) -> None:
        """Starts writing a checkpoint; returns when the arrays may be overwritten.

        Raises:
          UserError: this or the checkpoint before it could not be written.
        """
        self.wait()
        # Orbax would notice a full disk as well, in many lines and after filling it.
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves((state.model, state.optimizer)))
        free = shutil.disk_usage(self._directory).free
        if free < needed:
            error = OSError(f"it needs {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB are free")
            raise self._cannot_write(error)
        items = ocp.args.Composite(
            model=ocp.args.StandardSave(named_leaves(state.model)),
            optimizer=ocp.args.StandardSave(named_leaves(state.optimizer)),
            data=ocp.args.JsonSave(data),
        )
        try:
            saved = self._manager.save(step, args=items)
        except Exception as error:
            raise self._cannot_write(error) from error
        if not saved and step != self.latest():
            raise UserError(f"checkpoint {step} was not written to {self._directory}")

    def save_model(self, step: int, model: Transformer, data: dict) -> None:
        """Writes a checkpoint of a model alone, with which no training goes on.

        Raises:
          UserError: it could not be written.
        """
        items = ocp.args.Composite(
            model=ocp.args.StandardSave(named_leaves(model)), data=ocp.args.JsonSave(data)
        )
        try:
            saved = self._manager.save(step, args=items)
        except Exception as error:
            raise self._cannot_write(error) from error
        self.wait()
        if not saved:
            raise UserError(f"checkpoint {step} was not written to {self._directory}")

    def wait(self) -> None:
        """Returns when every checkpoint is complete on disk.

        Raises:
          UserError: one could not be written.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._cannot_write(error) from error

    def latest(self) -> int | None:
        """The newest complete checkpoint's step."""
        return max(self._manager.all_steps(), default=None)

    def restore(self, config: Config, mesh: Mesh) -> tuple[int, TrainState, dict] | None:
        """The newest checkpoint that can be read, placed on a mesh: step, state and data record.

        A damaged one is moved to the workdir's damaged-STEP with a warning, and the one before
        it is used. None if the run has no checkpoint.

        Raises:
          UserError: there are checkpoints, and none can be read.
        """
        shapes = jax.eval_shape(lambda: init_state(config))
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            if not (self._directory / str(step) / "optimizer").exists():
                raise UserError(
                    f"checkpoint {step} in {self._directory} holds a model alone; train another "
                    "run that starts as it, by --config.init.workdir"
                )
            arguments = ocp.args.Composite(
                model=_restore_arguments(shapes.model, mesh),
                optimizer=_restore_arguments(shapes.optimizer, mesh),
                data=ocp.args.JsonRestore(),
            )
            try:
                items = self._manager.restore(step, args=arguments)
            except Exception as error:  # whatever a truncated file makes its reader raise
                log.warning("checkpoint %d cannot be read: %s", step, _first_line(error))
                self._set_aside(step)
                continue
            model = _unflatten(shapes.model, items["model"])
            optimizer = _unflatten(shapes.optimizer, items["optimizer"])
            number = jax.device_put(jax.numpy.int32(step), replicated(mesh))
            return step, TrainState(number, model, optimizer), items["data"]
        if steps:
            raise UserError(
                f"none of the checkpoints {steps} in {self._directory} can be read; they were "
                "moved beside it as damaged-*; run again to start from step 0, or restore a copy"
            )
        return None

    def restore_model(
        self, config: Config, mesh: Mesh, step: int | None = None
    ) -> tuple[int, Transformer]:
        """A checkpoint's step and model, placed on a mesh, without the optimizer.

        Args:
          config: the run's.
          mesh: where to.
          step: the newest one's unless given.

        Raises:
          UserError: there is none, or it cannot be read.
        """
        if step is not None and step not in self._manager.all_steps():
            raise UserError(f"checkpoint {step} is no longer in {self._directory}")
        step = self.latest() if step is None else step
        if step is None:
            raise UserError(f"no checkpoint in {self._directory}; train the run first")
        shapes = jax.eval_shape(lambda: init_model(config))
        arguments = ocp.args.Composite(model=_restore_arguments(shapes, mesh))
        try:
            items = self._manager.restore(step, args=arguments)
        except Exception as error:
            raise UserError(
                f"checkpoint {step} in {self._directory} cannot be read ({_first_line(error)}); "
                "resume the training, which falls back to the one before it"
            ) from error
        return step, _unflatten(shapes, items["model"])

    def close(self) -> None:
        self._manager.close()

    def _set_aside(self, step: int) -> None:
        if jax.process_index() == 0:
            target = self._directory.parent / f"damaged-{step}"
            (self._directory / str(step)).rename(target)
            log.warning("moved it to %s and go on with the checkpoint before it", target)
        processes.barrier(f"checkpoint {step} set aside")
        self._manager.reload()

    def _cannot_write(self, error: Exception) -> UserError:
        good = self.latest()
        return UserError(
            f"a checkpoint could not be written to {self._directory}: {_first_line(error)}; "
            + (f"the last good one is step {good}" if good is not None else "there is none yet")
        )


def _restore_arguments(shapes, mesh: Mesh) -> ocp.args.StandardRestore:
    def place(name, leaf):
        sharding = NamedSharding(mesh, rules.spec(name, leaf.shape, mesh))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    named = named_leaves(shapes).items()
    return ocp.args.StandardRestore({name: place(name, leaf) for name, leaf in named})


def _unflatten(shapes, arrays: dict[str, jax.Array]):
    return jax.tree.unflatten(
        jax.tree.structure(shapes), [arrays[name] for name in named_leaves(shapes)]
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
