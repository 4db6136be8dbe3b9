"""Text from a trained run: the prompt at once, then token by token from keys and values kept."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp

from prmoe_jax import workdir as workdirs
from prmoe_jax.data.tokenizer import Tokenizer
from prmoe_jax.errors import UserError
from prmoe_jax.evaluate import restore_run
from prmoe_jax.model import Transformer


def generate(
    workdir: Path, prompt: str, tokens: int, temperature: float = 0.8, seed: int = 0
) -> str:
    """Continues a prompt by up to `tokens` tokens, or to the document's end.

    Temperature 0 takes the likeliest token. No token is dropped, whatever its expert's load.

    Raises:
      UserError: no run in the folder, or prompt and continuation exceed the context.
    """
    if tokens < 1:
        raise UserError(f"--tokens={tokens} must be 1 or more")
    if not 0 <= temperature < math.inf:
        raise UserError(f"--temperature={temperature} must be 0 or more, and finite")
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed={seed} is out of range; use a value from 0 to {2**32 - 1}")
    # One sequence is for one device, until inference has a layout of its own.
    config, _, model, _ = restore_run(workdir, jax.local_devices()[:1])
    if config.moe.router == "expert_choice":
        raise UserError(
            "this run's experts choose their tokens (moe.router=expert_choice): whom they choose "
            "depends on the tokens to come, so it cannot generate"
        )
    tokenizer = Tokenizer.load(workdir / workdirs.TOKENIZER)
    length = config.model.length
    # Training starts every document with the end-of-text mark.
    start = [tokenizer.end_of_text, *tokenizer.encode(prompt)]
    if len(start) + tokens > length:
        raise UserError(
            f"the prompt's {len(start)} tokens and --tokens={tokens} exceed the context of "
            f"{length}; shorten the prompt or use --tokens={max(0, length - len(start))}"
        )
    tokens_L = jnp.zeros(length, jnp.int32).at[: len(start)].set(jnp.array(start))
    tokens_L = _sample(
        model,
        tokens_L,
        jnp.int32(len(start)),
        jnp.int32(len(start) + tokens),
        jnp.float32(temperature),
        jnp.int32(tokenizer.size),
        jnp.int32(tokenizer.end_of_text),
        jax.random.key(seed),
    )
    generated = tokens_L[len(start) : len(start) + tokens].tolist()
    if tokenizer.end_of_text in generated:
        generated = generated[: generated.index(tokenizer.end_of_text)]
    return tokenizer.decode(generated)


@jax.jit
def _sample(
    model: Transformer, tokens_L, start, stop, temperature, vocabulary, end_of_text, key
) -> jax.Array:
    """Fills tokens[start:stop]; ids from `vocabulary` on are padding and never drawn."""
    prompt_1xL = (jnp.arange(tokens_L.size) < start)[None]
    x_1xLxD, past = model.decode(
        tokens_L[None], prompt_1xL, model.empty_past(1), jnp.zeros(1, jnp.int32)
    )

    def unfinished(carry):
        tokens_L, position, *_ = carry
        return (position < stop) & ((position == start) | (tokens_L[position - 1] != end_of_text))

    def next_token(carry):
        tokens_L, position, x_D, past = carry
        logits_V = model.logits(x_D)
        logits_V = jnp.where(jnp.arange(logits_V.size) < vocabulary, logits_V, -jnp.inf)
        drawn = jax.random.categorical(
            jax.random.fold_in(key, position), logits_V / jnp.maximum(temperature, 1e-6)
        )
        token = jnp.where(temperature > 0, drawn, jnp.argmax(logits_V)).astype(jnp.int32)
        x_1x1xD, past = model.decode(
            token[None, None], jnp.ones((1, 1), bool), past, position[None]
        )
        return tokens_L.at[position].set(token), position + 1, x_1x1xD[0, 0], past

    first = tokens_L, start, x_1xLxD[0, start - 1], past
    return jax.lax.while_loop(unfinished, next_token, first)[0]
