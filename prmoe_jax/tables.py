"""Tables of text for the terminal."""

import io
import itertools
from collections.abc import Iterable, Sequence


def aligned(
    head: Sequence[str], rows: Iterable[Sequence[object]], texts: Sequence[int] = (0,)
) -> str:
    """A text table, as wide as its cells need; columns not in `texts` are aligned to the right."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
    for i, name in enumerate(head):
        table.add_column(Text(name), justify="left" if i in texts else "right", no_wrap=True)
    for row in rows:
        # Text keeps rich from reading brackets as a style.
        table.add_row(*[Text(str(cell)) for cell in row])
    text = io.StringIO()
    Console(file=text, width=1000, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def blocks(
    rows: Iterable[dict], title: str, columns: dict[str, str], texts: Sequence[int] = (0,)
) -> str:
    """Text tables, one for each group of consecutive rows with the same title.

    `title` and the values of `columns` by the columns' heads are format strings of a row's values.
    """
    parts = []
    for name, some in itertools.groupby(rows, lambda row: title.format(**row)):
        cells = [[shown.format(**row) for shown in columns.values()] for row in some]
        parts.append(f"{name}\n{aligned(list(columns), cells, texts)}")
    return "\n\n".join(parts)
