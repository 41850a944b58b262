"""What contributors read is true: the fast tests and the files of the map are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FAST = [line for line in (ROOT / "tests/fast.txt").read_text().splitlines() if not line.startswith("#")]
MAP = sorted(set(re.findall(r"`([\w./]+(?:\.\w+|/))`", (ROOT / "docs/map.md").read_text())))


@pytest.mark.parametrize("test", FAST)
def test_a_fast_test_is_there(test):
    file, _, function = test.partition("::")
    assert (ROOT / file).exists()
    assert not function or f"def {function}(" in (ROOT / file).read_text()


def test_the_map_is_read():
    assert len(MAP) > 40


@pytest.mark.parametrize("path", MAP)
def test_a_file_of_the_map_is_there(path):
    assert (ROOT / path).exists()
