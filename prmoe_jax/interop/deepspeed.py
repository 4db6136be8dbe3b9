"""Megatron-DeepSpeed's GPT checkpoints, dense, MoE or PR-MoE, as DeepSpeed's engine writes them.

A folder holds the file `latest`, which names a step's folder. The step's folder holds
mp_rank_00_model_states.pt (everything except the experts, and Megatron's arguments) and a file for
each expert of each MoE layer.
"""

import itertools
import logging
import math
import re
from argparse import Namespace
from pathlib import Path

import jax
import numpy as np

from prmoe_jax.config.schema import Config
from prmoe_jax.errors import UserError
from prmoe_jax.files import is_plain, regular
from prmoe_jax.interop.mapping import Table, read_parameters, their_tensors
from prmoe_jax.interop.settings import (
    check_expressed,
    differs,
    gpt2_shaped,
    import_settings,
    resolved,
    setting,
    shown,
)
from prmoe_jax.interop.torch_files import Inert, flat_arrays, read_torch, require_torch

log = logging.getLogger(__name__)

MAIN = "mp_rank_00_model_states.pt"
ENCODER = "language_model.encoder."
ROUTER = "mlp.deepspeed_moe.gate.wg.weight"
EXPERT = "mlp.deepspeed_moe.experts.deepspeed_experts"


def _mlp(ours: str, theirs: str) -> dict[str, tuple[str, str]]:
    """The table's rows for an MLP, or for each expert."""
    return {
        f"{ours}.w_in": (f"{theirs}.dense_h_to_4h.weight", "F D"),
        f"{ours}.b_in": (f"{theirs}.dense_h_to_4h.bias", "F"),
        f"{ours}.w_out": (f"{theirs}.dense_4h_to_h.weight", "D F"),
        f"{ours}.b_out": (f"{theirs}.dense_4h_to_h.bias", "D"),
    }


# H3K: Megatron stores queries, keys and values head by head.
TABLE = Table(
    layer=ENCODER + "layers.{}.",
    parameters={
        "tokens": ("language_model.embedding.word_embeddings.weight", "V D"),
        "positions": ("language_model.embedding.position_embeddings.weight", "L D"),
        "norm.scale": (ENCODER + "final_layernorm.weight", "D"),
        "norm.shift": (ENCODER + "final_layernorm.bias", "D"),
        "norm_attention.scale": ("input_layernorm.weight", "D"),
        "norm_attention.shift": ("input_layernorm.bias", "D"),
        "attention.w_qkv": ("self_attention.query_key_value.weight", "H3K D"),
        "attention.b_qkv": ("self_attention.query_key_value.bias", "H3K"),
        "attention.w_out": ("self_attention.dense.weight", "D HK"),
        "attention.b_out": ("self_attention.dense.bias", "D"),
        "norm_mlp.scale": ("post_attention_layernorm.weight", "D"),
        "norm_mlp.shift": ("post_attention_layernorm.bias", "D"),
        "mlp.w_router": (ROUTER, "E D"),
        "mlp.w_mix": ("mlp.coefficient.weight", "2 D"),
        "mlp.b_mix": ("mlp.coefficient.bias", "2"),
    }
    | _mlp("mlp", "mlp")
    | _mlp("mlp.mlp", "mlp.mlp")
    | _mlp("mlp.experts", EXPERT + ".{}"),
)
TOKENS, POSITIONS = (TABLE.parameters[name][0] for name in ("tokens", "positions"))
# Megatron's arguments that change the computation, with the values that match our model.
FIXED = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "layernorm_epsilon": 1e-5,
    "normalization": "layernorm",
    "apply_layernorm_1p": False,
    "apply_residual_connection_post_layernorm": False,
    "add_bias_linear": True,
    "add_position_embedding": True,
    "use_rotary_position_embeddings": False,
    "untie_embeddings_and_output_weights": False,
    "swiglu": False,
    "squared_relu": False,
    "onnx_safe": False,
}
CAPACITY = {
    "capacity_factor": "moe_train_capacity_factor",
    "eval_capacity_factor": "moe_eval_capacity_factor",
}


def read_deepspeed(source: Path) -> tuple[Config, dict[str, jax.Array], str]:
    """Reads a checkpoint, the folder with `latest` or a step's folder.

    Returns a config, parameters by our names, and a summary in words.
    """
    folder, latest = source, source / "latest"
    if latest.exists():
        name = regular(latest).read_text(errors="replace").strip()
        if not is_plain(name):
            raise UserError(f"{latest} names {shown(name)}, which isn't beside it")
        folder = source / name
    main = read_torch(folder / MAIN)
    if not isinstance(main.get("module"), dict) or not isinstance(main.get("args"), Inert):
        raise UserError(f"{folder / MAIN} lacks the module or the args that Megatron stores")
    version = main.get("checkpoint_version", 0)
    if not isinstance(version, (int, float)) or not version >= 2:
        raise UserError(
            f"{folder / MAIN}: checkpoint_version={shown(version)}; before 2 queries, keys and "
            "values lie in another order: load and save it with a newer Megatron-DeepSpeed"
        )
    arrays = flat_arrays(main["module"], folder / MAIN)
    for path in sorted(folder.glob("layer_*_expert_*_mp_rank_00_model_states.pt")):
        arrays |= flat_arrays(read_torch(path), path)
    config, leaves, found = converted(arrays, vars(main["args"]), folder)
    counts = filter(None, config.model.schedule.experts)
    used = {MAIN} | {_file(n, e) for n, experts in enumerate(counts) for e in range(experts)}
    for path in sorted(folder.glob("*model_states.pt")):
        if path.name not in used:
            raise UserError(
                f"{path} belongs to no expert of this model, which is {config.model.schedule} on "
                "one model-parallel rank; remove it if it is another checkpoint's"
            )
    return config, leaves, found


def converted(
    arrays: dict[str, np.ndarray], args: dict, source: Path
) -> tuple[Config, dict[str, jax.Array], str]:
    """As `read_deepspeed`, but from tensors by name and Megatron's arguments."""
    heads = args.get("num_attention_heads")
    for name, value in (FIXED | {"num_key_value_heads": heads}).items():
        theirs = args.get(name)
        if theirs is not None and differs(theirs, value):
            raise UserError(f"{source}: {name}={shown(theirs)}, our model has {shown(value)}")
    openai_gelu = setting(args, "openai_gelu", bool, source, False)
    if not (openai_gelu or setting(args, "bias_gelu_fusion", bool, source, True)):
        raise UserError(f"{source}: bias_gelu_fusion=False means the exact GELU, ours is tanh's")
    config = _config(arrays, args, source)
    shapes = {name: array.shape for name, array in arrays.items()}
    leaves, summary = read_parameters(config, TABLE, shapes, arrays.__getitem__, source)
    return config, leaves, summary


def write_deepspeed(config: Config, leaves: dict[str, np.ndarray], folder: Path, step: int) -> None:
    """Writes a checkpoint that DeepSpeed's engine loads: the model, without an optimizer."""
    import torch

    out = folder / f"global_step{step}"
    out.mkdir()
    for file, arrays in files(config, leaves).items():
        tensors = {name: torch.tensor(array) for name, array in arrays.items()}
        content = tensors if file != MAIN else _main(config, tensors, step)
        try:
            with open(out / file, "wb") as opened:
                torch.save(content, opened)
        except RuntimeError as error:  # torch hides the cause, such as a full disk
            raise (error.__context__ or error) from None
    (folder / "latest").write_text(out.name)


def _file(number: int, expert: int) -> str:
    """The file name of an expert; `number` counts only MoE layers, from 0."""
    return f"layer_{number}_expert_{expert}_mp_rank_00_model_states.pt"


def files(config: Config, leaves: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """The tensors of a checkpoint: file name -> tensor name -> array."""
    moe_layers = [str(i) for i, experts in enumerate(config.model.schedule.experts) if experts]
    of_expert = re.compile(re.escape(ENCODER) + rf"layers\.(\d+)\.{re.escape(EXPERT)}\.(\d+)\.")
    contents: dict[str, dict] = {MAIN: {}}
    for name, array in their_tensors(config.model, TABLE, leaves).items():
        found = of_expert.match(name)
        file = _file(moe_layers.index(found[1]), int(found[2])) if found else MAIN
        contents.setdefault(file, {})[name] = np.ascontiguousarray(array)
    return contents


def check_exportable(config: Config) -> None:
    """Raises UserError unless DeepSpeed's layer can compute the run's model and torch is there."""
    check_expressed(config, Config(model=gpt2_shaped(config.model)), "DeepSpeed's layer")
    factors = config.moe.capacity_factor, config.moe.eval_capacity_factor
    if math.isfinite(factors[0]) != math.isfinite(factors[1]):
        raise UserError(
            f"moe.capacity_factor={factors[0]}, moe.eval_capacity_factor={factors[1]}: DeepSpeed's "
            "layer drops tokens in both or in neither"
        )
    ours, theirs = config.moe.overflow, _overflow(config.model.top_k)
    if any(config.model.schedule.experts) and math.isfinite(factors[0]) and ours != theirs:
        log.warning("moe.overflow=%s: DeepSpeed's layer drops as overflow=%s", ours, theirs)
    require_torch()


def _overflow(top_k: int) -> str:
    """The value of `moe.overflow` by which DeepSpeed's gate drops tokens by default."""
    return {1: "random", 2: "position"}.get(top_k, "probability")


def _config(arrays: dict[str, np.ndarray], args: dict, source: Path) -> Config:
    """The architecture, from the tensors' names and shapes where possible, else from `args`."""
    settings = import_settings()
    model, moe = settings.model, settings.moe
    layer, norm = TABLE.layer, TABLE.parameters["norm_attention.scale"][0]
    model.layers = next(n for n in itertools.count() if layer.format(n) + norm not in arrays)
    routers = {n: layer.format(n) + ROUTER for n in range(model.layers)}
    experts = {n: _matrix(arrays, x, source)[0] for n, x in routers.items() if x in arrays}
    model.vocab_size, model.d_model = _matrix(arrays, TOKENS, source)
    model.length, _ = _matrix(arrays, POSITIONS, source)
    model.heads = setting(args, "num_attention_heads", int, source, low=1)
    model.d_ff = setting(args, "ffn_hidden_size", int, source, 4 * model.d_model, low=1)
    model.dropout = setting(args, "hidden_dropout", float, source, 0.0)
    if experts:
        model.placement = "layers " + " ".join(map(str, experts))
        model.experts = tuple(experts.values())
        model.top_k = setting(args, "topk", int, source, low=1)
        mlp_type = setting(args, "mlp_type", str, source)
        if mlp_type not in ("standard", "residual"):
            raise UserError(f"{source}: mlp_type={shown(mlp_type)} is not standard or residual")
        model.residual = mlp_type == "residual"
        drops = setting(args, "moe_token_dropping", bool, source, True)
        for ours, theirs in CAPACITY.items():
            moe[ours] = setting(args, theirs, float, source) if drops else math.inf
        if drops:
            moe.overflow = _overflow(model.top_k)
        moe.min_capacity = setting(args, "moe_min_capacity", int, source)
        if model.top_k == 2:
            name = "moe_top2_2nd_expert_sampling"
            moe.second_expert_sampling = setting(args, name, bool, source, True)
    return resolved(settings, source)


def _matrix(arrays: dict[str, np.ndarray], name: str, source: Path) -> tuple[int, int]:
    """The shape of a tensor that must be a matrix."""
    if name not in arrays:
        raise UserError(f"{source} lacks {name}")
    shape = arrays[name].shape
    if len(shape) != 2 or 0 in shape:
        raise UserError(f"{source}: no usable {name}: its shape is {shape}, not a matrix's")
    return shape


def _main(config: Config, tensors: dict, step: int) -> dict:
    """The main file's content, nested as Megatron loads it, with the fields the engine requires."""
    embedding = {n.split(".")[2]: {"weight": tensors[n]} for n in (TOKENS, POSITIONS)}
    encoder = {n.removeprefix(ENCODER): x for n, x in tensors.items() if n.startswith(ENCODER)}
    arguments = _arguments(config)
    return {
        "module": {"language_model": {"embedding": embedding, "encoder": encoder}},
        "num_experts": arguments.num_experts,
        "optimizer": None,
        "lr_scheduler": None,
        "global_steps": step,
        "global_samples": step * config.train.batch_size,
        "skipped_steps": 0,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "iteration": step,
        "checkpoint_version": 3.0,
        "args": arguments,
    }


def _arguments(config: Config) -> Namespace:
    model, moe = config.model, config.moe
    drops = math.isfinite(moe.capacity_factor)
    return Namespace(
        **FIXED,
        bias_gelu_fusion=True,
        openai_gelu=False,
        num_layers=model.layers,
        hidden_size=model.d_model,
        ffn_hidden_size=model.d_ff,
        num_attention_heads=model.heads,
        max_position_embeddings=model.length,
        seq_length=model.length,
        padded_vocab_size=model.vocab_size,
        hidden_dropout=model.dropout,
        attention_dropout=0.0,
        num_experts=list(filter(None, model.schedule.experts)) or [1],
        mlp_type="residual" if model.residual else "standard",
        topk=model.top_k,
        **{theirs: getattr(moe, ours) if drops else 1.0 for ours, theirs in CAPACITY.items()},
        moe_min_capacity=moe.min_capacity,
        moe_token_dropping=drops,
        moe_top2_2nd_expert_sampling=moe.second_expert_sampling,
    )
