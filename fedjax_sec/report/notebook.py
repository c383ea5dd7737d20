"""Tables of a sweep or an arena as a notebook shows them."""

import html
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


def page(
    title: str, sections: Iterable[tuple[str, str, "pd.DataFrame"]], refused: Iterable[str] = ()
) -> str:
    """A title, sections of (heading, what it is, table), and what was refused, as HTML.

    >>> import pandas as pd
    >>> page("A < B", [("Head", "Text.", pd.DataFrame({"a": ["1"]}))])[:53]
    '<p><b>A &lt; B</b></p><h4>Head</h4><p>Text.</p><table'
    """
    parts = [f"<p><b>{html.escape(title)}</b></p>"]
    for heading, said, table in sections:
        parts.append(f"<h4>{html.escape(heading)}</h4><p>{html.escape(said)}</p>{table.to_html()}")
    lines = [f"<li>{html.escape(one)}</li>" for one in refused]
    if lines:
        parts.append(f"<h4>Refused</h4><ul>{''.join(lines)}</ul>")
    return "".join(parts)
