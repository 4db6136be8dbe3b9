"""The size of the package, counted from its files.

python -m tests.repository.house    prints the table
"""

import ast
import re
from pathlib import Path

import prmoe_jax
from prmoe_jax.config.schema import declarations

PACKAGE = Path(prmoe_jax.__file__).parent


def modules() -> dict[str, Path]:
    """The package's files by the names of their modules."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imported(file: Path, known: dict[str, Path]) -> set[str]:
    """The modules that a file imports when it is imported itself."""
    names: set[str] = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names & known.keys()


def loaded(module: str) -> set[Path]:
    """The files of the package that importing a module loads."""
    known = modules()
    seen: set[str] = set()
    todo = [module]
    while todo:
        name = todo.pop()
        if name in seen or not name:
            continue
        seen.add(name)
        todo += [name.rpartition(".")[0], *imported(known[name], known)]
    return {known[name] for name in seen}


def lines(files) -> int:
    return sum(len(file.read_text().splitlines()) for file in files)


def rows() -> dict[str, str]:
    """The table: what was counted, and how much."""
    files = list(modules().values())
    text = "\n".join(file.read_text() for file in files)
    total = lines(files)
    table = {"lines of the package": f"{total:,}", "settings": str(len(declarations()))}
    for module in ("prmoe_jax.moe.layer", "prmoe_jax.training.step"):
        needed = loaded(module)
        table[f"to read {module}"] = f"{len(needed)} files, {lines(needed):,} lines"
    for word in ("raise", "except"):
        count = len(re.findall(rf"^ *{word}\b", text, re.MULTILINE))
        table[f"`{word}` in 1,000 lines"] = f"{count * 1000 / total:.1f}"
    table["`Raises:` sections"] = str(text.count(" Raises:\n"))
    return table


if __name__ == "__main__":
    for name, value in rows().items():
        print(f"{name:32}{value}")
