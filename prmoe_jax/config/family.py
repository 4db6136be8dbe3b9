"""Presets of model settings for families of published models."""

_GPT2 = {
    "norm": "layernorm",
    "norm_eps": 1e-5,
    "positions": "learned",
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 1.0,
    "activation": "gelu",
    "biases": "all",
    "qk_norm": "none",
    "attention_sinks": "none",
    "output": "tied",
    "residual_mix": "learned",  # as in the paper
    "normalize_top_k": "several",
}
_LLAMA = _GPT2 | {
    "norm": "rmsnorm",
    "positions": "rotary",
    "activation": "swiglu",
    "biases": "none",
    "output": "untied",
}
_QWEN = _LLAMA | {"norm_eps": 1e-6, "rope_theta": 1e6}
_QWEN3 = _QWEN | {"qk_norm": "head"}
_SHARED = {"residual_mix": "sum", "normalize_top_k": "always"}

# Each family's values for settings of the group `model`.
FAMILIES = {
    "gpt2": _GPT2,
    "llama": _LLAMA,
    "mistral": _LLAMA | {"norm_eps": 1e-6},
    "olmoe": _LLAMA | {"qk_norm": "whole", "normalize_top_k": "never"},
    "mixtral": _LLAMA | {"rope_theta": 1e6, "normalize_top_k": "always"},
    "qwen2": _QWEN | {"biases": "qkv"},
    "qwen2_moe": _QWEN | {"biases": "qkv", "residual_mix": "sigmoid", "normalize_top_k": "never"},
    "qwen3": _QWEN3,
    "qwen3_moe": _QWEN3 | {"normalize_top_k": "always"},
    "dots1": _LLAMA | _SHARED | {"norm_eps": 1e-6, "rope_theta": 1e7, "qk_norm": "head"},
    "glm4_moe": _LLAMA
    | _SHARED
    | {"rope_theta": 1e6, "partial_rotary_factor": 0.5, "biases": "qkv"},
    "minimax_m2": _LLAMA
    | {"norm_eps": 1e-6, "rope_theta": 5e6, "partial_rotary_factor": 0.5}
    | {"qk_norm": "whole", "normalize_top_k": "always"},
    "hy_v3": _LLAMA | _SHARED | {"rope_theta": 11_158_840.0, "qk_norm": "head"},
    "ernie4_5_moe": _LLAMA | _SHARED | {"rope_theta": 500_000.0, "output": "tied"},
    "gpt_oss": _LLAMA
    | {"rope_theta": 150_000.0, "activation": "clamped_swiglu", "biases": "every"}
    | {"attention_sinks": "learned", "normalize_top_k": "always"},
}
