"""recipes/prune.py on a few steps: every method, the files it writes, runs that are there already, mistakes."""

import json

import pytest
import torch

from hf_efcp import OptionError
from tests.recipes import helpers  # noqa: F401  (puts the recipes on the path)

SHORT = ["--train_steps=4", "--finetune_steps=2", "--calibration_batches=1", "--max_eval_samples=20", "--output=out/short"]


def test_every_method_on_digits(tmp_path, capsys):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    import prune as recipe

    argv = ["--task=digits", "--sparsity", "0.6", "--methods", *recipe.METHODS, *SHORT]
    results = recipe.main(argv)
    assert [r["method"] for r in results["runs"]] == [*recipe.METHODS]
    assert all(
        r["zeros"] == pytest.approx(0.6, abs=0.01) and 0 <= r["before"] <= 1 and r["after"] is not None for r in results["runs"]
    )
    assert json.loads((tmp_path / "out/short.json").read_text()) == results
    assert (tmp_path / "out/short.png").stat().st_size > 5000
    table = (tmp_path / "out/short.md").read_text()
    assert all(f"| 0.6 | `{method}` |" in table for method in recipe.METHODS)

    more = ["--task=digits", "--sparsity", "0.6", "2:4", "--methods", "magnitude", "banded", *SHORT]
    again = recipe.main(more)  # banded has no patterns
    assert "left out: banded at 2:4" in capsys.readouterr().out
    assert again["runs"][:-1] == results["runs"] and again["runs"][-1]["zeros"] == 0.5


def test_texts(tiny_model, monkeypatch):
    """A batch is as long as its longest text; the encoder is whoever minilm_folder names."""
    import datasets
    import prune as recipe

    rows = datasets.Dataset.from_dict({"text": ["the cat", "a dog s the horse", "a pear"] * 4, "label": [0, 1, 2] * 4})
    monkeypatch.setattr(recipe, "bbc_news", lambda task, seed: datasets.DatasetDict(train=rows, test=rows))
    monkeypatch.setattr(recipe, "minilm_folder", lambda: tiny_model)
    model, train, test = recipe.bbc(1, 2, 4, 6, layers=1)
    assert len(model.bert.encoder.layer) == 1 and not model.bert.embeddings.word_embeddings.weight.requires_grad
    assert len(train["labels"]) == 12 and len(test["labels"]) == 6 and train["input_ids"].shape[1] == 32
    assert recipe.cut(train, torch.tensor([0, 2]))["input_ids"].shape == (2, 4)
    recipe.train(model, train, 2, 4, 1e-3, 0, "adamw")
    assert 0 <= recipe.accuracy(model, test) <= 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--methods", "iobss"], "unknown method 'iobss' for --methods: did you mean 'iobs'"),
        (["--optim", "adamq"], "unknown optimizer 'adamq' for --optim: did you mean 'adamw'"),
        (["--sparsity", "0.5", "4:2"], "pattern='4:2'"),
        (["--sparsity", "1.5"], "pattern='1.5'"),
        (["--layers", "7"], "--layers 7: must be 1 to 6, with --task bbc"),
    ],
)
def test_mistakes_are_found_before_anything_is_loaded(argv, message, tmp_path):
    import prune as recipe

    with pytest.raises(OptionError, match=message):
        recipe.main([*argv, "--output=out/short"])
    assert not (tmp_path / "out").exists()


def test_runs_of_other_settings_are_not_mixed(tmp_path):
    pytest.importorskip("sklearn")
    import prune as recipe

    argv = ["--task=digits", "--sparsity", "0.6", "--methods", "magnitude", *SHORT]
    recipe.main(argv)
    with pytest.raises(OptionError, match="has runs with other train_steps; give another --output"):
        recipe.main([*argv, "--train_steps=5"])
