"""The tasks by name."""

import dataclasses
from typing import Any

from .base import Task

BBC, LARGER = "BBC sentences", "BBC News, LLaMA of 24M parameters"
TASKS = {
    task.name: task
    for task in (
        Task("digits_vit", "digits, small vision transformer from scratch", "digits.vision_transformer", 1e-3, 300, 64),
        Task("digits_resnet", "digits, small ResNet from scratch", "digits.resnet", 1e-3, 300, 64),
        Task("llama", "BBC News, LLaMA of 1M parameters from scratch", "language.llama", 1e-3, 500, 8, 0.1, 200, True),
        Task("larger_llama", f"{LARGER} from scratch", "language.larger_llama", 1e-3, 600, 32, perplexity=True),
        Task("lora", "BBC News, LoRA of rank 8 on that LLaMA, a new topic", "language.lora", 1e-3, 200, 8, 0.1, 200, True),
        Task("two_layer_frozen", f"{BBC}, MiniLM's first two layers, frozen embeddings", "sentences.two_frozen", 3e-4, 200, 16),
        Task("two_layer", f"{BBC}, MiniLM's first two layers", "sentences.two", 3e-4, 200, 16),
        Task("minilm", f"{BBC}, the whole of MiniLM", "sentences.whole", 1e-4, 150, 16, examples=500),
        Task("seq2seq", f"{BBC}, T5 of 1M parameters from scratch restores hidden words", "language.seq2seq", 1e-3, 500, 16),
        Task("softmax", f"{BBC}, softmax regression on MiniLM's features", "sentences.softmax", 1e-3, 500, 64, examples=3000),
    )
}


def get_task(name: str, **settings: Any) -> Task:
    """The task, with other `settings` (steps, batch_size, warmup, examples); raises ValueError for an unknown name."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}: valid: {', '.join(TASKS)}")
    valid = TASKS[name].settings()
    unknown = set(settings) - set(valid)
    if unknown:
        raise ValueError(f"task {name!r}: unknown setting {', '.join(sorted(unknown))}; valid: {', '.join(valid)}")
    return dataclasses.replace(TASKS[name], **settings)
