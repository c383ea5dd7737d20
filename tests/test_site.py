"""The documentation's site: built without a warning, complete, readable without a network."""

import html
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import browsing
import pytest

import fedjax_sec
from fedjax_sec import papers
from fedjax_sec.core import ConfigError, registry
from fedjax_sec.report import described
from fedjax_sec.report.site import api, components, links, mathematics

pytest.importorskip("mkdocs", reason="the site needs the extra [docs]")
ROOT = Path(__file__).parents[1]
NAMES = [(kind, name) for kind, known in registry.KINDS.items() for name in known.names()]


def build(out, before=""):
    """`mkdocs build` into `out`; `before` is Python that runs first, in the same process."""
    program = (
        f"{before}\nimport sys\nfrom mkdocs.__main__ import cli\n"
        f"sys.argv = ['mkdocs', 'build', '--strict', '-d', {str(out)!r}]\ncli()\n"
    )
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the site, built once; a warning would have failed it."""
    out = tmp_path_factory.mktemp("site")
    done = build(out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def pages(site):
    """Address in the site -> HTML."""
    return {path.relative_to(site).as_posix(): path.read_text() for path in site.rglob("*.html")}


# --- The built site -------------------------------------------------------------------------------


def test_every_component_has_a_page_with_its_mathematics(pages):
    formulas = 0
    for kind, name in NAMES:
        page = pages[f"components/{kind}/{name}.html"]
        one = described.component(kind, name)
        blocks, inline = mathematics.formulas(one.text)
        assert page.count('display="block"') == len(blocks), name
        assert page.count("<math") == len(blocks) + len(inline), name
        assert "math::" not in page and ":math:" not in page
        text = html.unescape(re.sub("<[^>]*>", "", page))
        assert registry.summary(registry.KINDS[kind].get(name)).split("`")[0] in text
        assert all(row.key in text and row.meaning.split("`")[0] in text for row in one.rows), name
        formulas += len(blocks) + len(inline)
    assert formulas > 150
    assert f'href="{NAMES[0][0]}/{NAMES[0][1]}.html"' in pages["components/index.html"]


def test_no_page_asks_for_anything_elsewhere(site, pages):
    loads = re.compile(r"<(?:script|img|iframe|source|link)\b[^>]*?(?:src|href)=[\"']?([^\"' >]+)")
    for address, page in pages.items():
        for target in loads.findall(page):
            assert not re.match(r"(?:[a-z]+:)?//", target), (address, target)
            path = (site / address).parent / target.partition("?")[0].partition("#")[0]
            assert address == "404.html" or path.exists(), (address, target)
    for style in site.rglob("*.css"):
        targets = re.findall(r"url\(\s*[\"']?([^\"')]+)", style.read_text())
        assert [t for t in targets if re.match(r"(?:https?:)?//", t)] == [], style
    assert (site / "assets" / "STIXTwoMath-Regular.ttf").is_file()
    assert (site / "search" / "search_index.js").is_file()  # what a page from the disk searches


def test_every_public_name_is_on_a_page(pages):
    for module in api.modules():
        page = pages[f"api/{module}.html"]
        for one in api.names(module):
            assert (
                f'id="{one.path}"' in page
                or f"<code>{one.name}</code>" in page
                or (one.kind == "module" and one.path in page)
            ), one.path
    assert {one.name for one in api.names("fedjax_sec")} == set(fedjax_sec.__all__)


def test_every_paper_has_a_page(pages):
    for name in papers.names():
        page, paper = pages[f"papers/{name}.html"], papers.find(name)
        assert all(f"<code>{item}</code>" in page for item in paper.items)
        assert f"fedjax-sec paper {name}" in page and f"configs/{name}/" in page


def test_links_that_leave_the_documents_lead_to_copies(site, pages):
    assert 'href="../contributing.html#a-new-component"' in pages["guide/extending.html"]
    assert 'href="files/benchmarks/results/tuning_cpu.json"' in pages["performance.html"]
    copy = site / "files" / "benchmarks" / "results" / "tuning_cpu.json"
    assert copy.read_text() == (ROOT / "benchmarks/results/tuning_cpu.json").read_text()
    assert "tuning_cpu.json" in pages["files/benchmarks/results/index.html"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "before, missing",
    [
        (
            "from fedjax_sec.core import registry; registry.defenses.get('krum').__doc__ = None",
            "defense krum",
        ),
        (
            "import dataclasses; from fedjax_sec.core import registry\n"
            "krum = registry.defenses.get('krum')\n"
            "krum.__dataclass_fields__['convention'].metadata = {'doc': ''}",
            "defense krum.convention",
        ),
        (
            "from fedjax_sec.report.site import api\napi._package()['api']['run'].docstring = None",
            "fedjax_sec.run",
        ),
    ],
    ids=["component", "field", "function"],
)
def test_a_public_name_without_words_fails_the_build(before, missing, tmp_path):
    done = build(tmp_path / "site", before)
    assert done.returncode == 1
    assert f"These public names say nothing of themselves: {missing}\n" in done.stdout + done.stderr


@pytest.mark.slow
def test_a_browser_shows_mathematics_and_searches_from_the_disk(site):
    with browsing.chromium() as driver:
        driver.get((site / "components/defense/krum.html").as_uri())
        font = "return document.fonts.load('16px \"STIX Two Math\"').then((fonts) => fonts.length)"
        assert driver.execute_script(font) == 1
        sizes = "return [...document.querySelectorAll('math')].map((one) => one.offsetHeight || "
        sizes += "one.getBoundingClientRect().height)"
        assert min(driver.execute_script(sizes)) > 10
        (field,) = driver.find_elements("css selector", "input.md-search__input")
        field.click()
        field.send_keys("fltrust")
        end, links = time.monotonic() + 60, []
        while not links:
            assert time.monotonic() < end, "the search finds nothing"
            time.sleep(0.1)
            links = driver.find_elements("css selector", ".md-search-result__link")
        addresses = [link.get_attribute("href").partition("?")[0] for link in links]
        assert (site / "components/defense/fltrust.html").as_uri() in addresses
        assert browsing.errors(driver) == []


@pytest.mark.slow
def test_a_link_that_leads_nowhere_fails_the_build(tmp_path):
    before = "from fedjax_sec.report.site import components\n"
    before += "components.page = lambda kind, name: f'# {name}\\n\\n[a](nowhere.md)\\n'"
    done = build(tmp_path / "site", before)
    assert done.returncode == 1
    assert "components/defense/krum.md' contains a link 'nowhere.md'" in done.stderr


# --- What it is made of ---------------------------------------------------------------------------


def test_nothing_public_is_without_words():
    assert components.undocumented() == []
    assert api.undocumented() == []


def test_a_dataclass_without_a_docstring_counts_as_silent(monkeypatch):
    krum = registry.defenses.get("krum")
    monkeypatch.setattr(krum, "__doc__", "Krum(num_byzantine: int | None = None)")
    assert components.undocumented() == ["defense krum"]


@pytest.mark.parametrize("latex", [r"\nowhere x", r"\frac{1}", r"\left( a"])
def test_a_formula_that_cannot_be_shown_is_an_error(latex):
    with pytest.raises(ConfigError, match="cannot be shown"):
        mathematics.mathml(latex)


def test_limits_and_names_of_formulas():
    shown = mathematics.mathml(r"agg = \min_i \sum_{j} s_{ij}", block=True)
    assert "<mi>agg</mi>" in shown
    assert re.search(r'<munder><mo movablelimits="true"[^>]*>min</mo><mi>i</mi></munder>', shown)
    assert "<munder><mo>&#x02211;</mo>" in shown
    assert "<mi>i</mi><mi>j</mi>" in shown  # two letters are a product of two


def test_bars_signs_and_relations_are_set_as_tex_sets_them():
    shown = mathematics.mathml(r"|x| \sim f(-a), \; \log b - c")
    assert shown.count('lspace="0" rspace="0">&#x0007C;</mo>') == 2
    assert "<mo>&#x0223C;</mo>" in shown
    assert shown.count('<mo form="prefix">&#x02212;') == 1  # of -a, not of b - c
    assert '<mi>log</mi><mspace width="0.17em"/>' in shown


def test_links_in_code_stay():
    text = "[a](../b.md) `[a](../b.md)`\n\n```md\n[a](../b.md)\n```\n"
    new = links.rewritten(text, "docs/a.md", "a.md", {"b.md": "more/b.md"}, Path("nowhere"))
    assert new == text.replace("[a](../b.md) ", "[a](more/b.md) ", 1)
