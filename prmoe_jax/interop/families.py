"""Hugging Face's families: their tensors, their settings, and what differs between them.

A family whose parts all exist is a row of `FAMILIES`, beside its row in `config/family.py`.
"""

from typing import Any, NamedTuple

from prmoe_jax.interop.mapping import Table


class Plain(NamedTuple):
    """A setting of config.json that is one of ours, in the group `model`, by another name.

    Those of `OF_ROUTERS` are in the group `moe`.
    """

    ours: str
    kind: type = int
    low: float = 1
    default: Any = None  # transformers', where config.json lacks it; None requires it
    optional: bool = False  # whether null stands for our default, which is 0
    words: tuple[str, ...] = ()  # our values for false and true
    times: str = ""  # our size of which theirs is the number, such as shared experts of one width


class Family(NamedTuple):
    """What differs between families."""

    architecture: str
    table: Table
    knows: tuple[str, ...]  # names in config.json
    fixed: dict[str, Any] = {"hidden_act": "silu"}  # settings with the values of our model
    defaults: dict[str, Any] = {}  # transformers' where they aren't those of `PLAIN`
    experts: str = ""  # the setting with the number of experts; "" for a dense family
    moe: dict[str, Any] = {}  # our settings in the group `moe`, where they aren't the defaults
    predicts_more: bool = False  # whether files may have layers after the last one (MTP)

    def known(self, rows: dict[str, Plain]) -> dict[str, Plain]:
        """The rows of `PLAIN` or `OF_EXPERTS` that the family has."""
        return {name: row for name, row in rows.items() if name in self.knows}


def _mlp(
    ours: str, theirs: str, names=("gate_proj", "up_proj", "down_proj")
) -> dict[str, tuple[str, str]]:
    """The table's rows for an MLP, or for each expert."""
    gate, up, down = (f"{theirs}.{name}.weight" for name in names)
    return {
        f"{ours}.w_gate": (gate, "F D"),
        f"{ours}.w_in": (up, "F D"),
        f"{ours}.w_out": (down, "D F"),
    }


def _moe(module: str, *names, router="gate", bias="", shared="") -> Table:
    """The table of a family whose MoE layers are modules of this name."""
    rows = {"mlp.w_router": (f"{module}.{router}.weight", "E D")}
    rows |= _mlp("mlp.experts", module + ".experts.{}", *names)
    if bias:
        rows["mlp.bias_router"] = f"{module}.{bias}", "E"
    if shared:
        rows |= _mlp("mlp.mlp", f"{module}.{shared}")
    return Table(LLAMA.parameters | rows, LLAMA.layer)


GPT2 = Table(
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
GPT_OSS = Table(
    LLAMA.parameters
    | {
        "attention.b_out": ("self_attn.o_proj.bias", "D"),
        "attention.sinks": ("self_attn.sinks", "H"),
        "mlp.w_router": ("mlp.router.weight", "E D"),
        "mlp.b_router": ("mlp.router.bias", "E"),
        "mlp.experts.w_gate": ("mlp.experts.gate_up_proj", "E D F2", 0),
        "mlp.experts.b_gate": ("mlp.experts.gate_up_proj_bias", "E F2", 0),
        "mlp.experts.w_in": ("mlp.experts.gate_up_proj", "E D F2", 1),
        "mlp.experts.b_in": ("mlp.experts.gate_up_proj_bias", "E F2", 1),
        "mlp.experts.w_out": ("mlp.experts.down_proj", "E F D"),
        "mlp.experts.b_out": ("mlp.experts.down_proj_bias", "E D"),
    },
    LLAMA.layer,
)
ERNIE = _moe("mlp", shared="shared_experts")._replace(alternating=("q_proj", "k_proj"))
ERNIE.parameters["mlp.bias_router"] = "mlp.moe_statics.e_score_correction_bias", "1 E"
QWEN2_MOE = Table(
    _moe("mlp", shared="shared_expert").parameters
    | {"mlp.w_shared": ("mlp.shared_expert_gate.weight", "1 D")},
    LLAMA.layer,
)

_GPT2_PLAIN = {
    "vocab_size": Plain("vocab_size"),
    "n_positions": Plain("length"),
    "n_layer": Plain("layers"),
    "n_embd": Plain("d_model"),
    "n_head": Plain("heads"),
    "n_inner": Plain("d_ff", optional=True),
}
_LLAMA_PLAIN = {
    "vocab_size": Plain("vocab_size"),
    "max_position_embeddings": Plain("length"),
    "num_hidden_layers": Plain("layers"),
    "hidden_size": Plain("d_model"),
    "num_attention_heads": Plain("heads"),
    "intermediate_size": Plain("d_ff"),
    "num_key_value_heads": Plain("kv_heads", optional=True),
    "rms_norm_eps": Plain("norm_eps", float, 1e-30, 1e-6),
    "rope_theta": Plain("rope_theta", float, 1, 10_000.0),
    "tie_word_embeddings": Plain("output", bool, default=False, words=("untied", "tied")),
}
# Each family takes the rows that it knows. The other names in `Family.knows` are read and written
# by code of their own.
PLAIN = {
    **_GPT2_PLAIN,
    **_LLAMA_PLAIN,
    "head_dim": Plain("head_dim", optional=True),
    "clip_qkv": Plain("clip_qkv", float, 1e-30, optional=True),
    "qkv_bias": Plain("biases", bool, default=True, words=("none", "qkv")),
    "attention_bias": Plain("biases", bool, default=False, words=("none", "qkv")),
    "use_qk_norm": Plain("qk_norm", bool, default=False, words=("none", "head")),
    "partial_rotary_factor": Plain("partial_rotary_factor", float, 1e-30, 1.0),
}
# Those that only models with MoE layers have.
OF_EXPERTS = {
    "num_experts_per_tok": Plain("top_k"),
    "moe_intermediate_size": Plain("expert_d_ff"),
    "norm_topk_prob": Plain("normalize_top_k", bool, default=False, words=("never", "always")),
    "shared_expert_intermediate_size": Plain("residual_d_ff", optional=True),
    "moe_k": Plain("top_k", default=6),
    "n_shared_experts": Plain("residual_d_ff", default=1, times="expert_d_ff"),
    "num_shared_experts": Plain("residual_d_ff", default=1, times="expert_d_ff"),
    "moe_num_shared_experts": Plain("residual_d_ff", low=0, default=2, times="expert_d_ff"),
}
OF_ROUTERS = {
    "routed_scaling_factor": Plain("routed_scale", float, 1e-30, 1.0),
    "router_scaling_factor": Plain("routed_scale", float, 1e-30, 1.0),
}

_LLAMA = tuple(_LLAMA_PLAIN)
_MOE = *_LLAMA, "num_experts_per_tok"
_QWEN = "sliding_window", "use_sliding_window"
_WINDOW = {"sliding_window": 4096}
_QWEN_MOE = *_MOE, *_QWEN, "moe_intermediate_size", "norm_topk_prob", "mlp_only_layers"
_DEEPSEEK = (
    *(*_MOE, "head_dim", "moe_intermediate_size", "norm_topk_prob", "n_shared_experts"),
    *("first_k_dense_replace", "routed_scaling_factor"),
)
# A choice among all experts, not first among groups of them.
_ONE_GROUP = {"hidden_act": "silu", "n_group": 1, "topk_group": 1}
_YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0} | {
    "truncate": False, "original_max_position_embeddings": 4096
}  # fmt: skip
# The biases are kept nearly as they are in training, until a larger rate is asked for.
_SIGMOID = {"scores": "sigmoid", "bias_update_rate": 1e-9}
FAMILIES = {
    "gpt2": Family(
        "GPT2LMHeadModel",
        GPT2,
        tuple(_GPT2_PLAIN),
        fixed={
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
            "tie_word_embeddings": True,
        },
    ),
    "llama": Family("LlamaForCausalLM", LLAMA, (*_LLAMA, "head_dim")),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        LLAMA,
        (*_LLAMA, *_QWEN, "layer_types", "head_dim"),
        defaults=_WINDOW,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        LLAMA,
        (*_LLAMA, *_QWEN, "layer_types", "head_dim"),
        defaults=_WINDOW,
    ),
    "mistral": Family(
        "MistralForCausalLM",
        LLAMA,
        (*_LLAMA, "head_dim", "sliding_window"),
        defaults=_WINDOW,
    ),
    "olmoe": Family(
        "OlmoeForCausalLM",
        _moe("mlp"),
        (*_MOE, "clip_qkv", "norm_topk_prob"),
        defaults={"rms_norm_eps": 1e-5},
        experts="num_experts",
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        _moe("block_sparse_moe", ("w1", "w3", "w2")),
        (*_MOE, "head_dim", "sliding_window"),
        defaults={"rms_norm_eps": 1e-5, "rope_theta": 1e6},
        experts="num_local_experts",
    ),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        QWEN2_MOE,
        (*_QWEN_MOE, "layer_types", "qkv_bias", "shared_expert_intermediate_size"),
        defaults=_WINDOW,
        experts="num_experts",
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        _moe("mlp"),
        (*_QWEN_MOE, "head_dim"),
        defaults=_WINDOW,
        experts="num_experts",
    ),
    "dots1": Family(
        "Dots1ForCausalLM",
        _moe("mlp", bias="gate.e_score_correction_bias", shared="shared_experts"),
        (*_DEEPSEEK, "sliding_window", "layer_types"),
        fixed=_ONE_GROUP,
        defaults=_WINDOW | {"max_window_layers": 62},
        experts="n_routed_experts",
        moe=_SIGMOID,
    ),
    "hy_v3": Family(
        "HYV3ForCausalLM",
        _moe("mlp", router="router.gate", bias="expert_bias", shared="shared_mlp"),
        (*_MOE, "head_dim", "moe_intermediate_size", "num_shared_experts")
        + ("mlp_layer_types", "router_scaling_factor"),
        defaults={"rms_norm_eps": 1e-5, "rope_theta": 11_158_840.0, "head_dim": 128}
        | {"router_scaling_factor": 2.826, "first_k_dense_replace": 1},
        experts="num_experts",
        moe=_SIGMOID,
        predicts_more=True,
    ),
    "glm4_moe": Family(
        "Glm4MoeForCausalLM",
        _moe("mlp", bias="gate.e_score_correction_bias", shared="shared_experts"),
        (*_DEEPSEEK, "attention_bias", "use_qk_norm", "partial_rotary_factor"),
        fixed=_ONE_GROUP,
        defaults={"rms_norm_eps": 1e-5, "first_k_dense_replace": 1, "norm_topk_prob": True}
        | {"partial_rotary_factor": 0.5},
        experts="n_routed_experts",
        moe=_SIGMOID,
        predicts_more=True,
    ),
    "minimax_m2": Family(
        "MiniMaxM2ForCausalLM",
        _moe("block_sparse_moe", ("w1", "w3", "w2"), bias="e_score_correction_bias"),
        (*_MOE, "head_dim", "partial_rotary_factor", "rotary_dim"),
        defaults={"rope_theta": 5e6, "head_dim": 128},
        experts="num_local_experts",
        moe=_SIGMOID,
    ),
    "ernie4_5_moe": Family(
        "Ernie4_5_MoeForCausalLM",
        ERNIE,
        (*_LLAMA, "head_dim", "moe_k", "moe_intermediate_size", "moe_num_shared_experts")
        + ("moe_layer_start_index", "moe_layer_interval", "moe_layer_end_index"),
        fixed={"hidden_act": "silu", "use_bias": False},
        defaults={"rms_norm_eps": 1e-5, "rope_theta": 5e5, "tie_word_embeddings": True}
        | {"first_k_dense_replace": 1},
        experts="moe_num_experts",
        moe={"bias_update_rate": 1e-9},
        predicts_more=True,
    ),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        GPT_OSS,
        (*_MOE, "head_dim", "sliding_window", "layer_types"),
        fixed={"hidden_act": "silu", "attention_bias": True}
        | {"swiglu_alpha": 1.702, "swiglu_limit": 7.0},
        defaults={"rms_norm_eps": 1e-5, "rope_theta": 150_000.0, "head_dim": 64}
        | {"sliding_window": 128, "rope_parameters": _YARN},
        experts="num_local_experts",
    ),
}
# Settings that change the computation in some family, with the values that our model has.
FIXED = {
    "attention_bias": False,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "rope_type": "default",
    "partial_rotary_factor": 1.0,
}
