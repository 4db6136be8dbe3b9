"""All messages of the package for its users, to be read as prose.

python -m tests.repository.messages    writes tests/goldens/messages.txt again
"""

import ast
from pathlib import Path

from tests.repository import house

GOLDEN = Path(__file__).parent.parent / "goldens" / "messages.txt"
# The arguments that hold text, of the functions that make a message.
TEXTS = {
    "UserError": (0,),
    "TrainingStopped": (0,),
    "CheckFailed": (0,),
    "Damaged": (0,),
    "require": (1,),
    "refusing": (0, 2, "fix"),
    "telling": (0, 1, "before", "fix"),
    "missing": (0, 1),
}


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(
            f"{{{ast.unparse(part.value)}}}" if isinstance(part, ast.FormattedValue) else part.value
            for part in node.values
        )
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return f"{{{ast.unparse(node)}}}"


def messages(file: Path) -> list[str]:
    """The messages of a file, in their order, with the code of what is filled in."""
    tree = ast.parse(file.read_text())
    assigned = [
        (node.lineno, target.id, node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant | ast.JoinedStr)
        for target in node.targets
        if isinstance(target, ast.Name)
    ]

    def meant(value: ast.expr, line: int) -> ast.expr:
        """The text that a name was given last before a line; anything else as it is."""
        name = value.id if isinstance(value, ast.Name) else None
        before = [(at, text) for at, other, text in assigned if other == name and at < line]
        return max(before, key=lambda found: found[0])[1] if before else value

    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            continue
        if node.func.id not in TEXTS:
            continue
        wanted = TEXTS[node.func.id]
        values = [value for i, value in enumerate(node.args) if i in wanted]
        values += [keyword.value for keyword in node.keywords if keyword.arg in wanted]
        texts = [_text(meant(value, node.lineno)) for value in values]
        found.append((node.lineno, node.col_offset, "; ".join(filter(None, texts))))
    return [text for _, _, text in sorted(found) if text]


def collected() -> str:
    parts = []
    for file in house.modules().values():
        if lines := messages(file):
            name = file.relative_to(house.PACKAGE)
            parts.append("\n".join([f"# {name}", *lines]))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    GOLDEN.write_text(collected())
