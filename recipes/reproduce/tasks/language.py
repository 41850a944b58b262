"""Language models on BBC News: a small LLaMA from scratch, LoRA on it for a topic that it has not seen, and a small T5."""

import functools

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from hf_efcp.demo.bbc import bbc_news
from hf_efcp.demo.language import VOCABULARY, learn_tokenizer, small_llama

from ..training import fit
from .base import Batch, Outcome, Problem, Task, cached

NEW_TOPIC = "sports"  # LoRA's; its base has read the other four
BASE_STEPS = 1000
SPLITS = ("train", "validation", "test")
BLOCK_SIZE = 128
TEXTS = 1000  # are cut together; what is left of them at the end is lost
LORA_RANK, LORA_ALPHA = 8, 16
SENTENCES = {"train": 20000, "validation": 1000, "test": 1000}
SENTENCE_TOKENS, HIDDEN = 48, 0.3


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 2048 tokens, learned from the train split."""
    made = cached("tokenizer", {"vocabulary": VOCABULARY}, lambda: {"text": _learn()})
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(made["text"]), **names)


def _learn() -> str:
    return learn_tokenizer(articles()["train"]["text"]).backend_tokenizer.to_str()


@functools.lru_cache(maxsize=1)
def articles() -> dict[str, Dataset]:
    """Whole articles, split by story."""
    return bbc_news(validation=True)


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
        packed[split] = torch.cat([_cut(batch["text"]) for batch in rows.iter(TEXTS)])
    return packed


def _cut(texts: list[str]) -> Tensor:
    words = tokenizer()
    ids = [token for tokens in words(texts)["input_ids"] for token in (*tokens, words.eos_token_id)]
    return torch.tensor(ids[: len(ids) // BLOCK_SIZE * BLOCK_SIZE]).reshape(-1, BLOCK_SIZE)


def _takes(part: str, topic: str) -> bool:
    return part != f"not {topic}" if part.startswith("not ") else part in ("all", topic)


def score(model: nn.Module, batch: Batch) -> Outcome:
    """Cross-entropy of the next token."""
    ids = batch["input_ids"]
    return Outcome(model(input_ids=ids, labels=ids).loss, ids.shape[0] * (ids.shape[1] - 1))


def _llama(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return small_llama(tokenizer())


def llama(task: Task, seed: int) -> Problem:
    """The new model of recipes/causal_lm.py, one million parameters."""
    return Problem(_llama(seed), blocks("all"), score)


def larger_llama(task: Task, seed: int) -> Problem:
    """A LLaMA of 24M parameters: eight layers of width 512."""
    torch.manual_seed(seed)
    return Problem(small_llama(tokenizer(), hidden_size=512, num_hidden_layers=8), blocks("all"), score)


def lora(task: Task, seed: int) -> Problem:
    """Adapters of rank 8 on every linear layer of a LLaMA that has read the other topics; the rest is frozen."""
    model = _llama(0)
    model.load_state_dict(cached("base", {"steps": BASE_STEPS, "topic": NEW_TOPIC}, _pretrain))
    torch.manual_seed(seed)
    adapters = LoraConfig(task_type="CAUSAL_LM", r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules="all-linear")
    return Problem(get_peft_model(model, adapters), blocks(NEW_TOPIC), score)


def _pretrain() -> dict[str, Tensor]:
    task = Task("base", "LoRA's LLaMA", "language.llama", 1e-3, BASE_STEPS, 8)
    problem = Problem(_llama(0), blocks(f"not {NEW_TOPIC}"), score)
    optimizer = torch.optim.AdamW(problem.model.parameters(), lr=task.rate, weight_decay=0.0)
    fit(problem, optimizer, task, task.rate, seed=0)
    return problem.model.state_dict()


# Sequence to sequence -----------------------------------------------------------------------------------------------------


def restored() -> dict[str, Batch]:
    """Sentences of at most 48 tokens, of which the mask token hides 30% at random, and the same sentences whole."""
    settings = {"limits": SENTENCES, "tokens": SENTENCE_TOKENS, "hidden": HIDDEN, "vocabulary": VOCABULARY}
    splits: dict[str, Batch] = {}
    for name, value in cached("restored", settings, _hide).items():
        split, field = name.split("/")
        splits.setdefault(split, {})[field] = value
    return splits


def _hide() -> dict[str, Tensor]:
    data, words = bbc_news("sentences", validation=True), tokenizer()
    generator = torch.Generator().manual_seed(0)
    flat = {}
    for split, limit in SENTENCES.items():
        texts = [text + words.eos_token for text in data[split]["text"][:limit]]
        tokens = words(texts, truncation=True, max_length=SENTENCE_TOKENS, padding=True, return_tensors="pt")
        ids, real = tokens["input_ids"], tokens["attention_mask"]
        hidden = (torch.rand(ids.shape, generator=generator) < HIDDEN) & (real == 1)
        flat[f"{split}/input_ids"] = ids.masked_fill(hidden, words.bos_token_id)
        flat[f"{split}/attention_mask"], flat[f"{split}/labels"] = real, ids.masked_fill(real == 0, -100)
    return flat


def score_restored(model: nn.Module, batch: Batch) -> Outcome:
    """Cross-entropy of the sentence's tokens, hidden or not, and how many are predicted right."""
    longest = int(batch["attention_mask"].sum(1).max())
    batch = {name: value[:, :longest].contiguous() for name, value in batch.items()}  # T5 takes views of labels
    output, labels = model(**batch), batch["labels"]
    return Outcome(output.loss, int((labels != -100).sum()), int((output.logits.argmax(-1) == labels).sum()))


def seq2seq(task: Task, seed: int) -> Problem:
    """A T5 of two layers each way and one million parameters, without dropout."""
    words = tokenizer()
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=len(words),
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=words.pad_token_id,
        eos_token_id=words.eos_token_id,
        decoder_start_token_id=words.pad_token_id,
    )
    return Problem(T5ForConditionalGeneration(config), restored(), score_restored)
