"""Converts between open models of Hugging Face's transformers and ours, which compute the same.

A family's settings and the names of its tensors stand in tables; `pieces` says which of their
tensors make one of our parameters. Reading and writing both follow it.
"""

import json
import logging
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from prmoe_jax.config.family import FAMILIES
from prmoe_jax.config.schema import Config, ModelConfig, MoeConfig, default_config
from prmoe_jax.data.tokenizer import Tokenizer
from prmoe_jax.errors import UserError
from prmoe_jax.interop.settings import LARGEST, differs, resolved, setting, shown
from prmoe_jax.interop.tensors import Tensors, check_coverage, check_shape, read_json, write_tensors
from prmoe_jax.model.layout import layer_shapes, places, unstack_layers
from prmoe_jax.model.transformer import init_model
from prmoe_jax.nn.parameters import named_leaves
from prmoe_jax.parallel import sharding

log = logging.getLogger(__name__)


class Names(NamedTuple):
    """A family's names of settings and tensors, as far as families differ."""

    architecture: str
    knows: tuple[str, ...]  # settings that not all families have
    moe_layer: str = ""  # the module of a MoE layer; '' for dense models
    experts: str = "num_experts"  # the setting with the number of experts
    expert_width: str = "moe_intermediate_size"
    matrices: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")  # of an expert
    norm_eps: float = 1e-6  # what the class takes where config.json says nothing
    rope_theta: float = 10_000.0  # likewise


_QWEN = "sliding_window", "use_sliding_window"
_QWEN_MOE = *_QWEN, "norm_topk_prob", "mlp_only_layers"
NAMES = {
    "llama": Names("LlamaForCausalLM", ("head_dim",)),
    "qwen3": Names("Qwen3ForCausalLM", (*_QWEN, "layer_types", "head_dim")),
    "olmoe": Names(
        "OlmoeForCausalLM",
        ("clip_qkv", "norm_topk_prob"),
        "mlp",
        expert_width="intermediate_size",
        norm_eps=1e-5,
    ),
    "mixtral": Names(
        "MixtralForCausalLM",
        ("head_dim", "sliding_window"),
        "block_sparse_moe",
        "num_local_experts",
        "intermediate_size",
        ("w1", "w3", "w2"),
        norm_eps=1e-5,
        rope_theta=1e6,
    ),
    "qwen2_moe": Names(
        "Qwen2MoeForCausalLM", (*_QWEN_MOE, "layer_types", "qkv_bias", "shared_expert"), "mlp"
    ),
    "qwen3_moe": Names("Qwen3MoeForCausalLM", (*_QWEN_MOE, "head_dim"), "mlp"),
}
# Settings that change the computation, with the values that our model has.
FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}
PORTION_TOKENS = 2**16  # the most of a portion of an imported run's batch
# From our settings to theirs.
SIZES = {
    "vocab_size": "vocab_size",
    "length": "max_position_embeddings",
    "layers": "num_hidden_layers",
    "d_model": "hidden_size",
    "heads": "num_attention_heads",
    "d_ff": "intermediate_size",
}
# From our names to theirs: of a layer, and of the rest.
LAYER = {
    "norm_attention.scale": "input_layernorm.weight",
    "norm_mlp.scale": "post_attention_layernorm.weight",
    "attention.w_q": "self_attn.q_proj.weight",
    "attention.b_q": "self_attn.q_proj.bias",
    "attention.w_out": "self_attn.o_proj.weight",
    "attention.q_norm.scale": "self_attn.q_norm.weight",
    "attention.k_norm.scale": "self_attn.k_norm.weight",
    "attention.q_norm.by_head": "self_attn.q_norm.weight",
    "attention.k_norm.by_head": "self_attn.k_norm.weight",
}
REST = {
    "tokens": "model.embed_tokens.weight",
    "norm.scale": "model.norm.weight",
    "output": "lm_head.weight",
}
# The numbers of `model.rope_scaling`.
SCALING = "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"
# Our parameters of several maps.
SEVERAL = {"w_qkv": "qkv", "b_qkv": "qkv", "w_kv": "kv", "b_kv": "kv"}
# The sliding window of Qwen's classes where it is switched on and no size is given.
WINDOW = 4096
# Endings of the names of buffers in old files.
IGNORED = (".rotary_emb.inv_freq",)


class Piece(NamedTuple):
    """A part of one layer's parameter that is one of their tensors."""

    name: str
    index: tuple  # where it lies in our array
    inputs: int  # the leading dimensions of the part that a product sums over; theirs come last


def pieces(name: str, shape: tuple[int, ...], family: str) -> list[Piece]:
    """The parts of one of our parameters.

    Args:
      name: its name after `unstack_layers`, such as 'layers.3.mlp.w_in'.
      shape: the parameter's shape.
      family: the value of `model.family`.
    """
    if name in REST:
        return [Piece(REST[name], (), 0)]
    _, layer, rest = name.split(".", 2)
    prefix, names = f"model.layers.{layer}.", NAMES[family]
    if rest in LAYER:
        inputs = {"attention.w_q": 1, "attention.w_out": 2}.get(rest, 0)
        return [Piece(prefix + LAYER[rest], (), inputs)]
    module, _, last = rest.rpartition(".")
    if last in SEVERAL:
        weight = last.startswith("w")
        kind, index = ("weight", (slice(None),)) if weight else ("bias", ())
        return [
            Piece(f"{prefix}self_attn.{letter}_proj.{kind}", (*index, i), int(weight))
            for i, letter in enumerate(SEVERAL[last])
        ]
    if last == "w_router":
        return [Piece(f"{prefix}{names.moe_layer}.gate.weight", (), 1)]
    if last == "w_shared":
        return [Piece(f"{prefix}mlp.shared_expert_gate.weight", (), 0)]
    number = ("w_gate", "w_in", "w_out").index(last)
    if module == "mlp.experts":
        start, end = f"{prefix}{names.moe_layer}.experts.", f".{names.matrices[number]}.weight"
        return [Piece(f"{start}{e}{end}", (e,), 1) for e in range(shape[0])]
    matrix = Names._field_defaults["matrices"][number]
    shared = "shared_expert." if module == "mlp.mlp" else ""
    return [Piece(f"{prefix}mlp.{shared}{matrix}.weight", (), 1)]


def _theirs(part: np.ndarray, piece: Piece) -> np.ndarray:
    """A part of ours as their tensor [out, in]."""
    if not piece.inputs:
        # A norm over all heads is a vector there, and the gate of a shared expert has one row.
        if piece.name.endswith("shared_expert_gate.weight"):
            return part[None]
        return part if piece.name in REST.values() else part.reshape(-1)
    rows = math.prod(part.shape[: piece.inputs])
    return part.reshape(rows, -1).T


def _ours(tensor: np.ndarray, piece: Piece, shape: tuple[int, ...]) -> np.ndarray:
    """Their tensor as a part of ours."""
    return (tensor.T if piece.inputs else tensor).reshape(shape)


def _parts(name: str, shape: tuple[int, ...], family: str) -> Iterator[tuple[Piece, tuple]]:
    """Each part of a parameter, and its shape there."""
    like = np.broadcast_to(np.float32(0), shape)
    for piece in pieces(name, shape, family):
        yield piece, like[piece.index].shape


def read_hugging_face(
    folder: Path, place: Callable[[Config], jax.sharding.Mesh]
) -> tuple[Config, dict[str, jax.Array], str]:
    """Reads a model that `save_pretrained` wrote, tensor by tensor, onto a mesh.

    The host holds no more than one layer's part of one of our parameters at a time.

    Args:
      folder: the folder; nothing in it is executed.
      place: makes the mesh for a config.

    Returns:
      The config, the parameters by our names, and a summary in words.

    Raises:
      UserError: the model's family is unknown, or it computes something else than ours, or the
        folder's tensors don't fit.
    """
    with Tensors(folder, IGNORED) as tensors:
        path = folder / "config.json"
        config = _config(read_json(path), path, len(tensors.shapes))
        head, table = REST["output"], REST["tokens"]
        if config.model.output == "tied" and {head, table} <= tensors.shapes.keys():
            if not np.array_equal(tensors.read(head), tensors.read(table)):
                raise UserError(f"{path}: tie_word_embeddings=True, but {head} is not {table}")
            del tensors.shapes[head]
        shapes, wanted = layer_shapes(config), {}
        for name, shape in shapes.items():
            for piece, part in _parts(name, shape, config.model.family):
                wanted[piece.name] = _theirs(np.broadcast_to(np.float32(0), part), piece).shape
        found = check_coverage(tensors.shapes, set(wanted), folder, IGNORED)
        for name, shape in wanted.items():
            check_shape(name, tensors.shapes[name], shape, folder)

        def read(name: str) -> np.ndarray:
            array = np.empty(shapes[name], np.float32)
            for piece, shape in _parts(name, shapes[name], config.model.family):
                array[piece.index] = _ours(tensors.read(piece.name), piece, shape)
            return array

        return config, _placed(config, place(config), read), found


def _config(theirs: dict, path: Path, tensors: int) -> Config:
    """The config of their settings; there are no more layers or experts than tensors."""
    family = theirs.get("model_type")
    if not isinstance(family, str) or family not in NAMES:
        raise UserError(
            f"{path}: model_type={shown(family)} is unknown; known are gpt2, {', '.join(NAMES)}"
        )
    for name, value in FIXED.items():
        if theirs.get(name) is not None and differs(theirs[name], value):
            raise UserError(f"{path}: {name}={shown(theirs[name])}, our model has {value!r}")
    settings = default_config()
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
    names = NAMES[family]
    model.norm_eps = setting(theirs, "rms_norm_eps", float, path, names.norm_eps, low=1e-30)
    model.rope_theta, model.rope_scaling = _rotary(theirs, names.rope_theta, path)
    tied = setting(theirs, "tie_word_embeddings", bool, path, False)
    model.output = "tied" if tied else "untied"
    if "clip_qkv" in names.knows and theirs.get("clip_qkv") is not None:
        model.clip_qkv = setting(theirs, "clip_qkv", float, path, low=1e-30)
    model.sliding_window = _window(theirs, names, model, path)
    if family == "qwen2_moe" and not setting(theirs, "qkv_bias", bool, path, True):
        model.biases = "none"
    if names.moe_layer:
        _read_experts(theirs, names, settings, path, tensors)
    dtype = theirs.get("dtype", theirs.get("torch_dtype"))
    model.dtype = "bfloat16" if dtype == "bfloat16" else "float32"
    settings.data.tokenizer = "tokenizer.json"  # the file in the same folder
    settings.train.steps = 1
    # `prmoe eval` computes a portion of a batch at once.
    rows = settings.train.batch_size
    while rows > 1 and rows * model.length > PORTION_TOKENS:
        rows //= 2
    settings.train.accumulate = settings.train.batch_size // rows
    return resolved(settings, path)


def _rotary(theirs: dict, theta: float, path: Path) -> tuple[float, tuple[int, ...]]:
    """The base of rotary positions and their scaling, which must be Llama 3's or none."""
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
    """Llama 3's numbers, which are whole in all of its models."""
    numbers = []
    for name in SCALING:
        number = setting(rope, name, float, path, low=1)
        if number % 1:
            raise UserError(f"{path}: {name}={number}, our model has only whole numbers")
        numbers.append(int(number))
    return tuple(numbers)


def _window(theirs: dict, names: Names, model: ConfigDict, path: Path) -> int:
    """The sliding window of all layers; 0 if there is none or it is as long as the context."""
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
    if "layer_types" not in NAMES[family].knows:
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


def _read_experts(theirs: dict, names: Names, settings: ConfigDict, path: Path, high: int) -> None:
    """Sets what concerns experts, which drop no token."""
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


def _placed(
    config: Config, mesh: jax.sharding.Mesh, read: Callable[[str], np.ndarray]
) -> dict[str, jax.Array]:
    """The parameters on a mesh, from those of the layers one by one."""
    tree = jax.eval_shape(lambda: init_model(config))
    homes = named_leaves(sharding.shardings(tree, mesh))
    layer_of = {place: number for number, place in enumerate(places(config.model))}
    leaves = {}
    for name, leaf in named_leaves(tree).items():
        if not name.startswith("stages."):
            leaves[name] = jax.device_put(read(name), homes[name])
            continue
        _, stage, _, block, rest = name.split(".", 4)
        numbers = [layer_of[int(stage), int(block), n] for n in range(leaf.shape[0])]
        reads = [partial(read, f"layers.{number}.{rest}") for number in numbers]
        leaves[name] = _stacked(leaf, homes[name], reads)
    return leaves


def _stacked(leaf, home: jax.sharding.NamedSharding, reads: list[Callable]) -> jax.Array:
    """An array on a mesh whose rows are read one by one, each when the one before is in place."""
    whole = jax.jit(partial(jnp.zeros, leaf.shape, leaf.dtype), out_shardings=home)()
    row_home = jax.sharding.NamedSharding(home.mesh, jax.sharding.PartitionSpec(*home.spec[1:]))
    put = jax.jit(lambda x, row, n: x.at[n].set(row), donate_argnums=0, out_shardings=home)
    for n, read in enumerate(reads):
        whole = put(whole, jax.device_put(read(), row_home), n)
        whole.block_until_ready()
    return whole


def check_exportable(config: Config) -> None:
    """Raises UserError if the family's class of transformers computes something else.

    It computes the same if reading what would be written gives the same architecture.
    """
    model, moe = config.model, config.moe
    if model.family not in NAMES:
        raise UserError(f"model.family={model.family}: transformers has no such class")
    names = NAMES[model.family]
    instead = f"{names.architecture} of transformers"
    if any(model.schedule.experts) != bool(names.moe_layer):
        has = "experts" if names.moe_layer else "none"
        raise UserError(f"this run is {model.schedule}, and {instead} has {has}")
    there = _config(_their_settings(model), Path("config.json"), LARGEST).model
    if str(there.schedule) != str(model.schedule):
        raise UserError(
            f"this run is '{model.schedule}': {instead} can only be '{there.schedule}'; use "
            "--kind=safetensors"
        )
    theirs = _architecture(there)
    for name, value in _architecture(model).items():
        if theirs[name] != value:
            raise UserError(
                f"model.{name}={value}: {instead} has {theirs[name]}; use --kind=safetensors"
            )
    for name in ("router", "scores", "routed_scale", "bias_update_rate"):
        value, only = getattr(moe, name), getattr(MoeConfig, name)
        if value != only:
            raise UserError(f"moe.{name}={value}: {instead} has {only}; use --kind=safetensors")
    if names.moe_layer and math.isfinite(moe.eval_capacity_factor):
        log.warning(
            "moe.eval_capacity_factor=%s: transformers drops no token, as with inf",
            moe.eval_capacity_factor,
        )


def _architecture(model: ModelConfig) -> dict[str, object]:
    """What a model computes, in settings with their effective values."""
    form = {name: getattr(model, name) for name in FAMILIES["gpt2"]}
    if model.normalizes or not any(model.schedule.experts):
        form["normalize_top_k"] = "always"
    if not model.residual:
        form["residual_mix"] = "none"
    return {
        **form,
        "kv_heads": model.key_heads,
        "head_dim": model.head_width,
        "clip_qkv": model.clip_qkv,
        "sliding_window": model.sliding_window,
        "rope_scaling": model.rope_scaling,
    }


def write_hugging_face(
    config: Config, leaves: dict[str, np.ndarray], tokenizer: Tokenizer, folder: Path
) -> None:
    """Writes a model in the format of its family's class.

    The tensors keep every bit: they are bfloat16 if that holds all of their numbers, else float32.

    Args:
      config: the run's config.
      leaves: the run's parameters by our names.
      tokenizer: the run's, for the ids that start and end a document.
      folder: the folder to write into.
    """
    tensors = {}
    for name, array in unstack_layers(config.model, leaves).items():
        for piece, _ in _parts(name, array.shape, config.model.family):
            tensors[piece.name] = _theirs(array[piece.index], piece)
    dtype = "float32"
    if all((x.astype(jnp.bfloat16).astype(np.float32) == x).all() for x in tensors.values()):
        dtype = "bfloat16"
        tensors = {name: x.astype(jnp.bfloat16) for name, x in tensors.items()}
    write_tensors(tensors, folder)
    settings = _their_settings(config.model) | {
        "dtype": dtype,
        "torch_dtype": dtype,  # as transformers 4 names it
        "bos_token_id": tokenizer.start_of_text,
        "eos_token_id": tokenizer.end_of_text,
        "pad_token_id": None,
    }
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")


def tokenizer_settings(tokenizer: Tokenizer, length: int) -> dict:
    """The content of a tokenizer_config.json, by which transformers takes tokenizer.json as it is.

    Without it AutoTokenizer chooses a class by the model's type, which may divide a text into words
    in another way than tokenizer.json.

    Args:
      tokenizer: the run's.
      length: the longest context, in tokens.
    """
    start, end = map(tokenizer.token, (tokenizer.start_of_text, tokenizer.end_of_text))
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": start,
        "eos_token": end,
        "model_max_length": length,
        "clean_up_tokenization_spaces": False,
    }


def _their_settings(model: ModelConfig) -> dict:
    """A model's settings in their words."""
    names = NAMES[model.family]
    scaling = dict(zip(SCALING, model.rope_scaling, strict=False))  # which may be none
    rope = {"rope_theta": model.rope_theta, "rope_type": "llama3" if scaling else "default"}
    settings = {theirs: getattr(model, ours) for ours, theirs in SIZES.items()} | {
        "architectures": [names.architecture],
        "model_type": model.family,
        "hidden_act": "silu",
        "num_key_value_heads": model.key_heads,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "rope_parameters": rope | scaling,
        "tie_word_embeddings": model.output == "tied",
        "attention_dropout": 0.0,
    }
    if scaling:
        settings["rope_scaling"] = rope | scaling  # as transformers 4 names it
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
