"""Tables and code of the documentation's pages, for tests that hold them to the package."""

import re
from pathlib import Path
from typing import NamedTuple

DOCS = Path(__file__).parents[1] / "docs"


class Table(NamedTuple):
    """A table: the section that it stands in, its header, and its rows of cells."""

    section: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def column(self, name: str) -> dict[str, str]:
        """Name in the first cell's code -> the cell of a column."""
        at = self.header.index(name)
        return {code(row[0])[0]: row[at] for row in self.rows}


def tables(page: str) -> list[Table]:
    """The tables of a page below `docs/`, in order."""
    result, section, lines = [], "", (DOCS / page).read_text().splitlines()
    block: list[tuple[str, ...]] = []
    for line in [*lines, ""]:
        if line.startswith("|"):
            block.append(tuple(cell.strip() for cell in line.strip("|").split("|")))
            continue
        if block:
            result.append(Table(section, block[0], tuple(block[2:])))
            block = []
        if line.startswith("#"):
            section = line.lstrip("# ")
    return result


def code(cell: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`]+)`", cell)


def section(page: str, title: str) -> str:
    """The text below a heading, up to the next one."""
    return (DOCS / page).read_text().partition(f"## {title}\n")[2].partition("\n## ")[0]


def between(page: str, name: str) -> str:
    """What stands between `<!-- name -->` and `<!-- end -->`."""
    inside = (DOCS / page).read_text().partition(f"<!-- {name} -->")[2]
    return inside.partition("<!-- end -->")[0].strip()
