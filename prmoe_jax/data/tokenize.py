"""`prmoe tokenize`: text to token shards, by Apache Beam on this machine or on a cluster."""

import argparse
import contextlib
import functools
import itertools
import logging
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from etils import epath

from prmoe_jax import stores
from prmoe_jax.config.schema import Config
from prmoe_jax.data import cache, shards, split, template, tokenizer, tokens
from prmoe_jax.data.chat import plain
from prmoe_jax.data.chunks import Chunk, find_chunks
from prmoe_jax.data.split import Selection
from prmoe_jax.data.stages import Work
from prmoe_jax.data.tokenizer import Tokenizer
from prmoe_jax.errors import UserError, missing, refusing
from prmoe_jax.errors.ending import describe, end
from prmoe_jax.stores import expand
from prmoe_jax.stores.lock import locked

log = logging.getLogger(__name__)

_PLAN = "plan"  # the first task; its result identifies text and settings
_ERROR = "error"  # the file with a worker's error message for the user
_COMMAND = "PRMOE_TOKENIZE"  # environment variable of local workers: the command's process id


def tokenize(config: Config, out: str | os.PathLike, flags: Sequence[str] = ()) -> dict[str, Any]:
    """Writes the shards of `config.data.corpus`, and their index last.

    Duplicates and empty documents are dropped. The others keep their order, and are split as in
    training on the text itself. The shards do not depend on the number of workers. After an
    interruption the same call makes only what is missing.

    Args:
      config: only `data` and `model.vocab_size` are used.
      out: the folder, which may be in an object store.
      flags: Beam's options. Without `--runner`, local processes do the work, by default one per
        core.

    Returns:
      The documents, tokens and bytes of each split, and the fingerprint of all shards.
    """
    options = _options(flags)
    folder = expand("--out", out)
    chunks, listed, times = find_chunks(config.data)
    given = None if config.data.tokenizer == "bpe" else tokenizer.load_given(config.data)
    chat_template, also = None, []
    if given:
        tokenizer.check_fits(given, config.model.vocab_size)
        chat_template = template.find(expand("data.tokenizer", config.data.tokenizer))
    if chat_template:
        also = [chat_template.fingerprint]  # identifies chats, and no text without them
    inputs = cache.fingerprint(
        *("tokenize 1", listed, config.data.text_field, config.data.validation_fraction),
        given.fingerprint if given else ["bpe", config.model.vocab_size],
    )
    work = Work(str(folder), config.data, len(chunks))
    with locked(folder, "--out") as check_lock:
        index = folder / shards.INDEX
        if index.exists():
            found = shards.Index.open(folder)
            if found.inputs != (cache.fingerprint(inputs, also) if found.marked else inputs):
                raise UserError(f"{folder} has shards of other text or settings; give a new --out")
            if times and max(times) > epath.Path(index).stat().mtime:
                log.warning(
                    "a file of data.corpus=%s is newer than its shards; if its text changed, give "
                    "a new --out",
                    config.data.corpus,
                )
            log.info("%s is complete", folder)
        else:
            _begin(work, {"inputs": inputs, "times": times} | ({"template": also} if also else {}))
            if given:
                tokens.save_tokenizer(work, given, chat_template)
            run = functools.partial(_stage, work, options)
            selection = split.select(work, chunks, run)
            known = given or _trained(work, chunks, selection, config)
            if selection.chats:
                inputs = cache.fingerprint(inputs, also)
            content = tokens.write_shards(work, chunks, selection, known, inputs, run)
            check_lock()
            work.save(index, content)
        if work.done(_PLAN) is not None:  # else `staging` is the user's own folder
            work.staging.rmtree()
    found = shards.Index.open(folder)
    names = itertools.product(shards.SPLITS, shards.COUNTS)
    counts = {f"{split}/{count}": found.splits[split][count] for split, count in names}
    return counts | {"fingerprint": found.fingerprint}


def _trained(
    work: Work, chunks: Sequence[Chunk], selection: Selection, config: Config
) -> Tokenizer:
    """Trains a BPE on the training split, in this process; or loads it if it was saved."""
    if (saved := work.folder / shards.TOKENIZER).exists():
        return Tokenizer.load(saved)
    kept = (split.kept(work, chunk, selection) for chunk in chunks)
    documents = (plain(text) for chunk in kept for name, text in chunk if name == "train")
    log.info("training a BPE of %d entries", config.model.vocab_size)
    trained = tokenizer.train_bpe(documents, config.model.vocab_size)
    tokens.save_tokenizer(work, trained, None)
    return trained


def _begin(work: Work, plan: dict[str, Any]) -> None:
    """Records the plan in an empty folder, or checks that a begun folder has the same plan."""
    known = work.done(_PLAN)
    if known is None:
        folders = [folder for folder in (work.folder, work.staging) if folder.exists()]
        found = [path for folder in folders for path in folder.iterdir()]
        if any(path != work.staging and not path.name.startswith(".") for path in found):
            raise UserError(f"{work.folder} holds other files; give a new --out")
        work.staging.mkdir(parents=True, exist_ok=True)
        work.finish(_PLAN, plan)
    elif known != plan:
        raise UserError(
            f"{work.folder} was begun with other text or settings; delete it, or give a new --out"
        )


def _stage(
    work: Work, options, function: Callable[..., None], tasks: dict[str, tuple]
) -> list[Any]:
    """Runs the unfinished tasks of a stage by Beam; returns the results of all its tasks.

    Each task has its own key, so that a runner can give it to any worker. Only the tasks' arguments
    go through Beam, no text.
    """
    import apache_beam as beam

    runner = _local_runner(work) if options.get_all_options()["runner"] is None else None
    left = [task for task in tasks.items() if work.done(task[0]) is None]
    if left:
        log.info("%s: %d of %d tasks", function.__name__, len(left), len(tasks))
        (work.staging / _ERROR).unlink(missing_ok=True)
        try:  # a runner checks some of its options when the pipeline is made, and others later
            made = beam.Pipeline(runner, options)
        except (TypeError, ValueError) as error:  # of several lines
            raise UserError(f"Apache Beam refuses its options: {error}") from error
        with refusing("Apache Beam", NotImplementedError), _watching_workers(), made as pipeline:
            keyed = pipeline | beam.Create(list(enumerate(left)))
            keyed | beam.GroupByKey() | beam.FlatMap(_perform, function, work)
        if (work.staging / _ERROR).exists():
            raise UserError((work.staging / _ERROR).read_text())
    results = [work.done(name) for name in tasks]
    assert None not in results, "a runner left out a task"
    return results


def _perform(
    keyed: tuple[int, Iterable[tuple[str, tuple]]], function: Callable, work: Work
) -> list:
    """Runs tasks in a worker.

    A foreseen error, such as bad input, ends the stage without Beam's retries. If the command is
    killed, its local workers finish their current task and start no other.
    """
    error, parent = work.staging / _ERROR, str(os.getppid())
    for name, arguments in keyed[1]:
        if error.exists() or os.environ.get(_COMMAND, parent) != parent:
            break
        if work.done(name) is not None:  # a runner may try a task twice
            continue
        try:
            function(work, *arguments)
        except Exception as problem:
            failure = describe(problem)
            if not failure.foreseen:
                raise
            work.save(error, failure.line.encode())
    return []


def _local_runner(work: Work):
    """Beam's local runner, whose worker processes log to a file if the folder is local.

    By default there is one worker per core, so each encodes in one thread.
    """
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner
    from apache_beam.transforms.environments import SubprocessSDKEnvironment

    threads = shlex.quote(os.environ.get("TOKENIZERS_PARALLELISM", "false"))
    log_file = os.devnull if stores.scheme(work.out) else str(work.staging / "workers.log")
    command = (
        f"exec env {_COMMAND}={os.getpid()} TOKENIZERS_PARALLELISM={threads} "
        f"{shlex.quote(sys.executable)} -m apache_beam.runners.worker.sdk_worker_main "
        f"2>>{shlex.quote(log_file)}"
    )
    return FnApiRunner(SubprocessSDKEnvironment.from_command_string(command))


@contextlib.contextmanager
def _watching_workers() -> Iterator[None]:
    """Ends the command if a signal kills a local worker: Beam would wait for it for ever."""
    before = threading.excepthook

    def failed(raised: threading.ExceptHookArgs) -> None:
        found = re.search(r"subprocess exited with return code -(\d+)", str(raised.exc_value))
        if found and int(found[1]) not in (signal.SIGINT, signal.SIGTERM):
            end(
                f"signal {found[1]} ended a worker process (9 is often for lack of memory); the "
                "same command makes the rest, with fewer workers by -- --direct_num_workers=N"
            )
        time.sleep(1)  # a killed worker may be the cause: its report ends the command
        before(raised)

    threading.excepthook = failed
    try:
        yield
    except Exception:
        time.sleep(1)
        raise
    finally:
        threading.excepthook = before


def _options(flags: Sequence[str]):
    """Parses and checks Beam's options."""
    logging.getLogger("apache_beam").setLevel(logging.ERROR)
    logging.disable(logging.WARNING)  # hides warnings about missing extras of Beam
    try:
        with missing("prmoe tokenize needs Apache Beam", "prmoe_jax[beam]"):
            from apache_beam.options.pipeline_options import PipelineOptions
            from apache_beam.runners.runner import create_runner
    finally:
        logging.disable(logging.NOTSET)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for kind in PipelineOptions.__subclasses__():
        kind._add_argparse_args(parser)
    with refusing("Apache Beam", argparse.ArgumentError):
        _, unknown = parser.parse_known_args(list(flags))
    if unknown:  # Beam itself would ignore it
        raise UserError(f"Apache Beam has no option '{unknown[0]}'")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    options = PipelineOptions([f"--direct_num_workers={cores}", *flags])
    if (workers := options.get_all_options()["direct_num_workers"]) < 0:
        raise UserError(f"--direct_num_workers={workers} must be 0, one for each core, or more")
    if runner := options.get_all_options()["runner"]:
        kinds = AttributeError, ImportError, TypeError, ValueError
        with refusing(f"Apache Beam refuses --runner={runner}", kinds):
            create_runner(runner)
    return options
