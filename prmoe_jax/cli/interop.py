"""`prmoe import` and `prmoe export`: models from other libraries and for them."""

from prmoe_jax.cli.options import local_path, path, verb
from prmoe_jax.cli.output import show

KINDS = "hf", "gpt2", "deepspeed", "safetensors"


def add(verbs) -> None:
    kinds = (
        "hf: Hugging Face's transformers (GPT-2, Llama, Qwen3, OLMoE, Mixtral, Qwen2-MoE, "
        "Qwen3-MoE); gpt2: its GPT2LMHeadModel alone; deepspeed: Megatron-DeepSpeed's GPT, dense, "
        "MoE or PR-MoE; safetensors: our own names, with a model card"
    )
    sub = verb(verbs, "import", _import, "make a run's folder from another library's model")
    sub.add_argument("--kind", choices=KINDS, required=True, help=kinds)
    sub.add_argument("--source", type=local_path, required=True, help="the folder to read")
    sub.add_argument("--workdir", type=path, required=True, help="the run's folder, a new one")

    what = "write a run's newest model for another library"
    sub = verb(verbs, "export", _export, what, "run")
    sub.add_argument("--kind", choices=KINDS, required=True, help=kinds)
    sub.add_argument("--out", type=path, required=True, help="the folder to write, a new one")


def _import(options, rest) -> None:
    from prmoe_jax.interop.run import import_run

    show(import_run(options.kind, options.source, options.workdir), options.json)


def _export(options, rest) -> None:
    from prmoe_jax.interop.run import export_run

    show(export_run(options.kind, options.workdir, options.out), options.json)
