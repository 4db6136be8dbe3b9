"""Checks settings, each alone and together, before anything compiles."""

import dataclasses
import math
import operator
import re

from prmoe_jax import stores
from prmoe_jax.config.architecture import placed
from prmoe_jax.config.schema import (
    LARGEST,
    Config,
    MeshConfig,
    ModelConfig,
    Setting,
    declarations,
    group_rows,
    leaves,
)
from prmoe_jax.errors import UserError, refusing, telling


def check_runs_without_limit(config: Config) -> None:
    """Checks that a run works without an expert capacity, as generation and tasks require."""
    require(
        config.moe.routes.tokens_choose,
        f"this run's experts choose their tokens (moe.router={config.moe.router}): whom they "
        "choose depends on the tokens to come, so it can neither generate nor be scored in tasks",
    )


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def check(config: Config) -> None:
    """Refuses values that are out of range, or that do not fit together."""
    values = leaves(config)
    for name, setting in declarations().items():
        _check_value(name, values[name], setting)
    _check_model(config.model)
    require(
        config.execution.attention != "cudnn" or config.model.dtype == "bfloat16",
        f"execution.attention=cudnn needs model.dtype=bfloat16, not {config.model.dtype}",
    )
    if any(config.model.schedule.experts):
        _check_moe(config)
    _check_mesh(config.mesh)
    _check_data(config)
    _check_training(config)
    _check_init(config)
    if config.teacher.workdir or config.teacher.cache:
        _check_distillation(config)


def _check_value(name: str, value, setting: Setting) -> None:
    """Refuses values that the setting's own declaration excludes."""
    if isinstance(value, str):
        _check_text(name, value, setting)
        return
    numbers = value if isinstance(value, tuple) else (value,)
    if setting.infinite and value == math.inf:
        return
    or_inf = ", or inf" * setting.infinite
    if isinstance(value, float):
        require(math.isfinite(value), f"{name}={value} must be finite{or_inf}")
    most = LARGEST if setting.most is None and not isinstance(value, float) else setting.most
    for holds, limit, words in (
        (operator.gt, setting.above, "more than {}"),
        (operator.ge, setting.least, "{} or more"),
        (operator.le, most, "at most {}"),
        (operator.lt, setting.below, "less than {}"),
    ):
        require(
            limit is None or all(holds(number, limit) for number in numbers),
            f"{name}={value} is out of range; use {words.format(limit)}{or_inf}",
        )


def _check_text(name: str, value: str, setting: Setting) -> None:
    if setting.path:
        with telling(f"{name}="):
            in_store = stores.scheme(value)
        require(
            not in_store or setting.path == "anywhere",
            f"{name}={value} is in an object store; this setting needs a local path",
        )
    require(value.isprintable(), f"{name}={value!r} holds a character that can't be printed")
    if setting.choices:
        known = ", ".join(setting.choices)
        require(value in setting.choices, f"{name}='{value}' is unknown; use one of {known}")


def _check_model(model: ModelConfig) -> None:
    require(
        model.head_dim > 0 or model.d_model % model.heads == 0,
        f"model.d_model={model.d_model} is not divisible by model.heads={model.heads}; "
        f"use d_model={-(-model.d_model // model.heads) * model.heads}, or model.head_dim",
    )
    require(
        model.heads % model.key_heads == 0,
        f"model.heads={model.heads} is not divisible by model.kv_heads={model.kv_heads}; use "
        f"kv_heads={math.gcd(model.heads, model.kv_heads)}",
    )
    with telling("model.full_attention: "):
        placed(model.layers, model.full_attention)
    scaling = model.rope_scaling
    require(
        not scaling or (len(scaling) == 4 and scaling[1] < scaling[2]),
        f"model.rope_scaling={scaling} must be four numbers, the second below the third, such as "
        "8,1,4,8192",
    )
    require(
        model.positions != "rotary" or model.head_width % 2 == 0,
        f"model.positions=rotary turns pairs of numbers, and a head has {model.head_width}; use an "
        f"even model.head_dim such as {model.head_width + 1}",
    )
    turned, whole = model.rotary_width, model.head_width
    require(
        model.positions != "rotary" or (turned > 0 and turned % 2 == 0),
        f"model.partial_rotary_factor={model.partial_rotary_factor} is {turned} of the {whole} "
        "numbers of a head, and model.positions=rotary turns pairs of them; use a share that is an "
        "even number of them",
    )
    fewest = min(filter(None, model.schedule.experts), default=model.top_k)
    require(
        model.top_k <= fewest,
        f"model.top_k={model.top_k} exceeds the {fewest} experts of the smallest MoE layer",
    )


def _check_moe(config: Config) -> None:
    moe = config.moe
    require(
        moe.bias_update_rate == 0 or not (moe.noise == "rsample" or moe.second_expert_sampling),
        "moe.bias_update_rate balances the router's own choice; switch moe.noise=rsample and "
        "moe.second_expert_sampling off",
    )
    require(
        moe.scores == "softmax" or moe.z_loss_weight == 0,
        f"moe.z_loss_weight={moe.z_loss_weight} is for moe.scores=softmax, whose logits it keeps "
        "small; use z_loss_weight=0",
    )
    if not moe.routes.tokens_choose:
        _check_expert_choice(config)
    check_groups(config)


def _check_expert_choice(config: Config) -> None:
    """Refuses normalised weights, and a capacity at which every expert takes every token."""
    moe, model = config.moe, config.model
    require(
        model.normalize_top_k != "always",
        f"model.normalize_top_k=always has no effect with moe.router={moe.router}, whose weights "
        "are the scores; use never",
    )
    most = min(filter(None, model.schedule.experts)) / model.top_k
    for name in ("capacity_factor", "eval_capacity_factor"):
        factor = getattr(moe, name)
        require(
            factor < most,
            f"moe.{name}={factor:g} lets every expert of moe.router={moe.router} take every "
            f"token; use less than {most:g}",
        )


def check_groups(config: Config, student: Config | None = None) -> None:
    """Checks that routing groups fit sequences and microbatches.

    The group size of a `student`'s teacher is fixed: the fix is another length or batch.
    """
    train, group, length = config.train, config.group_size, config.model.length
    fix: int | str = _largest_divisor(length, group)
    if student:
        longest = length // group * group or _largest_divisor(group, length)
        fix = f"model.length={longest if longest > 1 else group}"
    require(
        length % group == 0 or group % length == 0,
        f"moe.group_size={group} neither divides nor is a multiple of model.length={length}; "
        f"use {fix}",
    )
    microbatch = train.batch_size // max(1, train.accumulate) * length
    fix = math.gcd(microbatch, group)
    if student:
        rows = train.accumulate * group_rows(student, config)
        fix = f"train.batch_size={-(-train.batch_size // rows) * rows}"
    require(
        microbatch % group == 0,
        f"moe.group_size={group} does not divide the {microbatch} tokens that are computed at once "
        f"(train.batch_size={train.batch_size} / train.accumulate={train.accumulate} x "
        f"model.length={length}); use {fix}",
    )


def _largest_divisor(number: int, limit: int) -> int:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return max(d for d in [*small, *(number // d for d in small)] if d <= limit)


def check_same_routing(config: Config, source: Config, whose: str) -> None:
    """Checks that a run chooses and weighs experts like `source`, whose parameters it takes.

    `whose` is the source in words, for the message.
    """
    if not (any(config.model.schedule.experts) and any(source.model.schedule.experts)):
        return
    for name in ("router", "scores", "routed_scale"):
        ours, theirs = getattr(config.moe, name), getattr(source.moe, name)
        require(ours == theirs, f"moe.{name}={ours}, {whose} has {theirs}; use the same")
    ours, theirs = config.model.normalizes, source.model.normalizes
    require(
        ours == theirs or not config.moe.routes.tokens_choose,  # else nothing is normalised
        f"model.normalize_top_k={config.model.normalize_top_k}: the weights of a token's "
        f"experts {'add' if ours else 'do not add'} up to 1, those of {whose} "
        f"{'do' if theirs else 'do not'}; use {'always' if theirs else 'never'}",
    )
    rate = source.moe.bias_update_rate
    require(
        config.moe.bias_update_rate > 0 or rate == 0,
        f"moe.bias_update_rate=0 would lose the biases by which {whose} chooses experts; use "
        f"{rate}, or a rate that hardly moves them, such as 1e-9",
    )


def _check_mesh(mesh: MeshConfig) -> None:
    """Makes the checks that need no devices; `parallel.mesh.axis_sizes` makes the others."""
    sizes = {f"mesh.{name}": size for name, size in dataclasses.asdict(mesh).items()}
    del sizes["mesh.slices"]
    for name, size in sizes.items():
        require(size != 0, f"{name}=0 is out of range; use 1 or more, or -1 for all other devices")
    rest = [name for name, size in sizes.items() if size == -1]
    require(len(rest) < 2, f"{' and '.join(rest)} are both -1 (the rest); give all but one")


def _check_data(config: Config) -> None:
    data, vocabulary = config.data, config.model.vocab_size
    for name in ("corpus", "tokenizer", "text_field", "cache_dir"):
        require(getattr(data, name) != "", f"data.{name} is empty")
    smallest = {"bpe": 257, "bytes": 257, "gpt2": 50257}.get(data.tokenizer, 0)
    require(
        vocabulary >= smallest,
        f"model.vocab_size={vocabulary} is too small for data.tokenizer={data.tokenizer}; use "
        f"{-(-smallest // 128) * 128} or more",
    )


def _check_training(config: Config) -> None:
    train, optimizer, saved = config.train, config.optimizer, config.checkpoint
    require(
        saved.keep_every % saved.every == 0,
        f"checkpoint.keep_every={saved.keep_every} is no multiple of checkpoint.every={saved.every}"
        f", so that hardly any stay; use {-(-saved.keep_every // saved.every) * saved.every}",
    )
    require(
        bool(train.steps) != bool(train.tokens),
        f"train.steps={train.steps} and train.tokens={train.tokens}: exactly one must be above 0",
    )
    require(
        train.batch_size % train.accumulate == 0,
        f"train.batch_size={train.batch_size} is not divisible by train.accumulate="
        f"{train.accumulate}; use {math.gcd(train.batch_size, train.accumulate)}",
    )
    pattern = optimizer.trainable
    with refusing(f"optimizer.trainable={pattern} is no regular expression", re.error):
        re.compile(pattern)
    require(
        optimizer.min_learning_rate <= optimizer.learning_rate,
        f"optimizer.min_learning_rate={optimizer.min_learning_rate} exceeds learning_rate="
        f"{optimizer.learning_rate}; use at most that",
    )
    require(
        optimizer.decay_tokens == 0 or optimizer.decay_tokens > optimizer.warmup_tokens,
        f"optimizer.decay_tokens={optimizer.decay_tokens} must be above warmup_tokens="
        f"{optimizer.warmup_tokens}",
    )
    if config.decay_start is not None:
        start = config.decay_start * config.tokens_per_step
        require(
            optimizer.warmup_tokens <= start,
            f"optimizer.warmup_tokens={optimizer.warmup_tokens} exceeds the {start} tokens before "
            f"the decay of optimizer.schedule=wsd; use at most {start}",
        )


def _check_init(config: Config) -> None:
    step, start = config.init.step, config.decay_start
    if not config.init.workdir:
        return
    require(
        step > 0 or not config.teacher.inherit,
        "init.workdir and teacher.inherit=true: a run starts as one other; leave one of them out",
    )
    require(
        step == 0 or start is not None,
        f"init.step={step} needs optimizer.schedule=wsd, whose learning rate is the same in runs "
        f"of any length until it decays; optimizer.schedule is {config.optimizer.schedule}",
    )
    require(
        step == 0 or step <= start,
        f"init.step={step} comes after the decay of this run starts, at step {start} of "
        f"{config.total_steps}; use {start} or less, or a longer run",
    )
    require(
        step < config.total_steps,
        f"init.step={step} leaves none of train.steps={config.total_steps} to train; use fewer "
        "than these, or a longer run",
    )


def _check_distillation(config: Config) -> None:
    teacher, kd, top = config.teacher, config.kd, config.model.vocab_size - 1
    require(
        not teacher.cache or kd.kind == "top_k",
        f"kd.kind={kd.kind} needs the run itself; a teacher cache is for kd.kind=top_k",
    )
    require(
        bool(teacher.workdir) or not teacher.inherit,
        "teacher.inherit=true needs the run itself, too; name it by teacher.workdir",
    )
    require(
        kd.kind != "top_k" or 1 <= kd.top_k <= top,
        f"kd.top_k={kd.top_k} is out of range; use a value from 1 to {top}",
    )
    require(
        kd.stop <= 1 or kd.stop >= config.tokens_per_step,
        f"kd.stop={kd.stop:g} is less than a step of {config.tokens_per_step:,} tokens; use a "
        "share of the run, such as 0.7, or a number of tokens",
    )
    require(
        config.kd_steps > 0,
        f"kd.stop={kd.stop} ends before the first of {config.total_steps} steps; use a larger one",
    )
