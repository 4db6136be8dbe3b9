"""Imports models from other libraries, and exports models to them."""
