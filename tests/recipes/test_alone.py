"""Each recipe is one file: copied alone into an empty folder, it trains two steps there and writes its results."""

import importlib.util
import json
import re
import shutil
import sys

import pytest

from tests.recipes.helpers import RECIPES, write_csv

SHORT = ["--max_steps=2", "--logging_steps=1", "--save_strategy=no", "--disable_tqdm=true", "--output_dir=out"]
FEW = ["--max_train_samples=16", "--max_eval_samples=4"]
SENTENCES = [
    "A cat sat on the mat.",
    "It ate a red apple.",
    "The dog ran to the barn.",
    "A pear fell from its tree.",
    "It rains.",
]
NEEDS_BBC = {"trl_sft", "trl_dpo", "summarization"}  # these read articles where no data set of the hub is given
FLAGS = {
    "text_classification": ["--max_seq_length=16"],
    "accelerate_loop": ["--max_seq_length=16", "--max_train_steps=2", "--logging_steps=1", "--output_dir=out"],
    "linear_probe": SHORT,
    "image_classification": [*SHORT, *FEW, "--per_device_train_batch_size=4"],
    "causal_lm": [*SHORT, "--hidden_size=64", "--num_hidden_layers=1", "--vocab_size=270", "--block_size=8"],
    "trl_sft": [*SHORT, *FEW, "--max_length=32"],
    "trl_dpo": [*SHORT, *FEW, "--max_length=32", "--read_steps=2"],
    "summarization": [*SHORT, *FEW, "--max_source_length=16", "--max_target_length=6"],
}
FLAGS["text_classification"] += SHORT
RECIPE_FILES = sorted(p.stem for p in RECIPES.glob("*.py") if "HfArg(" in p.read_text())


def test_every_recipe_is_tried():
    assert set(FLAGS) <= set(RECIPE_FILES)
    assert set(RECIPE_FILES) - set(FLAGS) <= {"question_answering"}  # has tests of its own


@pytest.mark.parametrize("name", FLAGS)
def test_a_copy_alone_trains(name, tiny_model, tmp_path, monkeypatch, capsys):
    if name == "image_classification":
        pytest.importorskip("sklearn")
    if name.startswith("trl"):
        pytest.importorskip("trl")
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(RECIPES)])
    for module in [m for m in sys.modules if m in RECIPE_FILES]:
        monkeypatch.delitem(sys.modules, module)
    copy = shutil.copy(RECIPES / f"{name}.py", tmp_path)
    spec = importlib.util.spec_from_file_location(f"copy_of_{name}", copy)
    recipe = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, recipe)  # dataclasses look their module up
    spec.loader.exec_module(recipe)

    flags = list(FLAGS[name])
    if name in NEEDS_BBC:
        rows = [{"article": f"a/{i}", "label": i % 2, "topic": "ab"[i % 2], "text": " ".join(SENTENCES)} for i in range(16)]
        import datasets

        splits = datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split in ("train", "test")})
        monkeypatch.setattr(recipe, "bbc_news", lambda: splits)
        monkeypatch.setattr(
            recipe, "read_articles", lambda: [{**r, "text": "A head\n\n" + r["text"]} for r in rows], raising=False
        )
    elif name != "image_classification":
        files = [f"--train_file={write_csv(tmp_path / 'train.csv', 32)}"]
        files.append(f"--validation_file={write_csv(tmp_path / 'dev.csv', 16)}")
        flags += files if name == "causal_lm" else [*files, f"--model_name_or_path={tiny_model}"]
    results = recipe.main(flags)
    assert results["eval_samples"] > 0 and results["eval_loss"] > 0
    assert results["train_optimizer_state_bytes"] > 0
    saved = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert saved.keys() <= results.keys() and saved["eval_loss"] == results["eval_loss"]
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["global_step"] == 2
    printed = capsys.readouterr().out
    assert "efcp_lowrank_mfac" in printed and re.search(r"optimizer state +[\d.]+ MiB, [\d.]+ bytes per parameter", printed)
