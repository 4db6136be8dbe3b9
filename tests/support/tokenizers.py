"""Tokenizers that need no corpus."""

from prmoe_jax.config import DataConfig
from prmoe_jax.data.corpora import Corpus
from prmoe_jax.data.tokenizer import Tokenizer, load_tokenizer


def byte_tokenizer() -> Tokenizer:
    """A token for each byte, and the end of text."""
    return load_tokenizer(DataConfig(tokenizer="bytes"), 257, Corpus("none", dict))
