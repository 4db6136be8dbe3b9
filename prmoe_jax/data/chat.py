"""Documents of a chat: JSON lines with `messages`, or with a `prompt` and its `completion`."""

import json
from typing import Any

from prmoe_jax.errors import UserError

ANSWER = "assistant"  # the role whose messages carry the loss


class Chat(str):
    """A chat as the JSON of its fields, by which documents are compared and split.

    `place` names its line in messages.
    """

    place: str

    @property
    def fields(self) -> dict[str, Any]:
        return json.loads(self)

    @property
    def contents(self) -> str:
        """What is said, as plain text."""
        fields = self.fields
        said = [fields[name] for name in _names(fields)]
        texts = [part if isinstance(part, str) else _contents(part) for part in said]
        return "".join(texts) if isinstance(said[0], str) else "\n".join(texts)


def plain(document: str) -> str:
    """A document as plain text, for what reads text alone."""
    return document.contents if isinstance(document, Chat) else document


def parse(example: dict[str, Any], place: str) -> Chat | None:
    """The chat of a JSON line; None if it is none.

    `prompt` and `completion` are both text, or both lists of messages.
    """
    names = _names(example)
    if not names:
        return None
    values = [example[name] for name in names]
    if not (len(names) == 2 and all(isinstance(value, str) for value in values)):
        for name, value in zip(names, values, strict=True):
            if not isinstance(value, list) or not all(map(_is_message, value)):
                raise UserError(
                    f"{place}: field {name!r} is not a list of messages, each with a role"
                )
        if all(message["role"] != ANSWER for message in values[-1]):
            raise UserError(
                f"{place}: field {names[-1]!r} has no message of the role {ANSWER!r}, and only "
                "those carry the loss; leave the line out"
            )
    kept = {name: example[name] for name in (*names, "tools") if example.get(name) is not None}
    chat = Chat(json.dumps(kept, ensure_ascii=False))
    chat.place = place
    return chat


def _names(fields: dict[str, Any]) -> tuple[str, ...]:
    if "messages" in fields:
        return ("messages",)
    pair = ("prompt", "completion")
    return pair if all(name in fields for name in pair) else ()


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str)


def _contents(messages: list[dict[str, Any]]) -> str:
    return "\n".join(str(message.get("content") or "") for message in messages)
