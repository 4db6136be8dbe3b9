"""How much dense compute is a MoE worth, and how does that grow with its tokens and experts?

A ladder of dense models, each 1.5 times as wide as the one before, and MoEs as wide as its first.

    prmoe sweep experiments/multiplier                     # --shard=1/2 and 2/2 for two cores
    prmoe report experiments/multiplier

A run of more tokens goes on from the one of fewer, and comes right after it, so that no checkpoint
has to be kept for long. A sweep that is stopped has whole answers for the first seeds. After all
seeds of the others come two MoEs of other kinds: PR-MoE's residual layers, and experts that are 4
times as many, a quarter as wide, 4 for each token. The text is experiments/text, of which no token
comes twice.
"""

import runpy
from math import inf
from pathlib import Path

PROSE = runpy.run_path(str(Path(__file__).parents[2] / "configs/prose.py"))
LADDER = True  # MoEs are measured against the dense arms
LAW = (
    "the joint MoE scaling law (arXiv 2502.05172), which was fitted to models of 79 M active "
    "parameters and more"
)
PREDICTED = {  # by law.py
    "E128/3M": 0.115728,
    "E128/6M": 0.241591,
    "E128/11M": 0.466622,
    "E128/23M": 0.83133,
    "E64/3M": 0.189579,
    "E64/6M": 0.347758,
    "E64/11M": 0.593253,
    "E64/23M": 0.941475,
    "E8/3M": 0.622643,
    "E8/6M": 0.771307,
    "E8/11M": 0.923191,
    "E8/23M": 1.07188,
}
KEEP_CHECKPOINTS = False  # one of 128 experts takes 0.2 GB

BATCH, LENGTH = 32, 256  # 8,192 tokens a step
STEPS = {"3M": 350, "6M": 700, "11M": 1400, "23M": 2800}
WARMUP = 35  # steps; a tenth of the shortest run
# Width, heads, and experts in layers 1, 3, 5 and 7. The order shares the work evenly between two
# processes.
ARMS = {
    "dense_64": (64, 2, 0),
    "dense_96": (96, 3, 0),
    "E128": (64, 2, 128),
    "dense_144": (144, 4, 0),
    "E64": (64, 2, 64),
    "E8": (64, 2, 8),
    "residual": (64, 2, 64),
    "fine": (64, 2, 256),
    "dense_216": (216, 6, 0),  # only for its rate, in experiments/multiplier_rates
}
CHANGES = {
    "residual": {"model.residual": True},
    "fine": {"model.expert_d_ff": 64, "model.top_k": 4},
}
# The best of experiments/multiplier_rates; the rates of the widths between follow from those of the
# first and the last, since log(rate) is taken as linear in log(width), of which the ladder has even
# steps.
RATES = {"dense_64": 16e-3, "dense_216": 8e-3, "E8": 16e-3, "E64": 16e-3, "E128": 16e-3}
RATES |= dict.fromkeys(CHANGES, RATES["E64"])
RUNGS = 64, 96, 144, 216
TEXT = "~/.cache/prmoe_jax/text"


def rate(arm: str) -> float:
    """The highest learning rate of an arm."""
    if arm in RATES:
        return RATES[arm]
    share = RUNGS.index(ARMS[arm][0]) / (len(RUNGS) - 1)
    return float(f"{RATES['dense_64'] ** (1 - share) * RATES['dense_216'] ** share:.3g}")


def get_config(arm: str, steps: int, learning_rate: float):
    """The config of an arm's run; its seed is 0."""
    config = _recipe(arm, steps, learning_rate, TEXT)
    config.optimizer.kind = "muon"
    config.data.validation_fraction = 0.002  # 0.7 MB
    return config


def on_prose(arm: str, steps: int, learning_rate: float):
    """The same on the smaller text, with AdamW."""
    return _recipe(arm, steps, learning_rate)


def _recipe(arm: str, steps: int, learning_rate: float, corpus: str | None = None):
    width, heads, experts = ARMS[arm]
    config = PROSE["get_config"](f"8 layers, E={experts}" if experts else "8 layers", corpus)
    config.model.vocab_size, config.model.length = 1024, LENGTH
    config.model.d_model, config.model.heads, config.model.d_ff = width, heads, 4 * width
    if experts:
        config.moe.capacity_factor = config.moe.eval_capacity_factor = inf
    config.update_from_flattened_dict(CHANGES.get(arm, {}))
    config.train.batch_size, config.train.steps = BATCH, steps
    config.optimizer.schedule = "wsd"
    config.optimizer.learning_rate, config.optimizer.min_learning_rate = learning_rate, 0.0
    config.optimizer.warmup_tokens = WARMUP * BATCH * LENGTH
    config.eval.every = config.eval.batches = 0  # the whole validation split, at the end
    config.checkpoint.every, config.checkpoint.keep = 200, 1
    return config


def runs():
    trained = [arm for arm in ARMS if arm not in CHANGES and arm != "dense_216"]
    order = [(arm, seed) for seed in PROSE["SEEDS"] for arm in trained]
    for arm, seed in order + [(arm, seed) for seed in PROSE["SEEDS"] for arm in CHANGES]:
        trunk = None
        for tokens, steps in STEPS.items():
            config = get_config(arm, steps, rate(arm))
            config.seed = seed
            name = f"{arm}/{tokens}/{seed}"
            yield name, config, trunk
            trunk = name


def compared(arms):
    """The runs of a sweep's arms, on 11 M tokens.

    Args:
      arms: for each, an arm of ARMS, the settings that differ, and perhaps the arm from whose run
        it goes on. '{seed}' in the folder of a teacher stands for the seed.
    """
    for seed in PROSE["SEEDS"]:
        for arm, (model, changes, *trunk) in arms.items():
            config = get_config(model, STEPS["11M"], rate(model))
            config.update_from_flattened_dict({"seed": seed, **changes})
            config.teacher.workdir = config.teacher.workdir.format(seed=seed)
            yield f"{arm}/{seed}", config, *(f"{name}/{seed}" for name in trunk)
