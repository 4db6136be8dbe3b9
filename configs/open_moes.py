"""Open MoE models as their `config.json` describes them: to count, to plan, or to train anew.

    prmoe params --config=configs/open_moes.py:qwen3_30b_a3b
    prmoe plan --config=configs/open_moes.py:olmoe_1b_7b --topology=v5p:4x4x4

`prmoe import --kind=hf` reads the released weights. Here contexts are of 4,096 tokens and batches
of 1,024, OLMoE's; no token is dropped.
"""

import dataclasses
from math import inf
from typing import Any

from prmoe_jax.config import architecture
from prmoe_jax.config.schema import default_config
from prmoe_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Model:
    """A released model; `params` and `active` are its sizes in billions, with embeddings."""

    family: str
    architecture: str
    vocab_size: int
    d_model: int
    d_ff: int
    heads: int
    params: float
    active: float
    kv_heads: int = 0
    head_dim: int = 0
    expert_d_ff: int = 0
    residual_d_ff: int = 0
    normalize_top_k: str = "auto"
    sliding_window: int = 0
    full_attention: str = "none"


_GPT_OSS: dict[str, Any] = {"kv_heads": 8, "head_dim": 64, "sliding_window": 128} | {
    "full_attention": "every 2"
}
MODELS = {
    "olmoe_1b_7b": Model(
        "olmoe", "16 layers, every 1, E=64, top 8", 50_304, 2048, 1024, 16, 6.92, 1.28
    ),
    "mixtral_8x7b": Model(
        "mixtral",
        "32 layers, every 1, E=8, top 2",
        *(32_000, 4096, 14_336, 32, 46.70, 12.88),
        kv_heads=8,
    ),
    "qwen1.5_moe_a2.7b": Model(
        "qwen2_moe",
        "24 layers, every 1, E=60, top 4, residual",
        *(151_936, 2048, 5632, 16, 14.32, 2.69),
        expert_d_ff=1408,
        residual_d_ff=5632,
    ),
    "qwen3_30b_a3b": Model(
        "qwen3_moe",
        "48 layers, every 1, E=128, top 8",
        *(151_936, 2048, 6144, 32, 30.53, 3.35),
        kv_heads=4,
        head_dim=128,
        expert_d_ff=768,
    ),
    "gpt_oss_20b": Model(
        "gpt_oss",
        "24 layers, every 1, E=32, top 4",
        *(201_088, 2880, 2880, 64, 20.91, 4.19),
        **_GPT_OSS,
    ),
    "gpt_oss_120b": Model(
        "gpt_oss",
        "36 layers, every 1, E=128, top 4",
        *(201_088, 2880, 2880, 64, 116.83, 5.71),
        **_GPT_OSS,
    ),
}


def get_config(name: str = "olmoe_1b_7b"):
    if name not in MODELS:
        raise UserError(f"configs/open_moes.py has no '{name}'; use one of {', '.join(MODELS)}")
    values = dataclasses.asdict(MODELS[name])
    for key in ("params", "active"):
        del values[key]
    config = default_config()
    config.model.update(architecture.parse_fields(values.pop("architecture")))
    config.model.update(values)
    config.model.length = 4096
    config.execution.remat = "dots"
    config.moe.capacity_factor = config.moe.eval_capacity_factor = inf
    config.data.tokenizer = "tokenizer.json"  # of the released model
    config.train.tokens = 1_000_000_000_000
    config.train.batch_size = 1024
    config.optimizer.learning_rate = 4e-4
    config.optimizer.min_learning_rate = 4e-5
    config.optimizer.warmup_tokens = 10_000_000_000
    config.checkpoint.every = 1000
    return config
