"""Writes open/: random models of transformers' open families, and their logits.

pip install -e '.[interop]'
python tests/goldens/generate_open_models.py [--out=tests/goldens/open]
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

SIZES = {
    "vocab_size": 290,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
SHARED = HEADS | {"num_hidden_layers": 3, "moe_intermediate_size": 12}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 8.0, "factor": 8.0, "low_freq_factor": 1.0} | {
    "high_freq_factor": 2.0, "original_max_position_embeddings": 16
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 8.0, "factor": 4.0, "beta_fast": 2.0} | {
    "beta_slow": 1.0, "truncate": False, "original_max_position_embeddings": 16
}  # fmt: skip
# A name, the family, and what differs from `SIZES`.
MODELS = {
    "llama": ("llama", HEADS | {"rope_theta": 7000.0}),
    "qwen3": ("qwen3", HEADS | {"head_dim": 10, "tie_word_embeddings": True}),
    "olmoe": (
        "olmoe",
        {"num_attention_heads": 4, "num_key_value_heads": 4, "num_experts": 5}
        | {"num_experts_per_tok": 3, "clip_qkv": 0.5},
    ),
    "mixtral": (
        "mixtral",
        HEADS | {"num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 5},
    ),
    "qwen2_moe": (
        "qwen2_moe",
        HEADS
        | {"num_hidden_layers": 3, "mlp_only_layers": [1], "num_experts": 5}
        | {"num_experts_per_tok": 2, "moe_intermediate_size": 12}
        | {"shared_expert_intermediate_size": 28},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        HEADS
        | {"head_dim": 10, "num_experts": 5, "num_experts_per_tok": 3}
        | {"moe_intermediate_size": 12, "norm_topk_prob": True},
    ),
    # Its three wavelengths are shorter than the limits, between them and longer.
    "llama3": ("llama", HEADS | {"rope_parameters": LLAMA3}),
    "mistral": ("mistral", HEADS | {"head_dim": 10, "sliding_window": 5}),
    "qwen2": (
        "qwen2",
        HEADS | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0},
    ),
    "dots1": (
        "dots1",
        SHARED
        | {"n_routed_experts": 5, "num_experts_per_tok": 3, "n_shared_experts": 2}
        | {"first_k_dense_replace": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5},
    ),
    "hy_v3": (
        "hy_v3",
        SHARED
        | {"head_dim": 10, "num_experts": 4, "num_experts_per_tok": 2}
        | {"mlp_layer_types": ["sparse", "dense", "sparse"]},
    ),
    # 6 of the 12 numbers of a head rotate.
    "glm4_moe": (
        "glm4_moe",
        SHARED
        | {"head_dim": 12, "attention_bias": True, "use_qk_norm": True, "n_routed_experts": 4}
        | {"num_experts_per_tok": 2, "routed_scaling_factor": 1.5},
    ),
    "minimax_m2": (
        "minimax_m2",
        HEADS | {"head_dim": 10, "rotary_dim": 6, "num_local_experts": 5, "num_experts_per_tok": 3},
    ),
    # Of its five wavelengths one is kept, two are between the limits, and two are scaled.
    "yarn": ("qwen3", HEADS | {"head_dim": 10, "rope_parameters": YARN}),
    # Two of its four layers have a window.
    "gpt_oss": (
        "gpt_oss",
        HEADS
        | {"head_dim": 10, "num_hidden_layers": 4, "sliding_window": 5, "rope_parameters": YARN}
        | {"num_local_experts": 5, "num_experts_per_tok": 3},
    ),
    # A head's pairs alternate; experts in the second and fourth of five layers.
    "ernie4_5_moe": (
        "ernie4_5_moe",
        HEADS
        | {"num_hidden_layers": 5, "moe_intermediate_size": 12, "moe_k": 3, "moe_num_experts": 5}
        | {"moe_layer_interval": 2},
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "open")
    out = parser.parse_args().out
    for number, (name, (family, changes)) in enumerate(MODELS.items()):
        rng = np.random.default_rng(number)
        settings = CONFIG_MAPPING[family](**(SIZES | changes))
        model = AutoModelForCausalLM.from_config(settings, attn_implementation="eager").eval()
        with torch.no_grad():
            biases = [(key, x) for key, x in model.named_buffers() if key.endswith("bias")]
            for key, parameter in [*model.named_parameters(), *biases]:  # norms, too
                values = 0.2 * rng.normal(size=parameter.shape) + (parameter.ndim == 1)
                if family == "gpt_oss" and key.endswith("gate_up_proj"):
                    values *= 10  # some of its gates and inputs reach their limit
                parameter.copy_(torch.tensor(values))
        model.save_pretrained(out / name)
        (out / name / "generation_config.json").unlink(missing_ok=True)
        ids = torch.tensor(rng.integers(0, SIZES["vocab_size"], (2, 17)))
        with torch.inference_mode():
            logits = model(ids).logits.float().numpy()
        np.savez(out / name / "logits.npz", ids=ids.numpy(), logits=logits)


if __name__ == "__main__":
    main()
