"""The topic of a BBC sentence: all of MiniLM, its first two layers, or softmax regression on its frozen features."""

import functools

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from hf_efcp.demo.bbc import bbc_news, minilm_folder

from .base import Batch, Outcome, Problem, Task, cached, classify, rows

TOPICS = ("business", "politics", "tech")
LIMITS = {"train": 8000, "validation": 2000, "test": 3000}
MAX_TOKENS = 32
SORTED = 500


def sentences(topics: tuple[str, ...] | None) -> dict[str, Batch]:
    """Tokens, mask and topic of the sentences; evaluated splits are sorted by length inside blocks of 500: less padding."""
    settings = {"topics": topics, "limits": LIMITS, "max_tokens": MAX_TOKENS, "sorted": SORTED}
    flat = cached("sentences", settings, lambda: _tokenize(topics))
    splits: dict[str, Batch] = {}
    for name, value in flat.items():
        split, field = name.split("/")
        splits.setdefault(split, {})[field] = value
    return splits


def _tokenize(topics: tuple[str, ...] | None) -> dict[str, Tensor]:
    data = bbc_news("sentences", validation=True)
    names = data["train"].features["label"].names
    wanted = [names.index(topic) for topic in topics or names]
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    flat = {}
    for split, limit in LIMITS.items():
        examples = data[split].filter(wanted.__contains__, input_columns="label")
        examples = examples.select(range(min(limit, len(examples))))
        tokens = tokenizer(list(examples["text"]), truncation=True, max_length=MAX_TOKENS, padding=True, return_tensors="pt")
        labels = torch.tensor([wanted.index(label) for label in examples["label"]])
        order = torch.arange(len(labels))
        if split != "train":
            lengths = tokens["attention_mask"].sum(1)
            order = torch.cat([part[lengths[part].argsort(stable=True)] for part in order.split(SORTED)])
        for field, value in (
            ("input_ids", tokens["input_ids"]),
            ("attention_mask", tokens["attention_mask"]),
            ("labels", labels),
        ):
            flat[f"{split}/{field}"] = value[order]
    return flat


def score(model: nn.Module, batch: Batch) -> Outcome:
    """As `classify`, without the padding that no sentence of the batch needs."""
    longest = int(batch["attention_mask"].sum(1).max())
    return classify(model, {name: value[:, :longest] if value.ndim == 2 else value for name, value in batch.items()})


def _bert(seed: int, layers: int | None, frozen: bool) -> Problem:
    torch.manual_seed(seed)
    given = {} if layers is None else {"num_hidden_layers": layers}
    model = AutoModelForSequenceClassification.from_pretrained(minilm_folder(), num_labels=len(TOPICS), **given)
    if frozen:
        model.base_model.embeddings.requires_grad_(False)
    return Problem(model, sentences(TOPICS), score)


def whole(task: Task, seed: int) -> Problem:
    """All six layers and the embeddings."""
    return _bert(seed, None, False)


def two(task: Task, seed: int) -> Problem:
    """The first two layers and the embeddings."""
    return _bert(seed, 2, False)


def two_frozen(task: Task, seed: int) -> Problem:
    """The first two layers; the embeddings stay as they are."""
    return _bert(seed, 2, True)


@functools.lru_cache(maxsize=1)
def features() -> dict[str, Batch]:
    """MiniLM's mean token of each sentence, (n, 384), with mean 0 and variance 1 over the train split; all topics."""
    splits = sentences(None)
    limits = {split: min(limit, 3000) for split, limit in LIMITS.items()}

    def make() -> dict[str, Tensor]:
        model = AutoModel.from_pretrained(minilm_folder()).eval()
        return {split: _pooled(model, rows(splits[split], slice(limit))) for split, limit in limits.items()}

    pooled = cached("features", {"limits": limits, "max_tokens": MAX_TOKENS, "sorted": SORTED}, make)
    mean, deviation = pooled["train"].mean(0), pooled["train"].std(0)
    return {
        split: {"input": (pooled[split] - mean) / deviation, "labels": splits[split]["labels"][:limit]}
        for split, limit in limits.items()
    }


def _pooled(model: nn.Module, split: Batch) -> Tensor:
    pooled = []
    with torch.no_grad():
        for start in range(0, len(split["labels"]), 64):
            batch = rows(split, slice(start, start + 64))
            longest = int(batch["attention_mask"].sum(1).max())
            mask = batch["attention_mask"][:, :longest]
            states = model(batch["input_ids"][:, :longest], mask).last_hidden_state
            pooled.append((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
    return torch.cat(pooled)


def softmax(task: Task, seed: int) -> Problem:
    """One linear layer from zero: only the order of the data depends on the seed."""
    splits = features()
    classes = int(splits["train"]["labels"].max()) + 1
    model = nn.Linear(splits["train"]["input"].shape[1], classes)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    return Problem(model, splits, classify)
