"""Decoding and text generation."""
