"""The training loop, its steps, the optimizer, evaluation, and runs that start as another run."""
