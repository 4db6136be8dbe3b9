"""Downstream tasks, scored by lm-evaluation-harness."""
