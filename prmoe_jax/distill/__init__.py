"""Distillation: teachers, the loss, recorded predictions, and students pruned from teachers."""
