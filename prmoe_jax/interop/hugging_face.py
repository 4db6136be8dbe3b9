"""Converts models of Hugging Face's transformers to ours, which compute the same, and back.

Tables list each family's names of settings and tensors, for reading and for writing.
"""

import json
import logging
import math
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from prmoe_jax.config.schema import Config, ModelConfig
from prmoe_jax.data.tokenizer import Tokenizer
from prmoe_jax.errors import UserError
from prmoe_jax.interop import gpt2
from prmoe_jax.interop.mapping import Table, read_parameters, their_tensors
from prmoe_jax.interop.settings import (
    LARGEST,
    check_expressed,
    differs,
    import_settings,
    resolved,
    setting,
    shown,
)
from prmoe_jax.interop.tensors import Tensors, read_json, write_tensors

log = logging.getLogger(__name__)


def _mlp(
    ours: str, theirs: str, names=("gate_proj", "up_proj", "down_proj")
) -> dict[str, tuple[str, str]]:
    """The table's rows for an MLP, or for each expert."""
    gate, up, down = (f"{theirs}.{name}.weight" for name in names)
    return {f"{ours}.w_gate": (gate, "F D"), f"{ours}.w_in": (up, "F D")} | {
        f"{ours}.w_out": (down, "D F")
    }


def _moe(module: str, *names) -> Table:
    """The table of a family whose MoE layers are modules of this name."""
    router = {"mlp.w_router": (f"{module}.gate.weight", "E D")}
    experts = _mlp("mlp.experts", module + ".experts.{}", *names)
    return Table(LLAMA.parameters | router | experts, LLAMA.layer)


LLAMA = Table(
    layer="model.layers.{}.",
    parameters={
        "tokens": ("model.embed_tokens.weight", "V D"),
        "norm.scale": ("model.norm.weight", "D"),
        "output": ("lm_head.weight", "V D"),
        "norm_attention.scale": ("input_layernorm.weight", "D"),
        "attention.w_qkv": ("self_attn.{}_proj.weight", "HK D"),
        "attention.b_qkv": ("self_attn.{}_proj.bias", "HK"),
        "attention.w_q": ("self_attn.q_proj.weight", "HK D"),
        "attention.b_q": ("self_attn.q_proj.bias", "HK"),
        "attention.w_kv": ("self_attn.{}_proj.weight", "JK D"),
        "attention.b_kv": ("self_attn.{}_proj.bias", "JK"),
        "attention.q_norm.scale": ("self_attn.q_norm.weight", "K"),
        "attention.k_norm.scale": ("self_attn.k_norm.weight", "K"),
        "attention.q_norm.by_head": ("self_attn.q_norm.weight", "HK"),
        "attention.k_norm.by_head": ("self_attn.k_norm.weight", "JK"),
        "attention.w_out": ("self_attn.o_proj.weight", "D HK"),
        "norm_mlp.scale": ("post_attention_layernorm.weight", "D"),
    }
    | _mlp("mlp", "mlp"),
)
SHARED_EXPERT = _mlp("mlp.mlp", "mlp.shared_expert") | {
    "mlp.w_shared": ("mlp.shared_expert_gate.weight", "1 D")
}


class Family(NamedTuple):
    """What differs between families: names of settings and tensors, and defaults."""

    architecture: str
    table: Table
    knows: tuple[str, ...] = ()  # settings that not all families have
    experts: str = "num_experts"  # the setting with the number of experts
    expert_width: str = "moe_intermediate_size"
    norm_eps: float = 1e-6  # transformers' default, for a config.json without it
    rope_theta: float = 10_000.0  # transformers' default

    @property
    def has_experts(self) -> bool:
        """Whether the family has MoE layers."""
        return "mlp.w_router" in self.table.parameters


_QWEN = "sliding_window", "use_sliding_window"
_QWEN_MOE = *_QWEN, "norm_topk_prob", "mlp_only_layers"
FAMILIES = {
    "gpt2": Family("GPT2LMHeadModel", gpt2.TABLE),
    "llama": Family("LlamaForCausalLM", LLAMA, ("head_dim",)),
    "qwen3": Family("Qwen3ForCausalLM", LLAMA, (*_QWEN, "layer_types", "head_dim")),
    "olmoe": Family(
        "OlmoeForCausalLM",
        _moe("mlp"),
        ("clip_qkv", "norm_topk_prob"),
        expert_width="intermediate_size",
        norm_eps=1e-5,
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        _moe("block_sparse_moe", ("w1", "w3", "w2")),
        ("head_dim", "sliding_window"),
        experts="num_local_experts",
        expert_width="intermediate_size",
        norm_eps=1e-5,
        rope_theta=1e6,
    ),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        Table(_moe("mlp").parameters | SHARED_EXPERT, LLAMA.layer),
        (*_QWEN_MOE, "layer_types", "qkv_bias", "shared_expert"),
    ),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", _moe("mlp"), (*_QWEN_MOE, "head_dim")),
}
# Settings that change the computation, with the values that our model has.
FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}
MICROBATCH_TOKENS = 2**16  # the largest microbatch of an imported run
# Our setting -> transformers' setting.
SIZES = {
    "vocab_size": "vocab_size",
    "length": "max_position_embeddings",
    "layers": "num_hidden_layers",
    "d_model": "hidden_size",
    "heads": "num_attention_heads",
    "d_ff": "intermediate_size",
}
# transformers' names of the numbers in `model.rope_scaling`, in order.
SCALING = "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"
# Qwen's default of `sliding_window`, in tokens.
WINDOW = 4096
# The output matrix. With tied embeddings, a file may hold it as a copy of the embedding.
HEAD = "lm_head.weight"
# Name endings of buffers in old files; buffers are no weights.
BUFFERS = ".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias"


def read_hugging_face(
    folder: Path, only: str | None = None
) -> tuple[Config, dict[str, jax.Array], str]:
    """Reads a model that `save_pretrained` wrote, tensor by tensor, onto all devices.

    Args:
      folder: the folder; nothing in it is executed.
      only: the required family; any by default.

    Returns:
      The config, the parameters by our names, and a summary in words.
    """
    path = folder / "config.json"
    theirs = read_json(path)
    family = theirs.get("model_type", only)
    if only and family != only:
        raise UserError(f"{path}: model_type={shown(family)} is not {only}; use --kind=hf")
    tensors = Tensors(folder, BUFFERS)
    config = read_config({**theirs, "model_type": family}, path, len(tensors.shapes))
    table, shapes = FAMILIES[config.model.family].table, dict(tensors.shapes)
    if not any(name.startswith(table.prefix) for name in shapes):
        table = table._replace(prefix="")  # in files of the model without its head
    tokens = table.prefix + table.parameters["tokens"][0]
    if config.model.output == "tied" and {HEAD, tokens} <= shapes.keys():
        if not np.array_equal(tensors.read(HEAD), tensors.read(tokens)):
            raise UserError(f"{path}: tie_word_embeddings=True, but {HEAD} is not {tokens}")
        del shapes[HEAD]
    leaves, summary = read_parameters(config, table, shapes, tensors.read, folder)
    return config, leaves, summary


def read_config(theirs: dict, path: Path, tensors: int) -> Config:
    """Converts transformers' settings; the number of `tensors` limits layers and experts."""
    family = theirs.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise UserError(
            f"{path}: model_type={shown(family)} is unknown; known are {', '.join(FAMILIES)}"
        )
    if family == "gpt2":
        return gpt2.read_config(theirs, path, tensors)
    for name, value in FIXED.items():
        if theirs.get(name) is not None and differs(theirs[name], value):
            raise UserError(f"{path}: {name}={shown(theirs[name])}, our model has {value!r}")
    settings = import_settings()
    model = settings.model
    model.family = family
    for ours, name in SIZES.items():
        high = tensors if ours == "layers" else LARGEST
        model[ours] = setting(theirs, name, int, path, low=1, high=high)
    kv_heads = setting(theirs, "num_key_value_heads", int, path, model.heads, low=1)
    model.kv_heads = 0 if kv_heads == model.heads else kv_heads
    if theirs.get("head_dim") is not None:
        width = setting(theirs, "head_dim", int, path, low=1)
        model.head_dim = 0 if width * model.heads == model.d_model else width
    names = FAMILIES[family]
    model.norm_eps = setting(theirs, "rms_norm_eps", float, path, names.norm_eps, low=1e-30)
    model.rope_theta, model.rope_scaling = _rotary(theirs, names.rope_theta, path)
    tied = setting(theirs, "tie_word_embeddings", bool, path, False)
    model.output = "tied" if tied else "untied"
    if "clip_qkv" in names.knows and theirs.get("clip_qkv") is not None:
        model.clip_qkv = setting(theirs, "clip_qkv", float, path, low=1e-30)
    model.sliding_window = _window(theirs, names, model, path)
    if family == "qwen2_moe" and not setting(theirs, "qkv_bias", bool, path, True):
        model.biases = "none"
    if names.has_experts:
        _read_experts(theirs, names, settings, path, tensors)
    dtype = theirs.get("dtype", theirs.get("torch_dtype"))
    if dtype == "bfloat16":
        model.dtype = dtype
    # `prmoe eval` computes one microbatch at a time, which must fit in memory.
    rows = settings.train.batch_size
    while rows > 1 and rows * model.length > MICROBATCH_TOKENS:
        rows //= 2
    settings.train.accumulate = settings.train.batch_size // rows
    return resolved(settings, path)


def _rotary(theirs: dict, theta: float, path: Path) -> tuple[float, tuple[int, ...]]:
    """RoPE's base and its scaling, which must be Llama 3's or none."""
    name = "rope_scaling" if theirs.get("rope_scaling") else "rope_parameters"
    rope = theirs.get(name) or {}
    if not isinstance(rope, dict):
        raise UserError(f"{path}: {name}={shown(rope)} is not a group of settings")
    kind = rope.get("rope_type", rope.get("type", "default"))
    share = rope.get("partial_rotary_factor", theirs.get("partial_rotary_factor", 1.0))
    scaled = kind == "llama3"
    for name, value, ours in (
        ("rope_type", kind, "llama3" if scaled else "default"),
        ("partial_rotary_factor", share, 1.0),
    ):
        if differs(value, ours):
            raise UserError(f"{path}: {name}={shown(value)}, our model has {ours!r}")
    theta = setting(theirs | rope, "rope_theta", float, path, theta, low=1)
    return theta, _scaling(rope, path) if scaled else ()


def _scaling(rope: dict, path: Path) -> tuple[int, ...]:
    """The numbers of Llama 3's scaling; all of its models have whole numbers."""
    numbers = []
    for name in SCALING:
        number = setting(rope, name, float, path, low=1)
        if number % 1:
            raise UserError(f"{path}: {name}={number}, our model has only whole numbers")
        numbers.append(int(number))
    return tuple(numbers)


def _window(theirs: dict, names: Family, model: ConfigDict, path: Path) -> int:
    """The sliding window of all layers; 0 if there is none, or it covers the whole context."""
    switch = "use_sliding_window"
    if switch in names.knows:
        theirs = {"sliding_window": WINDOW} | theirs
    if theirs.get("sliding_window") is None:
        return 0
    if "sliding_window" not in names.knows:
        raise UserError(
            f"{path}: sliding_window={shown(theirs['sliding_window'])}, which "
            f"{names.architecture} doesn't know; set it to null"
        )
    if switch in names.knows and not setting(theirs, switch, bool, path, False):
        return 0
    window = setting(theirs, "sliding_window", int, path, low=1)
    windowed = _windowed(theirs, model.family, model.layers, path)
    if window >= model.length or not any(windowed):
        return 0
    if not all(windowed):
        raise UserError(
            f"{path}: {sum(windowed)} of {len(windowed)} layers have a sliding window; ours are "
            "all alike"
        )
    return window


def _windowed(theirs: dict, family: str, layers: int, path: Path) -> list[bool]:
    """Whether each layer has the sliding window, as the family's class decides it."""
    numbers = range(layers)
    if "layer_types" not in FAMILIES[family].knows:
        return [True for _ in numbers]
    kinds = theirs.get("layer_types")
    if kinds is None:
        first = setting(theirs, "max_window_layers", int, path, 28)
        if family == "qwen3":
            return [i >= first for i in numbers]
        return [i % 2 == 0 and i < first for i in numbers]
    known = ["full_attention", "sliding_attention"]
    if not isinstance(kinds, list) or len(kinds) != layers or any(k not in known for k in kinds):
        raise UserError(
            f"{path}: layer_types={shown(kinds)} must be one of {', '.join(known)} for each of "
            f"{layers} layers"
        )
    return [kind == known[1] for kind in kinds]


def _read_experts(theirs: dict, names: Family, settings: ConfigDict, path: Path, high: int) -> None:
    """Reads the settings of experts; no token is dropped."""
    model, moe = settings.model, settings.moe
    # transformers reads and writes either name.
    name = next((n for n in ("num_experts", "num_local_experts") if n in theirs), "num_experts")
    experts = setting(theirs, name, int, path, low=1, high=high)
    step = setting(theirs, "decoder_sparse_step", int, path, 1, low=1)
    dense = theirs.get("mlp_only_layers") or []
    if not isinstance(dense, list) or any(type(n) is not int for n in dense):
        raise UserError(f"{path}: mlp_only_layers={shown(dense)} is no list of layers")
    layers = [i for i in range(model.layers) if (i + 1) % step == 0 and i not in dense]
    if not layers:
        return
    every = layers == list(range(model.layers))
    model.placement = "every 1" if every else "layers " + " ".join(map(str, layers))
    model.experts = (experts,)
    model.top_k = setting(theirs, "num_experts_per_tok", int, path, low=1)
    width = setting(theirs, names.expert_width, int, path, low=1)
    model.expert_d_ff = 0 if width == model.d_ff else width
    if "norm_topk_prob" in names.knows:
        normalized = setting(theirs, "norm_topk_prob", bool, path, False)
        model.normalize_top_k = "always" if normalized else "never"
    if "shared_expert" in names.knows and theirs.get("shared_expert_intermediate_size"):
        model.residual = True
        model.residual_d_ff = setting(theirs, "shared_expert_intermediate_size", int, path, low=1)
    moe.capacity_factor = moe.eval_capacity_factor = math.inf


def check_exportable(config: Config, family: str) -> None:
    """Raises UserError unless the family's class in transformers can compute the run's model.

    The settings that would be written must give the same architecture when they are read.
    """
    model, names = config.model, FAMILIES[family]
    instead = f"{names.architecture} of transformers"
    if any(model.schedule.experts) != names.has_experts:
        has = "experts" if names.has_experts else "none"
        raise UserError(
            f"this run is {model.schedule}, and {instead} has {has}; use --kind=safetensors"
        )
    there = read_config(_their_settings(model, family), Path("config.json"), LARGEST).model
    if str(there.schedule) != str(model.schedule):
        raise UserError(
            f"this run is '{model.schedule}': {instead} can only be '{there.schedule}'; use "
            "--kind=safetensors"
        )
    check_expressed(config, there, instead)
    if names.has_experts and math.isfinite(config.moe.eval_capacity_factor):
        log.warning(
            "moe.eval_capacity_factor=%s: transformers drops no token, as with inf",
            config.moe.eval_capacity_factor,
        )


def write_hugging_face(
    config: Config,
    family: str,
    leaves: dict[str, np.ndarray],
    tokenizer: Tokenizer,
    folder: Path,
) -> None:
    """Writes a model in the format of a family's class.

    No number is rounded. Tensors are bfloat16 if that represents all of them exactly and the family
    is not GPT-2, else float32.

    Args:
      config: the run's config.
      family: a key of `FAMILIES`.
      leaves: the run's parameters by our names.
      tokenizer: the run's, for the ids of BOS and EOS.
      folder: the folder to write into.
    """
    tensors = their_tensors(config.model, FAMILIES[family].table, leaves)
    dtype = "float32"
    if family != "gpt2" and all(
        (x.astype(jnp.bfloat16).astype(np.float32) == x).all() for x in tensors.values()
    ):
        dtype = "bfloat16"
        tensors = {name: x.astype(jnp.bfloat16) for name, x in tensors.items()}
    write_tensors(tensors, folder)
    settings = _their_settings(config.model, family) | {
        "dtype": dtype,
        "torch_dtype": dtype,  # its name in transformers 4
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": None,
    }
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")


def tokenizer_settings(tokenizer: Tokenizer, length: int) -> dict:
    """The content of tokenizer_config.json, which makes transformers use tokenizer.json as it is.

    Without it AutoTokenizer chooses a class by the model's type, which may split a text into words
    differently.

    Args:
      tokenizer: the run's.
      length: the longest context, in tokens.
    """
    start, end = map(tokenizer.token, (tokenizer.bos_id, tokenizer.eos_id))
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": start,
        "eos_token": end,
        "model_max_length": length,
        "clean_up_tokenization_spaces": False,
    }


def _their_settings(model: ModelConfig, family: str) -> dict:
    """A model's settings as in the family's config.json."""
    if family == "gpt2":
        return gpt2.their_settings(model)
    names = FAMILIES[family]
    scaling = dict(zip(SCALING, model.rope_scaling, strict=False))  # rope_scaling may be empty
    rope = {"rope_theta": model.rope_theta, "rope_type": "llama3" if scaling else "default"}
    settings = {theirs: getattr(model, ours) for ours, theirs in SIZES.items()} | {
        "architectures": [names.architecture],
        "model_type": family,
        "hidden_act": "silu",
        "num_key_value_heads": model.key_heads,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "rope_parameters": rope | scaling,
        "tie_word_embeddings": model.output == "tied",
        "attention_dropout": 0.0,
    }
    if scaling:
        settings["rope_scaling"] = rope | scaling  # its name in transformers 4
    if "head_dim" in names.knows:
        settings["head_dim"] = model.head_width
    if "clip_qkv" in names.knows:
        settings["clip_qkv"] = model.clip_qkv or None
    if "sliding_window" in names.knows:
        settings |= {"sliding_window": model.sliding_window or None}
        if "use_sliding_window" in names.knows:
            settings |= {"use_sliding_window": model.sliding_window > 0, "max_window_layers": 0}
        if "layer_types" in names.knows and model.sliding_window:
            settings["layer_types"] = ["sliding_attention"] * model.layers
    if "qkv_bias" in names.knows:
        settings["qkv_bias"] = model.biases == "qkv"
    experts = [count for count in model.schedule.experts if count]
    if not experts:
        return settings
    settings |= {names.experts: experts[0], "num_experts_per_tok": model.top_k}
    settings[names.expert_width] = model.expert_width
    if "norm_topk_prob" in names.knows:
        settings["norm_topk_prob"] = model.normalizes
    if "mlp_only_layers" in names.knows:
        dense = [i for i, count in enumerate(model.schedule.experts) if not count]
        settings |= {"decoder_sparse_step": 1, "mlp_only_layers": dense}
    if "shared_expert" in names.knows:
        settings["shared_expert_intermediate_size"] = model.residual_width
    return settings
