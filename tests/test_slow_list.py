"""`slow.txt` names tests that are there."""

from pathlib import Path

import pytest
from choose_slow import COLLECTED, LISTED

ROOT = Path(__file__).parent.parent


def file_of(test: str) -> str:
    return test.partition("::")[0]


def test_every_listed_test_is_there(pytestconfig):
    """In the files that pytest was told to collect, or all: a renamed test would turn quick."""
    if any("::" in argument for argument in pytestconfig.args):
        pytest.skip("single tests were asked for, so files are not collected whole")
    listed, collected = LISTED.read_text().splitlines(), pytestconfig.stash[COLLECTED]
    assert listed == sorted(set(listed))
    assert not [test for test in listed if not (ROOT / file_of(test)).exists()]
    whole = {file_of(test) for test in collected}
    assert not [test for test in listed if file_of(test) in whole and test not in collected]
