"""`slow.txt` names tests that are there."""

import subprocess
import sys
from pathlib import Path

import pytest
from choose_slow import LISTED

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_every_listed_test_is_there():
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    listed = LISTED.read_text().splitlines()
    assert listed == sorted(set(listed)) and set(listed) <= set(done.stdout.splitlines())
