"""Benchmarks that users can run: `prmoe bench`."""

LOADS = "uniform", "zipf", "skewed"  # how tokens choose experts in `prmoe bench moe`
