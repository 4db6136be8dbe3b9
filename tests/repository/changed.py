"""The tests of what git says has changed: python -m tests.repository.changed.

They are those of the folders with changed files, and of the folders that import these files.
"""

import subprocess
from pathlib import Path

from tests.repository import house

TESTS = house.PACKAGE.parent / "tests"


def changed() -> set[Path]:
    """The files that differ from the last commit, or are new."""
    commands = "git diff --name-only HEAD", "git ls-files --others --exclude-standard"
    lines = [
        subprocess.check_output(line.split(), cwd=TESTS.parent, text=True) for line in commands
    ]
    return {TESTS.parent / line for line in "".join(lines).splitlines()}


def tests_of(files: set[Path]) -> list[Path]:
    """Folders and files of tests, for changed files of the package or of the tests."""
    known = house.modules()
    names = {name for name, file in known.items() if file in files}
    rooms = {
        file.relative_to(house.PACKAGE).parts[0].removesuffix(".py")
        for file in known.values()
        if file in files or names & house.imported(file, known)
    }
    own = {file for file in files if file.is_relative_to(TESTS) and file.match("test_*.py")}
    chosen = {TESTS / room for room in rooms} | {TESTS / f"test_{room}.py" for room in rooms}
    return sorted(path for path in chosen | own if path.exists() and path.parent not in chosen)


if __name__ == "__main__":
    print(*tests_of(changed()))
