"""Language models on BBC News: a small LLaMA from scratch, and LoRA on it for a topic that it has not seen."""

import functools

import torch
from bbc_news import load_bbc
from causal_lm import DataArguments, LoraArguments, ModelArguments, learn_tokenizer, load_model, pack
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from ..training import fit
from .base import Batch, Outcome, Problem, Task, cached

NEW_TOPIC = "sports"  # LoRA's; its base has read the other four
BASE_STEPS = 1000
SPLITS = ("train", "validation", "test")
BLOCK_SIZE = DataArguments().block_size
VOCABULARY = ModelArguments().vocab_size


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 2048 tokens, learned from the train split."""
    made = cached("tokenizer", {"vocabulary": VOCABULARY}, lambda: {"text": _learn()})
    from tokenizers import Tokenizer

    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(made["text"]), **names)


def _learn() -> str:
    return learn_tokenizer(articles()["train"], VOCABULARY).backend_tokenizer.to_str()


@functools.lru_cache(maxsize=1)
def articles() -> dict[str, Dataset]:
    """Whole articles, split by story."""
    return load_bbc("articles", validation=True)


def blocks(part: str) -> dict[str, Batch]:
    """Blocks of 128 tokens of all topics ("all"), of one topic, or of all but one ("not sports")."""
    flat = cached("blocks", {"part": part, "block": BLOCK_SIZE, "vocabulary": VOCABULARY}, lambda: _pack(part))
    return {split: {"input_ids": flat[split]} for split in SPLITS}


def _pack(part: str) -> dict[str, Tensor]:
    packed = {}
    for split, texts in articles().items():
        topics = texts.features["label"].names
        wanted = {i for i, name in enumerate(topics) if _takes(part, name)}
        rows = texts.filter(wanted.__contains__, input_columns="label").select_columns(["text"])
        packed[split] = torch.tensor(pack(split, rows, tokenizer(), DataArguments())[0]["input_ids"])
    return packed


def _takes(part: str, topic: str) -> bool:
    return part != f"not {topic}" if part.startswith("not ") else part in ("all", topic)


def score(model: nn.Module, batch: Batch) -> Outcome:
    """Cross-entropy of the next token."""
    ids = batch["input_ids"]
    return Outcome(model(input_ids=ids, labels=ids).loss, ids.shape[0] * (ids.shape[1] - 1))


def _llama(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return load_model(ModelArguments(), LoraArguments(), None, tokenizer(), None, DataArguments())


def llama(task: Task, seed: int) -> Problem:
    """The new model of recipes/causal_lm.py, one million parameters."""
    return Problem(_llama(seed), blocks("all"), score)


def lora(task: Task, seed: int) -> Problem:
    """Adapters of rank 8 on every linear layer of a LLaMA that has read the other topics; the rest is frozen."""
    from peft import LoraConfig, get_peft_model

    model = _llama(0)
    model.load_state_dict(cached("base", {"steps": BASE_STEPS, "topic": NEW_TOPIC}, _pretrain))
    torch.manual_seed(seed)
    given = LoraArguments()
    adapters = LoraConfig(task_type="CAUSAL_LM", r=given.lora_r, lora_alpha=given.lora_alpha, target_modules="all-linear")
    return Problem(get_peft_model(model, adapters), blocks(NEW_TOPIC), score)


def _pretrain() -> dict[str, Tensor]:
    task = Task("base", "LoRA's LLaMA", "language.llama", 1e-3, BASE_STEPS, 8)
    problem = Problem(_llama(0), blocks(f"not {NEW_TOPIC}"), score)
    optimizer = torch.optim.AdamW(problem.model.parameters(), lr=task.rate, weight_decay=0.0)
    fit(problem, optimizer, task, task.rate, seed=0)
    return problem.model.state_dict()
