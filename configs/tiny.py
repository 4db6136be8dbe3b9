"""Every architecture of the paper on one small backbone, for two CPU cores.

    prmoe train --config=configs/tiny.py:prmoe --workdir=runs/prmoe

The argument is a name below or an architecture string, '6 layers, E=8x2+16, residual'.
All rows share the backbone, the data and the recipe, so that they compare. `mos` learns from the
run in runs/prmoe, or another one that --config.teacher.workdir names.

`prmoe` takes 2 to 9 minutes on two cores (300 steps, 1.23 M tokens) and ends at 1.728 bits per byte
of held-out messages, seed 0; `xz -9e` needs 2.190.
"""

from prmoe_jax.config import architecture
from prmoe_jax.config.schema import default_config
from prmoe_jax.errors import UserError

ARCHITECTURES = {
    "dense": "6 layers",
    "moe": "6 layers, E=8",
    "first_half": "6 layers, first half, E=8",
    "second_half": "6 layers, second half, E=8",
    "top2": "6 layers, E=8, top 2",
    "residual": "6 layers, E=8, residual",
    "pyramid": "6 layers, E=4x2+8",
    "prmoe": "6 layers, E=4x2+8, residual",
    "mos": "5 layers, E=4+8, residual",  # the prmoe's student, a sixth of the depth less
}


def get_config(name: str = "prmoe"):
    if name not in ARCHITECTURES and "layers" not in name:
        known = ", ".join(ARCHITECTURES)
        raise UserError(
            f"configs/tiny.py has no '{name}'; use {known}, or a string such as '6 layers, E=8'"
        )
    config = default_config()
    config.model.update(architecture.parse_fields(ARCHITECTURES.get(name, name)))
    config.model.dtype = "float32"  # as in the recorded results
    config.train.steps = 300
    config.optimizer.learning_rate = 4e-3
    config.optimizer.min_learning_rate = 4e-4
    config.optimizer.warmup_tokens = 20 * 16 * 256
    config.eval.every = 100
    if name == "mos":
        config.teacher.workdir = "runs/prmoe"
    return config
