"""Converts models of Hugging Face's transformers to ours, which compute the same, and back."""

import dataclasses
import itertools
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from prmoe_jax.config.architecture import placement_of
from prmoe_jax.config.schema import Config, ModelConfig
from prmoe_jax.data import released
from prmoe_jax.data.tokenizer import Tokenizer
from prmoe_jax.errors import UserError
from prmoe_jax.interop.families import (
    FAMILIES,
    FIXED,
    OF_EXPERTS,
    OF_ROUTERS,
    PLAIN,
    Family,
    Plain,
)
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
from prmoe_jax.model.surgery import size

log = logging.getLogger(__name__)

MICROBATCH_TOKENS = 2**16  # the largest microbatch of an imported run
MOST_LAYERS = 10_000  # layers or experts of a config.json without tensors that limit them
# For each `model.rope_type`, transformers' names and defaults of the numbers in
# `model.rope_scaling`, in order.
LENGTH_BEFORE = "original_max_position_embeddings"
SCALING: dict[str, dict[str, int | None]] = {
    "llama3": dict.fromkeys(["factor", "low_freq_factor", "high_freq_factor", LENGTH_BEFORE]),
    "yarn": {"factor": None, "beta_slow": 1, "beta_fast": 32, LENGTH_BEFORE: None},
}
# Settings that positions and the reach of attention depend on.
POSITIONS = {"positions", "rope_theta", "rope_scaling", "rope_type", "rope_truncate"} | {
    "rope_attention_factor", "partial_rotary_factor", "sliding_window", "full_attention"
}  # fmt: skip
# Kinds of attention without and with a sliding window.
KINDS = "full_attention", "sliding_attention"
# The output matrix. With tied embeddings, a file may hold it as a copy of the embedding.
HEAD = "lm_head.weight"
# How many layers after the last one predict further tokens; transformers takes 1 as the default.
PREDICTORS = "num_nextn_predict_layers"
# Name endings of buffers in old files; buffers are no weights.
BUFFERS = ".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias"


def read_hugging_face(
    folder: Path, only: str | None = None
) -> tuple[Config, dict[str, jax.Array], str]:
    """Reads a model that `save_pretrained` wrote, tensor by tensor, onto all devices.

    `only` is the required family. Returns the config, the parameters by our names, and a summary in
    words.
    """
    path = folder / "config.json"
    theirs = read_json(path)
    family = theirs.get("model_type", only)
    if only and family != only:
        raise UserError(f"{path}: model_type={shown(family)} is not {only}; use --kind=hf")
    tensors = Tensors(folder, BUFFERS)
    config = read_config({**theirs, "model_type": family}, path, len(tensors.shapes))
    names, shapes = FAMILIES[config.model.family], dict(tensors.shapes)
    table = names.table
    if not any(name.startswith(table.prefix) for name in shapes):
        table = table._replace(prefix="")  # in files of the model without its head
    tokens = table.prefix + table.parameters["tokens"][0]
    if config.model.output == "tied" and {HEAD, tokens} <= shapes.keys():
        if not np.array_equal(tensors.read(HEAD), tensors.read(tokens)):
            raise UserError(f"{path}: tie_word_embeddings=True, but {HEAD} is not {tokens}")
        del shapes[HEAD]
    if names.predicts_more:
        count = setting(theirs, PREDICTORS, int, path, 1, high=len(shapes))
        _skip_predictors(shapes, table, config.model.layers, count, folder)
    leaves, summary = read_parameters(config, table, shapes, tensors.read, folder)
    return config, leaves, summary


def _skip_predictors(shapes: dict, table: Table, layers: int, count: int, folder: Path) -> None:
    """Removes the tensors of `count` layers after the model's, and tells of it."""
    more = (table.layer.format(layers + n) for n in range(count))
    starts = tuple(table.prefix + name for name in (*more, "model.mtp_"))
    skipped = [name for name in shapes if name.startswith(starts)]
    if skipped:
        log.warning(
            "%s: %d tensors are skipped: the layers after the %d of the model predict further "
            "tokens (MTP), and ours have no such layer",
            *(folder, len(skipped), layers),
        )
    for name in skipped:
        del shapes[name]


def read_config(theirs: dict, path: Path, tensors: int) -> Config:
    """Converts transformers' settings; the number of `tensors` limits layers and experts."""
    family = theirs.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise UserError(
            f"{path}: model_type={shown(family)} is unknown; known are {', '.join(FAMILIES)}"
        )
    names = FAMILIES[family]
    settings = import_settings()
    model, moe = settings.model, settings.moe
    model.family = family
    theirs, scaling = _with_rope(theirs, names, path)
    model.update(scaling)
    for name, value in (FIXED | names.fixed).items():
        given = theirs.get(name, value) or False  # null counts as false
        if name not in names.knows and differs(given, value):
            raise UserError(f"{path}: {name}={shown(theirs[name])}, our model has {value!r}")
    model.update(_plain(PLAIN, theirs, names, path, tensors))
    if family == "gpt2" and theirs.get("n_inner") is None:
        model.d_ff = 4 * model.d_model
    model.update(_windows(theirs, names, model, path))
    if names.experts:
        _read_placement(theirs, names, model, path, tensors)
    if model.experts:
        model.update(_plain(OF_EXPERTS, theirs, names, path, tensors))
        moe.update(names.moe | _plain(OF_ROUTERS, theirs, names, path, tensors))
        model.residual = model.residual_d_ff > 0
        moe.capacity_factor = moe.eval_capacity_factor = math.inf  # no token is dropped
    if family != "gpt2" and theirs.get("dtype", theirs.get("torch_dtype")) == "bfloat16":
        model.dtype = "bfloat16"
    # `prmoe eval` computes one microbatch at a time, which must fit in memory.
    rows = settings.train.batch_size
    while rows > 1 and rows * model.length > MICROBATCH_TOKENS:
        rows //= 2
    settings.train.accumulate = settings.train.batch_size // rows
    return resolved(settings, path)


def _plain(rows: dict[str, Plain], theirs: dict, names: Family, path: Path, layers: int) -> dict:
    """Our values of the settings in a table that the family knows, with at most `layers`."""
    ours = {}
    for name, row in names.known(rows).items():
        default = names.defaults.get(name, row.default)
        if not row.optional or theirs.get(name, default) is not None:
            high = layers if row.ours == "layers" else LARGEST
            value = setting(theirs, name, row.kind, path, default, row.low, high)
            value = value * ours[row.times] if row.times else value
            ours[row.ours] = row.words[value] if row.words else value
    return ours


def _with_rope(theirs: dict, names: Family, path: Path) -> tuple[dict, dict[str, Any]]:
    """The settings with those of their group for RoPE, and ours for scaled wavelengths."""
    if "rotary_dim" in names.knows and theirs.get("rotary_dim") is not None:
        width = setting(theirs, "head_dim", int, path, names.defaults["head_dim"], low=1)
        share = setting(theirs, "rotary_dim", int, path, low=1) / width
        theirs = {"partial_rotary_factor": share} | theirs
    name = "rope_scaling" if theirs.get("rope_scaling") else "rope_parameters"
    rope = theirs.get(name) or names.defaults.get("rope_parameters", {})
    if not isinstance(rope, dict):
        raise UserError(f"{path}: {name}={shown(rope)} is not a group of settings")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in SCALING:
        return theirs | rope | {"rope_type": kind}, {}
    scaling = []
    for name, default in SCALING[kind].items():
        if name == LENGTH_BEFORE:
            default = theirs.get("max_position_embeddings")
        number = setting(rope, name, float, path, default, low=1)
        if number % 1:
            raise UserError(f"{path}: {name}={number}, our model has only whole numbers")
        scaling.append(int(number))
    ours = {"rope_type": kind, "rope_scaling": tuple(scaling)}
    if kind == "yarn":
        ours["rope_truncate"] = setting(rope, "truncate", bool, path, True)
        ours["rope_attention_factor"] = _attention_factor(rope, scaling[0], path)
    return theirs | rope | {"rope_type": "default"}, ours


def _attention_factor(rope: dict, factor: int, path: Path) -> float:
    """YaRN's factor of queries and keys in config.json; 0 is the default of theirs and ours."""
    name, parts = "attention_factor", ("mscale", "mscale_all_dim")
    if rope.get(name) is not None:
        return setting(rope, name, float, path, low=1e-30)
    if not all(rope.get(part) for part in parts):
        return 0.0
    numbers = (setting(rope, part, float, path, low=1e-30) for part in parts)
    above, below = (0.1 * number * math.log(factor) + 1 for number in numbers)
    return above / below


def _windows(theirs: dict, names: Family, model: ConfigDict, path: Path) -> dict[str, Any]:
    """Our settings of the sliding window; none if it covers the context or no layer has it."""
    name, switch = "sliding_window", "use_sliding_window"
    theirs = names.defaults | theirs
    if theirs.get(name) is None:
        return {}
    if name not in names.knows:
        raise UserError(
            f"{path}: {name}={shown(theirs[name])}, which {names.architecture} doesn't know; set "
            "it to null"
        )
    if switch in names.knows and not setting(theirs, switch, bool, path, False):
        return {}
    window = setting(theirs, name, int, path, low=1)
    windowed = _windowed(theirs, model.family, model.layers, path)
    if window >= model.length or not any(windowed):
        return {}
    full = [i for i, each in enumerate(windowed) if not each]
    return {"sliding_window": window, "full_attention": placement_of(full, model.layers)}


def _windowed(theirs: dict, family: str, layers: int, path: Path) -> list[bool]:
    """Whether each layer has the sliding window, as the family's class decides it."""
    if "layer_types" not in FAMILIES[family].knows:
        return [True] * layers
    if windowed := _of_kind(theirs, "layer_types", KINDS, layers, path):
        return windowed
    if family == "gpt_oss":
        return [i % 2 == 0 for i in range(layers)]
    first = setting(theirs, "max_window_layers", int, path, 28)
    if family == "qwen2_moe":
        return [i % 2 == 0 and i < first for i in range(layers)]
    return [i >= first for i in range(layers)]


def _of_kind(
    theirs: dict, name: str, known: Sequence[str], layers: int, path: Path
) -> list[bool] | None:
    """Whether each layer is of the second of two kinds; None if config.json doesn't say."""
    kinds = theirs.get(name)
    if kinds is None:
        return None
    if not isinstance(kinds, list) or len(kinds) != layers or any(k not in known for k in kinds):
        raise UserError(
            f"{path}: {name}={shown(kinds)} must be one of {', '.join(known)} for each of "
            f"{layers} layers"
        )
    return [kind == known[1] for kind in kinds]


def _read_placement(theirs: dict, names: Family, model: ConfigDict, path: Path, high: int) -> None:
    """Reads the number of experts, and in which layers they are, if in any."""
    name, first = names.experts, names.defaults.get("first_k_dense_replace", 0)
    either = name, "num_experts", "num_local_experts"  # transformers knows these two as one
    name = next((each for each in either if each in theirs), name)
    if "{}" not in names.table.parameters["mlp.experts.w_out"][0]:
        high = MOST_LAYERS  # one tensor holds all experts of a layer
    experts = setting(theirs, name, int, path, low=1, high=high)
    step = setting(theirs, "decoder_sparse_step", int, path, 1, low=1)
    dense = theirs.get("mlp_only_layers") or []
    if not isinstance(dense, list) or any(type(n) is not int for n in dense):
        raise UserError(f"{path}: mlp_only_layers={shown(dense)} is no list of layers")
    if "first_k_dense_replace" in names.knows:
        first = setting(theirs, "first_k_dense_replace", int, path, first)
    last = -1
    if "moe_layer_start_index" in names.knows:
        first = setting(theirs, "moe_layer_start_index", int, path, first)
        last = setting(theirs, "moe_layer_end_index", int, path, last, low=-1)
        step = setting(theirs, "moe_layer_interval", int, path, 1, low=1)
    sparse = [i >= first and (last < 0 or i <= last) for i in range(model.layers)]
    if "mlp_layer_types" in names.knows:
        kinds = ["dense", "sparse"]
        sparse = _of_kind(theirs, "mlp_layer_types", kinds, model.layers, path) or sparse
    rows = enumerate(sparse)
    layers = [i for i, each in rows if each and (i + 1) % step == 0 and i not in dense]
    if layers:
        model.placement = placement_of(layers, model.layers)
        model.experts = (experts,)


def check_exportable(config: Config, family: str) -> None:
    """Raises UserError unless the family's class in transformers can compute the run's model."""
    model, names = config.model, FAMILIES[family]
    instead = f"{names.architecture} of transformers"
    if any(model.schedule.experts) != bool(names.experts):
        has = "experts" if names.experts else "none"
        raise UserError(
            f"this run is {model.schedule}, and {instead} has {has}; use --kind=safetensors"
        )
    # The settings that would be written must give the same architecture when they are read.
    there = read_config(their_settings(config, family), Path("config.json"), LARGEST)
    if str(there.model.schedule) != str(model.schedule):
        raise UserError(
            f"this run is '{model.schedule}': {instead} can only be '{there.model.schedule}'; use "
            "--kind=safetensors"
        )
    check_expressed(config, there, instead)
    if names.experts and math.isfinite(config.moe.eval_capacity_factor):
        log.warning(
            "moe.eval_capacity_factor=%s: transformers drops no token, as with inf",
            config.moe.eval_capacity_factor,
        )


def with_context(config: Config, kept: Mapping[str, str], folder: Path) -> Config:
    """The config with the context and window of the released model, if positions are the same.

    Tuning with a shorter context doesn't shorten that of the model.
    """
    model = config.model
    if released.CONFIG not in kept or model.positions != "rotary":
        return config
    path = folder / released.CONFIG
    there = read_config(released.settings(kept, released.CONFIG), path, MOST_LAYERS).model
    if POSITIONS & model.differences(there).keys() or there.length <= model.length:
        return config
    names = "length", "sliding_window", "full_attention"
    model = dataclasses.replace(model, **{name: getattr(there, name) for name in names})
    return dataclasses.replace(config, model=model)


def write_hugging_face(
    config: Config,
    family: str,
    leaves: dict[str, np.ndarray],
    tokenizer: Tokenizer,
    kept: Mapping[str, str],
    folder: Path,
) -> None:
    """Writes parameters, by our names, settings and tokenizer in the format of a family's class.

    `kept` are the files of `released.read`, which are written, too. No number is rounded. Tensors
    are bfloat16 if that represents all of them exactly and the family is not GPT-2, else float32.
    The routers' biases are always float32, as in the classes that have some.
    """
    table, dtype = FAMILIES[family].table, "float32"
    tensors = their_tensors(config.model, table, leaves)
    biases = tuple(row[0] for ours, row in table.parameters.items() if ours == "mlp.bias_router")
    others = {name: x for name, x in tensors.items() if not name.endswith(biases)}
    if family != "gpt2" and all(
        (x.astype(jnp.bfloat16).astype(np.float32) == x).all() for x in others.values()
    ):
        dtype = "bfloat16"
        tensors |= {name: x.astype(jnp.bfloat16) for name, x in others.items()}
    write_tensors(tensors, folder)
    settings = their_settings(config, family) | _their_ids(tokenizer, kept)
    settings |= {"dtype": dtype, "torch_dtype": dtype}  # the second for transformers 4
    tokenizer_settings = {
        "bos_token": tokenizer.token(tokenizer.bos_id),
        "eos_token": tokenizer.token(tokenizer.eos_id),
        "model_max_length": config.model.length,
        "clean_up_tokenization_spaces": False,
    } | released.settings(kept, released.TOKENIZER)
    # Otherwise AutoTokenizer chooses a class by the model's type or a program beside the model,
    # which may split a text into words otherwise.
    tokenizer_settings.pop("auto_map", None)
    tokenizer_settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    written = {released.CONFIG: settings, released.TOKENIZER: tokenizer_settings}
    texts = {name: json.dumps(content, indent=2) + "\n" for name, content in written.items()}
    for name, text in ({"tokenizer.json": tokenizer.plain, **kept} | texts).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(text.encode())


def _their_ids(tokenizer: Tokenizer, kept: Mapping[str, str]) -> dict[str, Any]:
    """The special ids in config.json: the released model's, or else the tokenizer's.

    Ids that the tokenizer doesn't have as special tokens are not written.
    """
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": None}
    for name, value in released.settings(kept, released.CONFIG).items():
        known = tokenizer.special_ids.issuperset(found := released.ids(value))
        if name in ids and (found and known or value is None and name != "eos_token_id"):
            ids[name] = value
    return ids


def their_settings(config: Config, family: str) -> dict:
    """The settings of a run's model as in the family's config.json."""
    model, names = config.model, FAMILIES[family]
    settings = names.fixed | {"architectures": [names.architecture], "model_type": family}
    experts = next(filter(None, model.schedule.experts), 0)
    rows = PLAIN | OF_EXPERTS if experts else PLAIN
    for name, row in names.known(rows).items():
        value = size(model, row.ours)
        if row.times:  # rounded up; `check_exportable` finds a width that is no multiple
            value = -(-value // size(model, row.times)) if model.residual or row.low else 0
        if row.words:
            value = value == row.words[True]
        settings[name] = value or None if row.optional else value
    if family == "gpt2":
        dropout = {"embd_pdrop": model.dropout, "resid_pdrop": model.dropout}
        return settings | {"attn_pdrop": 0.0} | dropout
    settings |= {"attention_dropout": 0.0} | _their_rope(model)
    if "sliding_window" in names.knows:
        settings["sliding_window"] = model.sliding_window or None
    if "use_sliding_window" in names.knows:
        settings |= {"use_sliding_window": model.sliding_window > 0, "max_window_layers": 0}
    if "layer_types" in names.knows:
        settings["layer_types"] = [KINDS[window > 0] for window in model.windows]
    if not experts:
        return settings
    settings[names.experts] = experts
    dense = [i for i, count in enumerate(model.schedule.experts) if not count]
    if "moe_intermediate_size" not in names.knows:
        settings["intermediate_size"] = model.expert_width
    if "norm_topk_prob" in names.knows:
        settings["norm_topk_prob"] = model.normalizes
    if "mlp_only_layers" in names.knows:
        settings |= {"decoder_sparse_step": 1, "mlp_only_layers": dense}
    if "first_k_dense_replace" in names.knows:
        settings["first_k_dense_replace"] = len(dense)
    if "moe_layer_start_index" in names.knows:
        places = [i for i, count in enumerate(model.schedule.experts) if count]
        steps = {after - before for before, after in itertools.pairwise(places)} or {1}
        settings |= {"moe_layer_start_index": places[0], "moe_layer_end_index": places[-1]}
        settings["moe_layer_interval"] = min(steps)
    if "mlp_layer_types" in names.knows:
        kinds = ["sparse" if count else "dense" for count in model.schedule.experts]
        settings["mlp_layer_types"] = kinds
    if names.predicts_more:
        settings[PREDICTORS] = 0
    for name, row in names.known(OF_ROUTERS).items():
        settings[name] = getattr(config.moe, row.ours)
    return settings


def _their_rope(model: ModelConfig) -> dict:
    rope = {"rope_theta": model.rope_theta, "rope_type": "default"}
    if not model.rope_scaling:
        return {"rope_parameters": rope}
    *numbers, length = model.rope_scaling
    numbers = *map(float, numbers), length  # transformers warns of other types
    rope |= dict(zip(SCALING[model.rope_type], numbers, strict=True))
    rope["rope_type"] = model.rope_type
    if model.rope_type == "yarn":
        rope["truncate"] = model.rope_truncate
        if model.rope_attention_factor:
            rope["attention_factor"] = model.rope_attention_factor
    return {"rope_parameters": rope, "rope_scaling": rope}  # the second for transformers 4
