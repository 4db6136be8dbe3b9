"""The settings of an experiment: type, default, meaning, choices and bounds, each declared once.

`prmoe train --help`, docs/configuration.md (`python docs/generate.py`) and the checks of single
values follow from these declarations. `validation.py` checks combinations of settings.
"""

import dataclasses
import functools
import math
import operator

from ml_collections import ConfigDict

from prmoe_jax.config.architecture import Layer, Schedule, Stage, placed, stages
from prmoe_jax.config.family import FAMILIES
from prmoe_jax.config.routers import ROUTERS, Router

# The largest integer in a setting that declares no limit: JAX counts in 32 bits.
LARGEST = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Setting:
    """The declaration of a setting, apart from its type.

    A condition is the name of a setting that must be on, or NAME=VALUE; `or` joins alternatives.
    """

    default: object
    meaning: str
    choices: dict[str, str] | None = None  # value -> remark
    least: float = 0
    most: float | None = None  # of integers LARGEST
    above: float | None = None  # the value must be larger
    below: float | None = None  # the value must be smaller
    infinite: bool = False  # whether inf is allowed
    path: str = ""  # "local" or, if it may be in an object store, "anywhere"
    formerly: str = ""  # its name in older configs
    layer: bool = False  # whether it changes a layer's output for given parameters
    only: str = ""  # the condition without which the setting has no effect
    unless: str = ""  # the condition with which it has none

    def described(self) -> str:
        """The meaning, the choices and the conditions as text; quotes mark the values to write."""
        text = self.meaning
        if self.choices:
            choices = [f"'{c}'" + f" ({why})" * bool(why) for c, why in self.choices.items()]
            text += f" One of {', '.join(choices)}."
        text += f" Only with '{self.only}'." * bool(self.only)
        return text + f" Not with '{self.unless}'." * bool(self.unless)


def setting(default, meaning: str, **declared):
    """A field of a group of settings; see `Setting` for what can be declared."""
    metadata = {"setting": Setting(default, meaning, **declared)}
    return dataclasses.field(default=default, metadata=metadata)


def choice(meaning: str, only="", unless="", formerly="", layer=False, **choices: str):
    """A setting whose default is the first of its choices, each with a remark."""
    declared = {"only": only, "unless": unless, "formerly": formerly, "layer": layer}
    return setting(next(iter(choices)), meaning, choices=choices, **declared)


def of_family(meaning: str, only="", **choices: str):
    """A setting of the model with these choices; its default is the family's choice."""
    return choice(meaning, only, layer=True, auto="", **choices)


def axis(meaning: str, default=1):
    """An axis of the mesh: a number of devices, or -1."""
    return setting(default, meaning, least=-1)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The decoder's shape and where its experts are."""

    vocab_size: int = setting(
        4096, "Entries of the embedding table; at least the tokenizer's.", least=2, most=2**24
    )
    length: int = setting(256, "Context length: the tokens of a sequence.", least=2)
    layers: int = setting(6, "Number of layers (blocks).", least=1, most=1000)
    d_model: int = setting(128, "Model width.", least=1)
    heads: int = setting(
        4, "Attention heads; they divide the width unless `head_dim` is given.", least=1
    )
    kv_heads: int = setting(
        0,
        "Heads of keys and values, each for as many heads of queries (grouped-query attention, "
        "arXiv 2305.13245); 0 is one for each.",
    )
    head_dim: int = setting(0, "Width of a head; 0 is `d_model / heads`.")
    d_ff: int = setting(512, "Hidden width of the dense MLPs.", least=1)
    expert_d_ff: int = setting(0, "Hidden width of each expert; 0 is `d_ff`.", only="model.experts")
    residual_d_ff: int = setting(
        0, "Hidden width of the residual MLP; 0 is an expert's.", only="model.residual=true"
    )
    family: str = choice(
        "Published models whose form the decoder has where settings below are 'auto', and where "
        "`norm_eps`, `rope_theta` and `partial_rotary_factor` are 0.",
        **dict.fromkeys(FAMILIES, ""),
    )
    norm: str = of_family("Normalisation.", layernorm="", rmsnorm="without mean and shift")
    norm_eps: float = setting(0.0, "The norms' ε; 0 is the family's.", layer=True)
    positions: str = of_family(
        "How positions enter attention.",
        learned="embeddings that are added to the tokens'",
        rotary="rotated queries and keys (arXiv 2104.09864)",
    )
    rope_theta: float = setting(
        0.0,
        "Base θ of rotary positions' wavelengths, above 1; 0 is the family's.",
        above=1,
        layer=True,
        only="model.positions=rotary",
    )
    rope_scaling: tuple[int, ...] = setting(
        (),
        "Longer wavelengths for a longer context: their factor, two numbers of periods and the "
        "length before, such as 8,1,4,8192; () is none. A wavelength is kept if more periods than "
        "the second number fit into this length, and scaled if fewer than the first do.",
        least=1,
        layer=True,
        only="model.positions=rotary",
    )
    rope_type: str = choice(
        "How `rope_scaling` scales what is between its two numbers of periods.",
        only="model.rope_scaling",
        layer=True,
        llama3="by the number of periods, as Llama 3.1",
        yarn="by the index of the wavelength; queries and keys are scaled, too (arXiv 2309.00071)",
    )
    rope_truncate: bool = setting(
        True,
        "Whether the indices between which YaRN changes its scale are whole numbers.",
        layer=True,
        only="model.rope_type=yarn",
    )
    rope_attention_factor: float = setting(
        0.0,
        "YaRN's factor of rotated queries and keys; 0 is 0.1 ln(factor of the wavelengths) + 1.",
        layer=True,
        only="model.rope_type=yarn",
    )
    partial_rotary_factor: float = setting(
        0.0,
        "Share of each head's dimensions, the first ones, that rotary positions rotate; 0 is the "
        "family's.",
        most=1,
        layer=True,
        only="model.positions=rotary",
    )
    activation: str = of_family(
        "Hidden units of MLPs and experts.",
        gelu="",
        swiglu="silu(W_gate x) · (W_in x)",
        clamped_swiglu="g · σ(1.702 g) · (u + 1), where g is W_gate x, at most 7, and u is W_in x, "
        "clamped to ± 7; as in gpt-oss",
    )
    biases: str = of_family(
        "Linear maps that have a bias.",
        all="those of attention and of MLPs, except gates",
        qkv="queries, keys and values",
        every="gates and routers, too",
        none="",
    )
    qk_norm: str = of_family(
        "RMSNorm of queries and keys, before rotary positions.",
        none="",
        head="of each head",
        whole="of all heads together",
    )
    output: str = of_family("The output matrix.", tied="the token embedding", untied="")
    clip_qkv: float = setting(
        0.0, "Queries, keys and values are clamped to ± this; 0 does not clamp.", layer=True
    )
    sliding_window: int = setting(
        0, "Tokens that a token attends to, itself included; 0 is all before it.", layer=True
    )
    full_attention: str = setting(
        "none",
        "Which layers have no sliding window, as in `placement`.",
        layer=True,
        only="model.sliding_window",
    )
    attention_sinks: str = of_family(
        "What a head may attend to beside tokens.",
        none="",
        learned="a number for each head in the softmax's denominator, as in gpt-oss",
    )
    placement: str = setting(
        "none",
        "Which layers are MoE layers: 'none', 'every 2', 'first half', 'second half' or "
        "'layers 1 3 5', counted from 0.",
    )
    experts: tuple[int, ...] = setting(
        (), "Number of experts: one count for each MoE layer, or one for all.", least=1
    )
    top_k: int = setting(1, "Experts that serve each token.", least=1, only="model.experts")
    normalize_top_k: str = of_family(
        "When the weights of a token's experts are divided by their sum.",
        only="model.experts",
        several="if `top_k` is above 1",
        always="",
        never="",
    )
    residual: bool = setting(
        False, "Whether a dense MLP stands beside a layer's experts.", only="model.experts"
    )
    residual_mix: str = of_family(
        "How the experts' output and that of the residual MLP are mixed.",
        only="model.residual=true",
        learned="softmax of a linear map of the token, as in DeepSpeed's code",
        sum="",
        half="the mean",
        sigmoid="experts + σ(a linear map of the token) · MLP, as in Qwen2-MoE",
    )
    dropout: float = setting(
        0.0,
        "Dropout rate of the embedding and of the output of attention and feed-forward; 0 is usual "
        "for one epoch. The paper's recipe had 0.1, on the attention weights too (Megatron's).",
        below=1,
    )
    init_std: float = setting(
        0.02,
        "Standard deviation of the initial weights; output projections divide it by √(2 · layers), "
        "and routers and mixes are drawn as torch draws a linear layer.",
        above=0,
    )
    dtype: str = choice(
        "Data type of activations and matrix products; parameters and router are float32.",
        bfloat16="on CPUs, activations and evaluation are float32, and products in training are "
        "of execution.cpu_products",
        float32="on GPUs and TPUs products of it round their factors, except with "
        "JAX_DEFAULT_MATMUL_PRECISION=highest",
    )

    def __post_init__(self):
        """Replaces 'auto' and 0 by the family's values, where it has some."""
        for name, value in FAMILIES.get(self.family, {}).items():
            if getattr(self, name) in ("auto", 0):
                object.__setattr__(self, name, value)

    @functools.cached_property
    def schedule(self) -> Schedule:
        """The placement of the experts, layer by layer."""
        return Schedule.place(self.layers, self.placement, self.experts, self.top_k, self.residual)

    @functools.cached_property
    def windows(self) -> tuple[int, ...]:
        """The sliding window of each layer, 0 for none."""
        full = placed(self.layers, self.full_attention)
        return tuple(0 if i in full else self.sliding_window for i in range(self.layers))

    @functools.cached_property
    def stages(self) -> tuple[Stage, ...]:
        """The layers by their experts and windows, in stages."""
        layers = zip(self.schedule.experts, self.windows, strict=True)
        return stages([Layer(*layer) for layer in layers])

    @property
    def head_width(self) -> int:
        return self.head_dim or self.d_model // self.heads

    @property
    def rotary_width(self) -> int:
        """Dimensions of a head that rotary positions rotate."""
        return int(self.head_width * self.partial_rotary_factor)

    @property
    def rotary_scale(self) -> float:
        """Factor of rotated queries and keys (YaRN, section 3.4); 1 without YaRN."""
        if not self.rope_scaling or self.rope_type != "yarn":
            return 1.0
        return self.rope_attention_factor or 0.1 * math.log(self.rope_scaling[0]) + 1

    @property
    def key_heads(self) -> int:
        return self.kv_heads or self.heads

    def window_in(self, length: int) -> int:
        """The sliding window for contexts of this length; 0 if none is set or it covers them."""
        return self.sliding_window if self.sliding_window < length else 0

    @property
    def gated(self) -> bool:
        """Whether MLPs and experts have a gate."""
        return self.activation != "gelu"

    @property
    def expert_width(self) -> int:
        return self.expert_d_ff or self.d_ff

    @property
    def residual_width(self) -> int:
        return self.residual_d_ff or self.expert_width

    def differences(self, other: "ModelConfig") -> dict[str, tuple]:
        """Settings, sizes aside, in which layers differ at this model's length: both values."""
        names = [f.name for f in dataclasses.fields(self) if f.metadata["setting"].layer]
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in names}
        pairs["sliding_window"] = self.window_in(self.length), other.window_in(self.length)
        if not self.window_in(self.length) or self.windows == other.windows:
            del pairs["full_attention"]
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    @property
    def output_std(self) -> float:
        """The initial standard deviation of projections that write to the residual stream."""
        return self.init_std / (2 * self.layers) ** 0.5

    @property
    def normalizes(self) -> bool:
        """Whether the weights of a token's experts are scaled to a sum of 1."""
        several = self.normalize_top_k == "several" and self.top_k > 1
        return several or self.normalize_top_k == "always"


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """Routing of tokens (DeepSpeed's capacity routing), and how experts start."""

    router: str = choice(
        "Who chooses. Expert choice is not causal: whether a token is chosen depends on the "
        "tokens after it.",
        **dict.fromkeys(ROUTERS, ""),
    )
    scores: str = choice(
        "The router's score of an expert, which is its weight.",
        softmax="",
        sigmoid="of each expert on its own, as in DeepSeek-V3",
    )
    routed_scale: float = setting(
        1.0, "Factor of the weights of a token's experts, after they are normalised.", above=0
    )
    capacity_factor: float = setting(
        1.0,
        "Capacity of an expert in training, relative to an even share of its routing group, and at "
        "least `min_capacity`; inf never drops a token.",
        above=0,
        most=LARGEST,
        infinite=True,
    )
    eval_capacity_factor: float = setting(
        1.0, "The same in evaluation.", above=0, most=LARGEST, infinite=True
    )
    min_capacity: int = setting(
        4, "Lower limit of an expert's capacity in tokens, but its routing group at most."
    )
    group_size: int = setting(
        0,
        "Tokens that compete for the same capacity, and over which `balance=group` takes its loss; "
        "0 is one sequence. It is part of the model: it decides which tokens are dropped, and does "
        "not depend on the devices.",
    )
    overflow: str = choice(
        "Which choices a full expert keeps.",
        position="the first in the order of the tokens; in training with top 2 all first "
        "choices precede all second ones, as in GShard",
        probability="the most probable, which is not causal",
        random="in training a random subset, DeepSpeed's random token selection; in "
        "evaluation as position",
    )
    noise: str = choice(
        "Noise in routing, in training only.",
        none="",
        rsample="Gumbel noise on the scores, for top 1",
        jitter="the router's input times U(0.99, 1.01)",
    )
    second_expert_sampling: bool = setting(
        False, "Gumbel noise on the second choice, in training only.", only="model.top_k=2"
    )
    aux_loss_weight: float = setting(0.01, "Weight of the load-balancing loss, summed over layers.")
    balance: str = choice(
        "Over which tokens the load-balancing loss is taken.",
        only="moe.aux_loss_weight",
        group="each routing group, as in GShard",
        batch="the whole batch (arXiv 2501.11873); where it is accumulated in microbatches, "
        "another forward pass counts the choices first",
    )
    z_loss_weight: float = setting(
        0.0, "Weight of the router's z-loss log(Z)², summed over layers; ST-MoE used 1e-3."
    )
    bias_update_rate: float = setting(
        0.0,
        "Balancing without a loss (DeepSeek-V3): after every step each expert's bias, which "
        "counts in the choice alone, moves by this much towards even load, and the mean of all "
        "biases back to 0; 0 is off.",
    )
    expert_init: str = choice(
        "How the experts of a layer start.",
        unless="init.workdir or teacher.inherit=true",
        independent="each drawn on its own",
        tied="all as copies of one MLP, as in DeepSpeed",
    )

    @property
    def routes(self) -> Router:
        return ROUTERS[self.router]


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices on each axis of the mesh; -1, on one axis, means all that are left."""

    data: int = axis("Replicas. Without any axis, a mesh is suggested.", default=-1)
    fsdp: int = axis("Devices that share the parameters outside the experts (ZeRO-3).")
    fsdp_experts: int = axis("Devices that share all parameters, the experts' too (ZeRO-3).")
    expert: int = axis("Devices that share the experts.")
    expert_slice: int = axis("Devices that share the hidden units of every expert.")
    tensor: int = axis("Devices that share attention heads, hidden units and vocabulary.")
    expert_inner: int = setting(
        1,
        "Neighbours among the `expert` devices that form the inner stage of an exchange, and that "
        "FSDP may use without the others.",
        least=1,
    )
    slices: int = setting(
        0,
        "Slices of a pod, which only the data-centre network links; `data` crosses them. 0 finds "
        "the slices of TPUs; other devices form one slice unless this is larger.",
    )


@dataclasses.dataclass(frozen=True)
class ExecutionConfig:
    """How this machine computes. Results differ by rounding only, speed and memory differ."""

    attention: str = choice(
        "Attention kernel; 'auto' takes the fastest one that the device has.",
        formerly="model.attention",
        auto="",
        xla="",
        blocks="for CPUs",
        cudnn="",
        splash="",
    )
    remat: str = choice(
        "Rematerialisation: what the forward pass keeps for the backward pass.",
        formerly="model.remat",
        auto="'none' for at most 8 layers on a CPU, else 'dots'",
        none="everything",
        dots="results of matrix products, attention kernels and exchanges",
        full="the input of each layer (of each cell of layers that repeat together) and "
        "results of exchanges",
    )
    dispatch: str = choice(
        "How tokens are brought to their experts; all give the same values.",
        formerly="moe.dispatch",
        only="model.experts",
        auto="",
        gather="buffers of slots",
        einsum="one-hot products, the oracle",
        ragged="runs of rows, grouped matrix product",
        blocked="runs of rows, loops for CPUs",
        padded="runs of rows, padded to blocks, for GPUs",
    )
    exchange: str = choice(
        "How rows reach experts on other devices; all give the same values.",
        formerly="moe.exchange",
        only="model.experts",
        auto="",
        flat="one all-to-all",
        hierarchical="neighbours first",
        coordinated="each device of `tensor` exchanges its share",
    )
    buffer_factor: float = setting(
        1.25,
        "Rows that a device receives at once, relative to an even share, where nothing is dropped "
        "and experts are on several devices; more rows come in further rounds. Pieces of one size "
        "(TPU v5e, between slices) are larger where their share is small.",
        least=1,
        formerly="moe.buffer_factor",
        only="model.experts",
    )
    cpu_products: str = choice(
        "Factors of matrix products where a model is trained on a CPU; results are float32.",
        only="model.dtype=bfloat16",
        auto="'bfloat16' if the CPU has instructions for it (AVX512-BF16 or AMX), else 'float32'",
        bfloat16="",
        float32="",
    )
    compile_cache: str = setting(
        "auto",
        "Folder of compiled programs, which a restart reads instead of compiling; `auto` is "
        "none on CPUs, and on GPUs and TPUs ~/.cache/prmoe_jax/compile_cache, or compile_cache/ in "
        "the run's folder if that is in a store; `` is none. A run's config.json cannot set it.",
        path="anywhere",
        formerly="train.compile_cache",
    )


AUTO = ExecutionConfig()


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The text, and its conversion to token windows."""

    corpus: str = setting(
        "sotu",
        "The text: 'sotu', 'prose', 'tfds:NAME' or 'tfds:NAME/CONFIG', a folder, or a glob of"
        " .txt, .jsonl, .jsonl.gz or .jsonl.zst files. 'tokens:GLOB' reads token shards instead,"
        " and 'tokens:GLOB*0.7,GLOB*0.3' mixes them.",
        path="anywhere",
    )
    text_field: str = setting(
        "text",
        "The field that holds the text, in .jsonl lines and TFDS examples; lines without it may be "
        "chats.",
    )
    tokenizer: str = setting(
        "bpe",
        "'bpe' (trained on the training split; with token shards, their own tokenizer), 'gpt2', "
        "'bytes', or the path of a tokenizer.json.",
        path="anywhere",
    )
    validation_fraction: float = setting(
        0.05,
        "Share of whole documents held out where the corpus has neither a validation split nor a "
        "test split of its own; with token shards of other libraries, the share of their tokens.",
        above=0,
        below=1,
    )
    cross_document_attention: bool = setting(
        False,
        "Whether tokens attend to earlier documents of their window. Without it a token "
        "attends within its own document only, and positions restart with each document.",
    )
    cache_dir: str = setting("~/.cache/prmoe_jax", "Folder of prepared text.", path="local")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long a run is, and its batches; give either `steps` or `tokens`."""

    steps: int = setting(0, "Length of the run in steps.")
    tokens: int = setting(0, "Length of the run in tokens, rounded up to whole steps.", most=2**53)
    batch_size: int = setting(16, "Sequences of a step, all devices together.", least=1, most=2**20)
    accumulate: int = setting(
        1,
        "Gradient accumulation: the microbatches in which a batch is computed, in "
        "evaluation too; it changes memory and time, and no result but by rounding.",
        least=1,
    )
    z_loss: float = setting(0.0, "Weight of log(Z)² of the logits.")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or Muon, with linear warm-up and a decay of the learning rate, measured in tokens."""

    kind: str = choice(
        "The optimizer.",
        adamw="",
        muon="the orthogonalised momentum for the weight matrices of layers, each expert's "
        "on its own, scaled to suit AdamW's rates (arXiv 2502.16982), and AdamW for "
        "embeddings, output, routers, biases and norms",
    )
    learning_rate: float = setting(1e-3, "Highest learning rate, after warm-up.", above=0)
    min_learning_rate: float = setting(1e-4, "Learning rate at the end of the decay.")
    trainable: str = setting(
        "",
        "The parameters that train: a regular expression that is found in their names, such as "
        "'router', 'experts' or 'norm'; empty is all. The others keep the values with which they "
        "start, and have neither gradients nor an optimizer's state.",
    )
    router_rate: float = setting(
        1.0,
        "Learning rate of the routers, relative to that of others.",
        above=0,
        only="model.experts",
    )
    schedule: str = choice(
        "The learning rate after warm-up.",
        cosine="it falls along half a cosine",
        wsd="warm-up, stable, decay: constant, then linear; the checkpoint where the decay "
        "starts is kept, and another run can go on from it by `init.step`",
    )
    warmup_tokens: int = setting(0, "Tokens of linear warm-up.", most=2**53)
    decay_tokens: int = setting(
        0, "Tokens from the run's start to the decay's end; 0 is the end of the run.", most=2**53
    )
    decay_fraction: float = setting(
        0.2,
        "The share of these tokens in which `schedule=wsd` decays.",
        above=0,
        below=1,
        only="optimizer.schedule=wsd",
    )
    b1: float = setting(0.9, "AdamW's β₁, decay rate of the mean of the gradients.", most=0.99999)
    b2: float = setting(0.95, "AdamW's β₂, decay rate of the mean of their squares.", most=0.99999)
    eps: float = setting(1e-8, "AdamW's ε.", above=0)
    momentum: float = setting(
        0.95, "Decay rate of Muon's momentum.", most=0.99999, only="optimizer.kind=muon"
    )
    weight_decay: float = setting(0.1, "Weight decay of matrices; biases and norms have none.")
    clip_norm: float = setting(
        1.0, "Largest norm of the whole gradient; inf does not clip.", above=0, infinite=True
    )


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """Initial parameters from another run; without a workdir they are random."""

    workdir: str = setting(
        "", "Folder of a run, whose newest checkpoint is the start.", path="anywhere"
    )
    step: int = setting(
        0,
        "Step of a checkpoint of that run, where this one goes on as its branch, with the "
        "optimizer's state and the position in the data; 0 takes the parameters alone, and starts "
        "at step 0. It needs `optimizer.schedule=wsd`.",
        only="init.workdir",
    )
    noise: float = setting(
        0.0,
        "Noise on experts that start as copies of an MLP, in standard deviations of the weight.",
        only="init.workdir",
        unless="init.step",
    )


@dataclasses.dataclass(frozen=True)
class TeacherConfig:
    """The teacher of distillation (MoS, paper section 4.2); none without `workdir` or `cache`."""

    workdir: str = setting(
        "", "Folder of the teacher's run, whose newest checkpoint is restored.", path="anywhere"
    )
    cache: str = setting(
        "",
        "Folder that `prmoe teacher-cache` wrote, used instead of the run itself.",
        path="anywhere",
        formerly="teacher.lessons",
    )
    mode: str = choice(
        "How the teacher computes.",
        unless="teacher.cache",
        eval="as in evaluation",
        train="with dropout, noise and training's capacity, as in Megatron-DeepSpeed",
    )
    capacity_factor: float = setting(
        0.0,
        "Capacity factor of the teacher in mode 'eval'; 0 is that of its own evaluation, inf "
        "drops nothing.",
        most=LARGEST,
        infinite=True,
        unless="teacher.cache or teacher.mode=train",
    )
    inherit: bool = setting(False, "Whether the student starts as a part of its teacher.")
    layers: str = setting(
        "",
        "For each layer of the student, the layer of the teacher that it starts as, such as "
        "'0 1 3'; unless given, layers are chosen evenly among those of the same kind.",
        only="teacher.inherit=true",
    )
    importance: str = choice(
        "Which channels, heads and hidden units a narrower student takes.",
        only="teacher.inherit=true",
        weights="the largest weights",
        taylor="the largest (activation · gradient)²",
    )


@dataclasses.dataclass(frozen=True)
class KdConfig:
    """The loss of distillation: weight · T² · KL is added for each token."""

    kind: str = choice(
        "The divergence.",
        forward="KL(teacher ‖ student), as in the paper",
        reverse="KL(student ‖ teacher)",
        top_k="forward, over the teacher's top k tokens; all others are one outcome",
    )
    top_k: int = setting(0, "How many tokens `kind=top_k` takes.", only="kd.kind=top_k")
    weight: float = setting(1.0, "Weight of the loss.", above=0)
    temperature: float = setting(
        1.0, "The temperature T of both distributions.", least=0.01, most=1e3
    )
    stop: float = setting(
        0.7, "Where distillation ends: a share of the run, or above 1 a number of tokens.", above=0
    )
    decay: str = choice("How the weight changes.", none="", linear="it falls to 0 at `stop`")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation on the validation split during training; the end of a run always evaluates."""

    every: int = setting(0, "Steps between evaluations; 0 evaluates at the end only.")
    batches: int = setting(0, "Batches of each evaluation before the last; 0 is the whole split.")
    documents: bool = setting(
        False, "Whether the last evaluation also writes the loss of each document of the split."
    )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When a run is saved."""

    every: int = setting(100, "Steps between checkpoints.", least=1)
    keep: int = setting(3, "How many of the newest checkpoints stay.", least=1)
    keep_every: int = setting(
        0, "Checkpoints of steps that this divides stay as well; 0 keeps none of them."
    )


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What a run writes about itself."""

    every: int = setting(10, "Steps between lines of metrics.jsonl.", least=1)
    stall_minutes: float = setting(
        30.0,
        "Minutes without a step after which the stacks of all threads are printed; inf never does.",
        least=0.01,
        infinite=True,
    )
    wandb: str = setting(
        "", "Project of Weights & Biases that gets the metrics, too (extra `[wandb]`)."
    )


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment. Attribute names are the names on the command line."""

    seed: int = setting(
        0, "Seed of parameters, order of the data and training's randomness.", most=2**32 - 2
    )
    model: ModelConfig = ModelConfig()
    moe: MoeConfig = MoeConfig()
    mesh: MeshConfig = MeshConfig()
    execution: ExecutionConfig = AUTO
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    init: InitConfig = InitConfig()
    teacher: TeacherConfig = TeacherConfig()
    kd: KdConfig = KdConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @property
    def tokens_per_step(self) -> int:
        return self.train.batch_size * self.model.length

    @property
    def total_steps(self) -> int:
        return self.train.steps or -(-self.train.tokens // self.tokens_per_step)

    @property
    def decay_end(self) -> int:
        """The number of steps after which the learning rate is at its minimum."""
        return -(-self.optimizer.decay_tokens // self.tokens_per_step) or self.total_steps

    @property
    def decay_start(self) -> int | None:
        """The step at which the decay of `optimizer.schedule=wsd` starts; None for others."""
        if self.optimizer.schedule != "wsd":
            return None
        return self.decay_end - max(1, round(self.optimizer.decay_fraction * self.decay_end))

    @property
    def kd_steps(self) -> int:
        """The number of steps with distillation, counted from the start of the run."""
        return min(self.total_steps, self.kd_stop)

    @property
    def kd_stop(self) -> int:
        """The step of `kd.stop`, which may be after the end of the run; 0 without a teacher."""
        if not (self.teacher.workdir or self.teacher.cache):
            return 0
        if self.kd.stop <= 1:
            return round(self.kd.stop * self.total_steps)
        return -(-int(self.kd.stop) // self.tokens_per_step)

    @property
    def group_size(self) -> int:
        """Tokens in a routing group."""
        return self.moe.group_size or self.model.length

    @property
    def causal(self) -> bool:
        """Whether no prediction in evaluation depends on later tokens."""
        by_position = self.moe.overflow != "probability"
        return self.moe.routes.causal and (by_position or self.moe.eval_capacity_factor == math.inf)

    @property
    def loss_reaches_routers(self) -> bool:
        """Whether routers get a gradient from the cross-entropy; not if all weights are fixed."""
        experts = max(self.model.schedule.experts)
        one_choice = self.model.top_k == 1 and self.moe.routes.tokens_choose
        one_score = experts == 1 and self.moe.scores == "softmax"
        return not (experts and one_choice and (self.model.normalizes or one_score))


# The conditions without which the settings of a whole group have no effect.
ONLY = {"moe": "model.experts"} | dict.fromkeys(
    ("teacher", "kd"), "teacher.workdir or teacher.cache"
)


@functools.cache
def declarations() -> dict[str, Setting]:
    """The declaration of every setting, by its name on the command line, in order."""
    declared = {}
    for field in dataclasses.fields(Config):
        if dataclasses.is_dataclass(field.type):
            for member in dataclasses.fields(field.type):
                declared[f"{field.name}.{member.name}"] = member.metadata["setting"]
        else:
            declared[field.name] = field.metadata["setting"]
    return declared


def default_config() -> ConfigDict:
    """All settings with their defaults: the start of a config file."""
    return as_settings(Config())


def as_settings(config: Config) -> ConfigDict:
    """A config as mutable settings; values equal to the family's become 'auto' or 0 again."""
    settings = ConfigDict(dataclasses.asdict(config))
    for name, value in FAMILIES[config.model.family].items():
        if settings.model[name] == value:
            settings.model[name] = declarations()[f"model.{name}"].default
    return settings


def group_rows(config: Config, teacher: Config | None = None) -> int:
    """The neighbouring sequences that must be computed together, to keep routing groups whole."""
    length = config.model.length
    groups = [one.moe.group_size or length for one in (config, teacher) if one]
    return math.lcm(*(max(1, group // length) for group in groups))


def leaves(config: Config) -> dict[str, object]:
    """The value of every setting, by its name on the command line, such as 'model.layers'."""
    return {name: operator.attrgetter(name)(config) for name in declarations()}


def preset(config: Config) -> dict[str, object]:
    """The defaults for this config's family, by name as in `leaves`."""
    return leaves(Config(model=ModelConfig(family=config.model.family)))


def changed(config: Config) -> dict[str, object]:
    """The settings that differ from their defaults, by name as in `leaves`."""
    defaults = preset(config) | {"model.family": ModelConfig.family}
    return {name: value for name, value in leaves(config).items() if value != defaults[name]}
