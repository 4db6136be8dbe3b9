"""The command line: each verb parses its flags and calls one function.

JAX is imported inside the verbs, so that help and mistakes are answered at once.
"""

import argparse
import contextlib
import difflib
import json
import logging
import os
import re
import sys
import warnings
from pathlib import Path

import prmoe_jax
from prmoe_jax import boundary
from prmoe_jax.allocator import keep_freed_memory
from prmoe_jax.config import userfile
from prmoe_jax.errors import UserError

CONFIG_HELP = """
settings:
  --config=FILE:NAME            a config file and the architecture in it, for example
                                configs/tiny.py:prmoe, configs/paper.py:prmoe_1.3b or
                                configs/tiny.py:'6 layers, E=8x2+16, residual'; or a run's
                                own config.json
  --config.GROUP.NAME=VALUE     overrides any setting:
                                --config.train.steps=40 --config.model.experts=8,8,16
"""


WEIGHTS = "float32", "bfloat16", "int8"
KINDS = "gpt2", "deepspeed", "safetensors"
MOST_SAMPLES = 1_000_000  # of `prmoe generate`, which makes all of them at once

# S, M, F, E of `prmoe bench moe`.
BENCH_SIZES = (
    (4096, 256, 1024, 32),
    (4096, 512, 2048, 64),
    (2048, 512, 2048, 128),
    (8192, 256, 1024, 8),
)
MODELLED_SIZES = ((4096, 2048, 8192, 128),)  # with --topology: S is a chip's


def main(arguments: list[str] | None = None) -> int:
    """Runs one verb; returns 0, 1 (the run failed) or 2 (the input cannot be used)."""
    boundary.prepare()
    _log_to_stderr()
    given = sys.argv[1:] if arguments is None else arguments
    options = argparse.Namespace()

    def command() -> None:
        nonlocal options
        for argument in given:
            try:
                argument.encode()
            except UnicodeEncodeError:
                raise UserError(f"the argument {argument!a} is not UTF-8 text") from None
        with _processes(given):
            options, rest = _parser().parse_known_args(given)
            if rest and not options.takes_config:
                raise UserError(f"'{rest[0]}' is not understood; see prmoe {options.verb} --help")
            options.run(options, rest)

    return boundary.guard(command, lambda: getattr(options, "workdir", None))


def _processes(arguments: list[str]):
    """The run's other processes; joined before anything else, so that a mistake ends all."""
    if arguments[:1] not in (["train"], ["eval"]) or "--distributed" not in arguments:
        return contextlib.nullcontext()
    keep_freed_memory()
    from prmoe_jax.parallel import processes

    return processes.joined()


def parse_config(arguments: list[str]):
    """The `Config` that --config and its overrides describe.

    Raises:
      UserError: no or no such config file, an unknown or mistyped setting, a failed check.
    """
    from prmoe_jax.config import resolve

    path, name, overrides = _config_argument(arguments)
    settings = _load_settings(path, name)
    _override(settings, overrides)
    return resolve(settings)


def _config_argument(arguments: list[str]) -> tuple[Path, str, list[str]]:
    """The file and the name of --config=FILE:NAME, and the other arguments."""
    parser = _Parser(prog="prmoe", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", default="")
    options, rest = parser.parse_known_args(arguments)
    file, _, name = options.config.partition(":")
    if not file:
        raise UserError("no --config; for example --config=configs/tiny.py:prmoe")
    return Path(file), name, rest


def _load_settings(path: Path, name: str):
    """Calls get_config(name) of a config file, without the argument where there is no name."""
    from ml_collections import ConfigDict

    if not path.is_file():
        raise UserError(f"--config={path} is not a file; for example configs/tiny.py:prmoe")
    if path.suffix == ".json":  # a run's own
        import dataclasses

        from prmoe_jax.config import load

        return ConfigDict(dataclasses.asdict(load(path)))
    arguments = [name] if name else []
    settings = userfile.call(path, "get_config", *arguments, named=f"--config={path}")
    if not isinstance(settings, ConfigDict):
        raise UserError(
            f"--config={path}: get_config returns {type(settings).__name__}, not a ConfigDict; "
            "start from prmoe_jax.config.default_config()"
        )
    return settings


def _override(settings, arguments: list[str]) -> None:
    """Changes `settings` as arguments like --config.train.steps=40 say."""
    from absl import flags
    from ml_collections import config_flags

    from prmoe_jax.config import Config, leaves

    known = leaves(Config())
    for argument in arguments:
        if not argument.startswith("--"):
            continue  # the value of the flag before it, or else left over below
        match = re.fullmatch(r"--(?:no)?config\.(.*)", argument.partition("=")[0])
        if not match:
            raise UserError(f"'{argument}' is not understood; settings look like --config.seed=1")
        if match[1] not in known:
            raise UserError(f"--config.{match[1]} is not a setting{_did_you_mean(match[1], known)}")

    argv = ["prmoe", *arguments]
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", settings, flag_values=values, sys_argv=argv)
    try:
        leftover = values(argv)[1:]
    except flags.IllegalFlagValueError as error:
        # 'flag --config.seed=x: invalid literal for int() with base 10'
        given = str(error).removeprefix("flag ").removesuffix(f": {error.__context__}")
        kind = type(known[given.partition("=")[0].removeprefix("--config.")])
        wanted = "whole numbers such as 8,8,16" if kind is tuple else f"of type {kind.__name__}"
        raise UserError(f"{given} must be {wanted}") from error
    except (flags.Error, ValueError) as error:  # --noconfig.x=1 is a ValueError
        raise UserError(str(error)) from error
    if leftover:
        raise UserError(f"'{leftover[0]}' is not understood; settings look like --config.seed=1")


def _did_you_mean(name: str, known) -> str:
    """A hint: what the group `name` holds, or the setting spelled most like it."""
    members = [setting for setting in known if setting.startswith(f"{name}.")]
    if members:
        return f" but a group of them, such as --config.{members[0]}"
    by_last_part = {setting.rpartition(".")[2]: setting for setting in known}
    close = difflib.get_close_matches(name, known, 1)
    for last_part in difflib.get_close_matches(name.rpartition(".")[2], by_last_part, 1):
        close.append(by_last_part[last_part])
    groups = ", ".join(dict.fromkeys(setting.partition(".")[0] for setting in known))
    return f"; did you mean --config.{close[0]}?" if close else f"; there are {groups}"


def _train(options, rest) -> None:
    keep_freed_memory()
    config = parse_config(rest)
    profile = _profile_steps(options.profile, config)
    workdir = options.workdir or Path("runs") / _run_name(rest)
    from prmoe_jax.training.loop import train

    metrics = train(config, workdir, profile)
    if _is_first_process():
        _show(metrics, options.json)
        print(f"run: {workdir}", file=sys.stderr)


def _eval(options, rest) -> None:
    keep_freed_memory()
    _check_run(options.workdir)
    tasks = options.tasks.split(",") if options.tasks is not None else []
    if not all(task.strip() for task in tasks):
        raise UserError(f"--tasks={options.tasks} has an empty name; use names such as cloze,wiki")
    if options.limit is not None and not (tasks and 0 < options.limit <= sys.maxsize):
        raise UserError(
            f"--limit={options.limit} is a number of examples, for --tasks: from 1 to {sys.maxsize}"
        )
    if tasks and options.teacher:
        raise UserError("--teacher is for the validation split; leave it or --tasks out")
    if tasks:
        from prmoe_jax.tasks.harness import evaluate_tasks

        scores = evaluate_tasks(options.workdir, tasks, options.limit)
        if options.json:
            print(json.dumps(scores))
        else:
            for task, values in scores.items():
                _show({f"{task} {name}": value for name, value in values.items()}, False)
        return
    from prmoe_jax.training.evaluate import evaluate

    metrics = evaluate(options.workdir, options.teacher)
    if _is_first_process():
        _show(metrics, options.json)


def _is_first_process() -> bool:
    import jax

    return jax.process_index() == 0


def _generate(options, rest) -> None:
    _check_run(options.workdir)
    mesh = _mesh(options.mesh) if options.mesh is not None else None
    from prmoe_jax.inference.generate import Generator, Sampling

    if not 1 <= options.samples <= MOST_SAMPLES:
        raise UserError(f"--samples={options.samples} must be 1 or more, up to {MOST_SAMPLES}")
    sampling = Sampling(options.temperature, options.top_k, options.top_p)
    prompts = [prompt for prompt in options.prompt or [""] for _ in range(options.samples)]
    seeds = [options.seed + i % options.samples for i in range(len(prompts))]
    generator = Generator.restore(options.workdir, options.weights or "", mesh)
    streamed = len(prompts) == 1 and not options.json
    lead = prompts[:1]

    def show(_, text: str) -> None:
        print(lead.pop() if lead else "", text, sep="", end="", flush=True)

    texts = generator(
        prompts,
        options.tokens,
        sampling,
        seeds,
        options.stop or (),
        show if streamed else None,
    )
    if streamed:
        print(*lead)
        return
    for prompt, seed, text in zip(prompts, seeds, texts, strict=True):
        answer = {"prompt": prompt, "seed": seed, "text": text}
        print(json.dumps(answer) if options.json else f"{prompt}{text}\n")


def _mesh(text: str):
    """'expert:4,tensor:2' as the mesh's settings."""
    import dataclasses

    from prmoe_jax.config import MeshConfig

    names = [field.name for field in dataclasses.fields(MeshConfig)]
    sizes = {}
    for part in text.split(","):
        name, _, size = part.partition(":")
        if name not in names or name in sizes or not re.fullmatch("[1-9][0-9]{0,8}", size):
            raise UserError(
                f"--mesh={text} must be axes and their devices such as expert:4,tensor:2; there "
                f"are {', '.join(names)}"
            )
        sizes[name] = int(size)
    return MeshConfig(**sizes)


def _check_run(workdir: Path) -> None:
    """Fails where the folder holds no run, before JAX is imported."""
    from prmoe_jax import config
    from prmoe_jax.run.directory import CONFIG

    config.load(workdir / CONFIG)


def _import(options, rest) -> None:
    from prmoe_jax.interop.run import import_run

    _show(import_run(options.kind, options.source, options.workdir), options.json)


def _export(options, rest) -> None:
    _check_run(options.workdir)
    from prmoe_jax.interop.run import export_run

    _show(export_run(options.kind, options.workdir, options.out), options.json)


def _sweep(options, rest) -> None:
    shard = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", options.shard)
    if not shard:
        raise UserError(f"--shard={options.shard} must be I/N, such as 1/4")
    from prmoe_jax.sweep import run

    root = options.workdir or Path("runs") / options.folder.resolve().name
    records = run.sweep(options.folder, root, (int(shard[1]), int(shard[2])))
    print(json.dumps(records) if options.json else run.table(records))


def _report(options, rest) -> None:
    if (options.folder is None) == (options.workdir is None):
        raise UserError("prmoe report needs a sweep's folder, or --workdir=DIR for one run")
    if options.workdir:
        if options.base is not None:
            raise UserError("--base is for a sweep's folder; a run of its own has no arms")
        _check_run(options.workdir)
        from prmoe_jax.report import single

        _show(single.report(options.workdir), options.json)
        return
    from prmoe_jax.report import experiment

    result = experiment.report(options.folder, options.base)
    print(json.dumps(result) if options.json else experiment.table(result))


def _params(options, rest) -> None:
    from prmoe_jax.model import sizes

    if options.paper:
        if rest:
            raise UserError(f"--paper shows fixed configs; leave out {rest[0]}")
        rows = sizes.paper_rows()
        print(json.dumps(rows) if options.json else sizes.paper_table(rows))
    else:
        model = parse_config(rest).model
        print(json.dumps(sizes.report(model)) if options.json else sizes.table(model))


def _distil_plan(options, rest) -> None:
    from prmoe_jax import config
    from prmoe_jax.distill import student

    values = _taught_config(rest)
    rows = student.plan(config.teacher_of(values).model, values.model, values.teacher.layers)
    print(json.dumps(rows) if options.json else student.table(rows))


def _teacher_cache(options, rest) -> None:
    keep_freed_memory()
    config = _taught_config(rest)
    if config.kd.kind != "top_k":
        raise UserError("the likeliest tokens are kept; use --config.kd.kind=top_k, with kd.top_k")
    if config.teacher.mode != "eval" or config.teacher.lessons:
        raise UserError("leave out teacher.lessons, and teacher.mode at eval")
    from prmoe_jax.distill.teacher import write_lessons

    meta = write_lessons(config, options.out)
    size = sum(file.stat().st_size for file in options.out.iterdir())
    print(json.dumps(meta) if options.json else f"{options.out}: {size / 1e6:,.0f} MB")


def _taught_config(rest):
    """The config of a student, whose teacher is a run."""
    config = parse_config(rest)
    if not config.teacher.workdir:
        raise UserError("no run teaches; name one by --config.teacher.workdir")
    return config


def _bench_decode(options, rest) -> None:
    config = parse_config(rest)
    layouts = {text: _mesh(text) for text in options.mesh or ()} or {"one device": None}
    from prmoe_jax.bench import decode

    batches, weights = options.batch or [1, 8], options.weights or ["float32", "int8"]
    rows = decode.bench_decode(config, batches, weights, options.prompt, options.repeats, layouts)
    print(json.dumps(rows) if options.json else decode.table(rows))


def _bench_moe(options, rest) -> None:
    keep_freed_memory()
    modelled_only = options.topology is not None
    if modelled_only:
        _compile_only()
    from prmoe_jax.bench import modelled, moe

    if modelled_only:
        given = [name for name in ("load", "repeats") if getattr(options, name) is not None]
        if given:
            raise UserError(f"--{given[0]} has no effect with --topology; leave one of them out")
        sizes = [moe.Size(*size) for size in options.sizes or MODELLED_SIZES]
        rows = modelled.model_moe(sizes, options.dtype or "bfloat16", options.topology)
        print(json.dumps(rows) if options.json else modelled.table(rows))
        return
    rows = moe.bench_moe(
        [moe.Size(*size) for size in options.sizes or BENCH_SIZES],
        options.load or ["uniform"],
        options.dtype or "float32",
        15 if options.repeats is None else options.repeats,
    )
    print(json.dumps(rows) if options.json else moe.table(rows))


def _compile_only() -> None:
    """Before JAX is imported: its compilers for devices that aren't there make programs only."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several may compile at a time


def _plan(options, rest) -> None:
    config, teacher = parse_config(rest), None
    if options.teacher:
        from prmoe_jax.config import beside

        if not config.kd_steps or options.decode:
            raise UserError(
                f"--teacher={options.teacher} has no effect: "
                + ("nobody teaches in decoding" if config.kd_steps else "the config has no teacher")
            )
        teacher = beside(parse_config([f"--config={options.teacher}"]), config)
    if (options.topology is None) == (options.find is None):
        raise UserError("prmoe plan needs either --topology=v5p:4x4x8 or --find=v5p")
    if not 0 <= options.decode < 1 << 31:
        raise UserError(f"--decode={options.decode} must be a number of sequences, below 2^31")
    _compile_only()
    from prmoe_jax.plan import find, picture, report

    if options.picture:
        picture.check(options.picture)
    if options.find is not None:
        result = find.find(config, options.find, options.decode, teacher)
    else:
        result = find.fit(config, options.topology, options.decode, teacher)
    if options.picture:
        picture.draw({result["topology"]: result}, options.picture)
    print(json.dumps(result) if options.json else report.table(result))


def _path(text: str) -> Path:
    """A path that an option names."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; if it was a shell variable, it isn't set")
    return Path(text)


def _size(text: str) -> tuple[int, ...]:
    """'4096,512,2048,64' as numbers."""
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 4 or not all(re.fullmatch("[0-9]{1,9}", part) for part in parts):
        raise UserError(f"--sizes={text} must be four counts S,M,F,E such as 4096,512,2048,64")
    return tuple(map(int, parts))


class _Parser(argparse.ArgumentParser):
    """Reports a mistake as everything else here does: on one line."""

    def error(self, message: str):
        raise UserError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="prmoe",
        description="Parameter-efficient Mixture-of-Experts language models (PR-MoE) in JAX.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=prmoe_jax.__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, run, help: str, takes_config: bool = False, parsers=verbs):
        sub = parsers.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + ".",
            epilog=CONFIG_HELP if takes_config else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.add_argument("--json", action="store_true", help="print JSON for machines")
        sub.set_defaults(run=run, takes_config=takes_config)
        return sub

    sub = verb("train", _train, "train a config, or resume the run in its workdir", True)
    sub.add_argument("--workdir", type=_path, help="the run's folder (default: runs/NAME)")
    sub.add_argument("--profile", metavar="FIRST:LAST", help="trace these steps with the profiler")
    distributed = "be one process of several: on a TPU pod, under SLURM or on GKE"
    sub.add_argument("--distributed", action="store_true", help=distributed)

    sub = verb("eval", _eval, "evaluate a run on its validation split")
    sub.add_argument("--workdir", type=_path, required=True, help="the run's folder")
    sub.add_argument("--distributed", action="store_true", help=distributed)
    sub.add_argument("--teacher", type=_path, help="another run, to compare its predictions with")
    sub.add_argument(
        "--tasks",
        help="instead, tasks of lm-evaluation-harness, or ours, which need no network: cloze, "
        "wiki, logiqa_local, quartz_local, socialiqa_local",
    )
    sub.add_argument("--limit", type=int, help="examples of each task (default: all)")

    sub = verb("generate", _generate, "continue a prompt with a trained run")
    sub.add_argument("--workdir", type=_path, required=True, help="the run's folder")
    sub.add_argument(
        "--prompt", action="append", help="a text to continue; may be repeated (default: none)"
    )
    sub.add_argument("--tokens", type=int, default=100, help="at most this many (default: 100)")
    sub.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default: 0.8)")
    sub.add_argument("--top-k", type=int, default=0, help="draw from the K likeliest only")
    sub.add_argument(
        "--top-p", type=float, default=1.0, help="draw from the P likeliest share only"
    )
    sub.add_argument("--stop", action="append", help="a text to end before; may be repeated")
    sub.add_argument("--samples", type=int, default=1, help="of each prompt (default: 1)")
    sub.add_argument("--seed", type=int, default=0, help="of the first sample (default: 0)")
    sub.add_argument(
        "--weights",
        choices=WEIGHTS,
        help="what weights are held in (default: the run's dtype, on CPUs float32)",
    )
    sub.add_argument("--mesh", help="devices by axis, such as expert:4,tensor:2 (default: one)")

    sub = verb("sweep", _sweep, "train the runs that a folder's sweep.py names, and record them")
    sub.add_argument("folder", type=_path, help="for example experiments/placement")
    sub.add_argument("--workdir", type=_path, help="the runs' folder (default: runs/FOLDER)")
    sub.add_argument(
        "--shard", default="1/1", metavar="I/N", help="of N processes that share the runs, the I-th"
    )

    sub = verb("report", _report, "draw what a sweep, or one run, came to, on a page of its own")
    sub.add_argument("folder", type=_path, nargs="?", help="a sweep's, with results.jsonl")
    sub.add_argument("--base", help="the arm the others are compared with; default: the first")
    sub.add_argument("--workdir", type=_path, help="instead, a run's; writes report/ there")

    kinds = (
        "gpt2: Hugging Face's GPT2LMHeadModel; deepspeed: Megatron-DeepSpeed's GPT, dense, MoE or "
        "PR-MoE; safetensors: our own names, with a model card"
    )
    sub = verb("import", _import, "make a run's folder from another library's model")
    sub.add_argument("--kind", choices=KINDS, required=True, help=kinds)
    sub.add_argument("--source", type=_path, required=True, help="the folder to read")
    sub.add_argument("--workdir", type=_path, required=True, help="the run's folder, a new one")

    sub = verb("export", _export, "write a run's newest model for another library")
    sub.add_argument("--kind", choices=KINDS, required=True, help=kinds)
    sub.add_argument("--workdir", type=_path, required=True, help="the run's folder")
    sub.add_argument("--out", type=_path, required=True, help="the folder to write, a new one")

    sub = verb("params", _params, "count a config's parameters and FLOPs, building nothing", True)
    sub.add_argument("--paper", action="store_true", help="all models of the paper, side by side")

    verb("distil-plan", _distil_plan, "show which part of its teacher a student starts as", True)

    keep = "keep what a teacher expects of a student's training text, for many students"
    sub = verb("teacher-cache", _teacher_cache, keep, True)
    sub.add_argument("--out", type=_path, required=True, help="the folder to write, a new one")

    sub = verb("plan", _plan, "compile a config's train step for a pod, and model its cost", True)
    sub.add_argument("--topology", help="chips, such as v5p:4x4x8, v5e:16x16 or h100:16x8")
    sub.add_argument("--find", metavar="CHIP", help="instead, the smallest slice that fits")
    sub.add_argument(
        "--decode",
        type=int,
        default=0,
        metavar="SEQUENCES",
        help="instead of training, the next token of so many sequences of full context",
    )
    sub.add_argument(
        "--teacher", metavar="FILE:NAME", help="the config of the teacher, to plan its first stage"
    )
    sub.add_argument("--picture", type=_path, help="also draw the plan: a .png, .svg or .pdf")

    verb_of_bench = verbs.add_parser(
        "bench", help="time parts of the library beside their rivals", allow_abbrev=False
    ).add_subparsers(dest="what", required=True, metavar="WHAT")
    kind = "time the next token of a config's model beside dense models and transformers"
    sub = verb("decode", _bench_decode, kind, True, verb_of_bench)
    sub.add_argument(
        "--batch", type=int, action="append", help="sequences; may be repeated (default: 1 and 8)"
    )
    sub.add_argument(
        "--weights",
        choices=WEIGHTS,
        action="append",
        help="what weights are held in; may be repeated (default: float32 and int8)",
    )
    sub.add_argument(
        "--mesh",
        action="append",
        help="devices by axis, such as expert:4,tensor:2; may be repeated (default: one device)",
    )
    sub.add_argument("--prompt", type=int, default=64, help="tokens before (default: 64)")
    sub.add_argument("--repeats", type=int, default=9, help="timed turns (default: 9)")
    kind = "time an MoE layer, forward and backward, beside a dense MLP and other implementations"
    sub = verb("moe", _bench_moe, kind, parsers=verb_of_bench)
    sub.add_argument(
        "--sizes",
        type=_size,
        action="append",
        metavar="S,M,F,E",
        help="tokens, width, hidden width, experts; may be repeated (default: four sizes)",
    )
    sub.add_argument(
        "--load",
        choices=["uniform", "zipf"],
        action="append",
        help="how tokens choose experts; may be repeated (default: uniform)",
    )
    sub.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="default: float32, with --topology bfloat16",
    )
    sub.add_argument("--repeats", type=int, help="timed runs (default: 15)")
    sub.add_argument(
        "--topology",
        help="instead of timing, compile for TPU chips such as v5p:4x4x4 with S tokens each, and "
        "show the compiler's cycles; needs the extra [tpu], no TPU",
    )
    return parser


def _profile_steps(text: str | None, config) -> tuple[int, int] | None:
    if text is None:
        return None
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise UserError(f"--profile={text} must be FIRST:LAST, two steps such as 10:15")
    if int(last) > config.total_steps:
        raise UserError(f"--profile={text} ends after the run's {config.total_steps} steps")
    return int(first), int(last)


def _run_name(arguments: list[str]) -> str:
    """'tiny-prmoe' for --config=configs/tiny.py:prmoe."""
    path, name, _ = _config_argument(arguments)
    words = "".join(c if c.isalnum() or c in "._" else "-" for c in name)
    return f"{path.stem}-{words}".rstrip("-")


def _show(metrics: dict, as_json: bool) -> None:
    if as_json:
        print(json.dumps(metrics))
        return
    from prmoe_jax.run.metrics import router_table

    for name, value in metrics.items():
        if not (isinstance(value, list) or "layers/" in name):
            print(f"{name:24} {value:.6g}" if isinstance(value, float) else f"{name:24} {value}")
    if table := router_table({name.removeprefix("eval/"): v for name, v in metrics.items()}):
        print(f"\n{table}")


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("prmoe_jax")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    # Orbax and Grain report their housekeeping and failures here, in many lines; a failure
    # reaches us as an error as well, and is told in one.
    for library in ("absl", "asyncio"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    # A failed checkpoint ends before all of Orbax's coroutines have begun.
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
