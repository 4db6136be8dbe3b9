"""Benchmarks that users can run: `prmoe bench`."""

LOADS = "uniform", "zipf"  # how tokens choose experts in `prmoe bench moe`
