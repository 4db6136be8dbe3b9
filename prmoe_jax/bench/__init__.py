"""Benchmarks that users run too: `prmoe bench`."""
