"""Maps Hugging Face's GPT-2 to our dense model, which computes the same, and back."""

from pathlib import Path

from prmoe_jax.config.schema import Config, ModelConfig
from prmoe_jax.errors import UserError
from prmoe_jax.interop.mapping import Table
from prmoe_jax.interop.settings import LARGEST, differs, import_settings, resolved, setting, shown

# Settings of GPT2Config that change the computation, with the values that match our model.
FIXED = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
# Our setting -> GPT2Config's.
SIZES = {
    "vocab_size": "vocab_size",
    "length": "n_positions",
    "layers": "n_layer",
    "d_model": "n_embd",
    "heads": "n_head",
}
TABLE = Table(
    prefix="transformer.",
    layer="h.{}.",
    parameters={
        "tokens": ("wte.weight", "V D"),
        "positions": ("wpe.weight", "L D"),
        "norm.scale": ("ln_f.weight", "D"),
        "norm.shift": ("ln_f.bias", "D"),
        "norm_attention.scale": ("ln_1.weight", "D"),
        "norm_attention.shift": ("ln_1.bias", "D"),
        "attention.w_qkv": ("attn.c_attn.weight", "D 3HK"),
        "attention.b_qkv": ("attn.c_attn.bias", "3HK"),
        "attention.w_out": ("attn.c_proj.weight", "HK D"),
        "attention.b_out": ("attn.c_proj.bias", "D"),
        "norm_mlp.scale": ("ln_2.weight", "D"),
        "norm_mlp.shift": ("ln_2.bias", "D"),
        "mlp.w_in": ("mlp.c_fc.weight", "D F"),
        "mlp.b_in": ("mlp.c_fc.bias", "F"),
        "mlp.w_out": ("mlp.c_proj.weight", "F D"),
        "mlp.b_out": ("mlp.c_proj.bias", "D"),
    },
)


def read_config(theirs: dict, path: Path, tensors: int) -> Config:
    """Converts GPT-2's settings; the number of `tensors` limits the layers."""
    for name, value in FIXED.items():
        if differs(theirs.get(name, value), value):
            raise UserError(f"{path}: {name}={shown(theirs[name])}, our dense model has {value!r}")
    settings = import_settings()
    model = settings.model
    for ours, name in SIZES.items():
        high = tensors if ours == "layers" else LARGEST
        model[ours] = setting(theirs, name, int, path, low=1, high=high)
    model.d_ff = setting(theirs, "n_inner", int, path, 4 * model.d_model, low=1)
    return resolved(settings, path)


def gpt2_sizes(model: ModelConfig) -> dict[str, int]:
    """A dense model's sizes under GPT2Config's names."""
    return {theirs: getattr(model, ours) for ours, theirs in SIZES.items()} | {
        "n_inner": model.d_ff
    }


def their_settings(model: ModelConfig) -> dict:
    """A dense model's settings as in GPT-2's config.json."""
    return FIXED | {
        "architectures": ["GPT2LMHeadModel"],
        **gpt2_sizes(model),
        "attn_pdrop": 0.0,
        "embd_pdrop": model.dropout,
        "resid_pdrop": model.dropout,
    }
