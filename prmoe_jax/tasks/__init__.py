"""Tasks that lm-evaluation-harness scores, as measures of a model beside its loss."""
