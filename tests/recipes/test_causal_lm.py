"""The causal language model recipe: its texts, its arguments, tiny full and LoRA runs end to end."""

import dataclasses
import json
import math
from pathlib import Path

import bbc_news
import causal_lm as recipe
import datasets
import pytest
import torch

TEXTS = ["the cat sat on the mat", "the dog ate a red apple", "a horse ran to the old barn", "the pear fell from the tree"]
TINY = ["--hidden_size=64", "--num_hidden_layers=1", "--vocab_size=300", "--block_size=16"]


@pytest.fixture
def flags() -> list[str]:
    """A new tiny model on two text files."""
    for name, count in (("train", 96), ("dev", 24)):
        Path(f"{name}.txt").write_text("\n\n".join(TEXTS[i % len(TEXTS)] for i in range(count)))
    return [*TINY, "--train_file=train.txt", "--validation_file=dev.txt", "--output_dir=out", "--disable_tqdm=true"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> str:
    """Folder of a tiny model, trained so far that its perplexity has fallen."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "train.txt").write_text("\n\n".join(TEXTS * 24))
    files = [f"--{split}_file={folder / 'train.txt'}" for split in ("train", "validation")]
    out = str(folder / "model")
    recipe.main([*TINY, *files, f"--output_dir={out}", "--save_strategy=no", "--learning_rate=5e-3", "--num_train_epochs=4"])
    return out


def weights(folder) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    (file,) = Path(folder).glob("*.safetensors")
    return load_file(file)


# Texts --------------------------------------------------------------------------------------------------------------------


def test_learned_tokens_give_every_text_back():
    tokenizer = recipe.learn_tokenizer(datasets.Dataset.from_dict({"text": TEXTS}), vocab_size=300)
    assert len(tokenizer) == 300 and tokenizer.vocab_size == 300
    for text in [*TEXTS, "Ünknown wörds: 京都, £5\n\tand  spaces "]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_packing_loses_only_the_last_piece():
    tokenizer = recipe.learn_tokenizer(datasets.Dataset.from_dict({"text": TEXTS}), vocab_size=300)
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    for separate, end in ((True, "</s>"), (False, "")):
        data = recipe.DataArguments(block_size=5, separate_texts=separate)
        blocks, bytes_per_token = recipe.pack("train", rows, tokenizer, data)
        joined = "".join(text + end for text in TEXTS)
        tokens = [t for block in blocks["input_ids"] for t in block]
        assert joined.startswith(tokenizer.decode(tokens)) and blocks["labels"][:] == blocks["input_ids"][:]
        total = len(tokenizer(joined)["input_ids"])
        if separate:
            total = sum(len(tokenizer(text)["input_ids"]) + 1 for text in TEXTS)
            assert bytes_per_token == pytest.approx(sum(map(len, TEXTS)) / total)
            assert len(tokens) == total // 5 * 5


def test_topics_keep_the_split(monkeypatch):
    topics = ["business", "sports", "tech"]
    label = datasets.ClassLabel(names=topics)
    features = datasets.Features({"text": datasets.Value("string"), "label": label})
    splits = {
        split: datasets.Dataset.from_dict({"text": [f"{split} {name}" for name in topics], "label": topics}, features=features)
        for split in ("train", "test")
    }
    monkeypatch.setattr(bbc_news, "load_bbc", lambda task, seed: splits)
    texts, eval_name = recipe.load_texts("bbc_articles", {}, recipe.DataArguments(topics=["sports", "tech"]))
    assert eval_name == "test"
    found = {split: rows[:] for split, rows in texts.items()}
    assert found == {"train": {"text": ["train sports", "train tech"]}, "eval": {"text": ["test sports", "test tech"]}}
    with pytest.raises(recipe.UsageError, match="--topics cooking: BBC News has business, sports, tech"):
        recipe.load_texts("bbc_articles", {}, recipe.DataArguments(topics=["sports", "cooking"]))


def test_perplexity_of_a_uniform_guess():
    found = recipe.held_out({"eval_loss": math.log(256)}, bytes_per_token=2.0)
    assert found["eval_perplexity"] == pytest.approx(256) and found["eval_bits_per_byte"] == pytest.approx(4)
    assert recipe.held_out({"eval_loss": 1e4}, 1.0)["eval_perplexity"] == math.inf


# Runs ---------------------------------------------------------------------------------------------------------------------


def test_a_new_model_trains_writes_its_results_and_resumes_bit_for_bit(flags, tmp_path, capsys):
    flags = [*flags, "--learning_rate=5e-3", "--num_train_epochs=3", "--save_steps=10"]
    results = recipe.main(flags)
    assert results["eval_perplexity"] < 0.5 * results["eval_perplexity_before"]
    assert results["eval_perplexity_before"] == pytest.approx(300, rel=0.3)  # the guess of an untrained model
    out = tmp_path / "out"
    saved = {name: json.loads((out / f"{name}_results.json").read_text()) for name in ("all", "train", "eval")}
    assert saved["all"] == {**saved["train"], **saved["eval"]} == results
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == results["train_steps"]
    printed = capsys.readouterr().out
    for line in ("efcp_lowrank_mfac on train.txt", "perplexity before", "bits per byte", "optimizer state"):
        assert line in printed

    again = recipe.main([*flags, f"--resume_from_checkpoint={out / 'checkpoint-10'}", "--output_dir=resumed"])
    assert again["train_steps"] == results["train_steps"] - 10
    first, second = weights(out), weights("resumed")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    evaluated = recipe.main([*flags, f"--model_name_or_path={out}", "--do_eval", "--output_dir=evaluated"])
    assert evaluated["eval_perplexity"] == pytest.approx(results["eval_perplexity"], rel=1e-5)
    assert "train_runtime" not in evaluated and "eval_perplexity_before" not in evaluated


def test_lora_saves_the_adapter_resumes_and_is_loaded_again(flags, trained, tmp_path):
    lora = [*flags, f"--model_name_or_path={trained}", "--lora", "--lora_r=4", "--lora_dropout=0.1", "--save_steps=5"]
    lora += ["--per_device_train_batch_size=4", "--optim_args=rank=1"]
    lora += ["--lora_target_modules", "q_proj,v_proj", "down_proj", "--learning_rate=5e-3"]
    results = recipe.main(lora)
    out = tmp_path / "out"
    adapter = json.loads((out / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], set(adapter["target_modules"])) == (4, 16, {"q_proj", "v_proj", "down_proj"})
    names = weights(out)
    assert len(names) == 6 and all("lora_" in name for name in names)
    assert results["train_parameters"] == sum(w.numel() for w in names.values())
    assert results["eval_perplexity"] < results["eval_perplexity_before"]
    assert results["train_optimizer_state_bytes"] < 45 * results["train_parameters"]

    resumed = recipe.main([*lora, f"--resume_from_checkpoint={out / 'checkpoint-5'}", "--output_dir=resumed"])
    assert resumed["train_steps"] == results["train_steps"] - 5
    assert all(torch.equal(w, weights("resumed")[name]) for name, w in names.items())

    more = [*flags, f"--model_name_or_path={out}", "--output_dir=more", "--max_steps=2"]  # the base comes with the adapter
    assert recipe.main(more)["eval_perplexity_before"] == pytest.approx(results["eval_perplexity"], rel=1e-4)
    assert weights("more").keys() == names.keys()


@pytest.mark.parametrize("extra", [[], ["--lora", "--gradient_checkpointing"]], ids=["full", "lora"])
def test_json_config_and_bf16_weights(flags, trained, extra, tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"body": text, "id": 1}) for text in [*TEXTS * 20, "", " "]))
    config = {
        "model_name_or_path": trained,
        "torch_dtype": "bfloat16",
        "train_file": "rows.jsonl",
        "text_column": "body",
        "block_size": 16,
        "max_train_samples": 40,
        "max_eval_samples": 3,
        "validation_share": 0.2,
        "lora_target_modules": "q_proj,o_proj",
        "output_dir": "from_json",
        "save_strategy": "no",
        "max_steps": 2,
        **{flag.removeprefix("--"): True for flag in extra},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    results = recipe.main(["config.json"])
    assert 1 <= results["eval_samples"] <= 3 and math.isfinite(results["eval_perplexity"])
    expected = torch.float32 if extra else torch.bfloat16  # PEFT keeps adapters in 32 bits
    assert {w.dtype for w in weights("from_json").values()} == {expected}


# Mistakes -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--torch_dtype=bf16"], "--torch_dtype 'bf16': must be one of float32, bfloat16, float16"),
        (["--hidden_size=100"], "--hidden_size 100: must be a multiple of 64"),
        (["--vocab_size=100"], "--vocab_size 100: must be an integer >= 258"),
        (["--block_size=1"], "--block_size 1: must be an integer >= 2"),
        (["--block_size=100000"], "fewer than one block: --block_size 100000"),
        (["--lora", "--lora_r=0"], "--lora_r 0: must be an integer >= 1"),
        (["--lora", "--lora_dropout=1"], "--lora_dropout 1.0: must be a number in [0, 1)"),
        (["--lora", "--lora_alpha=0"], "--lora_alpha 0.0: must be a number > 0"),
        (["--lora", "--lora_target_modules=q_prj"], "q_prj"),
        (["--validation_share=1"], "--validation_share 1.0: must be a number between 0 and 1"),
        (["--topics", "tech"], "--topics: only BBC News has topics"),
        (["--text_column=body"], "--text_column 'body' of the train split: no such column; the data has text"),
        (["--train_file="], "local data needs --train_file, given: validation"),
        (["--train_file=train.doc"], "must end in .txt, .csv"),
        (["--train_file=numbers.csv"], "holds int64, not text"),
        (["--validation_file=blank.csv"], "the eval split has no texts"),
        (["--validation_file=", "--train_file=one.txt"], "local data: needs train and validation"),
        (["--dataset_name=wikitext"], "--dataset_name and --train_file are both given"),
        (["--model_name_or_path=no/such/model"], "no/such/model"),
        (["--optim_args=rnak=4"], "rank"),
        (["--do_predict"], "--do_predict"),
        (["--resume_from_checkpoint=true"], "no checkpoint in 'out'"),
        (["--lr_scheduler_type=polynomial", "--learning_rate=0"], "--learning_rate 0.0: must be > 1e-07, where"),
    ],
)
def test_mistakes_are_one_clear_error_and_write_nothing(flags, more, message, tmp_path):
    (tmp_path / "numbers.csv").write_text("text\n1\n2\n3\n")
    (tmp_path / "blank.csv").write_text('text,id\n" ",1\n" ",2\n')
    (tmp_path / "one.txt").write_text("one paragraph")
    with pytest.raises(recipe.UsageError) as error:
        recipe.main([*flags, *more])
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_mistakes_in_the_json_config(flags, tmp_path):
    for name, value in (("lora_alpha", "large"), ("hidden_size", "64"), ("lora_r", 1.5), ("validation_share", None)):
        (tmp_path / "config.json").write_text(json.dumps({"train_file": "train.txt", "output_dir": "out", name: value}))
        with pytest.raises(recipe.UsageError, match=f"--{name} .*: must be"):
            recipe.main(["config.json"])


def test_a_block_longer_than_the_model_takes(flags, trained):
    with pytest.raises(recipe.UsageError, match="--block_size 1000: this model takes at most 512"):
        recipe.main([*flags, f"--model_name_or_path={trained}", "--block_size=1000"])


def test_every_argument_has_help():
    for arguments in (recipe.ModelArguments, recipe.LoraArguments, recipe.DataArguments, recipe.RecipeTrainingArguments):
        assert [f.name for f in dataclasses.fields(arguments) if f.init and not f.metadata.get("help")] == []


def test_the_learning_rate_suits_what_is_trained():
    def rate(*flags):
        groups = (recipe.ModelArguments, recipe.LoraArguments, recipe.DataArguments, recipe.RecipeTrainingArguments)
        model, lora, data, args = recipe.common.parse(groups, "", list(flags))
        recipe.check_arguments(model, lora, data, args)
        return args.learning_rate

    pretrained = "--model_name_or_path=some/model"
    assert (rate(), rate(pretrained), rate(pretrained, "--lora")) == (1e-3, 1e-4, 1e-3)
    assert rate("--learning_rate=0.5") == rate(pretrained, "--lora", "--learning_rate=0.5") == 0.5
