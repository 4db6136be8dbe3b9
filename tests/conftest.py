"""What every test needs."""

import logging
import os
import tempfile

import pytest

# Many tests start the same small run anew, some in a process of their own: compile it once.
# Set before JAX is imported; the workers of pytest-xdist and subprocesses inherit it.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="prmoe-tests-"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


@pytest.fixture(autouse=True)
def several_arenas(monkeypatch):
    """What speeds up long runs in a process of their own slows down a process of many compiles."""
    monkeypatch.setattr("prmoe_jax.cli.keep_freed_memory", lambda: False)


@pytest.fixture(autouse=True)
def logs_reach_caplog():
    """The command line gives the package a handler of its own; tests want to see its records."""
    logger = logging.getLogger("prmoe_jax")
    yield
    logger.handlers, logger.propagate = [], True
