"""The Mixture-of-Experts layer: route, dispatch, experts, combine, residual MLP."""
