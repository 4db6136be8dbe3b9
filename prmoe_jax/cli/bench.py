"""`prmoe bench`: times parts of the library beside other implementations."""

import re

from prmoe_jax import allocator
from prmoe_jax.bench import LOADS
from prmoe_jax.cli.options import compile_only, parse_config, parse_mesh
from prmoe_jax.cli.output import emit
from prmoe_jax.errors import UserError
from prmoe_jax.inference import WEIGHTS

# Tokens S, width M, hidden width F and experts E of `prmoe bench moe`.
BENCH_SIZES = (
    (4096, 256, 1024, 32),
    (4096, 512, 2048, 64),
    (2048, 512, 2048, 128),
    (8192, 256, 1024, 8),
)
MODELLED_SIZES = ((4096, 2048, 8192, 128),)  # with --topology; S for each chip


def add(verb, verbs) -> None:
    """Declares the subcommands and their options."""
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
        choices=LOADS,
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
    kind = "time a config's whole training step beside PyTorch's, with DeepSpeed's MoE layers"
    sub = verb("step", _bench_step, kind, True, verb_of_bench)
    sub.add_argument("--repeats", type=int, default=15, help="timed steps (default: 15)")


def _bench_step(options, rest) -> None:
    allocator.keep_freed_memory()
    config = parse_config(rest)
    from prmoe_jax.bench import step

    emit(step.bench_step(config, options.repeats), options.json, step.table)


def _bench_decode(options, rest) -> None:
    config = parse_config(rest)
    layouts = {text: parse_mesh(text) for text in options.mesh or ()} or {"one device": None}
    from prmoe_jax.bench import decode

    batches, weights = options.batch or [1, 8], options.weights or ["float32", "int8"]
    rows = decode.bench_decode(config, batches, weights, options.prompt, options.repeats, layouts)
    emit(rows, options.json, decode.table)


def _bench_moe(options, rest) -> None:
    allocator.keep_freed_memory()
    modelled_only = options.topology is not None
    if modelled_only:
        compile_only()
    from prmoe_jax.bench import modelled, moe

    if modelled_only:
        given = [name for name in ("load", "repeats") if getattr(options, name) is not None]
        if given:
            raise UserError(f"--{given[0]} has no effect with --topology; leave one of them out")
        sizes = [moe.Size(*size) for size in options.sizes or MODELLED_SIZES]
        rows = modelled.model_moe(sizes, options.dtype or "bfloat16", options.topology)
        emit(rows, options.json, modelled.table)
        return
    rows = moe.bench_moe(
        [moe.Size(*size) for size in options.sizes or BENCH_SIZES],
        options.load or ["uniform"],
        options.dtype or "float32",
        15 if options.repeats is None else options.repeats,
    )
    emit(rows, options.json, moe.table)


def _size(text: str) -> tuple[int, ...]:
    """Parses '4096,512,2048,64' into numbers."""
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 4 or not all(re.fullmatch("[0-9]{1,9}", part) for part in parts):
        raise UserError(f"--sizes={text} must be four counts S,M,F,E such as 4096,512,2048,64")
    return tuple(map(int, parts))
