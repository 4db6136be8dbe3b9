"""What every test needs."""

import logging
import os
import random
import signal
import sys
import threading
import time
from importlib import metadata
from pathlib import Path

import pytest

# Many tests start the same small run anew, some in a process of their own: compile it once, and
# keep the programs for the next time. What nobody used for a week goes.
# Set before JAX is imported; the workers of pytest-xdist and subprocesses inherit it.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    kept = Path(__file__).parent.parent / ".cache"
    programs = kept / "programs"
    programs.mkdir(parents=True, exist_ok=True)
    for file in programs.iterdir():
        if time.time() - file.stat().st_atime > 7 * 24 * 3600:
            file.unlink(missing_ok=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(programs)
    # DeepSpeed compiles, too, and waits for ever for a process that was killed meanwhile.
    for lock in kept.glob("torch/**/lock"):
        lock.unlink()
    os.environ["TORCH_EXTENSIONS_DIR"] = str(kept / "torch")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
# What the command line would keep in a file is shown.
os.environ["PRMOE_TRACEBACK"] = "1"
# Random draws compile in a seventh of the time (see `sharding.init_sharded`), and training steps in
# half with XLA's older code for fusions, which newer releases of JAX lack: their XLA stops at the
# unknown flag. `make test-extras` has the code that users have.
FLAGS = "--xla_backend_optimization_level=1"
if metadata.version("jax").startswith("0.10."):
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", FLAGS)

# A shell starts what runs in the background with Ctrl-C ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A failed assertion of a helper shows its values, as one of a test does.
pytest.register_assert_rewrite("tests.support")


def pytest_collection_modifyitems(items):
    """Marks the tests that say they need an extra: `pytest -m extra` runs them."""
    for item in items:
        reasons = [mark.kwargs.get("reason", "") for mark in item.iter_markers("skipif")]
        if any(reason.startswith("needs the extra [") for reason in reasons):
            item.add_marker("extra")


@pytest.fixture(autouse=True)
def several_arenas(monkeypatch):
    """What speeds up long runs in a process of their own slows down a process of many compiles."""
    monkeypatch.setattr("prmoe_jax.allocator.keep_freed_memory", lambda: None)


@pytest.fixture(autouse=True)
def garbage_is_not_this_tests(monkeypatch):
    """An error in a destructor or a thread becomes pytest's warning, without our own report.

    It may be an earlier test's, and the report would be among the lines that this test prints.
    """
    monkeypatch.setattr("prmoe_jax.boundary._thread_failed", threading.excepthook)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr("prmoe_jax.boundary._report_unraisable", sys.unraisablehook)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)


@pytest.fixture(autouse=True)
def logs_reach_caplog():
    """The command line gives the package a handler of its own; tests want to see its records."""
    logger = logging.getLogger("prmoe_jax")
    yield
    logger.handlers, logger.propagate = [], True


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder of documents with something to learn, and a cache beside it."""
    folder = tmp_path_factory.mktemp("text")
    rng = random.Random(0)
    words = "the expert of a token is chosen by its router and so on".split()
    for i in range(40):
        (folder / f"{i}.txt").write_text(f"{i}: " + " ".join(rng.choices(words, k=300)))
    return folder, tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def object_store():
    """An object store in a process of its own, which clients in this process and others find."""
    from tests.support.object_store import ObjectStore

    with ObjectStore() as store:
        yield store
