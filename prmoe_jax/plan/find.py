"""`prmoe plan --find`: the smallest slice of a kind of chip that a config's train step fits."""

import dataclasses
import logging
import math

from prmoe_jax.config import Config, MeshConfig
from prmoe_jax.errors import UserError
from prmoe_jax.parallel.mesh import propose
from prmoe_jax.plan.chips import CHIPS, SLICES
from prmoe_jax.plan.report import plan
from prmoe_jax.sizes import cost

log = logging.getLogger(__name__)

STATE_BYTES = 12  # of a parameter and its two moments, in float32


def find(config: Config, chip: str, decode: int = 0, teacher: Config | None = None) -> dict:
    """Plans on one slice after the other until one fits.

    The mesh is the config's where it says anything of it, else `parallel.mesh.propose`'s. A slice
    whose chips together can't hold the parameters, and in training the optimizer's state, isn't
    compiled for. `decode` and `teacher` are those of `report.plan`.

    Returns:
      The plan of the first that fits, and `tried`: (topology, why not) of those before.

    Raises:
      UserError: no such chip, or none of its slices fits.
    """
    if chip not in CHIPS:
        raise UserError(f"--find={chip} is unknown; use one of {', '.join(CHIPS)}")
    state_bytes = (2 if decode else STATE_BYTES) * cost(config.model).total_params
    tried = []
    for shape in SLICES[chip]:
        topology, chips = f"{chip}:{shape}", math.prod(map(int, shape.split("x")))
        if state_bytes > chips * CHIPS[chip].hbm_bytes:
            reason = f"the model alone is {state_bytes / 2**30:,.0f} GiB"
        else:
            mesh = config.mesh if config.mesh != MeshConfig() else propose(config, chips)
            try:
                student = dataclasses.replace(config, mesh=mesh)
                taught_by = teacher and dataclasses.replace(teacher, mesh=mesh)
                result = plan(student, topology, decode, taught_by)
            except UserError as error:
                if "cannot be compiled for" in str(error):
                    raise
                reason = str(error)
            else:
                if result["fits"]:
                    return result | {"tried": tried}
                needed = result["hbm_bytes_per_chip"].get("needed")
                held = needed or sum(result["hbm_bytes_per_chip"].values())
                reason = f"needs {held / 2**30:,.1f} GiB a chip"
        log.info("%s: %s", topology, reason)
        tried.append((topology, reason))
    raise UserError(f"--find={chip}: no slice fits; {tried[-1][0]}: {tried[-1][1]}")
