"""`prmoe import` and `prmoe export` convert between other libraries' files and a run's folder."""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import jax
import numpy as np

from prmoe_jax.config.loading import load, save
from prmoe_jax.config.schema import Config, ModelConfig
from prmoe_jax.data import released
from prmoe_jax.data.tokenizer import Tokenizer, from_vocabulary
from prmoe_jax.errors import UserError
from prmoe_jax.interop import deepspeed, hugging_face
from prmoe_jax.interop.mapping import spread_over
from prmoe_jax.interop.settings import differs, resolved, shown
from prmoe_jax.interop.tensors import Tensors, check_shapes, read_json, write_tensors
from prmoe_jax.model.sizes import cost
from prmoe_jax.model.transformer import init_model
from prmoe_jax.nn.parameters import from_named, named_leaves
from prmoe_jax.run import directory as workdirs
from prmoe_jax.run.metrics import read_metrics
from prmoe_jax.run.new import check_free, write_folder, write_run
from prmoe_jax.run.restore import restore_run

log = logging.getLogger(__name__)


def import_run(kind: str, source: Path, workdir: Path) -> dict:
    """Makes a run's folder, at step 0, from another library's folder; nothing in it is executed.

    Args:
      kind: 'hf' for any model type of `families.FAMILIES`; 'gpt2' for GPT2LMHeadModel only;
        'deepspeed' for Megatron-DeepSpeed's GPT, dense, MoE or PR-MoE; 'safetensors' for a folder
        that `export_run` wrote.

    Returns:
      workdir, parameters, vocab_size.

    Raises:
      UserError: the source can't be imported, or the workdir is not empty or not writable.
    """
    if (workdir / workdirs.CONFIG).exists():
        raise UserError(f"--workdir={workdir} holds a run; give another folder")
    check_free("workdir", workdir)
    if not source.is_dir():
        raise UserError(f"--source={source} is not a folder")
    gguf = sorted(source.glob("*.gguf"))
    if gguf and kind != "deepspeed" and not any(source.glob("*.safetensors")):
        raise UserError(
            f"{gguf[0]} is in llama.cpp's format GGUF, which isn't read; give a folder with the "
            "model's safetensors, or convert the file as docs/interop.md says"
        )
    theirs = kind in ("hf", "gpt2")  # the other kinds hold such files as a run does
    kept = released.read(source if theirs else source / released.FOLDER)
    ends = released.end_ids(kept, released.CONFIG)
    tokenizer = _tokenizer(source, kind, ends)
    config, leaves, summary = READERS[kind](source)
    log.info("%s: %s", source, summary)
    data = dataclasses.replace(config.data, tokenizer=str(workdir / workdirs.TOKENIZER))
    config = dataclasses.replace(config, data=data)
    if tokenizer.size > config.model.vocab_size:
        raise UserError(
            f"--source={source}: the tokenizer has {tokenizer.size} entries and the model only "
            f"{config.model.vocab_size}; remove the added ones from its tokenizer.json, or enlarge "
            "the model by transformers' resize_token_embeddings"
        )
    if ends and tokenizer.eos_id not in ends:
        log.warning(
            "%s: eos_token_id=%s is no special token of the tokenizer; documents end with %s",
            *(source / released.CONFIG, shown(ends), tokenizer.token(tokenizer.eos_id)),
        )
    shapes = jax.eval_shape(lambda: init_model(config))
    model = jax.tree.map(jax.numpy.asarray, from_named(leaves, shapes))
    write_run("workdir", workdir, config, model, tokenizer, kept=kept)
    size = sum(leaf.size for leaf in leaves.values())
    return {"workdir": str(workdir), "parameters": size, "vocab_size": config.model.vocab_size}


def export_run(kind: str, workdir: Path, out: Path) -> dict:
    """Writes a run's newest checkpoint for another library.

    Args:
      kind: 'hf' for the transformers class of the run's `model.family`; 'gpt2' for GPT2LMHeadModel
        only; 'deepspeed' for a checkpoint of Megatron-DeepSpeed; 'safetensors' for our names, with
        the config and a model card.

    Returns:
      out, step, parameters.

    Raises:
      UserError: the workdir holds no run, the run can't be written as this kind, or `out` is not
        empty or cannot be written.
    """
    check_free("out", out)
    config = load(workdir / workdirs.CONFIG)  # `restore_run` changes mesh and execution
    family = {"hf": config.model.family, "gpt2": "gpt2"}.get(kind)
    kept = released.read(workdir / released.FOLDER)
    if family:
        config = hugging_face.with_context(config, kept, workdir / released.FOLDER)
        hugging_face.check_exportable(config, family)
    if kind == "deepspeed":
        deepspeed.check_exportable(config)
    devices = jax.local_devices()  # one need not hold the whole model
    _, step, model, _ = restore_run(workdir, devices, spread_over(config.model, len(devices)))
    tokenizer = Tokenizer.load(workdir / workdirs.TOKENIZER)
    leaves = {name: np.asarray(leaf) for name, leaf in named_leaves(model).items()}

    def build(folder: Path) -> None:
        if family:
            hugging_face.write_hugging_face(config, family, leaves, tokenizer, kept, folder)
            return
        if kind == "deepspeed":
            deepspeed.write_deepspeed(config, leaves, folder, step)
        else:
            write_tensors(leaves, folder)
            save(config, folder / workdirs.CONFIG)
            (folder / "README.md").write_text(_card(config, step, workdir))
        tokenizer.save(folder / "tokenizer.json")
        released.write(kept, folder)

    write_folder("out", out, build, "latest" if kind == "deepspeed" else workdirs.CONFIG)
    size = sum(leaf.size for leaf in leaves.values())
    return {"out": str(out), "step": step, "parameters": size}


def _read_ours(folder: Path) -> tuple[Config, dict[str, np.ndarray], str]:
    path = folder / workdirs.CONFIG
    settings, tensors = read_json(path), Tensors(folder)
    # Layers are counted by the norms before their MLPs. This comes before the config is resolved,
    # since resolving a false, huge number of layers would take long.
    norms = [shape for name, shape in tensors.shapes.items() if name.endswith(".norm_mlp.scale")]
    layers = sum(shape[0] for shape in norms if shape)
    model = settings.get("model")
    given = model.get("layers", ModelConfig.layers) if isinstance(model, dict) else layers
    if differs(given, layers):
        raise UserError(f"{path}: model.layers={shown(given)}, the tensors are of {layers} layers")
    config = resolved(settings, path)
    leaves = named_leaves(jax.eval_shape(lambda: init_model(config)))
    shapes = {name: leaf.shape for name, leaf in leaves.items()}
    summary = check_shapes(tensors.shapes, shapes, folder)
    return config, {name: tensors.read(name) for name in shapes}, summary


READERS: Mapping[str, Callable[[Path], tuple[Config, Mapping, str]]] = {
    "hf": hugging_face.read_hugging_face,
    "gpt2": partial(hugging_face.read_hugging_face, only="gpt2"),
    "deepspeed": deepspeed.read_deepspeed,
    "safetensors": _read_ours,
}


def _tokenizer(source: Path, kind: str, ends: list[int]) -> Tokenizer:
    """The source's tokenizer; a document ends with the first special token among the ids `ends`."""
    if (source / "tokenizer.json").is_file():
        return Tokenizer.load(source / "tokenizer.json", ends)
    settings = source / "config.json"
    if kind == "hf" and settings.is_file() and read_json(settings).get("model_type") != "gpt2":
        raise UserError(
            f"{source} has no tokenizer.json; make it by AutoTokenizer.from_pretrained(FOLDER)"
            ".save_pretrained(FOLDER) of transformers"
        )
    # These two files suffice for GPT-2 only: other models split a text into words differently.
    if (source / "vocab.json").is_file() and (source / "merges.txt").is_file():
        return from_vocabulary(source / "vocab.json", source / "merges.txt")
    raise UserError(f"{source} has no tokenizer.json, nor vocab.json with merges.txt")


def _card(config: Config, step: int, workdir: Path) -> str:
    """A model card that describes the weights."""
    size, model, measured, trained = cost(config.model, config.moe), config.model, "", ""
    for line in read_metrics(workdir / workdirs.METRICS):
        if "eval/loss" in line:  # the last one counts
            measured = (
                f"Validation loss {line['eval/loss']:.4f} nats a token, "
                f"{line['eval/bits_per_byte']:.4f} bits a byte, after step {line['step']}.\n"
            )
    if config.init.workdir:
        trained = f" It started as the run {config.init.workdir}."
    if step:
        trained += (
            f" Trained for {step * config.tokens_per_step:,} tokens of\n`{config.data.corpus}` by "
            f"prmoe_jax, seed {config.seed}."
        )
    return f"""# {model.schedule}

A decoder of {size.total_params:,} parameters, {size.active_params:,} of them active for a token.
Width {model.d_model}, {model.heads} heads, hidden width {model.d_ff}, context {model.length},
vocabulary {model.vocab_size}.{trained}
{measured}
`model.safetensors` holds the parameters under prmoe_jax's names, `config.json` its settings,
`tokenizer.json` the tokenizer. To use it:

    prmoe import --kind=safetensors --source=. --workdir=runs/imported
    prmoe generate --workdir=runs/imported --prompt="…"
"""
