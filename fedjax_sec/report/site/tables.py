"""Markdown of the generated pages."""

from collections.abc import Iterable, Sequence


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown; a bar inside a cell is escaped.

    >>> print(table(("a", "b"), [("1", "x | y")]))
    | a | b |
    | --- | --- |
    | 1 | x \\| y |
    """
    lines = [columns, ["---"] * len(columns)]
    lines += [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def code(text: str) -> str:
    """A text as code, empty where it is empty.

    >>> code("1.0"), code("")
    ('`1.0`', '')
    """
    return f"`{text}`" if text else ""
