"""The training loop and its steps, the optimizer, evaluation, and runs that start as others."""
