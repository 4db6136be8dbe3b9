"""Decoding and text generation."""

WEIGHTS = "float32", "bfloat16", "int8"  # the types that large weights are held in
