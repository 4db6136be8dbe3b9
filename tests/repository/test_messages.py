"""What the package says to its users, all of it, as one file that a reviewer reads."""

import pytest

from tests.repository import changed, house, messages

PACKAGE = house.PACKAGE


def test_every_message_was_read():
    """Run python -m tests.repository.messages, and read the difference as prose."""
    assert messages.collected() == messages.GOLDEN.read_text()


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("raise UserError(f'--n={n} is {2}' + ' or more')", ["--n={n} is {2} or more"]),
        ("def f():\n line = f'no {x}'\n raise UserError(line) from None", ["no {x}"]),
        (
            "with refusing(f'{path} is bad', ValueError, fix='copy it'): pass",
            ["{path} is bad; copy it"],
        ),
        ("a = 'b'\nUserError(a)\na = 'c'\nUserError(a)", ["b", "c"]),
        ("require(n > 0, 'b')\nrequire(\n n > 1, 'a')", ["b", "a"]),
        ("raise ValueError('nothing for users')", []),
    ],
)
def test_a_message_and_what_is_filled_in(code, found, tmp_path):
    (file := tmp_path / "module.py").write_text(code)
    assert messages.messages(file) == found


def test_tests_of_a_change():
    chosen = {
        str(path.relative_to(changed.TESTS))
        for path in changed.tests_of({PACKAGE / "moe/kernels.py", changed.TESTS / "test_files.py"})
    }
    assert {"moe", "test_files.py"} <= chosen  # its own, and the changed test
    assert "data" not in chosen
    assert changed.tests_of({changed.TESTS / "data/test_cache.py"}) == [
        changed.TESTS / "data/test_cache.py"
    ]
    assert changed.TESTS / "test_files.py" in changed.tests_of({PACKAGE / "files.py"})
    assert changed.tests_of({PACKAGE.parent / "README.md"}) == []
