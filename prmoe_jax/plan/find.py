"""Which mesh, and which slice of a kind of chip, a config's step fits: `prmoe plan`."""

import dataclasses
import logging
import math

from jax.sharding import AbstractMesh

from prmoe_jax.config import Config, MeshConfig
from prmoe_jax.errors import UserError
from prmoe_jax.model.sizes import cost
from prmoe_jax.parallel.mesh import axis_sizes, choose_mesh, flags, leaner
from prmoe_jax.plan.chips import CHIPS, SLICES, chip_count, chip_of
from prmoe_jax.plan.report import decoding, held_bytes, plan

log = logging.getLogger(__name__)

STATE_BYTES = 12  # of a parameter and its two moments, in float32


def fit(config: Config, topology: str, decode: int = 0, teacher: Config | None = None) -> dict:
    """Plans for a topology; where the step doesn't fit, also what would.

    The mesh is the config's own, or the suggested one (`parallel.mesh.choose_mesh`). What would fit
    is looked for among the other meshes of these chips, then among larger slices, smallest first.
    `decode` and `teacher` are those of `report.plan`.

    Returns:
      The plan, with `flags`, which give its mesh, where the config has none. Where it doesn't fit
      also `instead`: the plan that does, with its `flags`, or None where none does; and `tried`:
      (topology, why not) for each plan on the way.

    Raises:
      UserError: see `choose_mesh` and `report.plan`.
    """
    chip_of(topology)
    search = _Search(config, decode, teacher)
    result = search.plan(topology, choose_mesh(search.config, chip_count(topology)).mesh)
    if result["fits"]:
        return result
    chip = topology.partition(":")[0]
    slices = [f"{chip}:{shape}" for shape in SLICES[chip]]
    larger = [other for other in slices if chip_count(other) > chip_count(topology)]
    search.config = dataclasses.replace(search.config, mesh=MeshConfig())
    found = filter(None, map(search.first, [topology, *larger]))
    return result | {"instead": next(found, None), "tried": search.tried}


def find(config: Config, chip: str, decode: int = 0, teacher: Config | None = None) -> dict:
    """Plans on one slice after the other until one fits.

    The mesh is the config's own; where it has none, the suggested one, or another that fits. A
    slice whose chips together can't hold the parameters, and in training the optimizer's state,
    isn't compiled for. `decode` and `teacher` are those of `report.plan`.

    Returns:
      The plan of the first that fits, with `flags` as in `fit`, and `tried`: (topology, why not)
      of those before.

    Raises:
      UserError: no such chip, or none of its slices fits.
    """
    if chip not in CHIPS:
        raise UserError(f"--find={chip} is unknown; use one of {', '.join(CHIPS)}")
    search = _Search(config, decode, teacher)
    for shape in SLICES[chip]:
        if result := search.first(f"{chip}:{shape}"):
            return result | {"tried": search.tried}
    topology, reason = search.tried[-1]
    fix = ""
    if config.mesh != MeshConfig():
        fix = "; leave --config.mesh.… out for a mesh that suits each slice"
    raise UserError(f"--find={chip}: no slice fits; {topology}: {reason}{fix}")


class _Search:
    """Plans of one config on one topology and mesh after the other.

    A mesh is compiled for only if its state fits, and beside it what the last plan that didn't fit
    needed there: that is in proportion to the tokens of a chip, whatever the mesh.
    """

    def __init__(self, config: Config, decode: int, teacher: Config | None):
        self.config = decoding(config, decode) if decode else config
        self.decode, self.teacher = decode, teacher
        self.planned: set[tuple[str, MeshConfig]] = set()
        self.tried: list[tuple[str, str]] = []
        self.beside = 0.0  # bytes beside the state, all chips together

    def first(self, topology: str) -> dict | None:
        """The plan of the first mesh that fits a topology: the config's own, or any."""
        chips, room = chip_count(topology), chip_of(topology).hbm_bytes
        state = (2 if self.decode else STATE_BYTES) * cost(self.config.model).total_params
        if state > chips * room:
            return self._failed(topology, f"the model alone is {state / 2**30:,.0f} GiB")
        try:
            result = self._once(topology, choose_mesh(self.config, chips).mesh)
            if result or self.config.mesh != MeshConfig():
                return result
            for mesh in leaner(self.config, chips):
                if self.beside / chips > room:
                    break
                if self._predicted(mesh, chips) <= room:
                    if result := self._once(topology, mesh):
                        return result
        except UserError as error:
            if "cannot be compiled for" in str(error):
                raise
            return self._failed(topology, str(error))
        return None

    def _once(self, topology: str, mesh: MeshConfig) -> dict | None:
        if (topology, mesh) in self.planned:
            return None
        result = self.plan(topology, mesh)
        return result if result["fits"] else None

    def plan(self, topology: str, mesh: MeshConfig) -> dict:
        """The plan on a mesh, noted if it doesn't fit."""
        self.planned.add((topology, mesh))
        teacher = self.teacher and dataclasses.replace(self.teacher, mesh=mesh)
        config = dataclasses.replace(self.config, mesh=mesh)
        result = plan(config, topology, self.decode, teacher)
        if mesh != self.config.mesh:
            result["flags"] = flags(mesh)
        if not result["fits"]:
            held = dict(result["hbm_bytes_per_chip"])
            needed = held.pop("needed", None) or sum(held.values())
            held.pop("temporaries", None)
            self.beside = max(0, needed - self._state(held)) * chip_count(topology)
            self._failed(topology, f"needs {needed / 2**30:,.1f} GiB a chip")
        return result

    def _predicted(self, mesh: MeshConfig, chips: int) -> float:
        """Bytes a chip that a step needs on a mesh, as far as is known without compiling it."""
        config = dataclasses.replace(self.config, mesh=mesh)
        sizes = axis_sizes(config, chips)
        abstract = AbstractMesh(tuple(sizes.values()), tuple(sizes))
        teacher = self.teacher and dataclasses.replace(self.teacher, mesh=mesh)
        try:
            held = held_bytes(config, abstract, self.decode, teacher)
        except UserError:  # the teacher can't be split so
            return math.inf
        return self._state(held) + self.beside / chips

    def _state(self, held: dict[str, int]) -> int:
        """What a step is given; in training a gradient as well, as large as the parameters."""
        return sum(held.values()) + (0 if self.decode else held["parameters"])

    def _failed(self, topology: str, reason: str) -> None:
        log.info("%s: %s", topology, reason)
        self.tried.append((topology, reason))
