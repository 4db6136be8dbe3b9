"""`prmoe generate`: continues prompts with a trained run."""

from prmoe_jax.cli.options import parse_mesh, verb
from prmoe_jax.cli.output import emit
from prmoe_jax.errors import UserError
from prmoe_jax.inference import WEIGHTS

MOST_SAMPLES = 1_000_000  # since all samples are made at once


def add(verbs) -> None:
    sub = verb(verbs, "generate", run, "continue a prompt with a trained run", "run")
    prompt = "a text to continue; may be repeated (default: none)"
    sub.add_argument("--prompt", action="append", help=prompt)
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
    prompts = [prompt for prompt in options.prompt or [""] for _ in range(options.samples)]
    seeds = [options.seed + i % options.samples for i in range(len(prompts))]
    generator = Generator.restore(options.workdir, options.weights or "", options.mesh)
    streamed = len(prompts) == 1 and not options.json
    lead = prompts[:1]

    def show(_, text: str) -> None:
        print(lead.pop() if lead else "", text, sep="", end="", flush=True)

    on_text, stop = show if streamed else None, options.stop or ()
    texts = generator(prompts, options.tokens, sampling, seeds, stop, on_text)
    if streamed:
        print(*lead)
        return
    for prompt, seed, text in zip(prompts, seeds, texts, strict=True):
        answer = {"prompt": prompt, "seed": seed, "text": text}
        emit(answer, options.json, "{prompt}{text}\n".format_map)
