"""Damaged files of strangers: every reader refuses them in one line, or reads what they hold.

There is never a traceback, a signal, a wait without an end, a look at a file outside, or numbers
that nobody checked. Longer by hand: `python -m tests.support.fuzz 1000`.
"""

import pytest

from tests.support.extras import needs_extra
from tests.support.fuzz import GOOD, Worker
from tests.support.readers import READERS

EXTRAS = {"deepspeed": needs_extra("interop", "torch")}


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    worker = Worker(tmp_path_factory.mktemp("strangers"))
    yield worker
    worker.close()


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=EXTRAS.get(name, ())) for name in READERS if READERS[name].examples],
)
def test_a_damaged_file_is_refused_in_one_line_or_read_as_it_is(name, worker):
    found = {number: worker.read(name, number) for number in range(READERS[name].examples)}
    bad = {f"{name}:{i}": outcome for i, outcome in found.items() if outcome.kind not in GOOD}
    assert not bad
