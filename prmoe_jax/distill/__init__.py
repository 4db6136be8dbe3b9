"""Distillation: the teacher, its loss, what it records, and students cut out of it."""
