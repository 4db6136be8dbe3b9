"""`prmoe generate`: continues prompts, or answers messages, with a trained run."""

import contextlib
import sys
from collections.abc import Callable
from functools import partial

from prmoe_jax.cli.options import parse_mesh, verb
from prmoe_jax.cli.output import emit
from prmoe_jax.errors import UserError, refusing
from prmoe_jax.inference import WEIGHTS

MOST_SAMPLES = 1_000_000  # since all samples are made at once


def add(verbs) -> None:
    sub = verb(verbs, "generate", run, "continue a prompt with a trained run", "run")
    prompt = "a text to continue; may be repeated (default: none)"
    sub.add_argument("--prompt", action="append", help=prompt)
    chat = "answer prompts by the model's chat template; without --prompt, hold a conversation"
    sub.add_argument("--chat", action="store_true", help=chat)
    sub.add_argument("--tokens", type=int, default=100, help="at most this many (default: 100)")
    sub.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default: 0.8)")
    most = "sample from the K most probable tokens, and ties"
    sub.add_argument("--top-k", type=int, default=0, help=most)
    most = "sample from the most probable tokens whose probabilities reach P"
    sub.add_argument("--top-p", type=float, default=1.0, help=most)
    sub.add_argument("--stop", action="append", help="a text to end before; may be repeated")
    samples = "continuations of each prompt (default: 1)"
    sub.add_argument("--samples", type=int, default=1, help=samples)
    sub.add_argument("--seed", type=int, default=0, help="seed of the first sample (default: 0)")
    weights = "type of the large weights (default: the run's dtype, on CPUs float32)"
    sub.add_argument("--weights", choices=WEIGHTS, help=weights)
    axes = "devices by axis, such as expert:4,tensor:2 (default: one)"
    sub.add_argument("--mesh", type=parse_mesh, help=axes)


def run(options, rest) -> None:
    from prmoe_jax.inference.generate import Generator, Sampling

    if not 1 <= options.samples <= MOST_SAMPLES:
        raise UserError(f"--samples={options.samples} must be 1 or more, up to {MOST_SAMPLES}")
    for name, default in (("samples", 1), ("top-k", 0), ("top-p", 1)):
        if options.temperature == 0 and vars(options)[name.replace("-", "_")] != default:
            raise UserError(
                f"--{name} has no effect with --temperature=0, which takes the top token; leave "
                "one of them out"
            )
    sampling = Sampling(options.temperature, options.top_k, options.top_p)
    stop = options.stop or ()
    if options.chat and not options.prompt:
        if options.samples > 1:
            raise UserError("--samples has no effect in a conversation; leave it out")
        generator = Generator.restore(options.workdir, options.weights or "", options.mesh)
        _converse(partial(generator, tokens=options.tokens, sampling=sampling, stop=stop), options)
        return
    prompts = [prompt for prompt in options.prompt or [""] for _ in range(options.samples)]
    seeds = [options.seed + i % options.samples for i in range(len(prompts))]
    generator = Generator.restore(options.workdir, options.weights or "", options.mesh)
    streamed = len(prompts) == 1 and not options.json
    lead = [] if options.chat else prompts[:1]

    def show(_, text: str) -> None:
        print(lead.pop() if lead else "", text, sep="", end="", flush=True)

    on_text = show if streamed else None
    given = [[_said("user", prompt)] for prompt in prompts] if options.chat else prompts
    texts = generator(given, options.tokens, sampling, seeds, stop, on_text)
    if streamed:
        print(*lead)
        return
    form = "{text}\n" if options.chat else "{prompt}{text}\n"
    for prompt, seed, text in zip(prompts, seeds, texts, strict=True):
        emit({"prompt": prompt, "seed": seed, "text": text}, options.json, form.format_map)


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _converse(answer: Callable[..., list[str]], options) -> None:
    """Answers each line of standard input, until it ends or a line is empty."""

    def show(_, text: str) -> None:
        print(text, end="", flush=True)

    messages: list[dict[str, str]] = []
    while line := _next_line():
        messages.append(_said("user", line))
        on_text = None if options.json else show
        [text] = answer([messages], seeds=[options.seed], on_text=on_text)
        messages.append(_said("assistant", text))
        if options.json:
            emit({"prompt": line, "seed": options.seed, "text": text}, True, str)
        else:
            print()


def _next_line() -> str:
    """The next line of standard input, without its end; '' at the end."""
    wrong = refusing("a message is not UTF-8 text", UnicodeDecodeError)
    with contextlib.suppress(EOFError), wrong:
        return input("> " if sys.stdin.isatty() else "")
    return ""
