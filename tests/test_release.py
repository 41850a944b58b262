"""A release is what it should be: one version everywhere, and a wheel with all files of the package and no others."""

import re
import shutil
import zipfile
from pathlib import Path

import pytest

import hf_efcp

ROOT = Path(__file__).parents[1]


def test_the_version_is_the_same_everywhere():
    first = re.search(r"^## (\S+) \((\d{4}-\d\d-\d\d)\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = (ROOT / "CITATION.cff").read_text()
    assert first[1] == hf_efcp.__version__
    assert f"\nversion: {first[1]}\n" in citation and f"\ndate-released: {first[2]}\n" in citation


def test_the_wheel_has_the_package_and_nothing_else(tmp_path, monkeypatch):
    pytest.importorskip("setuptools", minversion="77")
    from setuptools import build_meta

    tree = tmp_path / "tree"
    skipped = shutil.ignore_patterns("__pycache__", "*.pyc")
    for folder in ("hf_efcp", "tests", "recipes"):  # the last two must not be found
        shutil.copytree(ROOT / folder, tree / folder, ignore=skipped)
    for file in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / file, tree)
    monkeypatch.chdir(tree)
    wheel = build_meta.build_wheel(str(tmp_path))
    assert wheel == f"hf_efcp-{hf_efcp.__version__}-py3-none-any.whl"
    archive = zipfile.ZipFile(tmp_path / wheel)
    names = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = {str(p.relative_to(tree)) for p in (tree / "hf_efcp").rglob("*") if p.is_file()}
    assert names == package >= {"hf_efcp/py.typed", "hf_efcp/demo/questions.json", "hf_efcp/startup/sitecustomize.py"}
    info = f"hf_efcp-{hf_efcp.__version__}.dist-info"
    assert "hf-efcp = hf_efcp.cli.main:main" in archive.read(f"{info}/entry_points.txt").decode()
    assert f"\nVersion: {hf_efcp.__version__}\n" in archive.read(f"{info}/METADATA").decode()
