"""Links of documents that lie in a checkout, made to links within the site.

Documents link files beside `docs/` by relative paths, such as `../../CONTRIBUTING.md`. The site
takes some of them in as pages; every other file is copied, and a folder becomes a list of files.
"""

import posixpath
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

DOCS = "docs"
#: Where the site keeps copies of files from outside `docs/`.
COPIES = "files"
#: Code, in which brackets are no links; or a link's beginning, target and end.
_LINK = re.compile(r"(?ms)^ *(`{3,}).*?^ *\1 *$|`[^`\n]+`|(\]\()([^)\s]+)(\))")


def targets(text: str) -> Iterator[str]:
    """The relative targets of a document's links, without what follows `#`.

    >>> list(targets("[a](x.md#y), [b](https://b.org), `[c](z.md)`"))
    ['x.md']
    """
    for match in _LINK.finditer(text):
        target = (match[3] or "").partition("#")[0]
        if target and ":" not in target:
            yield target


def outside(text: str, place: str, checkout: Path) -> Iterator[str]:
    """The paths in the checkout of what a document links outside `docs/`, and of folders within.

    `place` is the document's own path in the checkout.
    """
    for target in targets(text):
        path = posixpath.normpath(posixpath.join(posixpath.dirname(place), target))
        inside = path.startswith(f"{DOCS}/")
        if (checkout / path).is_dir() or (not inside and (checkout / path).is_file()):
            yield path


def address(path: str, taken: Mapping[str, str], checkout: Path) -> str:
    """Where the site has a path of the checkout; `taken` maps files to the pages made of them.

    >>> address("docs/scale.md", {}, Path()), address("LICENSE", {}, Path())
    ('scale.md', 'files/LICENSE')
    """
    if path in taken:
        return taken[path]
    if (checkout / path).is_dir():
        readme = f"{path}/README.md"
        known = readme in taken or (checkout / readme).is_file()
        return address(readme, taken, checkout) if known else f"{COPIES}/{path}/index.md"
    return path.removeprefix(f"{DOCS}/") if path.startswith(f"{DOCS}/") else f"{COPIES}/{path}"


def rewritten(text: str, place: str, page: str, taken: Mapping[str, str], checkout: Path) -> str:
    """A document with the links that leave `docs/`, or lead to a folder, led to the site's copies.

    `page` is the document's address in the site.

    >>> rewritten("[a](../b.md#c)", "docs/a.md", "a.md", {"b.md": "more/b.md"}, Path())
    '[a](more/b.md#c)'
    """

    def link(match: re.Match) -> str:
        target, hash_, part = (match[3] or "").partition("#")
        if not target or ":" in target:
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(place), target))
        if path not in taken and not (checkout / path).exists():
            return match[0]
        at = address(path, taken, checkout)
        relative = posixpath.relpath(at, posixpath.dirname(page) or ".")
        return f"{match[2]}{relative}{hash_}{part}{match[4]}"

    return _LINK.sub(link, text)


def listing(folder: Path, path: str) -> str:
    """A page that lists the files of a folder of the checkout."""
    names = sorted(one.name for one in (folder / path).iterdir() if one.is_file())
    return f"# `{path}`\n\n" + "\n".join(f"- [{name}]({name})" for name in names) + "\n"
