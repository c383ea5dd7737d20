"""Writes `slow.txt`: the tests that `make test` leaves out since they take longest.

    python -m pytest -n 2 --dist loadfile -m 'not slow' --junitxml=report.xml
    python tests/choose_slow.py report.xml 900

From a report of the quick tests it takes out the longest, until the others add up to 900 seconds.
Tests that are listed already stay so; to choose anew, empty the list first. `KEPT` stay quick.
"""

import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

LISTED = Path(__file__).parent / "slow.txt"
#: The names of all tests that pytest collected, before any was left out.
COLLECTED = pytest.StashKey[frozenset[str]]()
#: Promises that every change must keep, and one test of each way in.
KEPT = re.compile(
    r"golden|test_(architecture|proofs|prose|readme|docs|configs|prepare|plugins)\b|test_published"
    r"|test_cli.py::test_(run|sweep)$|resume|does_nothing|paired|fedjax_sec/(api|testing|core)"
)


def nodeid(case: ET.Element) -> str:
    """A test's name on pytest's command line.

    >>> nodeid(ET.fromstring('<testcase classname="tests.test_a" name="test_b[1]"/>'))
    'tests/test_a.py::test_b[1]'
    """
    return f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"


def longest(seconds: dict[str, float], budget: float) -> list[str]:
    """The longest tests but those kept, until the others take no more than `budget` seconds.

    >>> longest({"a": 1.0, "b": 5.0, "c": 3.0, "test_docs": 9.0}, 13.0)
    ['b']
    """
    left, out = sum(seconds.values()), []
    for name in sorted(seconds, key=lambda name: -seconds[name]):
        if left > budget and not KEPT.search(name):
            out.append(name)
            left -= seconds[name]
    return out


def main(report: str, budget: str) -> None:
    """Adds to the list, and says how many tests and seconds it leaves."""
    listed = set(LISTED.read_text().splitlines()) if LISTED.exists() else set()
    cases = ET.parse(report).iter("testcase")
    seconds = {nodeid(case): float(case.get("time", 0)) for case in cases}
    quick = {name: time for name, time in seconds.items() if name not in listed}
    out = longest(quick, float(budget))
    LISTED.write_text("".join(f"{name}\n" for name in sorted({*listed, *out})))
    left = sum(quick.values()) - sum(quick[name] for name in out)
    print(f"{len(out)} of {len(quick)} tests left out, {left:.0f} of {sum(quick.values()):.0f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
