"""Generates text from a trained run: prefill in chunks, then decoding token by token."""

import dataclasses
import math
import os.path
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from prmoe_jax import stores
from prmoe_jax.config.schema import MeshConfig
from prmoe_jax.data import released, template
from prmoe_jax.data.template import ChatTemplate
from prmoe_jax.data.tokenizer import Tokenizer
from prmoe_jax.errors import UserError, refusing
from prmoe_jax.inference import WEIGHTS
from prmoe_jax.inference.decoder import Decoder, decoder
from prmoe_jax.inference.restore import restore_for_inference
from prmoe_jax.model.attention import KVCache
from prmoe_jax.parallel.axes import batch_axes
from prmoe_jax.run import directory as workdirs

# Tokens of each prompt in a chunk of the prefill; decoding steps between two reads by the host.
PREFILL_CHUNK = 64
STEPS = 16
# Below COLDEST, only the argmax has a probability above 0. Above HOTTEST, all tokens are equally
# probable. Logits that are divided by a number outside these bounds could exceed float32's range.
COLDEST, HOTTEST = 1e-30, 1e30
LARGEST_TOP_K = 2**31 - 1
# A tokenizer decodes bytes that are not UTF-8, such as half a character, to this.
NOT_UTF8 = "\ufffd"


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; `top_k` and `top_p` both apply."""

    temperature: float = 0.8  # below COLDEST, such as 0, takes the argmax
    # Tokens that are as probable as the least probable kept one are also kept.
    top_k: int = 0  # draws from this many most probable tokens; 0 is all
    top_p: float = 1.0  # draws from the fewest tokens of at least this total probability

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"--temperature={self.temperature} must be 0 or more, and finite")
        if not 0 <= self.top_k <= LARGEST_TOP_K:
            raise UserError(
                f"--top-k={self.top_k} must be 0 (all tokens) or more, up to {LARGEST_TOP_K}"
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p={self.top_p} must be above 0, up to 1")


class State(NamedTuple):
    """A batch of sequences that are being generated."""

    tokens_BxT: jax.Array  # prompt and continuation
    length_B: jax.Array  # number of tokens so far
    stop_B: jax.Array  # the maximum length of each
    x_BxD: jax.Array  # the last token's final activations
    caches: list[KVCache]
    key_B: jax.Array


class Generator:
    """Continues prompts; the model is compiled once for each shape."""

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        mesh: Mesh,
        ends: Iterable[int] = (),
        chat_template: ChatTemplate | None = None,
    ):
        """`ends` are ids at which a text ends, beside the tokenizer's EOS."""
        self.decoder, self.tokenizer, self.mesh = decoder, tokenizer, mesh
        self.chat_template = chat_template
        self.ends = tuple(sorted({tokenizer.eos_id, *ends}))

    @classmethod
    def restore(
        cls, workdir: Path, weights: str = "", mesh: MeshConfig | None = None
    ) -> "Generator":
        """Restores a run's newest checkpoint.

        Args:
          workdir: the run's folder.
          weights: the type of the large weights, one of `WEIGHTS`. By default it is the compute
            dtype: float32 on CPUs, elsewhere the run's dtype.
          mesh: a mesh of all devices; by default one device.
        """
        if weights not in ("", *WEIGHTS):
            raise UserError(f"--weights={weights} is unknown; use one of {', '.join(WEIGHTS)}")
        workdir = stores.as_path(workdir)
        devices = None if mesh else jax.local_devices()[:1]
        model, on, execution = restore_for_inference(workdir, devices, mesh or MeshConfig())
        tokenizer = Tokenizer.load(workdir / workdirs.TOKENIZER)
        with jax.set_mesh(on):
            held = decoder(model, weights or model.config.dtype, on, execution)
        kept = released.read(workdir / released.FOLDER)
        return cls(held, tokenizer, on, released.ends(kept, tokenizer), template.of_files(kept))

    def __call__(
        self,
        prompts: Sequence[str | Sequence[int] | Sequence[dict]],
        tokens: int,
        sampling: Sampling = Sampling(),
        seeds: Sequence[int] | None = None,
        stop: Sequence[str] = (),
        on_text: Callable[[int, str], None] | None = None,
    ) -> list[str]:
        """Continues each prompt until an end mark, a stop text, or `tokens` new tokens.

        End marks are EOS and, of a released model, the tokens that end its turn.

        A continuation depends only on its prompt and its seed: no token is dropped.

        Args:
          prompts: texts, or their token ids without the BOS token, or conversations: lists of
            messages with `role` and `content`, to which the model answers.
          tokens: the largest number of new tokens for each prompt.
          sampling: how tokens are drawn.
          seeds: one for each prompt; all 0 by default.
          stop: texts before which a continuation ends.
          on_text: called with a prompt's number and each new piece of its continuation.

        Returns:
          The text of each continuation, without its prompt, in the order of the prompts.
        """
        if isinstance(prompts, str):
            raise UserError("prompts is one text, not a list of texts; give [text]")
        seeds = [0] * len(prompts) if seeds is None else seeds
        _check(tokens, seeds, stop)
        if len(seeds) != len(prompts):
            raise UserError(f"{len(seeds)} seeds for {len(prompts)} prompts; give one for each")
        if not len(prompts):
            return []
        starts = [self._start(prompt) for prompt in prompts]
        length = self.decoder.config.length
        longest = max(map(len, starts))
        if longest + tokens > length:
            less = f" or use --tokens={length - longest}" if longest < length else ""
            raise UserError(
                f"the prompt's {longest} tokens and --tokens={tokens} exceed the context of "
                f"{length}; shorten the prompt{less}"
            )
        written = [TextStream(self.tokenizer, stop, start[1:], self.ends) for start in starts]
        with jax.set_mesh(self.mesh):
            state = start(self.decoder, self.mesh, starts, seeds, tokens)
            seen = [len(start) for start in starts]
            while True:
                ids = self.tokenizer.size, self.ends
                state = decode(self.decoder, state, sampling, *ids)
                lengths, come = np.asarray(state.length_B), np.asarray(state.tokens_BxT)
                ended = np.array(state.stop_B)
                for i, text in enumerate(written):
                    piece = text.add(come[i, seen[i] : lengths[i]].tolist(), lengths[i] >= ended[i])
                    if on_text and piece:
                        on_text(i, piece)
                    seen[i] = lengths[i]
                    if text.ended:
                        ended[i] = lengths[i]
                if (lengths >= ended).all():
                    return [text.text for text in written]
                state = state._replace(stop_B=jax.device_put(ended, state.stop_B.sharding))

    def _start(self, prompt: Any) -> list[int]:
        """A prompt's token ids, from its start; ids that the caller gave are checked."""
        if isinstance(prompt, str):
            _check_text("--prompt", prompt)
            return [self.tokenizer.bos_id, *self.tokenizer.encode(prompt)]
        if any(isinstance(message, dict) for message in prompt):
            _check_text("--prompt", "".join(str(message.get("content")) for message in prompt))
            return self._rendered(prompt)
        for token in prompt:
            if not 0 <= token < self.tokenizer.size:
                raise UserError(
                    f"the prompt's token {token} is out of range; the tokenizer's are from 0 to "
                    f"{self.tokenizer.size - 1}"
                )
        return [self.tokenizer.bos_id, *prompt]

    def _rendered(self, messages: Sequence[dict]) -> list[int]:
        """The token ids of a conversation, by the run's chat template."""
        if self.chat_template is None:
            raise UserError(
                "a conversation needs a chat template, and the run has none; put a "
                f"{released.TEMPLATE} into its folder {released.FOLDER}"
            )
        return self.chat_template.prompt(messages, self.tokenizer)


class TextStream:
    """The text of one continuation, decoded while its tokens are generated.

    A token's text can depend on the tokens before it, such as a space between words, or a character
    whose bytes are several tokens. So new tokens are decoded together with the tokens just before
    them, and the first ones together with the prompt (`prompt`, without BOS). The text ends before
    the first of the ids `ends`, by default EOS.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str],
        prompt: Sequence[int] = (),
        ends: Sequence[int] = (),
    ):
        self._tokenizer, self._stop, self._ends = tokenizer, stop, ends or (tokenizer.eos_id,)
        self._before, self._ids = list(prompt), []  # tokens before the new ones; tokens to decode
        self._decoded = ""  # the text of all tokens that need not be decoded again
        self.text, self.ended = "", False
        if tokenizer.decode(self._before).startswith(NOT_UTF8):
            self._drop_rest_of_a_character()

    def add(self, ids: list[int], last: bool) -> str:
        """Adds tokens; returns the new text that later tokens can't change.

        Part of a character, or what may begin a stop text, waits for the next tokens.
        """
        if self.ended:
            return ""
        count = next((n for n, token in enumerate(ids) if token in self._ends), len(ids))
        if count < len(ids):
            ids, last = ids[:count], True
        self._ids += ids
        self._decode(last)
        text = self._decoded
        found = [text.find(stop, len(self.text)) for stop in self._stop]
        found = [place for place in found if place >= 0]
        if found:
            text, last = text[: min(found)], True
        self.ended = last
        if not last:  # leave out what may begin a stop text
            starts = [n for stop in self._stop for n in range(len(stop)) if text.endswith(stop[:n])]
            text = text[: len(text) - max(starts, default=0)]
        new, self.text = text[len(self.text) :], text
        return new

    def _drop_rest_of_a_character(self) -> None:
        """Drops leading tokens of a prompt that was cut inside a character.

        Some tokenizers can't decode the bytes that follow such tokens.
        """
        for lost in range(1, 4):
            text = self._tokenizer.decode(self._before[lost:])
            if text and not text.startswith(NOT_UTF8):
                del self._before[:lost]
                return

    def _decode(self, last: bool) -> None:
        """Decodes new tokens; adds an incomplete character only in the `last` call."""
        before = self._tokenizer.decode(self._before)
        count = len(self._ids)
        # A character has at most four bytes, so at most three tokens belong to an incomplete one.
        for size in (count,) if last else range(count, max(count - 4, 0), -1):
            text = self._tokenizer.decode(self._before + self._ids[:size])
            new = text[len(os.path.commonprefix([before, text])) :]
            if last or (new and not new.endswith(NOT_UTF8)):
                self._decoded += new
                kept = self._before if before.endswith(NOT_UTF8) else []
                self._before, self._ids = kept + self._ids[:size], self._ids[size:]
                return


def _check(tokens: int, seeds: Sequence[int], stop: Sequence[str]) -> None:
    if tokens < 1:
        raise UserError(f"--tokens={tokens} must be 1 or more")
    for seed in seeds:
        if not 0 <= seed < 2**32:
            raise UserError(f"--seed={seed} is out of range; use a value from 0 to {2**32 - 1}")
    for text in stop:
        if not text:
            raise UserError("--stop= is empty, and would end every text at once; leave it out")
        _check_text("--stop", text)


def _check_text(option: str, text: str) -> None:
    """Refuses lone surrogates: Python's form of command-line bytes that are not UTF-8."""
    with refusing(f"{option} is not UTF-8 text", UnicodeEncodeError):
        text.encode()


def room(longest: int, tokens: int) -> int:
    """Positions in a sequence's KV cache: prompt and new tokens, each rounded up to whole chunks.

    A sequence that has ended still writes to its cache, at the position after its last token.
    """
    return sum(-(-count // PREFILL_CHUNK) * PREFILL_CHUNK for count in (longest, tokens))


def start(
    decoder: Decoder,
    mesh: Mesh,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    tokens: int,
) -> State:
    """Runs the prefill of prompts of token ids; returns the state for `decode`.

    `mesh` must be JAX's current mesh. Each prompt has a seed, and at most `tokens` new tokens.
    """
    devices = math.prod(mesh.shape[name] for name in batch_axes(mesh))
    batch = -(-len(prompts) // devices) * devices  # padding rows stop at once
    longest = max(map(len, prompts))
    tokens_BxT = np.zeros((batch, room(longest, tokens)), np.int32)
    lengths = np.ones(batch, np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BxT[row, : len(prompt)], lengths[row] = prompt, len(prompt)
    stops = lengths + np.where(np.arange(batch) < len(prompts), tokens, 0).astype(np.int32)
    seeds = jnp.array([*seeds, *[0] * (batch - len(prompts))], jnp.uint32)
    chunks = -(-longest // PREFILL_CHUNK)
    return prefill(decoder, tokens_BxT, lengths, stops, jax.vmap(jax.random.key)(seeds), chunks)


@partial(jax.jit, static_argnums=5)
def prefill(decoder: Decoder, tokens_BxT, length_B, stop_B, key_B, chunks: int) -> State:
    """Prefills the KV caches with the prompts, in chunks of `PREFILL_CHUNK` tokens."""
    batch, room = tokens_BxT.shape
    caches = decoder.empty_cache(batch, room)
    x_BxD = jnp.zeros((batch, decoder.config.d_model), decoder.config.dtype)

    def chunk(i, carry):
        x_BxD, caches = carry
        begin = i * PREFILL_CHUNK
        tokens_BxQ = jax.lax.dynamic_slice_in_dim(tokens_BxT, begin, PREFILL_CHUNK, axis=1)
        valid_BxQ = begin + jnp.arange(PREFILL_CHUNK) < length_B[:, None]
        x_BxQxD, caches = decoder(tokens_BxQ, valid_BxQ, caches, jnp.full(batch, begin))
        last_B = length_B - 1 - begin
        found_BxD = jnp.take_along_axis(
            x_BxQxD, jnp.clip(last_B, 0, PREFILL_CHUNK - 1)[:, None, None], axis=1
        )[:, 0]
        here_Bx1 = ((last_B >= 0) & (last_B < PREFILL_CHUNK))[:, None]
        return jnp.where(here_Bx1, found_BxD, x_BxD), caches

    x_BxD, caches = jax.lax.fori_loop(0, chunks, chunk, (x_BxD, caches))
    return State(tokens_BxT, length_B, stop_B, x_BxD, caches, key_B)


@partial(jax.jit, static_argnums=(2, 3, 4), donate_argnums=1)
def decode(
    decoder: Decoder, state: State, sampling: Sampling, vocabulary: int, ends: tuple[int, ...]
) -> State:
    """Generates up to `STEPS` tokens; ids from `vocabulary` on are padding and never drawn.

    A sequence stops after one of the ids `ends`.
    """
    rows = jnp.arange(len(state.length_B))

    def unfinished(carry):
        step, state = carry
        return (step < STEPS) & (state.length_B < state.stop_B).any()

    def next_token(carry):
        step, state = carry
        logits_BxV = decoder.logits(state.x_BxD)
        logits_BxV = jnp.where(jnp.arange(logits_BxV.shape[1]) < vocabulary, logits_BxV, -jnp.inf)
        keys_B = jax.vmap(jax.random.fold_in)(state.key_B, state.length_B)
        token_B = _draw(logits_BxV, sampling, keys_B)
        active_B = state.length_B < state.stop_B
        position_B = jnp.where(active_B, state.length_B, state.tokens_BxT.shape[1])
        tokens_BxT = state.tokens_BxT.at[rows, position_B].set(token_B, mode="drop")
        x_Bx1xD, caches = decoder(token_B[:, None], active_B[:, None], state.caches, state.length_B)
        length_B = state.length_B + active_B
        ends_B = (token_B[:, None] == jnp.array(ends, jnp.int32)).any(1)
        stop_B = jnp.where(active_B & ends_B, length_B, state.stop_B)
        return step + 1, State(tokens_BxT, length_B, stop_B, x_Bx1xD[:, 0], caches, state.key_B)

    return jax.lax.while_loop(unfinished, next_token, (0, state))[1]


def _draw(logits_BxV, sampling: Sampling, keys_B) -> jax.Array:
    """Draws the next token of each row, int32 [B]."""
    if sampling.temperature < COLDEST:
        return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
    logits_BxV /= min(sampling.temperature, HOTTEST)
    if 0 < sampling.top_k < logits_BxV.shape[1]:
        least_B = jax.lax.top_k(logits_BxV, sampling.top_k)[0][:, -1]
        logits_BxV = jnp.where(logits_BxV < least_B[:, None], -jnp.inf, logits_BxV)
    if sampling.top_p < 1:
        sorted_BxV = -jnp.sort(-logits_BxV)
        p_BxV = jax.nn.softmax(sorted_BxV)
        before_BxV = jnp.cumsum(p_BxV, axis=-1) - p_BxV
        kept_B = jnp.maximum((before_BxV < sampling.top_p).sum(-1), 1)
        least_Bx1 = jnp.take_along_axis(sorted_BxV, kept_B[:, None] - 1, axis=-1)
        logits_BxV = jnp.where(logits_BxV < least_Bx1, -jnp.inf, logits_BxV)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BxV).astype(jnp.int32)
