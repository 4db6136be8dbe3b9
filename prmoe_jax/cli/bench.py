"""`prmoe bench`: times parts of the library beside other implementations."""

import functools
import re

from prmoe_jax import allocator
from prmoe_jax.bench import LOADS
from prmoe_jax.cli.options import compile_only, parse_config, parse_mesh, verb
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


def add(verbs) -> None:
    verbs = verbs.add_parser(
        "bench", help="time parts of the library beside their rivals", allow_abbrev=False
    ).add_subparsers(dest="what", required=True, metavar="WHAT")

    kind = "time the next token of a config's model beside dense models and transformers"
    sub = verb(verbs, "decode", _bench_decode, kind, "config")
    add = functools.partial(sub.add_argument, action="append")
    add("--batch", type=int, help="sequences; may be repeated (default: 1 and 8)")
    held = "what weights are held in; may be repeated (default: float32 and int8)"
    add("--weights", choices=WEIGHTS, help=held)
    axes = "devices by axis, such as expert:4,tensor:2; may be repeated (default: one device)"
    add("--mesh", help=axes)
    sub.add_argument("--prompt", type=int, default=64, help="tokens before (default: 64)")
    sub.add_argument("--repeats", type=int, default=9, help="timed turns (default: 9)")

    kind = "time an MoE layer, forward and backward, beside a dense MLP and other implementations"
    sub = verb(verbs, "moe", _bench_moe, kind)
    add = functools.partial(sub.add_argument, action="append")
    sizes = "tokens, width, hidden width, experts; may be repeated (default: four sizes)"
    add("--sizes", type=_size, metavar="S,M,F,E", help=sizes)
    load = "how tokens choose experts; may be repeated (default: uniform)"
    add("--load", choices=LOADS, help=load)
    dtype = "default: float32, with --topology bfloat16"
    sub.add_argument("--dtype", choices=["float32", "bfloat16"], help=dtype)
    sub.add_argument("--repeats", type=int, help="timed runs (default: 15)")
    sub.add_argument(
        "--topology",
        help="instead of timing, compile for TPU chips such as v5p:4x4x4 with S tokens each, and "
        "show the compiler's cycles; needs the extra [tpu], no TPU",
    )

    kind = "time a config's whole training step beside PyTorch's, with DeepSpeed's MoE layers"
    sub = verb(verbs, "step", _bench_step, kind, "config")
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
    if options.topology is not None:
        compile_only()
    from prmoe_jax.bench import modelled, moe

    if options.topology is None:
        rows = moe.bench_moe(
            [moe.Size(*size) for size in options.sizes or BENCH_SIZES],
            options.load or ["uniform"],
            options.dtype or "float32",
            15 if options.repeats is None else options.repeats,
        )
        emit(rows, options.json, moe.table)
        return
    for name in ("load", "repeats"):
        if getattr(options, name) is not None:
            raise UserError(f"--{name} has no effect with --topology; leave one of them out")
    sizes = [moe.Size(*size) for size in options.sizes or MODELLED_SIZES]
    rows = modelled.model_moe(sizes, options.dtype or "bfloat16", options.topology)
    emit(rows, options.json, modelled.table)


def _size(text: str) -> tuple[int, ...]:
    """Parses '4096,512,2048,64' into numbers."""
    if not re.fullmatch(r" *\d{1,9} *(, *\d{1,9} *){3}", text, re.ASCII):
        raise UserError(f"--sizes={text} must be four counts S,M,F,E such as 4096,512,2048,64")
    return tuple(map(int, text.split(",")))
