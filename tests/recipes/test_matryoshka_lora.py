"""recipes/matryoshka_lora.py: every method at every rank, what goes on after an interruption, what the page says."""

import json
import statistics

import datasets
import pytest

pytest.importorskip("sklearn")

import matryoshka_lora
from matryoshka_lora import chosen, main, parse_arguments

from hf_efcp.matryoshka import aurac

SHORT = ["--ranks", "1", "2", "--max_steps", "2", "--batch_size", "4"]


def test_every_method_has_an_accuracy_at_every_rank(tmp_path, capsys):
    flags = [*SHORT, "--learning_rates", "1e-2", "1e-1", "--output", str(tmp_path / "out")]
    runs = main([*flags, "--seeds", "1", "2"])
    assert [r["seed"] for r in runs] == [1, 2] and all(r["eval_samples"] == 797 for r in runs)
    found = chosen(runs, parse_arguments(flags))
    for kind in ("matryoshka", "trained", "dylora", "lora", "cut"):
        assert [len(values) for values in found[kind]] == [2, 2]
    for values, run in zip(found["dylora"], runs, strict=True):
        tried = {rate: [r["runs"]["dylora"][rate]["validation"] for r in runs] for rate in ("0.01", "0.1")}
        scores = {rate: statistics.mean(aurac([1, 2], values) for values in of_rate) for rate, of_rate in tried.items()}
        assert values == run["runs"]["dylora"][max(scores, key=scores.get)]["test"]
    page = (tmp_path / "out.md").read_text()
    mean = statistics.mean(aurac([1, 2], values) for values in found["dylora"])
    assert f"| {mean:.2f} ±" in next(line for line in page.splitlines() if line.startswith("| DyLoRA"))
    assert (tmp_path / "out.png").stat().st_size > 5000
    capsys.readouterr()

    again = main([*flags, "--seeds", "2", "1"])  # nothing trains
    assert again == runs[::-1] and "cpu_seconds" not in capsys.readouterr().out
    assert len(json.loads((tmp_path / "out.json").read_text())) == 2


def test_sentences(tiny_model, tmp_path, monkeypatch):
    rows = {"text": ["the cats a dog", "the apple a pear", "a plum", "the horses"] * 3, "label": [0, 1, 1, 0] * 3}
    splits = datasets.DatasetDict({split: datasets.Dataset.from_dict(rows) for split in ("train", "validation", "test")})
    monkeypatch.setattr(matryoshka_lora, "bbc_news", lambda task, validation, seed: splits)
    monkeypatch.setattr(matryoshka_lora, "minilm_folder", lambda: tiny_model)
    flags = ["--task", "sentences", "--layers", "1", "--max_eval_samples", "12", "--learning_rates", "1e-2", "--seeds", "3"]
    (run,) = main([*SHORT, *flags, "--output", str(tmp_path / "out")])
    assert run["eval_samples"] == 12 and set(run["runs"]) == {"matryoshka", "sum", "trained", "dylora", "lora_1", "lora_2", "cut"}
    assert run["runs"]["cut"]["0.01"]["test"][-1] == run["runs"]["lora_2"]["0.01"]["test"][0]


def test_bad_flags_end_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(matryoshka_lora, "run_seed", None)
    with pytest.raises(ValueError, match="unknown rank_scale 'cube'"):
        main(["--rank_scale", "cube", "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="--ranks"):
        main(["--ranks", "0", "2", "--output", str(tmp_path / "out")])
