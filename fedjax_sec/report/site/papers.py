"""A page for each paper: its items, options, commands, settings and published numbers."""

import inspect
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from fedjax_sec.core import shipped
from fedjax_sec.report.paper import SCALES, SCHEMA, Option, Paper, published_lines
from fedjax_sec.report.site.tables import code, table

FOLDER = "papers"
#: Folders of `configs/` that belong to no paper.
_OTHERS = ("demo", "flower")


def pages(papers: Iterable[Paper], docs: Path) -> Iterator[tuple[str, str]]:
    """(path, Markdown) of each paper's page and of their list; `docs` holds `results/`."""
    rows = []
    for name, paper in _all(papers).items():
        title, text = _heading(name, paper, docs)
        results = f"../{_results(name)}" if (docs / _results(name)).is_file() else ""
        yield f"{FOLDER}/{name}.md", page(name, paper, title, text, results)
        command = code(f"fedjax-sec paper {name}") if paper else ""
        first = text.partition("\n\n")[0].replace("\n", " ")
        link = f"[results]({results})" if results else ""
        rows.append((f"[{title}]({name}.md)", first, command, link))
    said = (
        "One page for each paper whose tables and figures are regenerated here: the items, the "
        "commands, the settings and the published numbers. The commands are explained in the "
        "[guide](../guide/papers.md)."
    )
    columns = ("paper", "content", "command", "committed")
    yield f"{FOLDER}/index.md", f"# Papers\n\n{said}\n\n{table(columns, rows)}\n"


def navigation(papers: Iterable[Paper], docs: Path) -> list:
    """The entries of the site's navigation."""
    known = _all(papers).items()
    entries = [{_heading(name, one, docs)[0]: f"{FOLDER}/{name}.md"} for name, one in known]
    return [f"{FOLDER}/index.md", *entries]


def _all(papers: Iterable[Paper]) -> dict[str, Paper | None]:
    """The papers by name; None for those that have settings and results without a command."""
    known = {paper.name: paper for paper in papers}
    folders = {path.name for path in shipped.configs_folder().iterdir() if path.is_dir()}
    return {name: known.get(name) for name in sorted({*known, *folders} - {*_OTHERS})}


def _results(name: str) -> str:
    return f"results/{name}/README.md"


def _heading(name: str, paper: Paper | None, docs: Path) -> tuple[str, str]:
    """The title, and what the module says of the paper, or else the heading of its results."""
    if paper is not None:
        return paper.title, inspect.cleandoc(sys.modules[paper.module].__doc__ or "")
    text = (docs / _results(name)).read_text().partition("\n")[0].removeprefix("# ")
    return text.partition(":")[0].replace("*", ""), f"{text}."


def page(name: str, paper: Paper | None, title: str, text: str, results: str) -> str:
    """The page of one paper, in Markdown; `results` leads to the committed ones, if it has any."""
    parts = [f"# {title}", text]
    if results:
        parts.append(f"Committed results, with command and device: [results]({results}).")
    if paper is not None:
        parts += _command(paper)
    parts += ["## Settings", *_settings(name)]
    if paper is not None and (lines := published_lines(paper.module)):
        rows = [[line[key] for key in SCHEMA] for line in lines]
        said = f"{len(lines)} numbers as the paper prints them."
        parts += ["## Published numbers", said, table(SCHEMA, rows)]
    return "\n\n".join(filter(None, parts)) + "\n"


def _command(paper: Paper) -> list[str]:
    numbers = Counter(line["item"] for line in published_lines(paper.module))
    needed = "".join(
        f" --{_flag(option)} {option.values[0]}" for option in paper.options if not option.default
    )
    command, first = f"fedjax-sec paper {paper.name}", next(iter(paper.items))
    items = [
        (code(name), item.title, str(numbers[item.published or name] or ""))
        for name, item in paper.items.items()
    ]
    parts = [
        "## Command",
        f"    {command} {first}{needed} --scale small --out results/{paper.name}\n"
        f"    {command} all{needed} --out results/{paper.name}",
        f"`--scale` is {', '.join(code(scale) for scale in SCALES)} (default: `paper`), `--seeds` "
        f"{paper.seeds} unless given.",
        table(("item", "title", "published numbers"), items),
    ]
    if paper.options:
        rows = [
            (code(f"--{_flag(one)}"), ", ".join(map(code, one.values)), _default(one), one.help)
            for one in paper.options
        ]
        parts.append(table(("option", "values", "default", "meaning"), rows))
    return parts


def _flag(option: Option) -> str:
    return option.name.replace("_", "-")


def _default(option: Option) -> str:
    values = option.default if isinstance(option.default, tuple) else [option.default or ""]
    return ", ".join(map(code, values)) or "required"


def _settings(name: str) -> Iterator[str]:
    """The files of `configs/NAME/`, each folded."""
    for path in sorted((shipped.configs_folder() / name).glob("*.yaml")):
        body = "".join(f"    {line}\n" for line in path.read_text().splitlines())
        yield f'??? note "`configs/{name}/{path.name}`"\n\n    ```yaml\n{body}    ```'
