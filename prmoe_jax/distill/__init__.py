"""Distillation: teachers, the loss, recorded predictions, and students cut from a teacher."""
