"""Which values go together: every check between settings, made before anything compiles."""

import dataclasses
import math
import os

from prmoe_jax.config.schema import Config, MeshConfig, ModelConfig, MoeConfig, group_rows, leaves
from prmoe_jax.errors import UserError


def check_runs_without_limit(config: Config) -> None:
    """What generation and tasks need: a run that predicts the same where no token is dropped.

    Raises:
      UserError: its experts choose tokens, and without a limit every expert takes every token.
    """
    require(
        config.moe.router == "token_choice",
        "this run's experts choose their tokens (moe.router=expert_choice): whom they choose "
        "depends on the tokens to come, so it can neither generate nor be scored in tasks",
    )


def show(value) -> str:
    """A value for a message; Python prints no number of more than 4,300 digits."""
    try:
        return repr(value)
    except ValueError:
        return "a number of thousands of digits"


def require(condition: bool, message: str) -> None:
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


def check(config: Config) -> None:
    largest = LARGEST_OF["seed"]
    require(
        0 <= config.seed <= largest,
        f"seed={show(config.seed)} is out of range; use a value from 0 to {largest}",
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
        require(
            low <= value <= high,
            f"{group}.{name}={value} is out of range; use "
            + (f"{low} or more" if high == math.inf else f"a value from {low} to {high}"),
        )


def _check_value(name: str, value) -> None:
    """Refuses values that no setting of this type can have."""
    if isinstance(value, str):  # Python reads no number of more than 4,300 digits
        require(len(value) < 4096, f"{name} is too long: {len(value)} characters of at most 4095")
    elif isinstance(value, float):
        finite, (low, high) = math.isfinite(value), FLOAT32
        require(finite or name in MAY_BE_INFINITE, f"{name}={value} must be finite")
        fix = (
            "0" if abs(value) < low else "inf" if name in MAY_BE_INFINITE else f"{high:.6g} or less"
        )
        require(
            not finite or value == 0 or low <= abs(value) <= high,
            f"{name}={value} is out of float32's range; use {fix}",
        )
    else:
        largest = LARGEST_OF.get(name, LARGEST)
        require(
            all(abs(n) <= largest for n in (value if isinstance(value, tuple) else (value,))),
            f"{name}={show(value)} is out of range; the largest is {largest}",
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
        require(b"\0" not in encoded, f"{name}={value!r} is not a path: it holds a NUL character")
        longest = max(len(part) for part in encoded.split(b"/"))
        require(
            longest <= 255 and len(encoded) < 4096,
            f"{name} is too long: a path has up to 4095 bytes, and 255 from one / to the next; "
            f"this one has {len(encoded)} and {longest}",
        )


def _check_choice(group: str, values, name: str, choices: str) -> None:
    value = getattr(values, name)
    require(
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
    require(0 <= model.dropout < 1, f"model.dropout={model.dropout} must be in [0, 1)")
    require(model.init_std > 0, f"model.init_std={model.init_std} must be above 0")
    require(
        model.d_model % model.heads == 0,
        f"model.d_model={model.d_model} is not divisible by model.heads={model.heads}; "
        f"use d_model={-(-model.d_model // model.heads) * model.heads}",
    )
    require(
        model.attention != "cudnn" or model.dtype == "bfloat16",
        f"model.attention=cudnn needs model.dtype=bfloat16, not {model.dtype}",
    )
    require(
        all(e >= 1 for e in model.experts),
        f"model.experts={model.experts}: every MoE layer needs at least 1 expert",
    )
    experts = [e for e in model.schedule.experts if e]
    if not experts:
        for name, default in (("top_k", 1), ("residual", False), ("residual_mix", "learned")):
            value = getattr(model, name)
            require(
                value == default,
                f"model.{name}={value} has no effect: the architecture is dense; choose "
                f"model.placement and model.experts, or model.{name}={default}",
            )
        return
    require(
        model.residual or model.residual_mix == "learned",
        f"model.residual_mix={model.residual_mix} has no effect without model.residual=true",
    )
    require(
        model.top_k <= min(experts),
        f"model.top_k={model.top_k} exceeds the {min(experts)} experts of the smallest MoE layer",
    )


def _check_moe(config: Config) -> None:
    moe, model = config.moe, config.model
    if not any(model.schedule.experts):
        for field in dataclasses.fields(MoeConfig):
            value = getattr(moe, field.name)
            require(
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
        require(factor > 0, f"moe.{name}={factor} must be above 0 (inf never drops)")
        _check_factor(f"moe.{name}", factor)
    never_full = math.isinf(moe.capacity_factor) and math.isinf(moe.eval_capacity_factor)
    if moe.overflow == "random":
        never_full = math.isinf(moe.capacity_factor)
    require(
        moe.overflow == "position" or not never_full,
        f"moe.overflow={moe.overflow} has no effect with moe.capacity_factor=inf; leave it at "
        "position",
    )
    for name, only in (("noise", 1), ("second_expert_sampling", 2)):
        value = getattr(moe, name)
        require(
            value not in ("rsample", True) or model.top_k == only,
            f"moe.{name}={value} has no effect with model.top_k={model.top_k}; it is for "
            f"top_k={only}",
        )
    sampled = moe.noise == "rsample" or moe.second_expert_sampling
    require(
        moe.bias_update_rate == 0 or not sampled,
        "moe.bias_update_rate balances the router's own choice; switch moe.noise=rsample and "
        "moe.second_expert_sampling off",
    )
    if moe.router == "expert_choice":
        _check_expert_choice(moe)
    check_groups(config)


def _check_factor(name: str, factor: float) -> None:
    """Refuses numbers that overflow when they are multiplied by tokens, as inf would not."""
    require(
        factor <= LARGEST or factor == math.inf,
        f"{name}={factor} is out of range; use inf, which never drops",
    )


def check_groups(config: Config, student: Config | None = None) -> None:
    """Routing groups must be made of whole sequences, or sequences of whole groups.

    A teacher's group size is given: what doesn't fit it is the batch of its student.
    """
    train, group, length = config.train, config.group_size, config.model.length
    fix = _largest_divisor(length, group)
    if student:
        longest = length // group * group or _largest_divisor(group, length)
        fix = f"model.length={longest if longest > 1 else group}"
    require(
        length % group == 0 or group % length == 0,
        f"moe.group_size={group} neither divides nor is a multiple of model.length={length}; "
        f"use {fix}",
    )
    portion = train.batch_size // max(1, train.accumulate) * length
    fix = math.gcd(portion, group)
    if student:
        rows = train.accumulate * group_rows(student, config)
        fix = f"train.batch_size={-(-train.batch_size // rows) * rows}"
    require(
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
        require(
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
        require(
            value == idle,
            f"moe.{name}={value} has no effect: with moe.router=expert_choice no expert "
            f"overflows and the load is even; use moe.{name}={idle}",
        )
    require(
        moe.noise != "rsample",
        "moe.noise=rsample has no effect with moe.router=expert_choice; use jitter or none",
    )


def _check_mesh(mesh: MeshConfig) -> None:
    """What can be said without the devices; the rest is `parallel.mesh.axis_sizes`."""
    sizes = dataclasses.asdict(mesh)
    for name, size in sizes.items():
        may_be_rest = name != "expert_inner"
        require(
            size >= 1 or (size == -1 and may_be_rest),
            f"mesh.{name}={size} is out of range; use 1 or more"
            + (", or -1 for the rest of the devices" if may_be_rest else ""),
        )
    rest = [f"mesh.{name}" for name, size in sizes.items() if size == -1]
    require(len(rest) < 2, f"{' and '.join(rest)} are both -1 (the rest); give all but one")


def _check_data(config: Config) -> None:
    data, model = config.data, config.model
    for name in ("corpus", "tokenizer", "text_field", "cache_dir"):
        require(getattr(data, name) != "", f"data.{name} is empty")
    require(
        0 < data.validation_fraction < 1,
        f"data.validation_fraction={data.validation_fraction} must be between 0 and 1, exclusive",
    )
    smallest = {"bpe": 257, "bytes": 257, "gpt2": 50257}.get(data.tokenizer, 0)
    require(
        model.vocab_size >= smallest,
        f"model.vocab_size={model.vocab_size} is too small for data.tokenizer={data.tokenizer}; "
        f"use {-(-smallest // 128) * 128} or more",
    )


def _check_training(config: Config) -> None:
    train, optimizer = config.train, config.optimizer
    _check_ranges("train", train, "batch_size accumulate", 1)
    _check_ranges("train", train, "steps tokens z_loss", 0)
    require(
        bool(train.steps) != bool(train.tokens),
        f"train.steps={train.steps} and train.tokens={train.tokens}: exactly one must be above 0",
    )
    require(
        train.batch_size % train.accumulate == 0,
        f"train.batch_size={train.batch_size} is not divisible by train.accumulate="
        f"{train.accumulate}; use {math.gcd(train.batch_size, train.accumulate)}",
    )
    require(
        config.total_steps <= LARGEST,
        f"train.tokens={train.tokens} makes {config.total_steps} steps of "
        f"{config.tokens_per_step} tokens; use at most {LARGEST * config.tokens_per_step}",
    )
    _check_ranges("optimizer", optimizer, "warmup_tokens decay_tokens weight_decay", 0)
    _check_ranges("optimizer", optimizer, "b1 b2", 0, 0.99999)
    for name in ("learning_rate", "eps", "clip_norm"):
        value = getattr(optimizer, name)
        require(value > 0, f"optimizer.{name}={value} must be above 0")
    require(
        0 <= optimizer.min_learning_rate <= optimizer.learning_rate,
        f"optimizer.min_learning_rate={optimizer.min_learning_rate} must be from 0 to "
        f"learning_rate={optimizer.learning_rate}",
    )
    require(
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
    require(
        bool(init.workdir) or init.noise == 0,
        f"init.noise={init.noise} has no effect without init.workdir, the run to start as",
    )
    require(
        not (init.workdir and config.teacher.inherit),
        "init.workdir and teacher.inherit=true: a run starts as one other; leave one of them out",
    )


def _check_distillation(config: Config) -> None:
    teacher, kd = config.teacher, config.kd
    if not (teacher.workdir or teacher.lessons):
        defaults = leaves(Config())
        for name, value in leaves(config).items():
            require(
                not name.startswith(("teacher.", "kd.")) or value == defaults[name],
                f"{name}={value} has no effect: no run teaches; name one by teacher.workdir or "
                f"leave it at {defaults[name]}",
            )
        return
    if teacher.lessons:
        require(kd.kind == "top_k", f"kd.kind={kd.kind} needs the run itself; lessons are top_k")
        for name, idle in (("mode", "eval"), ("capacity_factor", 0.0)):
            value = getattr(teacher, name)
            require(
                value == idle,
                f"teacher.{name}={value} has no effect on lessons that are written; leave it at "
                f"{idle}",
            )
        require(
            bool(teacher.workdir) or not teacher.inherit,
            "teacher.inherit=true needs the run itself, too; name it by teacher.workdir",
        )
    _check_choice("teacher", teacher, "mode", "eval train")
    _check_choice("kd", kd, "kind", "forward reverse top_k")
    _check_choice("kd", kd, "decay", "none linear")
    require(
        teacher.mode == "eval" or teacher.capacity_factor == 0,
        f"teacher.capacity_factor={teacher.capacity_factor} has no effect with teacher.mode="
        "train, which has the teacher's own; leave it at 0",
    )
    _check_ranges("teacher", teacher, "capacity_factor", 0)
    _check_factor("teacher.capacity_factor", teacher.capacity_factor)
    _check_choice("teacher", teacher, "importance", "weights taylor")
    for name, idle in (("layers", ""), ("importance", "weights")):
        value = getattr(teacher, name)
        require(
            teacher.inherit or value == idle,
            f"teacher.{name}={value} has no effect without teacher.inherit=true",
        )
    for name in ("weight", "temperature", "stop"):
        value = getattr(kd, name)
        require(value > 0, f"kd.{name}={value} must be above 0")
    if kd.kind == "top_k":
        _check_ranges("kd", kd, "top_k", 1, config.model.vocab_size - 1)
    require(
        kd.kind == "top_k" or kd.top_k == 0,
        f"kd.top_k={kd.top_k} has no effect with kd.kind={kd.kind}; use kind=top_k or top_k=0",
    )
    require(
        config.kd_steps > 0,
        f"kd.stop={kd.stop} ends before the first of {config.total_steps} steps; use a larger one",
    )


def _check_arrays(config: Config) -> None:
    """Refuses sizes that are possible one by one, and impossible together."""
    model, tokens = config.model, config.tokens_per_step
    require(
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
        require(
            elements <= LARGEST_ARRAY,
            f"{names} make an array of {elements:.2g} numbers, which no machine holds; use less",
        )
