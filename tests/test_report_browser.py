"""The pages of results in a headless Chromium: opened, a cell picked, nothing loaded."""

import base64
import io
import json
import re
import shutil
import time

import browsing
import numpy as np
import pytest
import sweeps_made
from PIL import Image

from fedjax_sec.report import page

pytestmark = pytest.mark.slow


class Browser:
    """Chromium, its console and its requests, through the WebDriver protocol."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, path):
        self.driver.get(path.as_uri())
        self.rest()

    def rest(self, seconds=120):
        """Waits until all charts are drawn."""
        end = time.monotonic() + seconds
        while self.script("return document.body.dataset.busy") != "0":
            assert time.monotonic() < end, "the charts are still being drawn"
            time.sleep(0.05)

    def script(self, text, *arguments):
        return self.driver.execute_script(text, *arguments)

    def choose(self, name, value):
        """Chooses a value in a menu, as a person does."""
        self.script(
            "const menu = document.getElementById(arguments[0]); menu.value = arguments[1];"
            "menu.dispatchEvent(new Event('change'));",
            name,
            value,
        )
        self.rest()

    def click(self, chart, text, shift=False, last=False):
        """Clicks the first or last field of a chart that shows this text, with the mouse."""
        from selenium.webdriver.common.action_chains import ActionChains
        from selenium.webdriver.common.by import By
        from selenium.webdriver.common.keys import Keys

        shown = self.driver.find_elements(By.CSS_SELECTOR, f"#{chart} svg text")
        element = [one for one in shown if one.text == text][-1 if last else 0]
        self.script("arguments[0].scrollIntoView({block: 'center'})", element)
        actions = ActionChains(self.driver)
        if shift:
            actions.key_down(Keys.SHIFT)
        actions.move_to_element(element).click()
        if shift:
            actions.key_up(Keys.SHIFT)
        actions.perform()
        self.rest()

    def text(self, name):
        return self.script("return document.getElementById(arguments[0]).textContent", name)

    def texts(self, chart):
        """The texts of a chart that are not empty."""
        script = (
            "return [...document.querySelectorAll(`#${arguments[0]} svg text`)]"
            ".map((one) => one.textContent).filter((one) => one.trim());"
        )
        return self.script(script, chart)

    def cut(self):
        """Texts that reach beyond their chart's picture, and pictures that lie beyond their box."""
        return self.script(
            """
            const cut = [];
            for (const svg of document.querySelectorAll('.chart svg')) {
              const frame = svg.getBoundingClientRect();
              for (const one of svg.querySelectorAll('text')) {
                if (!one.textContent.trim()) continue;
                const box = one.getBoundingClientRect();
                const out = Math.max(frame.left - box.left, box.right - frame.right,
                                     frame.top - box.top, box.bottom - frame.bottom);
                if (out > 1.5) cut.push(one.textContent);
              }
            }
            return cut;
            """
        )

    def errors(self):
        """What the console says, and addresses that are not in the page, since the last call."""
        return browsing.errors(self.driver)

    def picture(self):
        """The page as it is seen, in grey [H, W]."""
        content = base64.b64decode(self.driver.get_screenshot_as_base64())
        return np.asarray(Image.open(io.BytesIO(content)).convert("L"), float)


@pytest.fixture(scope="module")
def browser():
    with browsing.chromium() as driver:
        yield Browser(driver)


ATTACKS = {"no attack": None, "sign flip": "sign_flip", "plus": {"name": "pattern"}}
RULES = {"mean": "mean", "median": "median", "Krum": "krum"}


def numbers(**changes):
    """(attack, rule, seed) -> accuracy: every field has a number of its own."""
    known = {}
    for i, attack in enumerate(ATTACKS):
        for j, rule in enumerate(RULES):
            for seed in range(3):
                last = 0.9 - 0.2 * i - 0.05 * j + 0.01 * (seed - 1)
                known[attack, rule, seed] = last + changes.get(rule, 0.0) * (1 + 0.1 * seed)
    return known


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    out = tmp_path_factory.mktemp("pages") / "first"
    return sweeps_made.sweep(out, ATTACKS, RULES, values=numbers())


def test_a_sweep_is_explored(browser, first, tmp_path):
    browser.open(page.write_one(first, tmp_path / "page.html"))
    shown = browser.texts("heat")
    assert {"90.0", "70.0", "50.0", "40.0", *ATTACKS, *RULES, "attack", "defense"} <= set(shown)
    assert shown.count("40.0") == 3  # Krum's, the worst of its row and of its column
    assert browser.text("picked") == "plus / Krum"
    browser.click("heat", "65.0")
    assert browser.text("picked") == "sign flip / median"
    assert "sign flip / median" in browser.texts("curves")
    assert browser.script("return document.querySelectorAll('#clients svg.marks').length") == 1
    assert "attack = sign flip" in browser.text("kept-said")
    assert "sign_flip" in browser.text("differences")
    browser.click("heat", "50.0", shift=True)
    assert browser.text("picked") == "sign flip / median; plus / mean"
    browser.choose("cell", "0")
    assert browser.text("picked") == "no attack / mean"
    # Any metric and any two axes.
    browser.choose("metric", "2")
    assert "attack success rate (%)" in browser.text("heat-said")
    browser.choose("down", "seed")
    assert {"0", "1", "2", "seed"} <= set(browser.texts("heat"))
    assert not browser.script("return document.querySelector('#only-seed')")
    browser.choose("metric", "0")
    browser.choose("only-attack", "plus")
    assert {"49.0", "50.0", "51.0"} <= set(browser.texts("heat"))
    browser.choose("over", "lowest")
    browser.choose("down", "")
    assert {"49.0", "44.0", "39.0"} <= set(browser.texts("heat"))
    assert browser.cut() == [] and browser.errors() == []


def test_a_field_of_the_worst_picks_whose_it_is(browser, first, tmp_path):
    browser.open(page.write_one(first, tmp_path / "page.html", with_pictures=False))
    assert browser.texts("heat").count("50.0") == 2  # plus / mean, and the worst of its column
    browser.choose("worst", "highest")
    assert browser.texts("heat").count("70.0") == 3  # of its row and its column, under an attack
    browser.click("heat", "70.0", last=True)
    assert browser.text("picked") == "sign flip / mean"
    assert browser.errors() == []


def test_an_unfinished_sweep_says_what_is_missing(browser, first, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(first, out)
    sweeps_made.unfinish(out, "plus_mean/seed0", rows=3)
    for seed in range(3):
        sweeps_made.unfinish(out, f"plus_Krum/seed{seed}", rows=5 if seed == 0 else None)
    browser.open(page.write_one(out, tmp_path / "page.html"))
    assert "plus_mean/seed0" in browser.text("missing")
    assert {"50.5*", "\N{HORIZONTAL ELLIPSIS}"} <= set(browser.texts("heat"))
    assert "not all runs of the field are finished" in browser.text("heat-said")
    browser.click("heat", "\N{HORIZONTAL ELLIPSIS}")
    assert browser.text("picked") == "plus / Krum"
    lines = browser.script("return document.querySelectorAll('#curves .mark-line path').length")
    assert lines == 2  # the one seed that has begun, and the mean of it
    assert browser.errors() == []


def test_nothing_is_finished_yet(browser, first, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(first, out)
    for summary in list(out.glob("cells/*/*/summary.json")):
        sweeps_made.unfinish(out, summary.parent.relative_to(out / "cells").as_posix())
    browser.open(page.write_one(out, tmp_path / "page.html", with_pictures=False))
    assert "Nothing is measured yet." in browser.text("heat-said")
    assert browser.errors() == []


def test_one_run_alone(browser, first, tmp_path):
    out = first / "cells" / "plus_median" / "seed0"
    browser.open(page.write_one(out, tmp_path / "page.html"))
    assert browser.script("return document.getElementById('heat-part').hidden")
    assert browser.texts("curves") and browser.texts("clients")
    assert browser.cut() == [] and browser.errors() == []


def test_a_numeric_axis_has_a_curve(browser, tmp_path):
    attacks = {str(z): {"name": "alie", "z": z} for z in (0.1, 1.0, 10.0)}
    out = sweeps_made.sweep(tmp_path / "s", attacks, RULES, seeds=(0, 1))
    browser.open(page.write_one(out, tmp_path / "page.html"))
    assert not browser.script("return document.getElementById('axis-part').hidden")
    assert set(RULES) <= set(browser.texts("axis")) and browser.errors() == []


def test_a_loss_that_explodes_leaves_the_others_their_colours(browser, tmp_path):
    out = sweeps_made.sweep(tmp_path / "s", ATTACKS, RULES, seeds=(0,))
    path = out / "cells" / "plus_mean" / "seed0"
    rows = (path / "metrics.jsonl").read_text()
    text = re.sub(r'"loss": 1\.\d+', '"loss": 1.2e15', rows)
    (path / "metrics.jsonl").write_text(text)
    summary = json.loads((path / "summary.json").read_text())
    del summary["files"], summary["sha256"]
    (path / "summary.json").write_text(json.dumps(summary))
    browser.open(page.write_one(out, tmp_path / "page.html", with_pictures=False))
    browser.choose("metric", "3")
    browser.choose("cell", "6")
    assert browser.text("picked") == "plus / mean"
    colours = browser.script(
        "return [...document.querySelectorAll('#heat .mark-rect.role-mark path')]"
        ".map((one) => getComputedStyle(one).fill)"
    )
    assert "loss" in browser.texts("curves") and len(set(colours)) > 4
    wide = "return ['curves', 'second'].map((id) => document.getElementById(id)).map((one) =>"
    assert browser.script(wide + "one.scrollWidth <= one.clientWidth)") == [True, True]
    assert browser.cut() == [] and browser.errors() == []


def test_thirty_by_thirty_is_legible(browser, tmp_path):
    attacks = {f"an attack of many words {i}, z = {i}": {"name": "alie", "z": i} for i in range(30)}
    rules = {
        f"a pipeline of rules {i}": {"name": "centered_clipping", "radius": 1.0 + i}
        for i in range(30)
    }
    out = sweeps_made.sweep(tmp_path / "s", attacks, rules, seeds=(0,), rounds=4, every=2)
    browser.open(page.write_one(out, tmp_path / "page.html", with_pictures=False))
    shown = browser.texts("heat")
    assert {*attacks, *rules} <= set(shown) and browser.cut() == []
    overlaps = browser.script(
        """
        const numbers = [...document.querySelectorAll('#heat svg text')]
          .filter((one) => /^\\d+\\.\\d/.test(one.textContent))
          .map((one) => one.getBoundingClientRect());
        const rows = new Map();
        for (const box of numbers) {
          const top = Math.round(box.top);
          rows.set(top, [...(rows.get(top) || []), box]);
        }
        let count = 0;
        for (const boxes of rows.values()) {
          boxes.sort((a, b) => a.left - b.left);
          boxes.slice(1).forEach((box, i) => (count += box.left < boxes[i].right));
        }
        return [numbers.length, count];
        """
    )
    assert overlaps == [900 + 60, 0]
    assert browser.errors() == []


def test_two_folders(browser, first, tmp_path):
    other = sweeps_made.sweep(
        tmp_path / "other", ATTACKS, RULES, values=numbers(median=0.05), client={"batch_size": 8}
    )
    browser.open(page.write_two(first, other, tmp_path / "page.html")[0])
    assert {"+5.5\N{BLACK DIAMOND}", "0.0"} <= set(browser.texts("difference"))
    assert "in 3 of 9 cells" in browser.text("difference-said")
    browser.click("difference", "+5.5\N{BLACK DIAMOND}")
    assert browser.text("picked") == "no attack / median"
    assert "over 3 pairs: larger than the spread" in browser.text("picked-said")
    assert {"A", "B"} <= set(browser.texts("curves"))
    assert "batch_size" in browser.script("return document.body.textContent")
    assert browser.cut() == [] and browser.errors() == []


CONTRAST = """
    const light = (colour) => {
      const parts = colour.match(/[\\d.]+/g).slice(0, 3).map((one) => one / 255)
        .map((one) => (one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4));
      return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
    };
    const boxes = [...document.querySelectorAll('#heat .mark-rect path')]
      .map((one) => [one.getBoundingClientRect(), getComputedStyle(one).fill])
      .filter(([, fill]) => fill !== 'none');
    return [...document.querySelectorAll('#heat .mark-text.role-mark text')]
      .filter((one) => one.textContent.trim()).map((one) => {
        const box = one.getBoundingClientRect();
        const [x, y] = [box.left + box.width / 2, box.top + box.height / 2];
        const [, fill] = boxes.filter(
          ([b]) => b.left <= x && x <= b.right && b.top <= y && y <= b.bottom).at(-1);
        const pair = [light(fill), light(getComputedStyle(one).fill)];
        return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
      });
"""


def test_numbers_stand_out_in_grey_too(browser, tmp_path):
    """The contrast of luminance of each number with its field, from 0 to 100 %."""
    attacks = {f"attack {i}": {"name": "alie", "z": i} for i in range(21)}
    values = {(f"attack {i}", "mean", 0): i / 20 for i in range(21)}
    rules = {"mean": "mean"}
    out = sweeps_made.sweep(tmp_path / "s", attacks, rules, seeds=(0,), values=values)
    browser.open(page.write_one(out, tmp_path / "page.html", with_pictures=False))
    contrasts = browser.script(CONTRAST)
    assert len(contrasts) == 22 and min(contrasts) > 4
    picture = browser.picture()
    assert picture.shape[1] >= 1300 and picture.std() > 20
