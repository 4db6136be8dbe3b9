"""Chat templates: from messages to token ids, and which of these carry the loss.

A template is a program of its model's publisher in Jinja, which runs in Jinja's sandbox, with what
transformers offers it. Special tokens come from the template alone: in the messages, their texts
are replaced before it runs, and are plain text again behind it.
"""

import dataclasses
import datetime
import functools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from prmoe_jax.data import cache, released
from prmoe_jax.data.chat import ANSWER, Chat
from prmoe_jax.data.tokenizer import Tokenizer
from prmoe_jax.errors import UserError, refusing

# Characters for private use, which replace the texts of special tokens in messages.
_PRIVATE = range(0xF0000, 0x10FFFE)
# The day for templates that write it. Tokens must not depend on the day on which they are made.
# It is the default of Llama's templates.
_DAY = datetime.datetime(2024, 7, 26)


class Tokens(NamedTuple):
    """The tokens of a chat, after the EOS before it."""

    ids: list[int]
    loss: list[bool]  # for each id, and for the document's end mark behind them
    apart: bool  # whether the ids begin with a start of their own, so that no BOS belongs there
    text_bytes: int  # UTF-8 bytes of the text that carries loss


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A chat template, with the texts of special tokens that it may name (`bos_token`)."""

    source: str
    texts: dict[str, str]

    @property
    def fingerprint(self) -> str:
        return cache.fingerprint(self.source, self.texts)

    @property
    def files(self) -> dict[str, str]:
        """The files, by name, in which `find` finds the template."""
        return {released.TEMPLATE: self.source, released.SPECIAL: json.dumps(self.texts)}

    def prompt(self, messages: Sequence[dict], tokenizer: Tokenizer) -> list[int]:
        """The ids of messages and of the beginning of an answer, today."""
        guard = _Guard(tokenizer, [self.source, self.texts, messages])
        today = datetime.datetime.now()
        text = self._render(guard.guarded(messages), None, True, today, "a prompt")
        return guard.encode(text, ())[0]

    def encode(self, chat: Chat, tokenizer: Tokenizer) -> Tokens:
        """The tokens of a chat.

        An answer is what its message adds to the rendering of those before it, with the beginning
        of an answer. If a token spans the beginning or the end of an answer, it belongs to what
        follows.
        """
        fields = chat.fields
        prompt = fields.get("prompt", [])
        guard = _Guard(tokenizer, [self.source, self.texts, fields])
        messages = guard.guarded([*prompt, *fields.get("messages", fields.get("completion"))])
        tools = guard.guarded(fields.get("tools"))

        def render(count: int, starts_answer: bool) -> str:
            return self._render(messages[:count], tools, starts_answer, _DAY, chat.place)

        text, cuts = render(len(messages), False), []
        for i, message in enumerate(messages[len(prompt) :], len(prompt)):
            if message["role"] == ANSWER:
                before, until = render(i, True), render(i + 1, False)
                if not (until.startswith(before) and text.startswith(until)):
                    raise UserError(
                        f"{chat.place}: the chat template doesn't write message {i + 1}, an "
                        "answer, right behind its generation prompt, or writes it in another way "
                        "if other messages follow; the loss on answers needs a template that does "
                        f"neither, such as a changed {released.TEMPLATE}"
                    )
                cuts += [len(before), len(until)]
        ids, counts = guard.encode(text, cuts)
        loss, size = [False] * (len(ids) + 1), 0
        for i in range(0, len(cuts), 2):
            first, last = counts[i : i + 2]
            loss[first:last] = [True] * (last - first)
            size += len(guard.plain(text[cuts[i] : cuts[i + 1]]).encode())
        return Tokens(ids, loss, True, size)

    def _render(self, messages, tools, starts_answer: bool, day, place: str) -> str:
        with refusing(f"{place}: the chat template refuses it"):  # it is a program of others
            return _compiled(self.source).render(
                **self.texts,
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=starts_answer,
                strftime_now=day.strftime,
            )


def encode(chat: Chat, tokenizer: Tokenizer, template: ChatTemplate | None) -> Tokens:
    """The tokens of a chat; text as prompt and completion needs no template."""
    fields = chat.fields
    if isinstance(prompt := fields.get("prompt"), str):
        before = tokenizer.encode(prompt) if prompt else []
        ids = (tokenizer.continuing if prompt else tokenizer).encode(fields["completion"])
        loss = [False] * len(before) + [True] * (len(ids) + 1)
        return Tokens(before + ids, loss, False, len(fields["completion"].encode()))
    if template is None:
        raise UserError(
            f"{chat.place}: messages need a chat template, and none lies beside the tokenizer; set "
            "--config.data.tokenizer to the tokenizer.json of a chat model's or an imported run's "
            f"folder, or put a {released.TEMPLATE} beside it"
        )
    return template.encode(chat, tokenizer)


def find(tokenizer: Path) -> ChatTemplate | None:
    """The template beside a tokenizer.json, in a model's folder or a run's; None without one."""
    folders = (tokenizer.parent, tokenizer.parent / released.FOLDER) if tokenizer.is_file() else ()
    for folder in folders:
        names = released.TOKENIZER, released.SPECIAL, released.TEMPLATE
        if found := of_files(released.read(folder, names)):
            return found
    return None


def of_files(kept: dict[str, str]) -> ChatTemplate | None:
    """The template in the files of a released model, as `released.read` gives them."""
    settings = released.settings(kept, released.TOKENIZER)
    source = settings.get("chat_template")
    if isinstance(source, list):  # several by name
        several = [one for one in source if isinstance(one, dict)]
        source = next((one.get("template") for one in several if one.get("name") == "default"), "")
    source = kept.get(released.TEMPLATE, source)
    if not isinstance(source, str) or not source:
        return None
    texts = {}
    for name, value in (settings | released.settings(kept, released.SPECIAL)).items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and name in source and isinstance(text, str):
            texts[name] = text
    return ChatTemplate(source, texts)


class _Generation(Extension):
    """The tag `generation`, in which some templates put answers: its content is written."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    """The compiled template, with the settings and functions that transformers gives it."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    return environment.from_string(source)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """JSON without the escapes for HTML that Jinja's own filter has."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)  # fmt: skip


def _raise_exception(message: str):
    raise jinja2.TemplateError(message)


class _Patterns(NamedTuple):
    special: re.Pattern  # a special token, with the white space that it takes up
    forged: re.Pattern  # in a message: such a text, or a part of one at the message's edge


@functools.lru_cache(maxsize=8)
def _patterns(tokenizer: Tokenizer) -> _Patterns:
    white = r"\s*"

    def any_of(texts: Iterable[str]) -> str:
        longest_first = sorted(set(texts), key=len, reverse=True)
        return f"(?:{'|'.join(map(re.escape, longest_first)) or '(?!)'})"

    special = (
        f"{white * one.get('lstrip', False)}{re.escape(text)}{white * one.get('rstrip', False)}"
        for text, one in sorted(tokenizer.special.items(), key=lambda item: -len(item[0]))
    )
    # Words are no markup: a text such as "user" may begin or end as a special token does.
    begins = (t[:i] for t in tokenizer.special if not t[0].isalnum() for i in range(1, len(t)))
    ends = (t[i:] for t in tokenizer.special if not t[-1].isalnum() for i in range(1, len(t)))
    edges = rf"\A{any_of(ends)}|{any_of(begins)}\Z"
    return _Patterns(
        re.compile("|".join(special)), re.compile(f"{any_of(tokenizer.special)}|{edges}")
    )


class _Guard:
    """Keeps special tokens in messages apart from those of the template.

    Each text of a special token in a message becomes one character that occurs nowhere else. So
    does the beginning of such a text at a message's end, and its end at a message's beginning:
    else two texts side by side could make a special token.
    """

    def __init__(self, tokenizer: Tokenizer, used: Any):
        self._tokenizer, self._patterns = tokenizer, _patterns(tokenizer)
        self._texts: dict[int, str] = {}  # what each character stands for
        taken = set(json.dumps(used, ensure_ascii=False))
        self._free = (chr(code) for code in _PRIVATE if chr(code) not in taken)
        self._names: dict[str, str] = {}

    def guarded(self, value: Any) -> Any:
        """A value of JSON with all its texts guarded."""
        if isinstance(value, str):
            inner = value.strip()  # templates strip messages, too
            first = value.find(inner)
            guarded = self._patterns.forged.sub(self._name, inner)
            return value[:first] + guarded + value[first + len(inner) :]
        if isinstance(value, dict):
            return {self.guarded(name): self.guarded(one) for name, one in value.items()}
        return [self.guarded(one) for one in value] if isinstance(value, list) else value

    def _name(self, found: re.Match) -> str:
        if found[0] not in self._names:
            self._names[found[0]] = name = next(self._free)
            self._texts[ord(name)] = found[0]
        return self._names[found[0]]

    def plain(self, text: str) -> str:
        """A rendered text without the template's special tokens."""
        return self._patterns.special.sub("", text).translate(self._texts)

    def encode(self, text: str, cuts: Sequence[int]) -> tuple[list[int], list[int]]:
        """The ids of a rendered text, and how many of them are before each place in `cuts`."""
        ids: list[int] = []
        counts = [0] * len(cuts)
        for first, last, special in self._pieces(text):
            found = self._encoded(text, first, last) if special is None else [special]
            for i, cut in enumerate(cuts):
                if special is None and first < cut < last:
                    counts[i] += _common(found, self._encoded(text, first, cut))
                else:
                    counts[i] += len(found) * (first < cut)
            ids += found
        return ids, counts

    def _encoded(self, text: str, first: int, last: int) -> list[int]:
        """The ids of a part of a text that has no special token."""
        tokenizer = self._tokenizer.continuing if first else self._tokenizer
        return tokenizer.encode(text[first:last].translate(self._texts))

    def _pieces(self, text: str) -> Iterator[tuple[int, int, int | None]]:
        """Where each piece of a text begins and ends, and its id if it is a special token."""
        behind = 0
        for found in self._patterns.special.finditer(text):
            if behind < found.start():
                yield behind, found.start(), None
            behind = found.end()
            yield found.start(), behind, self._tokenizer.special[found[0].strip()]["id"]
        if behind < len(text):
            yield behind, len(text), None


def _common(first: list[int], second: list[int]) -> int:
    """The number of ids with which two lists begin alike."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (one, other) in pairs if one != other), min(len(first), len(second)))
