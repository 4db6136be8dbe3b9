"""Decoding and text generation."""

WEIGHTS = "float32", "bfloat16", "int8"  # types in which large weights can be held
