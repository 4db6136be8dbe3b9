"""Configs that many tests use, and a second valid value of every setting."""

import math

from configs import tiny
from prmoe_jax import cli, config
from prmoe_jax.config import architecture

# What tests count with, however the recipe in configs/tiny.py is tuned.
BASE = """
    model.vocab_size=4096 model.length=256 model.d_model=192 model.heads=6 model.d_ff=768
    train.steps=600 train.batch_size=16
    optimizer.learning_rate=1e-3 optimizer.min_learning_rate=1e-4 optimizer.warmup_tokens=81920
""".split()
# Another valid value for every setting, as typed on the command line and as stored.
OTHER_VALUES = {
    "seed": ("4294967294", 2**32 - 2),
    "model.vocab_size": ("509", 509),
    "model.length": ("17", 17),
    "model.layers": ("7", 7),
    "model.d_model": ("6", 6),
    "model.heads": ("2", 2),
    "model.kv_heads": ("3", 3),
    "model.head_dim": ("20", 20),
    "model.d_ff": ("11", 11),
    "model.expert_d_ff": ("13", 13),
    "model.residual_d_ff": ("12", 12),
    "model.family": ("llama", "llama"),
    "model.norm": ("rmsnorm", "rmsnorm"),
    "model.norm_eps": ("1e-6", 1e-6),
    "model.positions": ("rotary", "rotary"),
    "model.rope_theta": ("5e5", 5e5),
    "model.rope_scaling": ("8,1,4,64", (8, 1, 4, 64)),
    "model.rope_type": ("yarn", "yarn"),
    "model.rope_truncate": ("false", False),
    "model.rope_attention_factor": ("1.5", 1.5),
    "model.partial_rotary_factor": ("0.5", 0.5),
    "model.activation": ("clamped_swiglu", "clamped_swiglu"),
    "model.biases": ("every", "every"),
    "model.qk_norm": ("head", "head"),
    "model.output": ("untied", "untied"),
    "model.clip_qkv": ("8", 8.0),
    "model.sliding_window": ("16", 16),
    "model.full_attention": ("every 2", "every 2"),
    "model.attention_sinks": ("learned", "learned"),
    "model.normalize_top_k": ("always", "always"),
    "model.placement": ("first half", "first half"),
    "model.experts": ("3,5,7", (3, 5, 7)),
    "model.top_k": ("2", 2),
    "model.residual": ("false", False),
    "model.residual_mix": ("half", "half"),
    "model.dropout": ("0.25", 0.25),
    "model.init_std": ("1", 1.0),
    "model.dtype": ("bfloat16", "bfloat16"),
    "execution.remat": ("dots", "dots"),
    "execution.cpu_products": ("float32", "float32"),
    "execution.attention": ("xla", "xla"),
    "moe.router": ("expert_choice", "expert_choice"),
    "moe.scores": ("sigmoid", "sigmoid"),
    "moe.routed_scale": ("2.5", 2.5),
    "moe.balance": ("batch", "batch"),
    "moe.noise": ("jitter", "jitter"),
    "moe.z_loss_weight": ("1e-3", 1e-3),
    "moe.bias_update_rate": ("1e-3", 1e-3),
    "moe.expert_init": ("tied", "tied"),
    "moe.capacity_factor": ("inf", math.inf),
    "moe.eval_capacity_factor": ("inf", math.inf),
    "moe.min_capacity": ("0", 0),
    "moe.group_size": ("64", 64),
    "moe.aux_loss_weight": ("0", 0.0),
    "moe.overflow": ("random", "random"),
    "moe.second_expert_sampling": ("true", True),
    "execution.dispatch": ("einsum", "einsum"),
    "execution.exchange": ("flat", "flat"),
    "execution.buffer_factor": ("2.0", 2.0),
    "mesh.data": ("2", 2),
    "mesh.fsdp": ("2", 2),
    "mesh.fsdp_experts": ("2", 2),
    "mesh.expert": ("2", 2),
    "mesh.expert_slice": ("2", 2),
    "mesh.tensor": ("2", 2),
    "mesh.expert_inner": ("2", 2),
    "mesh.slices": ("2", 2),
    "data.corpus": ("tfds:lm1b", "tfds:lm1b"),
    "data.text_field": ("body", "body"),
    "data.tokenizer": ("bytes", "bytes"),
    "data.validation_fraction": ("1e-3", 0.001),
    "data.cross_document_attention": ("true", True),
    "data.cache_dir": ("/a b=c", "/a b=c"),
    "train.steps": ("3", 3),
    "train.tokens": ("99", 99),
    "train.batch_size": ("32", 32),
    "train.accumulate": ("4", 4),
    "train.z_loss": ("1e-4", 0.0001),
    "execution.compile_cache": ("programs", "programs"),
    "optimizer.kind": ("muon", "muon"),
    "optimizer.trainable": ("router|^norm", "router|^norm"),
    "optimizer.router_rate": ("0.25", 0.25),
    "optimizer.momentum": ("0.9", 0.9),
    "optimizer.learning_rate": ("2e-3", 0.002),
    "optimizer.min_learning_rate": ("0", 0.0),
    "optimizer.schedule": ("wsd", "wsd"),
    "optimizer.decay_fraction": ("0.25", 0.25),
    "optimizer.warmup_tokens": ("5", 5),
    "optimizer.decay_tokens": ("81921", 81921),
    "optimizer.b1": ("0", 0.0),
    "optimizer.b2": ("0.99", 0.99),
    "optimizer.eps": ("1e-6", 1e-6),
    "optimizer.weight_decay": ("0", 0.0),
    "optimizer.clip_norm": ("inf", math.inf),
    "teacher.workdir": ("runs/a", "runs/a"),
    "init.workdir": ("runs/dense", "runs/dense"),
    "init.step": ("480", 480),
    "init.noise": ("0.1", 0.1),
    "teacher.cache": ("runs/lessons", "runs/lessons"),
    "teacher.mode": ("train", "train"),
    "teacher.capacity_factor": ("inf", math.inf),
    "teacher.inherit": ("true", True),
    "teacher.importance": ("taylor", "taylor"),
    "teacher.layers": ("0 1 2 3 4 5", "0 1 2 3 4 5"),
    "kd.kind": ("reverse", "reverse"),
    "kd.top_k": ("5", 5),
    "kd.weight": ("0.5", 0.5),
    "kd.temperature": ("2", 2.0),
    "kd.stop": ("1e6", 1e6),
    "kd.decay": ("linear", "linear"),
    "eval.every": ("0", 0),
    "eval.batches": ("5", 5),
    "eval.documents": ("true", True),
    "checkpoint.every": ("7", 7),
    "checkpoint.keep": ("1", 1),
    "checkpoint.keep_every": ("300", 300),
    "log.every": ("1", 1),
    "log.stall_minutes": ("inf", math.inf),
    "log.wandb": ("pyramids", "pyramids"),
}
# The gradient of a key's bias is 0 but for rounding, which Adam would scale up to a whole step.
GENTLE = {"eps": 1e-3}


def tiny_config(*overrides, name="prmoe"):
    """A tiny config from the command line's overrides, without their '--config.'."""
    arguments = [f"--config.{override}" for override in (*BASE, *overrides)]
    return cli.parse_config([f"--config={tiny.__file__}:{name}", *arguments])


def settings(text="2 layers, E=3, residual", batch_size=8, model=(), moe=(), **groups):
    """A small config; keyword groups override theirs."""
    shape = {"vocab_size": 384, "length": 8, "d_model": 12, "heads": 2, "d_ff": 10}
    fields = architecture.parse_fields(text) | shape | {"dtype": "float32", "init_std": 0.2}
    train = {"steps": 10, "batch_size": batch_size} | groups.pop("train", {})
    moe = ({"min_capacity": 1} if fields["experts"] else {}) | dict(moe)
    values = {"model": fields | dict(model), "moe": moe}
    values |= {"data": {"tokenizer": "bytes"}, "train": train, **groups}
    return config.resolve(values)
