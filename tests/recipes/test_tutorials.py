"""Each recipe has a tutorial: its command, the same with AdamW, how to draw both; pictures are small and described."""

import re

import pytest

from tests.recipes.helpers import RECIPES

DOCS = RECIPES.parent / "docs"
RECIPE_FILES = sorted(path.stem for path in RECIPES.glob("*.py") if "HfArg(" in path.read_text())
PICTURE = 60_000  # bytes: pages are read on phones, too
REPORT = 300_000


def test_there_are_recipes_and_no_tutorial_without_one():
    assert len(RECIPE_FILES) >= 9
    assert sorted(path.stem for path in (DOCS / "tutorials").glob("*.md")) == RECIPE_FILES


@pytest.mark.parametrize("name", RECIPE_FILES)
def test_a_tutorial_says_what_to_type_and_what_comes_of_it(name):
    page = (DOCS / "tutorials" / f"{name}.md").read_text()
    commands = re.findall(r"^    ((?:python|accelerate|hf-efcp) .+)$", page, re.MULTILINE)
    assert f"python recipes/{name}.py" in commands  # the default, with nothing set
    assert any("--optim adamw" in command for command in commands)
    assert any(command.startswith(("hf-efcp plot ", "hf-efcp report ")) for command in commands)
    folders = set(re.findall(r"--output_dir (\S+)", page)) | {f"outputs/{name}"}
    for command in commands:
        if command.startswith("hf-efcp"):
            assert set(command.split(" --")[0].split()[2:]) <= folders, command  # folders that the page has made
    for told, picture in re.findall(r"!\[(.*?)\]\((\S+)\)", page):
        assert len(told) > 20  # to be read aloud
        assert (DOCS / "tutorials" / picture).stat().st_size < (REPORT if "report" in picture else PICTURE)


def test_no_picture_is_forgotten():
    shown = {picture for page in DOCS.rglob("*.md") for picture in re.findall(r"images/tutorials/(\S+?)\)", page.read_text())}
    assert shown == {path.name for path in (DOCS / "images" / "tutorials").iterdir()} and len(shown) >= 3
