"""Tokenizers that need no corpus."""

import tokenizers
from tokenizers.processors import TemplateProcessing

from prmoe_jax.config.schema import DataConfig
from prmoe_jax.data.tokenizer import Tokenizer, load_given


def byte_tokenizer() -> Tokenizer:
    """A token for each byte, and the end of text."""
    return load_given(DataConfig(tokenizer="bytes"))


def started_tokenizer() -> Tokenizer:
    """The same with another token, 257, before a text, as in Llama's tokenizer.json."""
    inner = tokenizers.Tokenizer.from_str(byte_tokenizer().description)
    inner.add_special_tokens(["<s>"])
    inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 257)])
    return Tokenizer(inner.to_str(), "bytes with a start")
