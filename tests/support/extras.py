"""Tests that need an optional package; `make test-extras` runs them."""

import importlib.util

import pytest


def needs_extra(extra: str, package: str) -> pytest.MarkDecorator:
    """Skips a test where a package of an extra of setup.py is not installed.

    `conftest.py` knows such tests by the reason, and marks them `extra`.
    """
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"needs the extra [{extra}]")
