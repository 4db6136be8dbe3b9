"""What a command printed, line by line."""


def only_line(text: str) -> str:
    """The one line of a text; a failure shows all of them."""
    lines = text.splitlines()
    assert len(lines) == 1, text
    return lines[0]
