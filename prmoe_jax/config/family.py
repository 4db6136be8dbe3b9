"""The form of a decoder's parts, and that of each family of published models."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Form:
    """What a decoder is made of, apart from its sizes: by default as in the paper and GPT-2.

    The fields are settings of the same names, which say what the values mean.
    """

    norm: str = "layernorm"
    norm_eps: float = 1e-5
    positions: str = "learned"
    rope_theta: float = 10_000.0
    activation: str = "gelu"
    biases: str = "all"
    qk_norm: str = "none"
    output: str = "tied"
    residual_mix: str = "learned"
    normalize_top_k: str = "several"


def differing(one: Form, other: Form) -> list[str]:
    """The names of the fields in which two forms differ."""
    names = [field.name for field in dataclasses.fields(Form)]
    return [name for name in names if getattr(one, name) != getattr(other, name)]


_LLAMA = Form(
    norm="rmsnorm", positions="rotary", activation="swiglu", biases="none", output="untied"
)
_QWEN3 = dataclasses.replace(_LLAMA, norm_eps=1e-6, rope_theta=1e6, qk_norm="head")

FAMILIES = {
    "gpt2": Form(),
    "llama": _LLAMA,
    "olmoe": dataclasses.replace(_LLAMA, qk_norm="whole", normalize_top_k="never"),
    "mixtral": dataclasses.replace(_LLAMA, rope_theta=1e6, normalize_top_k="always"),
    "qwen2_moe": dataclasses.replace(
        _LLAMA,
        norm_eps=1e-6,
        rope_theta=1e6,
        biases="qkv",
        residual_mix="sigmoid",
        normalize_top_k="never",
    ),
    "qwen3": _QWEN3,
    "qwen3_moe": dataclasses.replace(_QWEN3, normalize_top_k="always"),
}
