"""The docs are true: their Python runs, code that they quote is the code, their options are the code's, their links lead on."""

import inspect
import re
import textwrap
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

from hf_efcp.cli.main import main
from hf_efcp.engine.windowed import Windowed
from hf_efcp.registry import all_optimizers

ROOT = Path(__file__).parents[1]
PAGES = [*(ROOT / page for page in ("README.md", "CONTRIBUTING.md", "recipes/README.md")), *sorted((ROOT / "docs").rglob("*.md"))]

# Python that a page quotes: `<!-- from FILE -->` stands in front of it. A line `...` leaves something out.
QUOTED = re.compile(r"<!-- from (\S+) -->\n```python\n(.*?)\n```", re.DOTALL)
QUOTES = [
    pytest.param(file, part, id=f"{page.name}-{part.splitlines()[-1].strip()[:30]}")
    for page in PAGES
    for file, code in QUOTED.findall(page.read_text())
    for part in code.split("\n...\n")
]


def tiny_bert():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForSequenceClassification(BertConfig(vocab_size=32, max_position_embeddings=16, **sizes))


def test_the_python_of_using_md_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/using.md").read_text(), re.DOTALL)
    assert len(blocks) >= 6
    data = [{"input_ids": torch.arange(8), "labels": torch.tensor(i % 2)} for i in range(8)]
    namespace = {
        "model": tiny_bert(),
        "base_model": tiny_bert(),
        "train_dataset": data,
        "loader": DataLoader(data, batch_size=4),
        "output_dir": str(tmp_path / "out"),
    }
    for block in blocks:
        exec(compile(block, "docs/using.md", "exec"), namespace)


def test_options_md_is_what_the_command_prints(capsys):
    assert main(["list", "--markdown"]) == 0
    table = capsys.readouterr().out
    assert (ROOT / "docs/options.md").read_text().endswith(table)


def test_choosing_md_has_a_row_for_every_registered_name_and_no_other():
    rows = re.findall(r"^\| `(efcp_\w+)` \| `(\w+)` \| ([a-z ]+?) \(", (ROOT / "docs/choosing.md").read_text(), re.MULTILINE)
    assert rows == [(info.name, info.cls.__name__, info.compression) for info in all_optimizers()]
    assert len(rows) == len(re.findall(r"^\| `efcp_", (ROOT / "docs/choosing.md").read_text(), re.MULTILINE))


def test_the_command_lists_every_registered_name_with_its_description(capsys):
    assert main(["list"]) == 0
    listed = [tuple(line.split(maxsplit=1)) for line in capsys.readouterr().out.splitlines()]
    assert listed == [(info.name, info.description) for info in all_optimizers()]


def test_some_code_is_quoted():
    assert len(QUOTES) >= 7


@pytest.mark.parametrize(("file", "part"), QUOTES)
def test_quoted_code_is_in_its_file(file, part):
    quoted = [textwrap.indent(part, indent) for indent in ("", "    ")]  # a method is quoted without its indentation
    assert any(f"\n{lines}\n" in (ROOT / file).read_text() for lines in quoted)


def test_algorithm_1_is_quoted_from_its_first_line_to_its_last():
    step = textwrap.dedent(inspect.getsource(Windowed.step))
    assert f"```python\n{step}```" in (ROOT / "docs/how_it_works.md").read_text()


def test_the_first_page_lists_every_page():
    listed = set(re.findall(r"\]\((?!http|\.\.)([^)#]+)[^)]*\)", (ROOT / "docs/index.md").read_text()))
    results = ROOT / "docs/results"  # their README lists them
    assert listed == {str(p.relative_to(ROOT / "docs")) for p in PAGES if p.is_relative_to(ROOT / "docs")} - {"index.md"} - {
        str(p.relative_to(ROOT / "docs")) for p in results.glob("*.md") if p.name != "README.md"
    }


def test_the_map_names_every_file_of_the_package():
    """A folder that the map names, such as hf_efcp/kernels/, counts for its files only where none of them is named."""
    text = (ROOT / "docs/map.md").read_text()
    files = [p for p in (ROOT / "hf_efcp").rglob("*.py") if not p.name.startswith("_") and p.parent.name != "kernels"]
    assert len(files) > 50
    missing = [name for name in (str(p.relative_to(ROOT)) for p in files) if f"`{name}`" not in text]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_that_a_page_names_are_there(page):
    named = re.findall(
        r"(?<![\w/])(?:hf_efcp|tests|recipes|docs)/[\w./-]*\w\.(?:py|sh|md|txt|yaml|ya?ml|json)\b", page.read_text()
    )
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not target.startswith("http"):
            file, _, anchor = target.partition("#")
            linked = page.parent / file if file else page
            assert linked.exists(), target
            headings = (
                [line.lstrip("# ").lower() for line in linked.read_text().splitlines() if line.startswith("#")] if anchor else []
            )
            assert not anchor or anchor in [re.sub(r"[^\w -]", "", h).replace(" ", "-") for h in headings], target
