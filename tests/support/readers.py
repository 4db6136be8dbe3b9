"""Every reader of files that a stranger may have made, with small valid files for each.

All paths are relative: a reader's files are in the folder `files` of the current one.
"""

import contextlib
import dataclasses
import functools
import gzip
import io
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import jax
import numpy as np

from prmoe_jax.cli.output import as_json, show
from prmoe_jax.config.loading import load, resolve, save
from prmoe_jax.config.schema import Config, DataConfig, changed
from prmoe_jax.data import cache, pipeline, shards
from prmoe_jax.data.sources import find_files, read_documents
from prmoe_jax.data.tokenizer import Tokenizer
from prmoe_jax.distill import teacher as teachers
from prmoe_jax.interop import deepspeed, mapping
from prmoe_jax.interop import run as interop
from prmoe_jax.interop.tensors import write_tensors
from prmoe_jax.model.sizes import cost
from prmoe_jax.model.transformer import init_model
from prmoe_jax.nn.parameters import named_leaves
from prmoe_jax.parallel.mesh import training_mesh
from prmoe_jax.report import experiment, single
from prmoe_jax.run.checkpoint import Checkpoints
from prmoe_jax.run.metrics import finished, read_metrics
from prmoe_jax.run.restore import restore_run, trained_text
from prmoe_jax.sweep import records
from prmoe_jax.tasks import choices
from prmoe_jax.training.loop import train
from prmoe_jax.training.step import init_state
from tests.data.test_shards import TEXTS, write_megatron
from tests.support import teacher_caches
from tests.support.configs import settings
from tests.support.paths import GOLDENS
from tests.support.records import record
from tests.support.shards import encoded, write_array, write_ours
from tests.support.tokenizers import byte_tokenizer, started_tokenizer

FILES = Path("files")
# Figures are drawn once, not in both formats.
DRAWN = mock.patch("prmoe_jax.report.figures.KINDS", {"svg": {}})
EVALUATED = {"loss": 5.4, "perplexity": 221.4, "bits_per_byte": 7.8, "drop_fraction": 0.0}
PROBE = "It's 9 o'clock,\n\tnaïve ☃! <|endoftext|>  "


class Reader(NamedTuple):
    """How files are made, read and judged.

    `build` writes valid files into the folder `files`, which does not exist, and `read` returns all
    that a command takes from them. A change of a file that `told` matches must be noticed, unless
    it makes no difference. Other files have nothing that tells a change from another valid input:
    what `read` returns then only has to be `sound`. After `sign`, which is given the file that was
    changed and mends digests, that holds for all files.
    """

    build: Callable[[], object]
    read: Callable[[], object]
    sound: Callable[..., bool]
    told: str = ""  # a glob of files' paths
    sign: Callable[[Path], object] | None = None
    files: str = "*"  # a glob of what is damaged
    examples: int = 40  # of the suite


# Token ids.


def _windows(corpus: str, tokenizer: str) -> list:
    """Everything that a run reads of a corpus."""
    fraction = 0.2
    config = DataConfig(
        corpus=corpus, tokenizer=tokenizer, cache_dir="cache", validation_fraction=fraction
    )
    return _all_of(pipeline.load_data(config, 384, 7))


def _all_of(data: pipeline.Data) -> list:
    identity = pipeline.pipeline_fingerprint(data, 4, 0)
    identity["corpus"] = type(identity["corpus"])  # the same ids of another dtype have another name
    found: list = [identity, data.tokenizer.description]
    for windows in (data.train, data.validation):
        indices = pipeline.evaluated_windows(windows)
        batches = [windows[i] for i in indices]
        found += [np.stack(field) for field in zip(*(batch[:4] for batch in batches), strict=True)]
        found += [windows.text_bytes, windows.bytes_of(indices)]
    return found


def _sound_windows(found: list, size: int = 257) -> bool:
    _, _, *train, train_bytes, _, tokens, targets, mask, _, text_bytes, read_bytes = found
    arrays = [*train[:2], tokens, targets]
    return (
        all(array.dtype == np.int32 and (0 <= array).all() for array in arrays)
        and all((array < size).all() for array in arrays)
        and (type(train_bytes), type(text_bytes)) == (int, int)
        and 0 <= text_bytes <= 8 * mask.sum()
        and math.isclose(read_bytes, text_bytes)
    )


def _sign_index(changed: Path) -> None:
    """Has index.json tell of its own content, and of a shard that was changed."""
    text = (FILES / shards.INDEX).read_text()
    content = json.loads(text)
    for split in content["splits"].values():
        for entry in split["shards"]:
            if entry["name"] == changed.name:
                with changed.open("rb") as file:
                    blocks = shards.block_digest(file, np.dtype("<u2"), entry["tokens"])
                text = text.replace(entry["blocks"], blocks)
    content = json.loads(text)
    # A text keeps what a parsed object loses, such as a name that is there twice.
    text = text.replace(content["fingerprint"], shards.fingerprint(content))
    (FILES / shards.INDEX).write_text(text)


def _foreign(write: Callable[[Path, list], object], name: str) -> Callable[[], None]:
    def build() -> None:
        FILES.mkdir()
        for i, part in enumerate((TEXTS[:2], TEXTS[2:])):
            write(FILES / name.format(i), encoded(part))

    return build


def _holds(load: Callable[[Path], np.ndarray], ending: str, found: list) -> bool:
    """Whether the windows have the ids that an independent reader finds in the files."""
    paths = sorted(path for path in FILES.glob(f"*{ending}") if path.is_file())
    ids = np.concatenate([load(path) for path in paths])
    _, _, train, targets, mask, _, _, _, tokens, _, held, *_ = found
    read = np.concatenate([train[mask], targets[mask][-1:], tokens[held][1:]])
    mark = byte_tokenizer().eos_id
    words = [part[part != mark] for part in (read, ids)]
    return _sound_windows(found) and np.array_equal(*words)


def _token_cache() -> pipeline.Data:
    config = DataConfig(
        corpus="text", tokenizer="bytes", cache_dir="files", validation_fraction=0.2
    )
    return pipeline.load_data(config, 384, 7)


def _text_folder() -> None:
    Path("text").mkdir(exist_ok=True)
    for i in range(9):
        (Path("text") / f"{i}.txt").write_text(f"document {i}: " + "so it is " * (3 + i))


def _build_token_cache() -> None:
    _text_folder()
    _token_cache()


def _seal(changed: Path) -> None:
    cache.seal(changed.parent)


def _build_teacher_cache() -> None:
    data = _teacher_data()
    teacher_caches.write(FILES, data)


def _teacher_data() -> pipeline.Data:
    return teacher_caches.data_of(Path("."), 5)


def _read_teacher_cache() -> list:
    data = teachers.attach_predictions(_teacher_data(), teacher_caches.config_of(FILES))
    lessons = [data.train[i].teacher_top_k for i in range(len(data.train))]
    return [data.teacher_cache_fingerprint, *map(np.stack, zip(*lessons, strict=True))]


def _sound_lessons(found: list) -> bool:
    name, tokens, log_p = found
    return type(name) is str and tokens.dtype == np.int32 and log_p.dtype == np.float32


# Text.


def _build_documents() -> None:
    import zstandard

    FILES.mkdir()
    lines = b"".join(json.dumps({"text": text, "id": 1}).encode() + b"\n" for text in TEXTS)
    (FILES / "a.jsonl").write_bytes(lines)
    (FILES / "b.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))
    packed = zstandard.ZstdCompressor(write_checksum=True).compress(lines)
    (FILES / "c.jsonl.zst").write_bytes(packed * 2)
    (FILES / "d.txt").write_text(TEXTS[1])


def _read_documents() -> list[str]:
    return list(read_documents(find_files(str(FILES)), "text"))


def _are_texts(found: list) -> bool:
    return all(isinstance(text, str) and text.encode("utf-8") is not None for text in found)


def _build_tokenizer() -> None:
    FILES.mkdir()
    started_tokenizer().save(FILES / "tokenizer.json")


def _read_tokenizer() -> list:
    known = Tokenizer.load(FILES / "tokenizer.json")
    ids = known.encode(PROBE)
    texts = [known.decode([i]) for i in (*ids, known.bos_id, known.eos_id)]
    tokens = known.token(known.bos_id), known.token(known.eos_id)
    return [known.size, known.bos_id, known.eos_id, tokens, ids, texts]


def _sound_tokenizer(found: list) -> bool:
    size, start, end, _, ids, texts = found
    return all(0 <= i < size for i in (start, end, *ids)) and end not in ids and _are_texts(texts)


def _build_tasks() -> None:
    FILES.mkdir()
    articles = {
        str(i): {"topic": "t", "description": f"a thing {i}", "extract": f"It is {i}. So. It is."}
        for i in range(6)
    }
    (FILES / "wiki.json").write_text(json.dumps(articles))
    content = "Where is it? A: here; B: there; C: nowhere"
    line = {"input": [{"role": "user", "content": content}], "ideal": "B"}
    (FILES / "socialiqa.jsonl").write_text(3 * (json.dumps(line) + "\n"))


def _read_tasks() -> list:
    social = choices.rows("socialiqa_local", FILES / "socialiqa.jsonl")
    rows = choices.rows("wiki", FILES / "wiki.json") + social
    ids = [byte_tokenizer().encode_batch([row["question"], *row["choices"]]) for row in rows]
    return [rows, ids]


def _sound_tasks(found: list) -> bool:
    return all(0 <= row["answer"] < len(row["choices"]) for row in found[0])


# Other libraries' models.


def _build_model(name: str, files: int = 1) -> None:
    from safetensors.numpy import load_file

    FILES.mkdir()
    byte_tokenizer().save(FILES / "tokenizer.json")
    shutil.copy(GOLDENS / name / "config.json", FILES)
    tensors = load_file(GOLDENS / name / "model.safetensors")
    size = sum(array.nbytes for array in tensors.values()) // files + 1
    with mock.patch("prmoe_jax.interop.tensors.SHARD_BYTES", size):
        write_tensors(tensors, FILES)


def _small_model() -> tuple:
    config = settings("2 layers, E=3, residual", data={"tokenizer": "tokenizer.json"})
    return config, named_leaves(_drawn(lambda: init_model(config)))


def _drawn(make: Callable[[], object]):
    """What a function makes, with other numbers, and no program is compiled for it."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: np.asarray(rng.normal(size=x.shape), x.dtype), jax.eval_shape(make)
    )


def _build_ours() -> None:
    config, leaves = _small_model()
    FILES.mkdir()
    byte_tokenizer().save(FILES / "tokenizer.json")
    save(config, FILES / "config.json")
    write_tensors(leaves, FILES)


def _build_deepspeed() -> None:
    config, leaves = _small_model()
    FILES.mkdir()
    byte_tokenizer().save(FILES / "tokenizer.json")
    deepspeed.write_deepspeed(config, leaves, FILES, 1)


def _import(kind: str) -> list:
    """What `prmoe import` would write; no program is compiled that places it on devices."""
    stacked = mock.patch.object(
        mapping, "_stacked", lambda leaf, home, reads: np.stack([read() for read in reads])
    )
    with stacked, mock.patch.object(interop, "write_run") as write:
        interop.import_run(kind, FILES, Path("run"))
    _, _, config, model, tokenizer = write.call_args.args
    leaves = {name: np.asarray(x) for name, x in named_leaves(model).items()}
    return [config, tokenizer.fingerprint, leaves]


def _sound_model(found: list) -> bool:
    """A model that its config describes, with the numbers of the files, each in some place."""
    config, _, leaves = found
    shapes = named_leaves(jax.eval_shape(lambda: init_model(config)))
    ours = np.sort(np.concatenate([x.ravel() for x in leaves.values()]))
    return (
        {name: x.shape for name, x in shapes.items()} == {n: x.shape for n, x in leaves.items()}
        and np.isfinite(ours).all()
        and cost(config.model, config.moe).total_params == ours.size
        and (_held() is None or np.array_equal(ours, _held()))
    )


def _held() -> np.ndarray | None:
    """All weights of the .safetensors files in ascending order, by the library's own reader."""
    from safetensors.flax import load_file

    ignored = ".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq"
    held = [load_file(path) for path in FILES.glob("*.safetensors") if path.is_file()]
    held = [np.asarray(x, np.float32).ravel() for one in held for name, x in one.items()
            if not name.endswith(ignored)]  # fmt: skip
    return np.sort(np.concatenate(held)) if held else None


# Runs.


def _line(step: int, **more) -> dict:
    layer = {
        "drop_fraction": 0.1, "unserved_fraction": 0.1, "router_entropy": 1.0,
        "position_drop_fraction": [0.0, 0.2], "expert_load": [0.5, 0.2, 0.3],
        "expert_drop_fraction": [0.1, 0.0, 0.2], "residual_coefficient": 0.5,
    }  # fmt: skip
    return {
        "step": step, "tokens": 64 * step, "loss": 5.5, "lm_loss": 5.4, "tokens_per_second": 900.0,
        "grad_norm": 1.0, "learning_rate": 1e-3, "goodput": 0.9,
        **{f"layers/01/{name}": value for name, value in layer.items()}, **more,
    }  # fmt: skip


def _build_run(steps: int = 10) -> None:
    """A run after 10 steps of `steps`, without the time that training takes."""
    _text_folder()
    config = _run_config(steps)
    placed, mesh = training_mesh(config)
    data = pipeline.load_data(config.data, config.model.vocab_size, config.model.length)
    fingerprint = pipeline.pipeline_fingerprint(data, config.train.batch_size, config.seed)
    with jax.set_mesh(mesh), contextlib.closing(Checkpoints(FILES, keep=3)) as checkpoints:
        state = jax.device_put(_drawn(lambda: init_state(placed)))
        read = {"fingerprint": fingerprint, "iterator": {"next_index": 10}}
        checkpoints.save(10, state, read | {"teacher_step": None, "productive_s": 2.5})
    _build_records(config)
    data.tokenizer.save(FILES / "tokenizer.json")


def _run_config(steps: int = 10) -> Config:
    data = {"corpus": "text", "tokenizer": "bytes", "cache_dir": "cache"}
    return settings("2 layers, E=3, residual", data=data, train={"steps": steps})


def _build_records(config: Config | None = None) -> None:
    """The records of a complete run alone."""
    FILES.mkdir(exist_ok=True)
    save(config or _run_config(), FILES / "config.json")
    lines = [_line(step) for step in range(2, 11, 2)]
    eval_line = {f"eval/{name}": value for name, value in _line(10).items() if name != "step"}
    lines.append({"step": 10, **eval_line, "eval/bits_per_byte": 2.0, "eval/drop_fraction": 0.1})
    (FILES / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    start = {
        "time": 1e9, "git_revision": "abc", "versions": {"jax": "0.1"}, "device": "cpu",
        "command": ["prmoe"], "device_count": 1,
    }  # fmt: skip
    (FILES / "environment.json").write_text(json.dumps([start]))


def _read_config() -> list:
    config = load(FILES / "config.json")
    return [config, cost(config.model, config.moe), changed(config), config.total_steps]


def _sound_config(found: list) -> bool:
    """One that is written and read again as itself."""
    config = found[0]
    again = resolve(json.loads(json.dumps(dataclasses.asdict(config))), trained=True)
    return repr(again) == repr(config)


def _resume() -> list:
    """What `prmoe train` reads and prints of a run that is complete, and its next batch."""
    config, iterators = _run_config(), []

    def made(*given):
        iterators.append(pipeline.train_iterator(*given))
        return iterators[-1]

    with (
        mock.patch("prmoe_jax.training.loop.train_iterator", made),
        mock.patch("prmoe_jax.training.loop.evaluate_model", lambda *_, **__: dict(EVALUATED)),
    ):
        line = train(config, FILES)
    batch = next(iterators[-1])
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        show(line, False)
    return [line, config.total_steps, batch[:4], as_json(line), shown.getvalue()]


def _go_on() -> list:
    """Two steps more, and all that is left of them but the time."""
    train(_run_config(12), FILES)
    steps = [line for line in read_metrics(FILES / "metrics.jsonl") if line["step"] > 10]
    return [[line.get(name) for name in ("step", "loss", "eval/loss")] for line in steps]


def _sound_steps(found: list) -> bool:
    return bool(found) and all(
        (loss is None or math.isfinite(loss)) and (evaluated is None or math.isfinite(evaluated))
        for _, loss, evaluated in found
    )


def _sound_resumed(found: list) -> bool:
    line, steps, batch, *_ = found
    return line["step"] == steps and all(0 <= field.min() <= field.max() < 257 for field in batch)


def _restore() -> list:
    config, step, model, _ = restore_run(FILES)
    leaves = {name: np.asarray(x) for name, x in named_leaves(model).items()}
    return [config, step, leaves, trained_text(FILES)]


def _sound_restored(found: list) -> bool:
    return _sound_model([found[0], "", found[2]])


def _recorded() -> list:
    """What `prmoe sweep` notes of a run, and shows."""
    config = load(FILES / "config.json")
    rows = records.complete(FILES, [records.record("a run", config, FILES)])
    return [rows, finished(config, FILES), records.table(rows)]


def _build_results() -> None:
    FILES.mkdir()
    rows = [record(arm, seed, 2.5 + seed / 9) for arm in ("a", "bb") for seed in (0, 1)]
    (FILES / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _read_results() -> list:
    rows = records.complete(FILES, records.read(FILES))
    records.check_one_text(rows)
    return [rows, records.table(rows)]


def _is_shown(found: list) -> bool:
    for row in found[0] if isinstance(found[0], list) else [found[0]]:
        # All numbers are finite, but for settings: a capacity factor may be infinite.
        json.dumps(row | {"settings": {}}, allow_nan=False)
    return all(line.isprintable() for line in found[-1].splitlines())


def _report_of_run() -> list:
    with DRAWN:
        found = single.report(FILES)
    return [found, json.dumps(found)]


def _report_of_sweep() -> list:
    with DRAWN:
        found = experiment.report(FILES, None)
    return [found, experiment.table(found)]


def _ours() -> None:
    write_ours(FILES, TEXTS)


READERS = {
    "shards": Reader(
        _ours, lambda: _windows("tokens:files", "bpe"), _sound_windows, "*", _sign_index
    ),
    "npy": Reader(
        _foreign(lambda path, ids: np.save(path, np.concatenate(ids).astype("<u2")), "{}.npy"),
        lambda: _windows("tokens:files/*.npy", "bytes"),
        functools.partial(_holds, np.load, ".npy"),
    ),
    "megatron": Reader(
        _foreign(write_megatron, "{}.bin"),
        lambda: _windows("tokens:files/*.bin", "bytes"),
        functools.partial(_holds, functools.partial(np.fromfile, dtype="<u2"), ".bin"),
        "*.idx",
    ),
    "bare array": Reader(
        _foreign(write_array, "{}.bin"),
        lambda: _windows("tokens:files/*.bin", "bytes"),
        functools.partial(_holds, functools.partial(np.fromfile, dtype="<u2"), ".bin"),
    ),
    # A cache is of one's own making, so that what was signed again is believed.
    "token cache": Reader(
        _build_token_cache, lambda: _all_of(_token_cache()), lambda _: True, "*", _seal, "tokens"
    ),
    "teacher cache": Reader(_build_teacher_cache, _read_teacher_cache, _sound_lessons, "*", _seal),
    "text": Reader(_build_documents, _read_documents, _are_texts, "*.[gz]*"),
    "tokenizer": Reader(_build_tokenizer, _read_tokenizer, _sound_tokenizer),
    "tasks": Reader(_build_tasks, _read_tasks, _sound_tasks),
    "llama": Reader(lambda: _build_model("open/llama", 2), lambda: _import("hf"), _sound_model),
    "qwen2_moe": Reader(
        lambda: _build_model("open/qwen2_moe"), lambda: _import("hf"), _sound_model
    ),
    "gpt2": Reader(lambda: _build_model("gpt2"), lambda: _import("gpt2"), _sound_model),
    "safetensors": Reader(_build_ours, lambda: _import("safetensors"), _sound_model),
    "deepspeed": Reader(_build_deepspeed, lambda: _import("deepspeed"), _sound_model),
    "config": Reader(_build_records, _read_config, _sound_config, files="config.json"),
    "metrics": Reader(_build_records, _recorded, _is_shown),
    "results": Reader(_build_results, _read_results, _is_shown),
    "report of a run": Reader(_build_records, _report_of_run, _is_shown, examples=2),
    "report of a sweep": Reader(_build_results, _report_of_sweep, _is_shown, examples=2),
    "resumed run": Reader(_build_run, _resume, _sound_resumed, "checkpoints/*/[mo]*", examples=20),
    "trained run": Reader(
        lambda: _build_run(12), _go_on, _sound_steps, "checkpoints/*/[mo]*", examples=0
    ),
    "restored run": Reader(
        _build_run, _restore, _sound_restored, "checkpoints/*/model/*", examples=20
    ),
}
