"""Settings: every config resolves, every override parses, every rule refuses, files round-trip."""

import dataclasses
import json
import math
import re

import pytest

from configs import paper, tiny
from prmoe_jax import cli
from prmoe_jax.config.family import FAMILIES
from prmoe_jax.config.loading import check_resume, load, resolve, save
from prmoe_jax.config.schema import Config, default_config, leaves
from prmoe_jax.config.teacher import teacher_of
from prmoe_jax.errors import UserError
from prmoe_jax.model.sizes import cost
from prmoe_jax.parallel.mesh import check_fits
from tests.support.configs import BASE, OTHER_VALUES, tiny_config


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_tiny_rows_differ_in_the_architecture_only(name):
    config, reference = resolve(tiny.get_config(name)), resolve(tiny.get_config("dense"))
    before, after = leaves(reference), leaves(config)
    changed = {setting for setting in before if before[setting] != after[setting]}
    assert changed <= {
        "model.placement", "model.experts", "model.top_k", "model.residual",
        *(("model.layers", "teacher.workdir") if name == "mos" else ()),
    }  # fmt: skip
    assert str(config.model.schedule) == tiny.ARCHITECTURES[name]


def test_tiny_rows_are_all_different():
    assert len({tiny_config(name=name) for name in tiny.ARCHITECTURES}) == 9


def test_an_architecture_string_names_a_config():
    assert tiny_config(name="6 layers, E=4x2+8, residual") == tiny_config(name="prmoe")
    assert tiny_config(name="3 layers, E=2").model.experts == (2,)


# layers, d_model, heads, batch, LR, min LR, decay in billions of tokens, init std.
PAPER = {
    "dense_350m": (24, 1024, 16, 256, 3e-4, 3e-5, 260, 0.014),
    "dense_1.3b": (24, 2048, 16, 512, 2e-4, 2e-5, 260, 0.014),
    "dense_6.7b": (32, 4096, 32, 1024, 1.2e-4, 1.2e-5, 260, 0.01),
    "moe_350m": (24, 1024, 16, 256, 2e-4, 2e-6, 300, 0.014),
    "moe_1.3b": (24, 2048, 16, 512, 1.2e-4, 1e-6, 300, 0.014),
    "prmoe_350m": (24, 1024, 16, 256, 3e-4, 1e-6, 300, 0.014),
    "prmoe_1.3b": (24, 2048, 16, 512, 1.2e-4, 1e-6, 300, 0.014),
    "mos_350m": (21, 1024, 16, 256, 3e-4, 1e-6, 300, 0.014),
    "mos_1.3b": (21, 2048, 16, 512, 1.2e-4, 1e-6, 300, 0.014),
}


def test_the_paper_has_nine_models():
    assert list(paper.ROWS) == list(PAPER)


def test_a_trillion_parameters_to_serve():
    """Within 2 % of what the paper says; a dense base of 24 billion."""
    model = resolve(paper.get_config("moe_24b")).model
    assert cost(model).total_params == pytest.approx(1_064.9e9, rel=0.02)
    dense = dataclasses.replace(model, placement="none", experts=())
    assert cost(dense).total_params == pytest.approx(24e9, rel=0.03)


@pytest.mark.parametrize("name, row", PAPER.items(), ids=PAPER)
def test_recipe_of_the_paper(name, row):
    config = resolve(paper.get_config(name))
    model, optimizer, moe = config.model, config.optimizer, config.moe
    assert row == (
        model.layers,
        model.d_model,
        model.heads,
        config.train.batch_size,
        optimizer.learning_rate,
        optimizer.min_learning_rate,
        optimizer.decay_tokens / 1e9,
        model.init_std,
    )
    assert (model.length, model.vocab_size, model.d_ff) == (2048, 50304, 4 * model.d_model)
    assert config.data.tokenizer == "gpt2"
    assert config.train.tokens == 300_000_000_000 and config.train.steps == 0
    assert optimizer.warmup_tokens == 375_000_000
    assert (optimizer.b1, optimizer.b2, optimizer.eps) == (0.9, 0.95, 1e-8)
    assert (optimizer.weight_decay, optimizer.clip_norm) == (0.1, 1.0)
    assert (moe.capacity_factor, moe.eval_capacity_factor, moe.min_capacity) == (1.0, 1.0, 4)
    assert (moe.aux_loss_weight, model.top_k) == (0.01, 1)
    assert (moe.overflow == "random") == (not name.startswith("dense"))  # DeepSpeed's default
    assert config.total_steps == math.ceil(300e9 / (row[3] * 2048))


def test_defaults_leave_only_the_length_of_the_run_open():
    with pytest.raises(UserError, match="train.steps=0 and train.tokens=0"):
        resolve(default_config())
    settings = default_config()
    settings.train.steps = 1
    assert dataclasses.replace(resolve(settings), train=Config().train) == Config()


@pytest.mark.parametrize("steps, tokens, total", [(7, 0, 7), (0, 1, 1), (0, 4096, 1), (0, 4097, 2)])
def test_steps_or_tokens(steps, tokens, total):
    config = tiny_config(f"train.steps={steps}", f"train.tokens={tokens}")
    assert config.tokens_per_step == 16 * 256
    assert config.total_steps == total


def test_the_routing_group_is_a_sequence_unless_given():
    assert tiny_config().group_size == 256
    assert tiny_config("moe.group_size=512").group_size == 512


TAUGHT, WSD = "teacher.workdir=runs/a", "optimizer.schedule=wsd"
SCALED = ["model.positions=rotary", "model.rope_scaling=8,1,4,64"]
YARN = [*SCALED, "model.rope_type=yarn"]
# What has to change with a setting for the whole to stay valid.
COMPANIONS = {
    "execution.cpu_products": ["model.dtype=bfloat16"],
    "model.top_k": ["model.residual=true"],
    "model.full_attention": ["model.sliding_window=16"],
    "model.rope_theta": ["model.positions=rotary"],
    "model.rope_scaling": ["model.positions=rotary"],
    "model.rope_type": SCALED,
    "model.rope_truncate": YARN,
    "model.rope_attention_factor": YARN,
    "model.partial_rotary_factor": ["model.positions=rotary"],
    "moe.second_expert_sampling": ["model.top_k=2"],
    "train.tokens": ["train.steps=0"],
    "teacher.layers": ["teacher.workdir=runs/a", "teacher.inherit=true"],
    "teacher.importance": ["teacher.workdir=runs/a", "teacher.inherit=true"],
    "init.noise": ["init.workdir=runs/dense"],
    "init.step": ["init.workdir=runs/trunk", "optimizer.schedule=wsd"],
    "optimizer.decay_fraction": ["optimizer.schedule=wsd"],
    "optimizer.momentum": ["optimizer.kind=muon"],
    "teacher.cache": ["kd.kind=top_k", "kd.top_k=5"],
    "kd.top_k": ["teacher.workdir=runs/a", "kd.kind=top_k"],
    **{
        name: ["teacher.workdir=runs/a"]
        for name in ("teacher.mode", "teacher.capacity_factor", "teacher.inherit", "kd.kind")
        + ("kd.weight", "kd.temperature", "kd.stop", "kd.decay")
    },
}


def test_the_table_has_every_setting():
    assert set(OTHER_VALUES) == set(leaves(Config()))


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_every_setting_can_be_overridden(name):
    text, value = OTHER_VALUES[name]
    companions = COMPANIONS.get(name, [])
    config = tiny_config(*companions, f"{name}={text}")
    before = leaves(tiny_config())
    after = leaves(config)
    assert after[name] == value != before[name]
    assert type(after[name]) is type(before[name])
    changed = {key for key in before if before[key] != after[key]} - {name}
    if name == "model.family":
        changed -= {f"model.{key}" for key in FAMILIES["gpt2"]}
    assert changed <= {companion.partition("=")[0] for companion in companions}


@pytest.mark.parametrize("name", leaves(Config()))
def test_every_setting_accepts_its_own_value(name):
    config = tiny_config("moe.capacity_factor=inf")
    value = leaves(config)[name]
    text = ",".join(map(str, value)) if value and isinstance(value, tuple) else str(value)
    assert tiny_config("moe.capacity_factor=inf", f"{name}={text}") == config


@pytest.mark.parametrize("text", ["4,4,8", "(4,4,8)", "[4,4,8]", "4, 4, 8"])
def test_tuples_can_be_written_in_several_ways(text):
    assert tiny_config(f"model.experts={text}").model.experts == (4, 4, 8)


def test_one_count_may_stand_for_all_layers():
    assert tiny_config("model.experts=8").model.schedule.experts == (0, 8) * 3


def test_the_order_of_arguments_does_not_matter():
    config = f"--config={tiny.__file__}:moe"
    expected = tiny_config("seed=3", name="moe")
    base = [f"--config.{override}" for override in BASE]
    assert cli.parse_config([*base, "--config.seed=3", config]) == expected
    assert cli.parse_config([*base, "--config.seed", "3", *config.split("=", 1)]) == expected


def test_the_last_of_several_overrides_counts():
    assert tiny_config("seed=3", "seed=5").seed == 5


# The rule, what breaks it, and what the message has to say.
RULES = {
    "seed": (["seed=-1"], "seed=-1 is out of range; use 0 or more"),
    "seed of 33 bits": (
        ["seed=4294967295"],
        "seed=4294967295 is out of range; use at mo",
    ),
    "vocabulary": (["model.vocab_size=1"], "model.vocab_size=1 is out of range; use 2 or more"),
    "length": (["model.length=1"], "model.length=1 is out of range; use 2 or more"),
    "layers": (["model.layers=0"], "model.layers=0 is out of range; use 1 or more"),
    "d_model": (["model.d_model=0"], "model.d_model=0 is out of range"),
    "heads": (["model.heads=0"], "model.heads=0 is out of range"),
    "d_ff": (["model.d_ff=-4"], "model.d_ff=-4 is out of range"),
    "heads divide": (
        ["model.heads=5"],
        "model.d_model=192 is not divisible by model.heads=5; use d_model=195",
    ),
    "top_k 0": (["model.top_k=0"], "model.top_k=0 is out of range"),
    "top_k above experts": (
        ["model.experts=1,4,4", "model.top_k=2"],
        "model.top_k=2 exceeds the 1 experts of the smallest MoE layer",
    ),
    "no expert": (["model.experts=4,0,8"], "model.experts=(4, 0, 8) is out of range; use 1"),
    "experts of layers": (
        ["model.experts=4,8"],
        "experts=4,8 has 2 entries, but placement 'every 2' makes 3 MoE layers of 6 layers; "
        "give 3 entries, or one for all",
    ),
    "layers of experts": (["model.layers=8"], "has 3 entries, but placement 'every 2' makes 4"),
    "placement": (["model.placement=third half"], "placement 'third half' is unknown; use 'none'"),
    "experts without placement": (
        ["model.placement=none"],
        "experts=4,4,8 has no effect: placement 'none' puts no MoE layer into 6 layers",
    ),
    "dtype": (
        ["model.dtype=float16"],
        "model.dtype='float16' is unknown; use one of bfloat16, float32",
    ),
    "remat": (
        ["execution.remat=all"],
        "execution.remat='all' is unknown; use one of auto, none, dots, full",
    ),
    "attention": (["execution.attention=flash"], "use one of auto, xla, blocks, cudnn, splash"),
    "empty choice": (["execution.attention="], "execution.attention='' is unknown"),
    "cudnn in float32": (["execution.attention=cudnn"], "needs model.dtype=bfloat16, not float32"),
    "dropout 1": (["model.dropout=1"], "model.dropout=1.0 is out of range; use less than 1"),
    "dropout -1": (["model.dropout=-0.1"], "model.dropout=-0.1 is out of range; use 0 or more"),
    "std": (["model.init_std=0"], "model.init_std=0.0 is out of range; use more than 0"),
    "exchange": (["execution.exchange=ring"], "use one of auto, flat, hierarchical, coordinated"),
    "init noise": (["init.noise=0.1"], "init.noise=0.1 has no effect without init.workdir"),
    "momentum": (
        ["optimizer.momentum=0.9"],
        "has no effect with optimizer.kind=adamw: it is for optimizer.kind=muon; leave it at 0.95",
    ),
    "init step": (["init.step=9"], "init.step=9 has no effect without init.workdir"),
    "branch by cosine": (
        ["init.workdir=a", "init.step=9"],
        "init.step=9 needs optimizer.schedule=wsd, whose learning rate is the same in runs of any",
    ),
    "branch in the decay": (
        ["init.workdir=a", "init.step=481", WSD],
        "init.step=481 comes after the decay of this run starts, at step 480 of 600; use 480 or",
    ),
    "branch at the end": (
        ["init.workdir=a", "init.step=6", "train.steps=6", "optimizer.decay_tokens=99999", WSD],
        "init.step=6 leaves none of train.steps=6 to train; use fewer than these, or a longer run",
    ),
    "branch with noise": (
        ["init.workdir=a", "init.step=480", "init.noise=0.1", WSD],
        "init.noise=0.1 has no effect with init.step=480",
    ),
    "decay of a cosine": (
        ["optimizer.decay_fraction=0.1"],
        "it is for optimizer.schedule=wsd; leave it at 0.2",
    ),
    "no decay": (
        ["optimizer.decay_fraction=1", WSD],
        "fraction=1.0 is out of range; use less",
    ),
    "long warm-up": (
        ["optimizer.warmup_tokens=1966081", WSD],
        "warmup_tokens=1966081 exceeds the 1966080 tokens before the decay of optimizer.schedule",
    ),
    "init noise -1": (
        ["init.workdir=a", "init.noise=-1"],
        "init.noise=-1.0 is out of range; use 0 or",
    ),
    "two starts": (
        ["init.workdir=a", TAUGHT, "teacher.inherit=true"],
        "init.workdir and teacher.inherit=true: a run starts as one other",
    ),
    "lessons": (
        ["teacher.cache=a"],
        "kd.kind=forward needs the run itself; a teacher cache is for",
    ),
    "teacher cache mode": (
        ["teacher.cache=a", "kd.kind=top_k", "kd.top_k=3", "teacher.mode=train"],
        "teacher.mode=train has no effect with teacher.cache=",
    ),
    "teacher cache part": (
        ["teacher.cache=a", "kd.kind=top_k", "kd.top_k=3", "teacher.inherit=true"],
        "teacher.inherit=true needs the run itself, too; name it by teacher.workdir",
    ),
    "no teacher": (
        ["kd.weight=2"],
        "kd.weight=2.0 has no effect without teacher.workdir or",
    ),
    "no teacher 2": (
        ["teacher.mode=train"],
        "mode=train has no effect without teacher.workdir or",
    ),
    "teacher mode": (
        [TAUGHT, "teacher.mode=asleep"],
        "'asleep' is unknown; use one of eval, train",
    ),
    "teacher importance": (
        [TAUGHT, "teacher.importance=taylor"],
        "teacher.importance=taylor has no effect with teacher.inherit=False",
    ),
    "teacher capacity": (
        [TAUGHT, "teacher.mode=train", "teacher.capacity_factor=2"],
        "teacher.capacity_factor=2.0 has no effect with teacher.mode=train",
    ),
    "teacher capacity -1": ([TAUGHT, "teacher.capacity_factor=-1"], "use 0 or more"),
    "layers of no student": (
        [TAUGHT, "teacher.layers=0 1"],
        "teacher.layers=0 1 has no effect with teacher.inherit=False",
    ),
    "kd kind": ([TAUGHT, "kd.kind=l2"], "kd.kind='l2' is unknown; use one of forward, reverse"),
    "kd decay": ([TAUGHT, "kd.decay=cosine"], "'cosine' is unknown; use one of none, linear"),
    "kd weight": ([TAUGHT, "kd.weight=0"], "kd.weight=0.0 is out of range; use more than 0"),
    "kd temperature": ([TAUGHT, "kd.temperature=-1"], "kd.temperature=-1.0 is out of range; use"),
    "kd top 0": ([TAUGHT, "kd.kind=top_k"], "kd.top_k=0 is out of range; use a value from 1 to"),
    "kd top k": ([TAUGHT, "kd.top_k=4"], "kd.top_k=4 has no effect with kd.kind=forward: it"),
    "kd stop": ([TAUGHT, "kd.stop=1e-6"], "kd.stop=1e-06 ends before the first of 600 steps"),
    "kd stop of no step": (
        [TAUGHT, "kd.stop=70"],
        "kd.stop=70 is less than a step of 4,096 tokens; use a share of the run, such as 0.7",
    ),
    "mesh 0": (["mesh.tensor=0"], "mesh.tensor=0 is out of range; use 1 or more, or -1 for all"),
    "mesh -2": (["mesh.fsdp=-2"], "mesh.fsdp=-2 is out of range; use -1 or more"),
    "two rests": (["mesh.fsdp=-1"], "mesh.data and mesh.fsdp are both -1 (the rest); give all but"),
    "dispatch": (
        ["execution.dispatch=scatter"],
        "use one of auto, gather, einsum, ragged, blocked",
    ),
    "capacity": (
        ["moe.capacity_factor=0"],
        "moe.capacity_factor=0.0 is out of range; use more than 0, or inf",
    ),
    "capacity nan": (["moe.capacity_factor=nan"], "moe.capacity_factor=nan must be finite, or"),
    "eval capacity": (["moe.eval_capacity_factor=-1"], "moe.eval_capacity_factor=-1.0 is out of"),
    "min capacity": (["moe.min_capacity=-1"], "moe.min_capacity=-1 is out of range; use 0 or"),
    "aux weight": (["moe.aux_loss_weight=-1"], "moe.aux_loss_weight=-1.0 is out of range"),
    "random selection of all": (
        ["moe.overflow=random", "moe.capacity_factor=inf"],
        "moe.overflow=random has no effect with moe.capacity_factor=inf: no expert is full",
    ),
    "priority without overflow": (
        ["moe.overflow=probability", "moe.capacity_factor=inf", "moe.eval_capacity_factor=inf"],
        "moe.overflow=probability has no effect with moe.capacity_factor=inf",
    ),
    "second expert of one": (
        ["moe.second_expert_sampling=true"],
        "moe.second_expert_sampling=True has no effect with model.top_k=1: it is for model.top_k=2",
    ),
    "rsample of two": (
        ["moe.noise=rsample", "model.top_k=2"],
        "moe.noise=rsample has no effect with model.top_k=2: it is for top_k=1",
    ),
    "balanced noise": (
        ["moe.noise=rsample", "moe.bias_update_rate=0.001"],
        "moe.bias_update_rate balances the router's own choice; switch moe.noise=rsample",
    ),
    "router": (["moe.router=hash"], "moe.router='hash' is unknown; use one of token_choice"),
    "overflow": (["moe.overflow=last"], "moe.overflow='last' is unknown; use one of position"),
    "noise": (["moe.noise=gauss"], "moe.noise='gauss' is unknown; use one of none, rsample"),
    "expert init": (["moe.expert_init=zero"], "moe.expert_init='zero' is unknown; use one of"),
    "router z": (["moe.z_loss_weight=-1"], "moe.z_loss_weight=-1.0 is out of range; use 0 or"),
    "bias": (["moe.bias_update_rate=-1"], "moe.bias_update_rate=-1.0 is out of range; use 0 or"),
    "experts choose all": (
        ["moe.router=expert_choice", "moe.capacity_factor=inf"],
        "moe.capacity_factor=inf lets every expert of moe.router=expert_choice take every token",
    ),
    "experts overflow": (
        ["moe.router=expert_choice", "moe.overflow=probability"],
        "moe.overflow=probability has no effect with moe.router=expert_choice; leave it",
    ),
    "experts balanced": (
        ["moe.router=expert_choice", "moe.bias_update_rate=0.001"],
        "moe.bias_update_rate=0.001 has no effect with moe.router=expert_choice; leave it",
    ),
    "experts scaled": (
        ["moe.router=expert_choice", "moe.routed_scale=2.5"],
        "moe.routed_scale=2.5 has no effect with moe.router=expert_choice; leave it",
    ),
    "experts normalised": (
        ["moe.router=expert_choice", "model.normalize_top_k=always"],
        "model.normalize_top_k=always has no effect with moe.router=expert_choice, whose",
    ),
    "experts sample": (
        ["moe.router=expert_choice", "moe.noise=rsample"],
        "moe.noise=rsample has no effect with moe.router=expert_choice: it is for tokens' choices",
    ),
    "family": (["model.family=bert"], "model.family='bert' is unknown; use one of gpt2, llama"),
    "shared keys": (
        ["model.kv_heads=4"],
        "model.heads=6 is not divisible by model.kv_heads=4; use kv_heads=2",
    ),
    "odd heads": (
        ["model.positions=rotary", "model.head_dim=15"],
        "model.positions=rotary turns pairs of numbers, and a head has 15; use an even model.head",
    ),
    "heads of any width": (
        ["model.heads=7"],
        "is not divisible by model.heads=7; use d_model=196, or model.head_dim",
    ),
    "theta 1": (
        ["model.positions=rotary", "model.rope_theta=1"],
        "model.rope_theta=1.0 is out of range; use more than 1",
    ),
    "experts choose nearly all": (
        ["moe.router=expert_choice", "moe.capacity_factor=4"],
        "moe.capacity_factor=4 lets every expert of moe.router=expert_choice take every token; use",
    ),
    "theta": (
        ["model.rope_theta=5e5"],
        "model.rope_theta=500000.0 has no effect with model.positions=learned: it is for",
    ),
    "scaled learned positions": (
        ["model.rope_scaling=8,1,4,64"],
        "model.rope_scaling=(8, 1, 4, 64) has no effect with model.positions=learned: it is for",
    ),
    "a share of learned positions": (
        ["model.partial_rotary_factor=0.5"],
        "model.partial_rotary_factor=0.5 has no effect with model.positions=learned: it is for",
    ),
    "more than a head": (
        ["model.positions=rotary", "model.partial_rotary_factor=1.5"],
        "model.partial_rotary_factor=1.5 is out of range; use at most 1",
    ),
    "half a pair": (
        ["model.positions=rotary", "model.partial_rotary_factor=0.1"],
        "model.partial_rotary_factor=0.1 is 3 of the 32 numbers of a head, and model.positions=",
    ),
    "half a scaling": (
        ["model.positions=rotary", "model.rope_scaling=8,1"],
        "model.rope_scaling=(8, 1) must be four numbers, the second below the third, such as",
    ),
    "YaRN of nothing": (
        ["model.positions=rotary", "model.rope_type=yarn"],
        "model.rope_type=yarn has no effect without model.rope_scaling; leave it at llama3",
    ),
    "a factor of YaRN's": (
        [*SCALED, "model.rope_attention_factor=1.5"],
        "model.rope_attention_factor=1.5 has no effect with model.rope_type=llama3: it is for",
    ),
    "limits that cross": (
        ["model.positions=rotary", "model.rope_scaling=8,4,4,64"],
        "model.rope_scaling=(8, 4, 4, 64) must be four numbers, the second below the third",
    ),
    "window": (
        ["model.sliding_window=256"],
        "model.sliding_window=256 has no effect with model.length=256; leave it at 0",
    ),
    "window of no layer": (
        ["model.sliding_window=16", "model.full_attention=every 1"],
        "model.sliding_window=16 has no effect with model.full_attention=every 1; leave it at 0",
    ),
    "full attention of a layer that is not there": (
        ["model.sliding_window=16", "model.full_attention=layers 9"],
        "model.full_attention: placement 'layers 9' must name ascending layers from 0 to",
    ),
    "branch of nothing": (
        ["model.residual=false", "model.residual_d_ff=5"],
        "model.residual_d_ff=5 has no effect with model.residual=False",
    ),
    "mix": (["model.residual_mix=max"], "model.residual_mix='max' is unknown; use one of auto"),
    "mix of nothing": (
        ["model.residual=false", "model.residual_mix=sum"],
        "residual_mix=sum has no effect with model.residual=False",
    ),
    "group": (["moe.group_size=-1"], "moe.group_size=-1 is out of range"),
    "group in length": (
        ["moe.group_size=100"],
        "moe.group_size=100 neither divides nor is a multiple of model.length=256; use 64",
    ),
    "group of lengths": (["moe.group_size=300"], "is a multiple of model.length=256; use 256"),
    "group in microbatch": (
        ["moe.group_size=1024", "train.accumulate=8"],
        "moe.group_size=1024 does not divide the 512 tokens that are computed at once "
        "(train.batch_size=16 / train.accumulate=8 x model.length=256); use 512",
    ),
    "corpus": (["data.corpus="], "data.corpus is empty"),
    "text field": (["data.text_field="], "data.text_field is empty"),
    "cache": (["data.cache_dir="], "data.cache_dir is empty"),
    "tokenizer": (["data.tokenizer="], "data.tokenizer is empty"),
    "no validation": (["data.validation_fraction=0"], "fraction=0.0 is out of range; use more"),
    "all validation": (["data.validation_fraction=1"], "data.validation_fraction=1.0 is out of"),
    "bytes": (
        ["data.tokenizer=bytes", "model.vocab_size=256"],
        "model.vocab_size=256 is too small for data.tokenizer=bytes; use 384 or more",
    ),
    "bpe": (["model.vocab_size=256"], "too small for data.tokenizer=bpe; use 384 or more"),
    "gpt2": (["data.tokenizer=gpt2"], "too small for data.tokenizer=gpt2; use 50304 or more"),
    "steps and tokens": (
        ["train.tokens=1"],
        "train.steps=600 and train.tokens=1: exactly one must be above 0",
    ),
    "neither": (["train.steps=0"], "train.steps=0 and train.tokens=0: exactly one must be above"),
    "steps": (["train.steps=-1"], "train.steps=-1 is out of range; use 0 or more"),
    "tokens": (["train.tokens=-1", "train.steps=0"], "train.tokens=-1 is out of range"),
    "batch": (["train.batch_size=0"], "train.batch_size=0 is out of range; use 1 or more"),
    "large batch": (["train.batch_size=1048577"], "is out of range; use at most 1048576"),
    "microbatches": (["train.accumulate=0"], "train.accumulate=0 is out of range; use 1 or more"),
    "microbatches divide": (
        ["train.accumulate=6"],
        "train.batch_size=16 is not divisible by train.accumulate=6; use 2",
    ),
    "z_loss": (["train.z_loss=-1"], "train.z_loss=-1.0 is out of range"),
    "rate": (["optimizer.learning_rate=0"], "learning_rate=0.0 is out of range; use more than 0"),
    "rate inf": (["optimizer.learning_rate=inf"], "optimizer.learning_rate=inf must be finite"),
    "rate nan": (["optimizer.learning_rate=nan"], "optimizer.learning_rate=nan must be finite"),
    "minimum": (
        ["optimizer.min_learning_rate=1"],
        "optimizer.min_learning_rate=1.0 exceeds learning_rate=0.001; use at most that",
    ),
    "minimum below 0": (
        ["optimizer.min_learning_rate=-1"],
        "min_learning_rate=-1.0 is out of",
    ),
    "warm-up": (["optimizer.warmup_tokens=-1"], "optimizer.warmup_tokens=-1 is out of range"),
    "decay": (["optimizer.decay_tokens=-1"], "optimizer.decay_tokens=-1 is out of range"),
    "decay after warm-up": (
        ["optimizer.decay_tokens=81920"],
        "optimizer.decay_tokens=81920 must be above warmup_tokens=81920",
    ),
    "b1": (["optimizer.b1=1"], "optimizer.b1=1.0 is out of range; use at most 0.99999"),
    "b2": (["optimizer.b2=-0.5"], "optimizer.b2=-0.5 is out of range"),
    "eps": (["optimizer.eps=0"], "optimizer.eps=0.0 is out of range; use more than 0"),
    "weight decay": (["optimizer.weight_decay=-1"], "optimizer.weight_decay=-1.0 is out of range"),
    "weight decay inf": (["optimizer.weight_decay=inf"], "optimizer.weight_decay=inf must be fini"),
    "trainable": (["optimizer.trainable=router("], "trainable=router( is no regular expression: "),
    "clip": (["optimizer.clip_norm=0"], "clip_norm=0.0 is out of range; use more than 0, or inf"),
    "eval": (["eval.every=-1"], "eval.every=-1 is out of range"),
    "eval batches": (["eval.batches=-1"], "eval.batches=-1 is out of range"),
    "checkpoint": (["checkpoint.every=0"], "checkpoint.every=0 is out of range; use 1 or more"),
    "keep": (["checkpoint.keep=0"], "checkpoint.keep=0 is out of range"),
    "keep every": (
        ["checkpoint.every=20", "checkpoint.keep_every=50"],
        "checkpoint.keep_every=50 is no multiple of checkpoint.every=20, so that hardly any stay",
    ),
    "stall": (["log.stall_minutes=0"], "log.stall_minutes=0.0 is out of range; use 0.01 or more"),
    "log": (["log.every=0"], "log.every=0 is out of range"),
}


@pytest.mark.parametrize("overrides, message", RULES.values(), ids=RULES)
def test_rules(overrides, message):
    with pytest.raises(UserError) as error:
        tiny_config(*overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "override, message",
    [
        ("model.top_k=2", "model.top_k=2 has no effect without model.experts"),
        ("model.residual=true", "model.residual=True has no effect without model.experts"),
        ("model.experts=4", "experts=4 has no effect: placement 'none'"),
        ("model.expert_d_ff=4", "model.expert_d_ff=4 has no effect without model.experts"),
        (
            "model.normalize_top_k=never",
            "normalize_top_k=never has no effect without model.experts",
        ),
        ("moe.capacity_factor=2", "moe.capacity_factor=2.0 has no effect"),
        ("moe.eval_capacity_factor=2", "moe.eval_capacity_factor=2.0 has no effect"),
        ("moe.min_capacity=8", "moe.min_capacity=8 has no effect"),
        ("moe.group_size=64", "moe.group_size=64 has no effect"),
        ("moe.aux_loss_weight=0.1", "moe.aux_loss_weight=0.1 has no effect"),
        ("moe.overflow=random", "without model.experts; leave it at position"),
        (
            "model.residual_mix=sum",
            "residual_mix=sum has no effect with model.residual=False",
        ),
        ("moe.second_expert_sampling=true", "moe.second_expert_sampling=True has no effect"),
        (
            "execution.dispatch=einsum",
            "execution.dispatch=einsum has no effect without model.experts",
        ),
    ],
)
def test_a_dense_model_has_no_settings_for_experts(override, message):
    with pytest.raises(UserError, match=re.escape(message)):
        tiny_config(override, name="dense")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"modle": {}}, "config.modle is not a setting; did you mean 'model'?"),
        ({"model": {"layrs": 3}}, "config.model.layrs is not a setting; did you mean 'layers'?"),
        ({"eval": {"zzz": 3}}, "config.eval.zzz is not a setting; known: every, batches"),
        ({"model": 3}, "config.model must be a group of settings, not 3"),
        ([], "config must be a group of settings, not []"),
        ({"model": {"layers": "6"}}, "config.model.layers='6' must be of type int"),
        ({"model": {"layers": 6.0}}, "config.model.layers=6.0 must be of type int"),
        ({"model": {"layers": True}}, "config.model.layers=True must be of type int"),
        ({"model": {"residual": 1}}, "config.model.residual=1 must be of type bool"),
        ({"model": {"dropout": "0"}}, "config.model.dropout='0' must be of type float"),
        ({"model": {"dropout": None}}, "config.model.dropout=None must be of type float"),
        ({"model": {"experts": [4, 4.0]}}, "config.model.experts=[4, 4.0] must be whole numbers"),
        ({"model": {"experts": True}}, "config.model.experts=(True,) must be whole numbers"),
    ],
)
def test_settings_of_another_kind_are_refused(settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        resolve(settings)


def test_whole_numbers_and_lists_stand_for_floats_and_tuples():
    """As a JSON file has them."""
    plain = {"model": {"layers": 2, "dropout": 0, "placement": "every 1", "experts": [2, 3]}}
    model = resolve(plain | {"train": {"steps": 1}}).model
    assert model.experts == (2, 3)
    assert model.dropout == 0.0 and type(model.dropout) is float


@pytest.mark.parametrize("name", ["prmoe", "dense"])
def test_a_saved_config_loads_as_the_same(tmp_path, name):
    overrides = ["optimizer.clip_norm=inf", "seed=7", "data.corpus=ünï/*.txt"]
    if name == "prmoe":
        overrides += ["moe.capacity_factor=inf", "model.experts=3,5,7"]
    config = tiny_config(*overrides, name=name)
    save(config, tmp_path / "config.json")
    assert load(tmp_path / "config.json") == config


def test_a_setting_keeps_its_earlier_name(tmp_path):
    """On the command line, in a run's config.json and in a config file."""
    more = "kd.kind=top_k", "kd.top_k=5"
    config = tiny_config("teacher.cache=a", *more)
    assert config.teacher.cache == "a"
    assert tiny_config("teacher.lessons=a", *more) == config
    save(config, tmp_path / "config.json")
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"cache"', '"lessons"'))
    assert load(tmp_path / "config.json") == config
    settings = tiny.get_config("prmoe")
    settings.kd.update(kind="top_k", top_k=5)
    settings.teacher.lessons = "a"
    assert resolve(settings).teacher == config.teacher
    settings.teacher.cache = "b"
    with pytest.raises(UserError, match="config.teacher.lessons is config.teacher.cache today"):
        resolve(settings)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"{", "config.json is damaged: Expecting property name"),
        (b"", "config.json is damaged: Expecting value"),
        (b"\xff\xfe{}", "config.json is damaged: 'utf-8' codec can't decode"),
        (b"[]", "config.json: config must be a group of settings, not []"),
        (b'{"modle": {}}', "config.json: config.modle is not a setting; did you mean 'model'?"),
        (b'{"seed": 1.5}', "config.json: config.seed=1.5 must be of type int"),
    ],
)
def test_a_damaged_config_is_named(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(message)):
        load(path)


def test_a_teacher_whose_experts_choose_needs_a_limit(tmp_path):
    """Without one each of its experts takes every token: another model than was trained."""
    teacher = tiny_config("moe.router=expert_choice", "moe.eval_capacity_factor=1.5")
    save(teacher, tmp_path / "config.json")
    taught = f"teacher.workdir={tmp_path}"
    message = "teacher.capacity_factor=inf lets every expert of this teacher (moe.router=expert_"
    with pytest.raises(UserError, match=re.escape(message)) as refused:
        teacher_of(tiny_config(taught, "teacher.capacity_factor=inf"))
    assert "use 0, for its own 1.5, or a finite one" in str(refused.value)
    for factor in (0, 3):
        assert teacher_of(tiny_config(taught, f"teacher.capacity_factor={factor}"))
    save(tiny_config(), tmp_path / "config.json")
    assert teacher_of(tiny_config(taught, "teacher.capacity_factor=inf"))


@pytest.mark.parametrize(
    ("teacher", "setting", "message"),
    [
        (["dense"], "teacher.capacity_factor=2", "teacher.capacity_factor=2 has no effect: the te"),
        (["prmoe", "moe.capacity_factor=2"], "teacher.capacity_factor=2", ""),
        (["dense"], "teacher.mode=train", "teacher.mode=train has no effect: this teacher has nei"),
        (["dense", "model.dropout=0.1"], "teacher.mode=train", ""),
        (["prmoe"], "teacher.mode=train", "and routes in training as in evaluation; leave it at e"),
        (["prmoe", "moe.noise=jitter"], "teacher.mode=train", ""),
        (["prmoe", "moe.overflow=random"], "teacher.mode=train", ""),
        (["prmoe", "moe.capacity_factor=2"], "teacher.mode=train", ""),
        (["prmoe", "model.top_k=2"], "teacher.mode=train", ""),
    ],
)
def test_a_setting_that_this_teacher_makes_idle(tmp_path, teacher, setting, message):
    name, *changes = teacher
    save(tiny_config(*changes, name=name), tmp_path / "config.json")
    student = tiny_config(f"teacher.workdir={tmp_path}", setting)
    if not message:
        assert teacher_of(student)
        return
    with pytest.raises(UserError, match=re.escape(message)):
        teacher_of(student)


def test_a_missing_config_means_no_run(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder" / "config.json").mkdir(parents=True)
    for folder in ("nowhere", "file"):
        with pytest.raises(UserError, match=f"no run in .*{folder}: config.json is missing"):
            load(tmp_path / folder / "config.json")
    with pytest.raises(UserError, match="config.json cannot be read: Is a directory"):
        load(tmp_path / "folder" / "config.json")


# Settings that may differ when a run is resumed.
FREE = {
    "eval.every",
    "eval.batches",
    "eval.documents",
    "checkpoint.every",
    "checkpoint.keep",
    "checkpoint.keep_every",
    "log.every",
    "log.stall_minutes",
    "log.wandb",
    "train.accumulate",
    "execution.compile_cache",
    "data.cache_dir",
    "execution.attention",
    "execution.cpu_products",
    "execution.remat",
    "execution.dispatch",
    "execution.exchange",
    "execution.buffer_factor",
    *(name for name in OTHER_VALUES if name.startswith("mesh.")),
}


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_a_resumed_run_has_the_same_settings(name):
    saved = tiny_config()
    text, value = OTHER_VALUES[name]
    given = tiny_config(*COMPANIONS.get(name, []), f"{name}={text}")
    if name in FREE:
        check_resume(tiny_config(*COMPANIONS.get(name, [])), given)
        return
    with pytest.raises(UserError) as error:
        check_resume(saved, given)
    before = leaves(saved)[name]
    assert f"{name} was {before!r}, is {value!r}" in str(error.value)
    assert "another --workdir" in str(error.value)


def test_every_changed_setting_is_named():
    with pytest.raises(UserError) as error:
        check_resume(tiny_config(), tiny_config("seed=3", "train.batch_size=32", "log.every=1"))
    assert "config: seed was 0, is 3, train.batch_size was 16, is 32; give" in str(error.value)
    assert "log.every" not in str(error.value)


@pytest.mark.parametrize(
    "schedule, length, refused",
    [
        # The learning rate's schedule is fixed in tokens: more steps only go further.
        (["optimizer.decay_tokens=999999"], ["train.steps=601"], None),
        (["optimizer.decay_tokens=999999"], ["train.steps=0", "train.tokens=9999999"], None),
        (["optimizer.decay_tokens=999999"], ["train.steps=599"], "train.steps was 600, is 599"),
        (["optimizer.decay_tokens=999999"], ["train.steps=601", "seed=1"], "seed was 0, is 1;"),
        # It ends with the run: more steps would have been another schedule from the start.
        ([], ["train.steps=601"], "train.steps was 600, is 601"),
    ],
)
def test_a_run_may_go_on_for_longer_on_the_same_schedule(schedule, length, refused):
    saved, given = tiny_config(*schedule), tiny_config(*schedule, *length)
    if refused is None:
        check_resume(saved, given)
        return
    with pytest.raises(UserError, match=f"config: {refused}"):
        check_resume(saved, given)


@pytest.mark.parametrize(
    "overrides, devices, use",
    [
        ([], 1, None),
        ([], 16, None),
        ([], 3, 15),
        ([], 32, 32),
        (["train.accumulate=4"], 4, None),
        (["train.accumulate=4"], 8, 32),
        # A routing group of 4 sequences stays on one device.
        (["moe.group_size=1024"], 4, None),
        (["moe.group_size=1024"], 8, 32),
        (["moe.group_size=64"], 16, None),
    ],
)
def test_devices_share_a_batch_evenly(overrides, devices, use):
    config = tiny_config(*overrides)
    if use is None:
        check_fits(config, devices)
        return
    with pytest.raises(UserError, match=f"train.batch_size=16 is not .* {devices} dev.*use {use}$"):
        check_fits(config, devices)
    check_fits(tiny_config(*overrides, f"train.batch_size={use}"), devices)


def test_a_saved_config_is_plain_json(tmp_path):
    save(tiny_config(), tmp_path / "config.json")
    assert json.loads((tmp_path / "config.json").read_text())["model"]["experts"] == [4, 4, 8]
