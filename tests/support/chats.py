"""Chat templates, a tokenizer with a chat's markup, and chats as JSON lines."""

import json

import tokenizers

from prmoe_jax.data import chat
from prmoe_jax.data.template import ChatTemplate
from prmoe_jax.data.tokenizer import Tokenizer
from tests.support.tokenizers import byte_tokenizer

START, END = 257, 258  # the ids of the markup, after <|endoftext|>

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
    "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim "
    "+ '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != "
    "(loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate!') }}"
    "{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token}}"
    "{% endif %}{% endfor %}"
)
PHI3 = (
    "{{ bos_token }}{% for message in messages %}{{'<|' + message['role'] + '|>' + '\n' + "
    "message['content'] + '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


def template(source=CHATML, **texts) -> ChatTemplate:
    return ChatTemplate(source, texts)


def chat_tokenizer(*marks: str, ends=(END,)) -> Tokenizer:
    """A token for each byte, <|endoftext|>, and special tokens; documents end as a turn does."""
    inner = tokenizers.Tokenizer.from_str(byte_tokenizer().description)
    inner.add_special_tokens(list(marks or ("<|im_start|>", "<|im_end|>")))
    return Tokenizer(inner.to_str(), "chat", ends)


def turns(*texts: str) -> list[dict]:
    """A user's and an assistant's messages, in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": x} for i, x in enumerate(texts)]


def parsed(**fields) -> chat.Chat:
    return chat.parse(fields, "chat.jsonl:1")


def write_model(folder, source=CHATML):
    """A folder with a tokenizer.json and its template; returns the tokenizer's path."""
    folder.mkdir()
    chat_tokenizer().save(folder / "tokenizer.json")
    (folder / "chat_template.jinja").write_text(source)
    return folder / "tokenizer.json"


def write_lines(path, *lines: dict):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
