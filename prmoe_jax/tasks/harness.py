"""Runs lm-evaluation-harness on a run: `prmoe eval --tasks`, or the harness's own command line.

python -m prmoe_jax.tasks.harness --model prmoe --model_args workdir=DIR --tasks lambada_openai
"""

import collections
import functools
import logging
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from prmoe_jax.errors import UserError, refusing
from prmoe_jax.errors.ending import describe, say

try:
    from lm_eval import evaluator, utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
except ImportError:
    missing = UserError(
        "tasks need lm-evaluation-harness 0.4.12 or newer; pip install 'prmoe_jax[eval]'"
    )
    if __name__ != "__main__":
        raise missing from None
    say(str(missing))
    sys.exit(missing.exit_code)

from prmoe_jax import stores
from prmoe_jax.config.loading import load
from prmoe_jax.config.validation import check_runs_without_limit
from prmoe_jax.data.corpora import open_corpus
from prmoe_jax.data.tokenizer import Tokenizer
from prmoe_jax.inference.generate import Generator, Sampling
from prmoe_jax.run import directory as workdirs
from prmoe_jax.run.restore import check_text
from prmoe_jax.tasks import local
from prmoe_jax.tasks.score import Scorer

log = logging.getLogger(__name__)

BATCH_SIZE = 16
# The generation_kwargs of a task that `generate_until` uses, by the harness's names.
KNOWN = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}


@register_model("prmoe")
class PrmoeLM(TemplateLM):
    """A run's newest model; every text starts with the BOS token, as in training."""

    def __init__(
        self,
        workdir: str,
        batch_size: int | str | None = None,
        max_batch_size=None,
        device=None,
        **unknown,
    ):
        """Restores the run.

        Args:
          workdir: the run's folder.
          batch_size: sequences that a device scores at once; 16 for None and 'auto'.
          max_batch_size, device: arguments of the harness that are ignored.
        """
        if unknown:
            raise UserError(f"--model_args: {', '.join(unknown)} is not known; give workdir=DIR")
        super().__init__()
        automatic = batch_size is None or str(batch_size).startswith("auto")
        size = str(BATCH_SIZE if automatic else batch_size)
        if not (size.isdecimal() and int(size) > 0):
            raise UserError(f"batch_size={batch_size} must be a number above 0, or auto")
        self._workdir = stores.as_path(workdir)
        self._batch_size = int(size)
        self._scorer = Scorer.restore(self._workdir, self._batch_size)
        self._tokenizer = Tokenizer.load(self._workdir / workdirs.TOKENIZER)

    @functools.cached_property
    def _generator(self) -> Generator:
        return Generator.restore(self._workdir)  # a second copy of the model; few tasks need it

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self._tokenizer.bos_id

    def tok_encode(self, string: str, add_special_tokens=None, **ignored) -> list[int]:
        return self._tokenizer.encode(string)

    def _loglikelihood_tokens(self, requests, **ignored) -> list[tuple[float, bool]]:
        bos = [self.prefix_token_id]
        contexts = [c if c[:1] == bos else bos + c for _, c, _ in requests]
        return self._scorer(contexts, [continuation for _, _, continuation in requests])

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        windows = [
            (number, *utils.make_disjoint_window(window))
            for number, request in enumerate(requests)
            for window in utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._scorer.length,
                context_len=1,
            )
        ]
        totals = [0.0] * len(requests)  # an empty text has no window
        scores = self._scorer([w[1] for w in windows], [w[2] for w in windows])
        for (number, *_), (score, _) in zip(windows, scores, strict=True):
            totals[number] += score
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        texts = [""] * len(requests)
        # Equal requests are numbered from 0, and the number is the seed.
        asked = collections.Counter()
        seeds = []
        # Requests with the same settings are generated together.
        kinds: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            prompt, kind = request.args[0], repr(request.args[1])
            kinds.setdefault(kind, []).append(i)
            seeds.append(asked[prompt, kind])
            asked[prompt, kind] += 1
        for numbers in kinds.values():
            settings = normalize_gen_kwargs(requests[numbers[0]].args[1])
            if ignored := settings.keys() - KNOWN:
                log.warning("generation_kwargs without effect: %s", ", ".join(sorted(ignored)))
            stop = [text for text in settings["until"] if text]
            tokens = min(settings["max_gen_toks"], self._scorer.length // 2)
            sampling = Sampling(
                float(settings.get("temperature", 0)),
                max(0, int(settings.get("top_k", 0))),  # -1, as in vLLM, means all tokens
                float(settings.get("top_p", 1)),
            )
            for start in range(0, len(numbers), self._batch_size):
                some = numbers[start : start + self._batch_size]
                prompts = [self._end(requests[i].args[0], tokens) for i in some]
                continued = self._generator(
                    prompts, tokens, sampling, [seeds[i] for i in some], stop
                )
                for i, text in zip(some, continued, strict=True):
                    texts[i] = text
        return texts

    def _end(self, prompt: str, tokens: int) -> list[int]:
        """The end of a prompt's tokens, cut to leave room for `tokens` new ones and BOS."""
        ids = self.tok_encode(prompt)
        return ids[max(0, len(ids) + 1 + tokens - self._scorer.length) :]


def evaluate_tasks(
    workdir: Path,
    tasks: Sequence[str],
    limit: int | None = None,
    batch_size: int | None = None,
) -> dict[str, dict]:
    """Scores a run on local tasks or tasks of the harness.

    Args:
      workdir: the run's folder.
      tasks: names or patterns of names; those of `local.NAMES` need no network.
      limit: number of examples of each task; all by default.
      batch_size: examples that a device scores at once, 16 by default.

    Returns:
      Task or group of tasks -> its metrics, and their standard errors, such as acc_stderr for acc.
      A task also has `examples`, the number of its examples.
    """
    config = load(workdir / workdirs.CONFIG)
    check_runs_without_limit(config)
    ours = set(local.NAMES)
    folders = [str(local.prepare(name, config.data)) for name in tasks if name in ours]
    known = TaskManager(include_path=folders, include_defaults=not ours.issuperset(tasks))
    names = []
    for task in tasks:
        matching = known.match_tasks([task])  # this also expands patterns such as lambada_*
        if not matching:
            raise UserError(
                f"--tasks={task} is unknown; use {', '.join(local.NAMES)} or any of "
                "lm-evaluation-harness"
            )
        names += matching
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    evaluator.get_git_commit_hash = lambda: None  # git complains where there is no checkout
    os.environ["DISABLE_MULTIPROC"] = "1"  # JAX's threads don't survive the bootstrap's forks
    names = _largest(known, dict.fromkeys(names))
    model = PrmoeLM(str(workdir), batch_size)
    if "cloze" in tasks:  # the run must not have trained on its documents
        check_text(workdir, config, open_corpus(config.data).fingerprint)
    options = {"limit": limit, "bootstrap_iters": 100, "log_samples": False}
    found = evaluator.simple_evaluate(model, tasks=names, task_manager=known, **options)
    scores = {}
    for task, values in found["results"].items():
        named = {n.removesuffix(",none"): v for n, v in values.items() if isinstance(v, float)}
        if task in found["n-samples"]:  # groups are not in it
            named["examples"] = found["n-samples"][task]["effective"]
        scores[task] = named
    return scores


def _largest(known: TaskManager, names: Iterable[str]) -> list[str]:
    """Leaves out tasks and groups that are in another group, since it has their scores."""
    held = {}  # the tasks of each name
    for name in names:
        # Causes: a package that the task needs, the network, or a dataset that is a script.
        kinds = ImportError, OSError, RuntimeError, ValueError
        with refusing(f"--tasks={name} cannot be loaded", kinds):
            held[name] = set(known.load(name)["tasks"])
    largest: list[str] = []
    for name in sorted(held, key=lambda name: -len(held[name])):
        shared = {other: tasks for other in largest if (tasks := held[name] & held[other])}
        if held[name] in shared.values():
            continue
        if shared:
            other, tasks = next(iter(shared.items()))
            raise UserError(
                f"--tasks: {min(tasks)} is in {other} and in {name}; score one of them only"
            )
        largest.append(name)
    return [name for name in held if name in largest]


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except UserError as error:
        say(describe(error).line)
        sys.exit(error.exit_code)
