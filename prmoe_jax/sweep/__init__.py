"""Trains many runs that one Python file defines."""
