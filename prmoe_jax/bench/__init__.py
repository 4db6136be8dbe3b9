"""Benchmarks that users can run: `prmoe bench`."""
