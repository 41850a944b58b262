"""The docs are true: their Python runs, their options are the code's, their links lead somewhere."""

import re
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

from hf_efcp.cli.main import main
from hf_efcp.registry import all_optimizers

ROOT = Path(__file__).parents[1]
PAGES = [*(ROOT / page for page in ("README.md", "CONTRIBUTING.md", "recipes/README.md")), *sorted((ROOT / "docs").rglob("*.md"))]


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


def test_readme_has_a_row_for_every_registered_name_and_no_other():
    rows = re.findall(r"^\| `(efcp_\w+)` \| `(\w+)` \| ([a-z ]+?) \(", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert rows == [(info.name, info.cls.__name__, info.compression) for info in all_optimizers()]
    assert len(rows) == len(re.findall(r"^\| `efcp_", (ROOT / "README.md").read_text(), re.MULTILINE))


def test_the_command_lists_every_registered_name_with_its_description(capsys):
    assert main(["list"]) == 0
    listed = [tuple(line.split(maxsplit=1)) for line in capsys.readouterr().out.splitlines()]
    assert listed == [(info.name, info.description) for info in all_optimizers()]


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
