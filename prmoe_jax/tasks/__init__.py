"""Tasks: what a model scores beside its loss, by lm-evaluation-harness."""
