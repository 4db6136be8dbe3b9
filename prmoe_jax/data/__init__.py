"""Text to token windows: corpora, tokenizers, the token cache and the input pipeline."""
