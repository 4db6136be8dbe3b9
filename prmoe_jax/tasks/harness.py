"""lm-evaluation-harness on a run: `prmoe eval --tasks`, or the harness's own command line.

python -m prmoe_jax.tasks.harness --model prmoe --model_args workdir=DIR --tasks lambada_openai
"""

import functools
import logging
import os
from collections.abc import Sequence
from pathlib import Path

try:
    from lm_eval import simple_evaluate, utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.tasks import TaskManager
except ImportError:
    from prmoe_jax.errors import UserError

    raise UserError("tasks need lm-evaluation-harness; pip install 'prmoe_jax[eval]'") from None

from prmoe_jax import workdir as workdirs
from prmoe_jax.config import load
from prmoe_jax.data.tokenizer import Tokenizer
from prmoe_jax.errors import UserError
from prmoe_jax.generate import Generator, Sampling
from prmoe_jax.tasks import local
from prmoe_jax.tasks.score import Scorer


@register_model("prmoe")
class PrmoeLM(TemplateLM):
    """A run's newest model. Every text starts with the end-of-text mark, as in training."""

    def __init__(self, workdir: str, batch_size: int = 16, **ignored):
        """Restores the run; what else the harness passes (device, max_batch_size) has no use."""
        super().__init__()
        self._workdir = Path(workdir)
        self._scorer = Scorer.restore(self._workdir, int(batch_size))
        self._tokenizer = Tokenizer.load(self._workdir / workdirs.TOKENIZER)
        self._batch_size = int(batch_size)

    @functools.cached_property
    def _generator(self) -> Generator:
        return Generator.restore(self._workdir)  # a second model, which few tasks need

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.end_of_text

    def tok_encode(self, string: str, add_special_tokens=None, **ignored) -> list[int]:
        return self._tokenizer.encode(string)

    def _loglikelihood_tokens(self, requests, **ignored) -> list[tuple[float, bool]]:
        mark = [self.eot_token_id]
        contexts = [c if c[:1] == mark else mark + c for _, c, _ in requests]
        return self._scorer(contexts, [continuation for _, _, continuation in requests])

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        totals = []
        for request in requests:
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.eot_token_id,
                max_seq_len=self._scorer.length,
                context_len=1,
            )
            pairs = [utils.make_disjoint_window(window) for window in windows]
            scores = self._scorer(*map(list, zip(*pairs, strict=True)))
            totals.append(sum(score for score, _ in scores))
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        texts = [""] * len(requests)
        # Requests of one kind side by side.
        kinds: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            kinds.setdefault(repr(request.args[1]), []).append(i)
        for numbers in kinds.values():
            settings = requests[numbers[0]].args[1]
            until = settings.get("until") or []
            tokens = min(settings.get("max_gen_toks", 256), self._scorer.length // 2)
            sampled = settings.get("do_sample", False)
            sampling = Sampling(settings.get("temperature", 0.0) if sampled else 0.0)
            for start in range(0, len(numbers), self._batch_size):
                some = numbers[start : start + self._batch_size]
                prompts = [self._end(requests[i].args[0], tokens) for i in some]
                stop = [until] if isinstance(until, str) else until
                continued = self._generator(prompts, tokens, sampling, None, stop)
                for i, text in zip(some, continued, strict=True):
                    texts[i] = text
        return texts

    def _end(self, prompt: str, tokens: int) -> str:
        """The end of a prompt that leaves room for so many tokens."""
        ids = self.tok_encode(prompt)
        room = self._scorer.length - tokens - 1
        return prompt if len(ids) <= room else self._tokenizer.decode(ids[-room:])


def evaluate_tasks(
    workdir: Path, tasks: Sequence[str], limit: int | None = None, batch_size: int = 16
) -> dict[str, dict]:
    """Scores a run in tasks: local ones, or any that the harness knows.

    Args:
      workdir: the run's folder.
      tasks: names; those of `local.NAMES` need no network.
      limit: examples of each, all unless given.
      batch_size: of the forward passes; changes no score.

    Returns:
      Of each task its metrics, the standard error of acc, and the number of examples.

    Raises:
      UserError: no such task, or no run.
    """
    config = load(workdir / workdirs.CONFIG)
    ours = set(local.NAMES)
    folders = [str(local.prepare(name, config.data)) for name in tasks if name in ours]
    known = TaskManager(include_path=folders, include_defaults=not ours.issuperset(tasks))
    unknown = [task for task in tasks if not known.match_tasks([task])]
    if unknown:
        raise UserError(
            f"--tasks={unknown[0]} is unknown; use {', '.join(local.NAMES)} or any of "
            "lm-evaluation-harness"
        )
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # The harness bootstraps in forked processes, which JAX's threads don't survive.
    found = simple_evaluate(
        PrmoeLM(str(workdir), batch_size),
        tasks=list(tasks),
        task_manager=known,
        limit=limit,
        bootstrap_iters=0,
        log_samples=False,
    )
    scores = {}
    for task, values in found["results"].items():
        named = {n.removesuffix(",none"): v for n, v in values.items() if isinstance(v, float)}
        count = found["n-samples"][task]["effective"] if task in found["n-samples"] else 0
        if "acc" in named and count > 1:
            named["acc_stderr"] = (named["acc"] * (1 - named["acc"]) / (count - 1)) ** 0.5
        scores[task] = named | {"examples": count}
    return scores


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
