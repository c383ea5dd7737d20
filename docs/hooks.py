"""What mkdocs does beside its plugins: `mkdocs.yml` names this file.

It adds the pages that are generated from the package, renders mathematics, leads links that leave
`docs/` to copies, and fails the build where a public name has no words.
"""

import importlib.util
from pathlib import Path

from markdown import Extension
from markdown.inlinepatterns import InlineProcessor
from markdown.preprocessors import Preprocessor
from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

from fedjax_sec import papers as papers_lib
from fedjax_sec.report.site import api, components, examples, links, mathematics, papers

DOCS = Path(__file__).parent
CHECKOUT = DOCS.parent
#: Files of the checkout that are pages of the site.
TAKEN = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
}
FONT = "STIXTwoMath-Regular.ttf"


class Formula(InlineProcessor):
    """A formula within a line."""

    def handleMatch(self, match, data):
        """The formula as MathML, which nothing looks into."""
        return self.md.htmlStash.store(mathematics.mathml(match[1])), *match.span()


class Formulas(Preprocessor):
    """Formulas that stand alone."""

    def run(self, lines):
        """The lines with MathML, which nothing looks into, in place of directives."""
        return mathematics.replace_blocks("\n".join(lines), self._store).split("\n")

    def _store(self, html: str) -> str:
        return self.md.htmlStash.store(f'<span class="formula">{html}</span>')


class Examples(Preprocessor):
    """Examples of docstrings."""

    def run(self, lines):
        """The lines with fences around examples."""
        return examples.fenced("\n".join(lines)).split("\n")


class Docstrings(Extension):
    """What docstrings hold beside Markdown: examples, and mathematics."""

    def extendMarkdown(self, md):
        """Before blocks of code are taken out (25) come examples, behind it formulas."""
        md.preprocessors.register(Examples(md), "examples", 26)
        md.preprocessors.register(Formulas(md), "formulas", 24)
        md.inlinePatterns.register(Formula(mathematics.ROLE, md), "formula", 200)


def _papers() -> list:
    return [papers_lib.find(name) for name in papers_lib.names()]


@event_priority(100)
def on_config(config):
    """Refuses names without words, and fills in the parts of the navigation that are generated."""
    if silent := [*components.undocumented(), *api.undocumented()]:
        raise PluginError("These public names say nothing of themselves: " + ", ".join(silent))
    config.markdown_extensions.append(Docstrings())
    made = {
        "components": components.navigation(),
        "papers": papers.navigation(_papers(), DOCS),
        "api": api.navigation(),
    }
    config.nav = [
        {title: made.get(entry.removesuffix("/"), entry) if isinstance(entry, str) else entry}
        for part in config.nav
        for title, entry in part.items()
    ]
    return config


def on_files(files, config):
    """Adds the generated pages, those taken from elsewhere, and copies of what they link."""
    made = {**dict(components.pages()), **dict(papers.pages(_papers(), DOCS)), **dict(api.pages())}
    made |= {page: (CHECKOUT / path).read_text() for path, page in TAKEN.items()}
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    pages = list(files.documentation_pages())
    while pages:  # a copy that is a page links further ones
        page = pages.pop()
        for path in links.outside(page.content_string, _place(page.src_uri), CHECKOUT):
            pages += _copied(path, files, config)
    font = Path(importlib.util.find_spec("ziamath").origin).parent / "fonts" / FONT
    files.append(File.generated(config, f"assets/{FONT}", abs_src_path=str(font)))
    return files


def _place(page: str) -> str:
    """The path in the checkout of a page's text, which its links are relative to."""
    back = {at: path for path, at in TAKEN.items()}
    inside = page.removeprefix(f"{links.COPIES}/")
    return back.get(page, inside if inside != page else f"{links.DOCS}/{page}")


def _copied(path: str, files, config) -> list[File]:
    """The page that becomes of a path of the checkout, if it is a new one."""
    at = links.address(path, TAKEN, CHECKOUT)
    if not at.startswith(f"{links.COPIES}/") or files.get_file_from_path(at):
        return []
    if (CHECKOUT / path).is_file():
        made = File.generated(config, at, abs_src_path=str(CHECKOUT / path))
    else:
        made = File.generated(config, at, content=links.listing(CHECKOUT, path))
    files.append(made)
    return [made] if made.is_documentation_page() else []


def on_page_markdown(markdown, page, config, files):
    """Leads links to where the site has what they mean."""
    place = _place(page.file.src_uri)
    return links.rewritten(markdown, place, page.file.src_uri, TAKEN, CHECKOUT)
