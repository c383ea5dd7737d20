"""Puts a page together: templates, rows, charts and the library that draws them, in one file."""

import datetime
import json
from pathlib import Path
from typing import Any

from fedjax_sec.core import files
from fedjax_sec.core.optional import require
from fedjax_sec.report.page import charts, comparison, facts, rows
from fedjax_sec.report.page.folder import read
from fedjax_sec.report.page.pictures import pictures

_HERE = Path(__file__).parent


def check_packages() -> None:
    """Raises `ConfigError` where a package of the extra `[report]` is absent."""
    for package in ("altair", "vl_convert", "jinja2"):
        require(package, "A page of results")


def write_one(path: str | Path, out: Path, with_pictures: bool = True) -> Path:
    """Writes the page of one folder; the folder may be unfinished.

    Args:
      path: of a run, a sweep, an arena or a paper, or a folder of runs.
      out: the page.
      with_pictures: whether data sets are read to draw poisoned examples.

    Returns: the page's path. Raises: `ConfigError` for a folder without runs.
    """
    check_packages()
    folder = read(path)
    content = rows.content(folder)
    drawn = pictures(folder.cells) if with_pictures else []
    headline = content["metrics"][0]["name"].replace("_", " ")
    known = {"title": folder.path.name, "pictures": drawn, "headline": headline}
    return _write(out, "single", content, charts.of_one(), known | facts.of(folder))


def write_two(first: str | Path, second: str | Path, out: Path) -> tuple[Path, str]:
    """Writes the page of two folders side by side.

    Returns: the page's path, and in a sentence how many cells differ by more than the spread.
    Raises: `ConfigError` for folders without runs, or without a common cell.
    """
    check_packages()
    folders = read(first), read(second)
    content = comparison.content(*folders)
    known = comparison.facts(*folders) | {
        "title": f"{folders[0].path.name} (A) and {folders[1].path.name} (B)",
        "lines": [
            f"{name}: {' - '.join(facts.lines(folder))}"
            for name, folder in zip("AB", folders, strict=True)
        ],
        "fewest": comparison.T_TEST,
        "ranks": comparison.WILCOXON,
        "level": comparison.LEVEL,
    }
    return _write(out, "comparison", content, charts.of_two(), known), comparison.said(content)


def _write(out: Path, name: str, content: dict, specs: dict, known: dict[str, Any]) -> Path:
    """Fills the template `NAME.html`; what its script reads is `content` with the charts."""
    jinja2, markup = require("jinja2", "A page of results"), require("markupsafe", "A page")
    styles = {"colours": charts.COLOURS, "dashes": charts.DASHES, "shapes": charts.SHAPES}
    held = json.dumps({**content, "charts": specs, "styles": styles}, separators=(",", ":"))
    script = "\n".join((_HERE / f"{part}.js").read_text() for part in ("common", name))
    pieces = {
        "style": (_HERE / "style.css").read_text(),
        "library": require("vl_convert", "A page of results").javascript_bundle(),
        "script": f"(() => {{\n{script}\n}})();",
        "rows": held.replace("<", "\\u003c"),  # nothing in it ends the element
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    written = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    text = environment.get_template(f"{name}.html").render(
        known,
        written=written,
        **{key: markup.Markup(piece) for key, piece in pieces.items()},
    )
    files.check_writable(out.absolute().parent)
    files.write_atomically(out, text)
    return out
