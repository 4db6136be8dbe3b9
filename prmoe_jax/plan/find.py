"""Finds a mesh and a slice of chips that a config's step fits: `prmoe plan`."""

import dataclasses
import logging
import math

from jax.sharding import AbstractMesh

from prmoe_jax.config.schema import Config, MeshConfig
from prmoe_jax.config.teacher import adapt_teacher
from prmoe_jax.errors import UserError
from prmoe_jax.model.sizes import cost
from prmoe_jax.parallel.mesh import (
    axis_sizes,
    choose_mesh,
    flags,
    has_own_mesh,
    lower_memory_configs,
    with_mesh,
)
from prmoe_jax.plan.chips import CHIPS, chip_of, device_count, slice_shapes, split
from prmoe_jax.plan.report import check_load, decoding, held_bytes, plan
from prmoe_jax.training.optimizer import least_state_bytes

log = logging.getLogger(__name__)


def fit(
    config: Config, topology: str, decode: int = 0, teacher: Config | None = None, load: float = 1.0
) -> dict:
    """Plans for a topology; if the step doesn't fit, also searches for a plan that fits.

    The mesh is the config's own, or the suggested one (`parallel.mesh.choose_mesh`). The search
    tries other meshes of these chips and, in training, more microbatches (`train.accumulate`); then
    larger slices, smallest first. See `report.plan` for `decode`, `teacher`, `load` and errors.

    Returns:
      The plan. If the config sets no mesh, its `flags` are the command-line flags of the suggested
      mesh. If the step doesn't fit, `instead` is another plan that fits, or None, and `tried` lists
      (topology, reason) for the plans that failed. The flags of `instead` include the number of
      microbatches and the exchange, where these had to change.
    """
    chip_of(topology)
    search = _Search(config, decode, teacher, load)
    devices = device_count(topology)
    placed = choose_mesh(on_topology(search.config, topology), devices, decode=decode > 0)
    result = search.plan(topology, placed)
    if result["fits"]:
        return result
    slices = slice_shapes(topology.partition(":")[0])
    larger = [other for other in slices if device_count(other) > devices]
    search.config = with_mesh(search.config, MeshConfig(slices=config.mesh.slices))
    if config.execution.exchange == "flat":  # it suits every mesh
        execution = dataclasses.replace(search.config.execution, exchange="flat")
        search.config = dataclasses.replace(search.config, execution=execution)
    found = filter(None, map(search.first, [topology, *larger]))
    return result | {"instead": next(found, None), "tried": search.tried}


def find(
    config: Config, chip: str, decode: int = 0, teacher: Config | None = None, load: float = 1.0
) -> dict:
    """Plans for one slice after the other, smallest first, until the step fits.

    If the config sets no mesh, the suggested mesh is tried first, then other meshes and numbers of
    microbatches. The step isn't compiled for a slice whose chips can't hold the parameters and, for
    training, the optimizer's state. See `report.plan` for `decode`, `teacher` and `load`.

    Returns:
      The first plan that fits, with `flags` and `tried` as in `fit`.

    Raises:
      UserError: the chip is unknown, or the step fits none of its slices.
    """
    count, name, shape = split(chip)
    if name not in CHIPS or shape:
        raise UserError(
            f"--find={chip} is unknown; use one of {', '.join(CHIPS)}, or 2xv5p for two slices"
        )
    if count > 1 and CHIPS[name].platform == "gpu":
        raise UserError(f"--find={chip} asks for slices, which only TPUs have; use --find={name}")
    slices = slice_shapes(chip)
    on_topology(config, slices[0])
    search = _Search(config, decode, teacher, load)
    if result := next(filter(None, map(search.first, slices)), None):
        return result | {"tried": search.tried}
    topology, reason = search.tried[-1]
    fix = "; leave --config.mesh.… out for a mesh that suits each slice"
    fix = fix if has_own_mesh(config) else ""
    raise UserError(f"--find={chip}: no slice fits; {topology}: {reason}{fix}")


def on_topology(config: Config, topology: str) -> Config:
    """The config with the topology's number of slices in `mesh.slices`, if it is above 1."""
    asked, (slices, *_) = config.mesh.slices, split(topology)
    if chip_of(topology).platform == "tpu" and asked not in (0, slices):
        raise UserError(
            f"mesh.slices={asked}, but --topology={topology} has {slices}; use {slices}, or 0"
        )
    if slices == 1:
        return config
    return dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, slices=slices))


class _Search:
    """Plans one config on several topologies, meshes and numbers of microbatches.

    On each topology the suggested mesh, or the config's own, is compiled first. Anything else is
    compiled only if its predicted memory fits a device. The prediction is the bytes of its state,
    plus what the last failed plan needed beside its state. That rest is taken as proportional to
    the tokens of a device in one microbatch, whatever the mesh.
    """

    def __init__(self, config: Config, decode: int, teacher: Config | None, load: float):
        check_load(config, decode, load)
        self.config = decoding(config, decode) if decode else config
        self.decode, self.teacher, self.load = decode, teacher, load
        self.exchange = config.execution.exchange  # the user's setting
        self.planned: set[tuple[str, MeshConfig, int]] = set()
        self.tried: list[tuple[str, str]] = []
        # What the last failed plan needed beside its state: bytes on all devices × microbatches.
        self.rest = 0.0

    def first(self, topology: str) -> dict | None:
        """The first plan to fit a topology, or None; tries only the config's mesh if it has one."""
        devices, room = device_count(topology), chip_of(topology).hbm_bytes
        config = on_topology(self.config, topology)
        bytes_each = 2 if self.decode else least_state_bytes(config)
        state = bytes_each * cost(config.model).total_params
        if state > devices * room:
            return self._failed(topology, f"the model alone is {state / 2**30:,.0f} GiB")
        try:
            result = self._once(topology, choose_mesh(config, devices, decode=self.decode > 0))
            if result or has_own_mesh(self.config):
                return result
            for tried in lower_memory_configs(config, devices, microbatches=not self.decode):
                rest = self.rest / devices / tried.train.accumulate
                if rest <= room and rest + self._state_bytes(tried, devices) <= room:
                    if result := self._once(topology, tried):
                        return result
        except UserError as error:
            if "cannot be compiled for" in str(error):
                raise
            return self._failed(topology, str(error))
        return None

    def _once(self, topology: str, config: Config) -> dict | None:
        if (topology, config.mesh, config.train.accumulate) not in self.planned:
            result = self.plan(topology, config)
            return result if result["fits"] else None

    def plan(self, topology: str, config: Config) -> dict:
        """Plans a config that has a mesh; a plan that doesn't fit is added to `tried`."""
        microbatches = config.train.accumulate
        self.planned.add((topology, config.mesh, microbatches))
        teacher = self.teacher and adapt_teacher(self.teacher, config)
        result = plan(config, topology, self.decode, teacher, self.load)
        if not has_own_mesh(self.config):
            result["flags"] = flags(config.mesh)
            if config.execution.exchange != self.exchange:
                result["flags"] += f" --config.execution.exchange={config.execution.exchange}"
            if microbatches != self.config.train.accumulate:
                result["flags"] += f" --config.train.accumulate={microbatches}"
        if not result["fits"]:
            held = dict(result["hbm_bytes_per_chip"])
            needed = held.pop("needed", None) or sum(held.values())
            held.pop("temporaries", None)
            rest = max(0, needed - self._state_of(held))
            self.rest = rest * device_count(topology) * microbatches
            self._failed(topology, f"needs {needed / 2**30:,.1f} GiB a chip")
        return result

    def _state_bytes(self, config: Config, devices: int) -> float:
        """Predicts the bytes of a step's state per device, without compiling it."""
        sizes = axis_sizes(config, devices)
        abstract = AbstractMesh(tuple(sizes.values()), tuple(sizes))
        try:
            teacher = self.teacher and adapt_teacher(self.teacher, config)
            return self._state_of(held_bytes(config, abstract, self.decode, teacher))
        except UserError:  # this mesh can't split the teacher
            return math.inf

    def _state_of(self, held: dict[str, int]) -> int:
        """Bytes of a step's arguments and, in training, of gradients, which frozen parts lack."""
        gradients = 0 if self.decode else min(held["parameters"], held["optimizer"])
        return sum(held.values()) + gradients

    def _failed(self, topology: str, reason: str) -> None:
        log.info("%s: %s", topology, reason)
        self.tried.append((topology, reason))
