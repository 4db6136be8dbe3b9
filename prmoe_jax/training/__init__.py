"""The training loop, its steps, the optimizer, evaluation, and runs initialised from other runs."""
