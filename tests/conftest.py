"""What every test needs."""

import logging

import pytest


@pytest.fixture(autouse=True)
def logs_reach_caplog():
    """The command line gives the package a handler of its own; tests want to see its records."""
    logger = logging.getLogger("prmoe_jax")
    yield
    logger.handlers, logger.propagate = [], True
