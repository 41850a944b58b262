"""The causal language model recipe: its texts, its arguments, tiny full and LoRA runs end to end."""

import json
import math
from pathlib import Path

import causal_lm as recipe
import datasets
import peft
import pytest
import torch

from hf_efcp import OptionError
from hf_efcp.demo.language import learn_tokenizer

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


def test_packing_loses_only_the_last_piece():
    tokenizer = learn_tokenizer(TEXTS, vocab_size=300)
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    for separate, end in ((True, "</s>"), (False, "")):
        blocks, bytes_per_token = recipe.pack(rows, tokenizer, 5, separate)
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
    splits = datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict(
                {"text": [f"{split} {name}" for name in topics], "label": topics}, features=features
            )
            for split in ("train", "test")
        }
    )
    monkeypatch.setattr(recipe, "bbc_news", lambda task, seed: splits)
    texts = recipe.load_texts(recipe.DataArguments(topics=["sports", "tech"]))
    found = {split: rows[:] for split, rows in texts.items()}
    assert found == {"train": {"text": ["train sports", "train tech"]}, "eval": {"text": ["test sports", "test tech"]}}
    with pytest.raises(OptionError, match="--topics cooking: BBC News has business, sports, tech"):
        recipe.load_texts(recipe.DataArguments(topics=["sports", "cooking"]))


def test_perplexity_of_a_uniform_guess():
    found = recipe.held_out({"eval_loss": math.log(256)}, bytes_per_token=2.0)
    assert found["eval_perplexity"] == pytest.approx(256) and found["eval_bits_per_byte"] == pytest.approx(4)
    assert recipe.held_out({"eval_loss": 1e4}, 1.0)["eval_perplexity"] == math.inf


def test_the_usual_rate_of_a_new_model_a_pretrained_one_and_adapters():
    ours = recipe.ModelArguments(hidden_size=64, num_hidden_layers=1)
    model = recipe.load_model(ours, learn_tokenizer(TEXTS, vocab_size=300), 16)
    assert recipe.usual_rate(model, new=True) == 1e-3 and recipe.usual_rate(model, new=False) == 1e-4
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    assert recipe.usual_rate(adapted, new=True) == recipe.usual_rate(adapted, new=False) == 1 / 64


# Runs ---------------------------------------------------------------------------------------------------------------------


def test_a_new_model_trains_writes_its_results_and_resumes_bit_for_bit(flags, tmp_path, capsys):
    flags = [*flags, "--learning_rate=5e-3", "--num_train_epochs=3", "--save_steps=10"]
    results = recipe.main(flags)
    assert results["eval_perplexity"] < 0.5 * results["eval_perplexity_before"]
    assert results["eval_perplexity_before"] == pytest.approx(300, rel=0.3)  # the guess of an untrained model
    out = tmp_path / "out"
    saved = {name: json.loads((out / f"{name}_results.json").read_text()) for name in ("all", "train", "eval")}
    assert saved["all"] == {**saved["train"], **saved["eval"]}
    steps = json.loads((out / "trainer_state.json").read_text())["global_step"]
    assert steps > 10
    printed = capsys.readouterr().out
    for line in ("efcp_lowrank_mfac on train.txt", "perplexity before", "bits per byte", "optimizer state"):
        assert line in printed

    again = recipe.main([*flags, f"--resume_from_checkpoint={out / 'checkpoint-10'}", "--output_dir=resumed"])
    assert again["train_runtime"] > 0 and json.loads(Path("resumed/trainer_state.json").read_text())["global_step"] == steps
    first, second = weights(out), weights("resumed")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    evaluated = recipe.main([*flags, f"--model_name_or_path={out}", "--do_eval", "--output_dir=evaluated"])
    assert evaluated["eval_perplexity"] == pytest.approx(results["eval_perplexity"], rel=1e-5)
    assert "train_runtime" not in evaluated and "eval_perplexity_before" not in evaluated


def test_lora_saves_the_adapter_resumes_and_is_loaded_again(flags, trained, tmp_path):
    lora = [*flags, f"--model_name_or_path={trained}", "--lora", "--lora_r=4", "--lora_dropout=0.1", "--save_steps=5"]
    lora += ["--per_device_train_batch_size=4", "--optim_args=rank=1"]
    lora += ["--lora_target_modules", "q_proj", "v_proj", "down_proj", "--learning_rate=5e-3"]
    results = recipe.main(lora)
    out = tmp_path / "out"
    adapter = json.loads((out / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], set(adapter["target_modules"])) == (4, 16, {"q_proj", "v_proj", "down_proj"})
    names = weights(out)
    assert len(names) == 6 and all("lora_" in name for name in names)
    assert results["train_parameters"] == sum(w.numel() for w in names.values())
    assert results["eval_perplexity"] < results["eval_perplexity_before"]
    assert results["train_optimizer_state_bytes"] < 45 * results["train_parameters"]

    recipe.main([*lora, f"--resume_from_checkpoint={out / 'checkpoint-5'}", "--output_dir=resumed"])
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
        "lora_target_modules": ["q_proj", "o_proj"],
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
        (["--hidden_size=100"], "hidden_size=100: must be a multiple of 64"),
        (["--vocab_size=100"], "vocab_size=100: must be an integer >= 258"),
        (["--block_size=100000"], "--block_size 100000: .*fewer than one block"),
        (["--topics", "tech"], "--topics: only BBC News has topics"),
        (["--text_column=body"], "--text_column 'body': no column of texts; the data has text"),
        (["--train_file=train.doc"], "must end in .txt, .csv"),
        (["--dataset_name=wikitext"], "--dataset_name and --train_file are both given"),
    ],
)
def test_mistakes_are_one_clear_error_and_write_nothing(flags, more, message, tmp_path):
    with pytest.raises(OptionError, match=message):
        recipe.main([*flags, *more])
    assert not (tmp_path / "out").exists()


def test_a_block_longer_than_the_model_takes(flags, trained):
    Path("train.txt").write_text("\n\n".join(TEXTS * 99))
    with pytest.raises(OptionError, match="--block_size 600: this model takes at most 512"):
        recipe.main([*flags, f"--model_name_or_path={trained}", "--validation_file=train.txt", "--block_size=600"])


def test_the_learning_rate_suits_what_is_trained(flags, trained, monkeypatch):
    """The Trainer is not reached: what it would get is looked at."""

    def rate(*more):
        monkeypatch.setattr(recipe, "Trainer", lambda args, **_: pytest.fail(str(args.learning_rate)))
        with pytest.raises(pytest.fail.Exception) as failure:
            recipe.main([*flags, *more])
        return float(str(failure.value))

    pretrained = f"--model_name_or_path={trained}"
    assert (rate(), rate(pretrained), rate(pretrained, "--lora")) == (1e-3, 1e-4, 1 / 64)
    assert rate("--learning_rate=0.5") == rate(pretrained, "--learning_rate=0.5") == 0.5
