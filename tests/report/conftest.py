"""Figures are drawn on axes that a test can look at."""

import contextlib

import pytest
from matplotlib.figure import Figure

from prmoe_jax.report import figures


@pytest.fixture
def drawn(monkeypatch):
    """The axes that are drawn on, and instead of pictures nearly empty files."""
    found = []

    @contextlib.contextmanager
    def figure(path, *size):
        found.append(Figure().subplots(size[1] if size[1:] else 1))
        yield found[-1]
        if path.name:
            path.with_suffix(".svg").write_text("<svg/>")

    monkeypatch.setattr(figures, "figure", figure)
    return found
