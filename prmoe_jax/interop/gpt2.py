"""Converts between Hugging Face's GPT-2 and our dense model, which compute the same."""

import json
from pathlib import Path

import numpy as np

from prmoe_jax.config.schema import Config, ModelConfig, default_config
from prmoe_jax.data.tokenizer import Tokenizer
from prmoe_jax.errors import UserError
from prmoe_jax.interop.settings import (
    LARGEST,
    check_gpt2_form,
    check_sizes,
    differs,
    resolved,
    setting,
    shown,
)
from prmoe_jax.interop.tensors import (
    check_coverage,
    check_shape,
    read_json,
    read_tensors,
    write_tensors,
)
from prmoe_jax.model.layout import layer_shapes, stack_layers, unstack_layers

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
# From our settings to GPT-2's.
SIZES = {
    "vocab_size": "vocab_size",
    "length": "n_positions",
    "layers": "n_layer",
    "d_model": "n_embd",
    "heads": "n_head",
}
# From GPT-2's names of a layer's parameters to ours. GPT-2's matrices are [in, out], as ours.
LAYER = {
    "ln_1.weight": "norm_attention.scale",
    "ln_1.bias": "norm_attention.shift",
    "attn.c_attn.weight": "attention.w_qkv",
    "attn.c_attn.bias": "attention.b_qkv",
    "attn.c_proj.weight": "attention.w_out",
    "attn.c_proj.bias": "attention.b_out",
    "ln_2.weight": "norm_mlp.scale",
    "ln_2.bias": "norm_mlp.shift",
    "mlp.c_fc.weight": "mlp.w_in",
    "mlp.c_fc.bias": "mlp.b_in",
    "mlp.c_proj.weight": "mlp.w_out",
    "mlp.c_proj.bias": "mlp.b_out",
}
REST = {
    "wte.weight": "tokens",
    "wpe.weight": "positions",
    "ln_f.weight": "norm.scale",
    "ln_f.bias": "norm.shift",
}
# Endings of the names of buffers in old files.
IGNORED = ".attn.bias", ".attn.masked_bias"


def read_gpt2(folder: Path) -> tuple[Config, dict[str, np.ndarray], str]:
    """Reads a GPT2LMHeadModel; returns a config, parameters by our names, and a summary in words.

    Raises:
      UserError: our dense model can't compute the same, or the folder's tensors don't fit.
    """
    path = folder / "config.json"
    theirs = read_json(path)
    for name, value in FIXED.items():
        if differs(theirs.get(name, value), value):
            raise UserError(f"{path}: {name}={shown(theirs[name])}, our dense model has {value!r}")
    stored = read_tensors(folder, IGNORED)
    tensors = {name.removeprefix("transformer."): x for name, x in stored.items()}
    if len(tensors) < len(stored):
        raise UserError(f"{folder} holds tensors with and without 'transformer.' before their name")
    settings = default_config()
    model = settings.model
    for ours, name in SIZES.items():
        high = len(tensors) if ours == "layers" else LARGEST
        model[ours] = setting(theirs, name, int, path, low=1, high=high)
    model.d_ff = setting(theirs, "n_inner", int, path, 4 * model.d_model, low=1)
    model.dtype = "float32"
    settings.data.tokenizer = "tokenizer.json"  # the file in the same folder
    settings.train.steps = 1
    config = resolved(settings, path)
    check_sizes(config.model, tensors, path)

    head = tensors.pop("lm_head.weight", None)
    if head is not None and not np.array_equal(head, tensors.get("wte.weight")):
        raise UserError(f"{folder}: lm_head.weight is not wte.weight; ours are one matrix")
    layers = range(config.model.layers)
    expected = {f"h.{i}.{name}" for i in layers for name in LAYER} | REST.keys()
    found = check_coverage(tensors, expected, folder, IGNORED)
    for name in sorted(expected):
        want = _theirs(name.split(".", 2)[2] if name.startswith("h.") else name, config.model)
        check_shape(name, tensors[name], want, folder)
    leaves, shapes = {ours: tensors[name] for name, ours in REST.items()}, layer_shapes(config)
    for i in layers:
        for name, ours in LAYER.items():
            ours = f"layers.{i}.{ours}"
            leaves[ours] = tensors[f"h.{i}.{name}"].reshape(shapes[ours])
    return config, stack_layers(config.model, leaves), found


def check_dense(model: ModelConfig) -> None:
    """Raises UserError if the model has experts, or parts that GPT-2 has not."""
    if any(model.schedule.experts):
        raise UserError(
            f"GPT-2 has no experts, and this run is {model.schedule}; use --kind=safetensors"
        )
    check_gpt2_form(model, "GPT-2")


def gpt2_sizes(model: ModelConfig) -> dict[str, int]:
    """The shape of a dense model in the settings of GPT2Config."""
    return {theirs: getattr(model, ours) for ours, theirs in SIZES.items()} | {
        "n_inner": model.d_ff
    }


def write_gpt2(
    config: Config, leaves: dict[str, np.ndarray], tokenizer: Tokenizer, folder: Path
) -> None:
    """Writes a dense model in the format of GPT2LMHeadModel; the tensors keep every bit.

    Args:
      config: the run's config.
      leaves: the run's parameters by our names.
      tokenizer: the run's, for the ids that start and end a document.
      folder: the folder to write into.
    """
    model = config.model
    named = unstack_layers(model, leaves)
    tensors = {f"transformer.{name}": named[ours] for name, ours in REST.items()}
    for i in range(model.layers):
        for name, ours in LAYER.items():
            layer = named[f"layers.{i}.{ours}"]
            tensors[f"transformer.h.{i}.{name}"] = layer.reshape(_theirs(name, model))
    write_tensors(tensors, folder)
    settings = FIXED | {
        "architectures": ["GPT2LMHeadModel"],
        **gpt2_sizes(model),
        "attn_pdrop": 0.0,
        "embd_pdrop": model.dropout,
        "resid_pdrop": model.dropout,
        "bos_token_id": tokenizer.start_of_text,
        "eos_token_id": tokenizer.end_of_text,
    }
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _theirs(name: str, model: ModelConfig) -> tuple[int, ...]:
    """The shape of one of GPT-2's tensors; `name` is without the layer."""
    d, f = model.d_model, model.d_ff
    return {
        "wte.weight": (model.vocab_size, d),
        "wpe.weight": (model.length, d),
        "attn.c_attn.weight": (d, 3 * d),
        "attn.c_attn.bias": (3 * d,),
        "attn.c_proj.weight": (d, d),
        "mlp.c_fc.weight": (d, f),
        "mlp.c_fc.bias": (f,),
        "mlp.c_proj.weight": (f, d),
    }.get(name, (d,))
