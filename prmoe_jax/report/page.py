"""Makes one HTML file that contains its text, tables and pictures, for any screen width."""

import base64
import html
from collections.abc import Iterable
from pathlib import Path

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light; }}
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; margin: 0 auto; max-width: 1180px;
  padding: 1rem; }}
h1 {{ font-size: 1.6rem; line-height: 1.2; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.15rem; margin: 1.6rem 0 .4rem; }}
p {{ max-width: 44rem; overflow-wrap: anywhere; }}
.wide {{ overflow-x: auto; margin-bottom: 1rem; }}
table {{ border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .25rem .7rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid #ddd; }}
th:first-child, td:first-child {{ text-align: left; padding-left: 0; }}
.figures {{ display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); }}
figure {{ margin: 0; }}
img {{ width: 100%; height: auto; }}
figcaption {{ font-size: .9rem; color: #555; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def page(title: str, parts: list[str]) -> str:
    """A whole page, from parts that the functions below make."""
    return PAGE.format(title=html.escape(title), body="\n".join(parts))


def heading(text: str) -> str:
    return f"<h2>{html.escape(text)}</h2>"


def paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def table(head: Iterable, rows: Iterable[Iterable]) -> str:
    """A table whose cells are shown by `str`."""

    def line(cells, tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(c))}</{tag}>" for c in cells) + "</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    return f'<div class="wide"><table>\n{line(head, "th")}\n{body}\n</table></div>'


def figures(pictures: dict[Path, str]) -> str:
    """SVG files, each with its caption."""
    parts = []
    for path, caption in pictures.items():
        data = base64.b64encode(path.with_suffix(".svg").read_bytes()).decode()
        text = html.escape(caption)
        image = f'<img alt="{text}" src="data:image/svg+xml;base64,{data}">'
        parts.append(f"<figure>{image}<figcaption>{text}</figcaption></figure>")
    return '<div class="figures">\n' + "\n".join(parts) + "\n</div>"
