"""The nine models of DeepSpeed-MoE (arXiv 2201.05596), tables 1, 2 and 5 and section 4.2.

    prmoe params --config=configs/paper.py:prmoe_350m
    prmoe params --paper
    prmoe plan --config=configs/paper.py:moe_24b --topology=v5p:4x4x16 --decode=256 …

Not trained here: each is a job of 300 billion tokens. Batches of 256 to 1024 sequences of
2048 tokens; GPT-2's byte-pair encoding, 50,257 entries padded to a multiple of 128. The
paper's own text isn't public: point `data.corpus` at yours.

Planned for a TPU v5p of 4x4x8 chips (docs/results.md): a step of dense_1.3b takes 229 ms, of
moe_1.3b 268 ms and of prmoe_1.3b 314 ms; prmoe_1.3b uses 17.4 of 95 GiB a chip.
"""

import dataclasses

from prmoe_jax.config import architecture
from prmoe_jax.config.schema import default_config
from prmoe_jax.errors import UserError

BILLION = 1_000_000_000


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the paper's tables; `params` is the size it gives, in billions."""

    architecture: str
    d_model: int
    heads: int
    batch_size: int
    learning_rate: float
    min_learning_rate: float
    decay_tokens: int
    init_std: float
    params: float


DENSE = "24 layers"
MOE = "24 layers, E=128"
ROWS = {
    "dense_350m": Row(DENSE, 1024, 16, 256, 3e-4, 3e-5, 260 * BILLION, 0.014, 0.35),
    "dense_1.3b": Row(DENSE, 2048, 16, 512, 2e-4, 2e-5, 260 * BILLION, 0.014, 1.3),
    "dense_6.7b": Row("32 layers", 4096, 32, 1024, 1.2e-4, 1.2e-5, 260 * BILLION, 0.01, 6.7),
    "moe_350m": Row(MOE, 1024, 16, 256, 2e-4, 2e-6, 300 * BILLION, 0.014, 13),
    "moe_1.3b": Row(MOE, 2048, 16, 512, 1.2e-4, 1e-6, 300 * BILLION, 0.014, 52),
    "prmoe_350m": Row(
        "24 layers, E=32x10+64x2, residual", 1024, 16, 256, 3e-4, 1e-6, 300 * BILLION, 0.014, 4
    ),
    "prmoe_1.3b": Row(
        "24 layers, E=64x10+128x2, residual", 2048, 16, 512, 1.2e-4, 1e-6, 300 * BILLION, 0.014, 31
    ),
    "mos_350m": Row(
        "21 layers, E=32x8+64x2, residual", 1024, 16, 256, 3e-4, 1e-6, 300 * BILLION, 0.014, 3.5
    ),
    "mos_1.3b": Row(
        "21 layers, E=64x8+128x2, residual", 2048, 16, 512, 1.2e-4, 1e-6, 300 * BILLION, 0.014, 27
    ),
}
# What section 5.5 serves and nobody trains; the recipe is that of moe_1.3b. So many layers make the
# dense base of 24 B, and with all experts 1,047 B, where the paper says 1,065 B.
SERVED = {
    "moe_24b": Row("30 layers, E=128", 8192, 64, 512, 1.2e-4, 1e-6, 300 * BILLION, 0.014, 1065)
}


def get_config(name: str = "prmoe_350m"):
    rows = ROWS | SERVED
    if name not in rows:
        raise UserError(f"configs/paper.py has no '{name}'; use one of {', '.join(rows)}")
    row = rows[name]
    config = default_config()
    config.model.update(architecture.parse_fields(row.architecture))
    config.model.vocab_size = 50_304
    config.model.length = 2048
    config.model.d_model = row.d_model
    config.model.heads = row.heads
    config.model.d_ff = 4 * row.d_model
    config.model.init_std = row.init_std
    config.execution.remat = "dots"
    if config.model.placement != "none":
        config.moe.overflow = "random"  # DeepSpeed's default
    if name.startswith("mos"):
        config.teacher.workdir = f"runs/pr{name.replace('mos', 'moe')}"
        config.kd.stop = 0.7  # about 400,000 steps of the 350M run
    config.data.tokenizer = "gpt2"
    config.train.tokens = 300 * BILLION
    config.train.batch_size = row.batch_size
    config.optimizer.learning_rate = row.learning_rate
    config.optimizer.min_learning_rate = row.min_learning_rate
    config.optimizer.warmup_tokens = 375_000_000
    config.optimizer.decay_tokens = row.decay_tokens
    config.eval.every = 1000
    config.eval.batches = 10
    config.checkpoint.every = 1000
    return config
