"""The documentation site builds without a warning: every page is in its menu, links lead on, docstrings are well formed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sphinx")
pytest.importorskip("furo")

import hf_efcp

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", folder / "trees", "docs", folder / "html"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return folder / "html"


def test_the_api_page_has_every_public_name(site):
    found = set(re.findall(r'id="hf_efcp\.(\w+)"', (site / "api.html").read_text()))
    assert {name for name in hf_efcp.__all__ if not name.startswith("_")} - found == set()


def test_the_first_page_says_what_to_type(site):
    assert "--optim" in (site / "index.html").read_text()
    assert (site / "searchindex.js").stat().st_size > 10_000
