"""The text classification recipe: its data, a tiny run end to end, mistakes."""

import json

import datasets
import pytest
import text_classification as recipe

from hf_efcp import OptionError
from tests.recipes.helpers import RECIPES, WORDS, write_csv


def test_classes_have_numbers():
    def classes(values, known=(), feature=None):
        features = datasets.Features({"label": feature}) if feature else None
        return recipe.class_names(datasets.Dataset.from_dict({"label": values}, features=features), "label", dict(known))

    assert list(classes([5, 1, 10]).items()) == [(1, "1"), (5, "5"), (10, "10")]
    assert list(classes(["b", "a"])) == ["a", "b"]
    assert list(classes(["b", "a"], {"b": 0, "a": 1})) == ["b", "a"]  # the model's order
    assert classes([1, 0], feature=datasets.ClassLabel(names=["no", "yes"])) == {0: "no", 1: "yes"}
    with pytest.raises(OptionError, match="--label_column 'label' holds float64: classes are needed"):
        classes([0.5, 1.25])


def test_columns_are_found_by_name():
    def find(*columns, text=None, label=None):
        given = recipe.Arguments(text_column=text, label_column=label)
        return recipe.find_columns(datasets.Dataset.from_dict({name: ["x"] for name in columns}), given)

    assert find("sentence", "label", "idx") == (["sentence"], "label")
    assert find("sentence1", "sentence2", "label") == (["sentence1", "sentence2"], "label")
    assert find("label", "text") == (["text"], "label")
    assert find("a", "b", "c", text="a, b", label="c") == (["a", "b"], "c")
    with pytest.raises(OptionError, match=r"--label_column None: .*text, topic"):
        find("text", "topic")


# Runs ---------------------------------------------------------------------------------------------------------------------


def test_local_csv_trains_evaluates_predicts_and_resumes(flags, tmp_path, capsys):
    test_file = write_csv(tmp_path / "test.csv", 10)
    flags = [*flags, f"--test_file={test_file}", "--do_train", "--do_eval", "--do_predict", "--save_steps=20"]
    results = recipe.main([*flags, "--num_train_epochs=10"])
    assert results["eval_accuracy"] == 1.0
    out = tmp_path / "out"
    saved = {name: json.loads((out / f"{name}_results.json").read_text()) for name in ("all", "train", "eval")}
    assert saved["all"] == {**saved["train"], **saved["eval"]}
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 40
    assert json.loads((out / "config.json").read_text())["id2label"] == {"0": "animal", "1": "fruit"}
    assert (out / "predictions.csv").read_text().split() == ["prediction", *["animal", "fruit"] * 5]
    table = capsys.readouterr().out
    for line in ("efcp_lowrank_mfac on ", "eval accuracy", "training time", "optimizer state"):
        assert line in table

    recipe.main([*flags, "--num_train_epochs=11", "--resume_from_checkpoint=true"])
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 44


def test_json_config_and_integer_labels(tmp_path, tiny_model):
    rows = [{"sentence1": f"the {w}", "sentence2": "a cat", "label": i} for i, ws in enumerate(WORDS.values()) for w in ws]
    for name in ("train.jsonl", "dev.jsonl"):
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    config = {
        "model_name_or_path": tiny_model,
        "train_file": "train.jsonl",
        "validation_file": "dev.jsonl",
        "max_seq_length": 16,
        "max_train_samples": 4,
        "max_eval_samples": 2,
        "optim": "adamw_torch",
        "output_dir": "from_json",
        "save_strategy": "no",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    results = recipe.main(["config.json"])
    assert (results["train_samples"], results["eval_samples"]) == (4, 2)
    assert results["train_optimizer_state_bytes"] == pytest.approx(8 * results["train_parameters"], rel=0.01)
    assert (tmp_path / "from_json" / "all_results.json").is_file()


def test_eval_only_uses_a_trained_model(flags, tmp_path):
    recipe.main([*flags, "--num_train_epochs=10", "--output_dir=first", "--save_strategy=no"])
    results = recipe.main([*flags, "--model_name_or_path=first", "--do_eval", "--output_dir=second"])
    assert results["eval_accuracy"] == 1.0
    assert "train_runtime" not in results


def test_accumulation_keeps_the_loss(flags):
    common = [*flags, "--learning_rate=0", "--do_train", "--save_strategy=no"]
    whole = recipe.main([*common, "--per_device_train_batch_size=16"])
    parts = recipe.main([*common, "--per_device_train_batch_size=4", "--gradient_accumulation_steps=4"])
    assert parts["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-5)


# Mistakes -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--text_column=body"], "--text_column 'body': .* which has text, label"),
        (["--train_file=train.txt"], "must end in .csv"),
        (["--validation_file="], "both --train_file and --validation_file, given: train"),
        (["--dataset_name=glue"], "--dataset_name and --train_file are both given"),
        (["--max_seq_length=64"], "--max_seq_length 64: this model takes at most 32"),
        (["--train_file=", "--validation_file=", "--dataset_name=bbc_article"], "did you mean 'articles'"),
    ],
)
def test_mistakes_are_one_clear_error_and_write_nothing(flags, more, message, tmp_path):
    with pytest.raises(OptionError, match=message):
        recipe.main([*flags, *more])
    assert not (tmp_path / "out").exists()


def test_accuracy_metric():
    import evaluate

    metric = evaluate.load(str(RECIPES / "metrics" / "accuracy"))
    assert metric.compute(predictions=[0, 1, 2, 2], references=[0, 1, 1, 2]) == {"accuracy": 0.75}
    assert metric.compute(predictions=[3], references=[3]) == {"accuracy": 1.0}
