"""More experts in the last layer, or in the first, or as many in all?

prmoe sweep experiments/pyramid --workdir=runs/prose
"""

import runpy
from pathlib import Path

PROSE = runpy.run_path(str(Path(__file__).parents[2] / "configs/prose.py"))
# The first and the last two have equally many parameters.
ARMS = {name: (name, {}) for name in ("moe", "small", "large", "pyramid", "inverse")}


def runs():
    return PROSE["runs"](ARMS)
