"""The package's folders form floors: imports go down only, so that none is part of a circle."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import prmoe_jax
from prmoe_jax import config
from tests.repository import house

PACKAGE = Path(prmoe_jax.__file__).parent
# From the bottom up; a folder imports those before it. Modules at the package's top come first.
FLOORS = (
    "errors stores files tables boundary allocator config nn parallel moe model data run distill "
    "training inference interop tasks plan bench check sweep report cli __main__"
).split()


def imports(file: Path) -> set[str]:
    """The folders, or modules at the package's top, that a file imports, in functions too."""
    names = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file} has a relative import; write it out"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("prmoe_jax.")}


def rooms() -> dict[str, list[Path]]:
    """The files of each folder; a module at the top is a folder of its own."""
    found: dict[str, list[Path]] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        first, *rest = file.relative_to(PACKAGE).parts
        found.setdefault(first if rest else Path(first).stem, []).append(file)
    return found


def test_imports_go_down_only():
    for room, files in rooms().items():
        if room == "__init__":
            continue
        below = FLOORS[: FLOORS.index(room)]
        for file in files:
            above = imports(file) - {room, *below}
            assert not above, f"{file.relative_to(PACKAGE)} imports {above}, which is not below it"


def test_no_module_is_part_of_a_circle():
    known = house.modules()
    graph = {name: house.imported(file, known) - {name} for name, file in known.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_every_floor_is_there_and_few_modules_are_at_the_top():
    assert set(FLOORS) == rooms().keys() - {"__init__"}
    at_the_top = [file.stem for file in PACKAGE.glob("*.py") if not file.stem.startswith("__")]
    assert len(at_the_top) <= 5, at_the_top


def test_a_reader_of_the_training_step_loads_no_text_and_no_stores():
    """Nor does a program that makes one."""
    needed = house.loaded("prmoe_jax.training.step")
    assert {file.parent.name for file in needed} <= {
        *("prmoe_jax", "errors", "config", "nn", "parallel", "moe", "model", "distill", "training")
    }
    assert house.lines(needed) <= 6000
    code = "import sys, prmoe_jax.training.step; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name for name in done.stdout.split() if name.startswith("prmoe_jax")}
    assert loaded == {name for name, file in house.modules().items() if file in needed}


def test_the_check_sees_imports(tmp_path):
    """Each form of an import; else an arrow up could hide in it."""
    file = tmp_path / "module.py"
    file.write_text(
        "import os, prmoe_jax.plan.chips\n"
        "from prmoe_jax import files, sweep as many\n"
        "from prmoe_jax.moe.layer import MoE\n"
        "def late():\n    from prmoe_jax.cli import main\n"
    )
    assert imports(file) == {"plan", "files", "sweep", "moe", "cli"}
    file.write_text("from . import cli\n")
    with pytest.raises(AssertionError, match="relative import"):
        imports(file)


def test_names_that_users_files_import_from_config():
    names = ("DataConfig", "MoeConfig", "default_config", "load", "resolve", "save")
    assert all(callable(getattr(config, name)) for name in names)
    with pytest.raises(ImportError):
        exec("from prmoe_jax.config import nothing")
