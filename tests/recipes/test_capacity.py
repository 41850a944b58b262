"""recipes/capacity.py: matrices in a format against what the command measures, and a page with both capacities."""

import pytest
import torch

pytest.importorskip("sklearn")

import importlib.util
import sys

from hf_efcp.cli.formats import parse
from tests.recipes.helpers import RECIPES


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("recipe_capacity", RECIPES / "capacity.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["int1", "int4", "sparse=0.75", "2:4"])
def test_a_matrix_in_a_format_has_its_error(recipe, name):
    w = torch.randn(500, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    error = float((w - recipe.compress(w, name)).square().mean() / w.square().mean())
    assert error == pytest.approx(parse(name, 10_000).gmse.value, abs=3e-3)


def test_sparse_first_then_quantized(recipe):
    w = torch.randn(40, 40, generator=torch.Generator().manual_seed(0))
    both = recipe.compress(w, "2:4*int4")
    assert ((both != 0).view(-1, 4).sum(1) == 2).all() and len(both[both != 0].unique()) <= 16


def test_the_page(recipe, tmp_path):
    flags = ["--formats", "int8", "int1", "sparse=0.9", "--seeds", "1", "--steps", "40", "--widths", "1", "4"]
    rows = recipe.main([*flags, "--output", str(tmp_path / "out")])
    assert [(r["format"], r["banded"]) for r in rows] == [
        *(("int8", False), ("int1", False), ("sparse=0.9", False), ("sparse=0.9", True))
    ]
    assert rows[0]["measured"] > rows[1]["measured"] and rows[0]["predicted"] > 0.98
    page = (tmp_path / "out.md").read_text()
    assert "| `sparse=0.9`, band p=0.2 | 0.085 |" in page and "Rank correlation" in page
    assert (tmp_path / "out.png").exists()


def test_other_formats_are_refused(recipe):
    with pytest.raises(SystemExit, match="nf4=64: this recipe trains intN"):
        recipe.main(["--formats", "nf4=64"])
    with pytest.raises(ValueError, match="unknown format"):
        recipe.main(["--formats", "int"])
