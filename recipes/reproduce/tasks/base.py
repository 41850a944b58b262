"""What a task is, the cache of what is slow to make, and the mean loss on a split."""

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

CACHE = Path(__file__).resolve().parents[3] / "outputs" / "reproduce"
EVALUATION_BATCH = 64
Batch = dict[str, Tensor]


class Outcome(NamedTuple):
    """What a model does on a batch.

    Attributes:
        loss: mean over what is scored (examples or tokens), with its graph.
        count: number of examples or tokens that are scored.
        correct: number of them that are predicted right; None: nobody counts them.
    """

    loss: Tensor
    count: int
    correct: int | None = None


class Problem(NamedTuple):
    """A model to train, and its data.

    Attributes:
        model: with new weights where the task is from scratch.
        splits: "train", "validation" and "test", which share no example: tensors of one length by name.
        score: (model, batch) -> Outcome.
    """

    model: nn.Module
    splits: dict[str, Batch]
    score: Callable[[nn.Module, Batch], Outcome]

    def to(self, device: str) -> "Problem":
        """The same on a device. On a GPU the model computes in bf16, because models are trained so there (Trainer's `bf16`)."""
        splits = {name: {key: value.to(device) for key, value in split.items()} for name, split in self.splits.items()}
        kind = torch.device(device).type
        return Problem(self.model.to(device), splits, self.score if kind == "cpu" else in_bf16(self.score, kind))


@dataclasses.dataclass(frozen=True)
class Task:
    """What all contenders train alike.

    Attributes:
        name: in specs and results.
        title: one line for the tables.
        maker: "module.function" of this package, (task, seed) -> Problem; the seed decides new weights, the splits are
            always the same. The module is imported when it is first needed: that takes seconds.
        rate: AdamW's usual learning rate.
        steps: number of training steps.
        batch_size: examples a step.
        warmup: share of the steps in which the learning rate grows; from there it falls linearly to 0.
        examples: so many of the validation split, and of the test split, are evaluated, or all.
        perplexity: whether exp(loss) is a perplexity.
    """

    name: str
    title: str
    maker: str
    rate: float
    steps: int
    batch_size: int
    warmup: float = 0.1
    examples: int = 1000
    perplexity: bool = False

    def make(self, seed: int) -> Problem:
        """Model and data; the global generator of random numbers is seeded."""
        module, function = self.maker.split(".")
        return getattr(importlib.import_module(f".{module}", __package__), function)(self, seed)

    def settings(self) -> dict[str, int | float]:
        """What a spec may set, and what tells two versions of a task apart."""
        return {name: getattr(self, name) for name in ("steps", "batch_size", "warmup", "examples")}


def in_bf16(score: Callable[[nn.Module, Batch], Outcome], kind: str) -> Callable[[nn.Module, Batch], Outcome]:
    """The same score by autocast on this kind of device; the parameters stay as they are."""

    def mixed(model: nn.Module, batch: Batch) -> Outcome:
        with torch.autocast(kind, torch.bfloat16):
            return score(model, batch)

    return mixed


def classify(model: nn.Module, batch: Batch) -> Outcome:
    """Cross-entropy of a model whose output is logits, or has them; "labels" are classes, all else is the model's input."""
    output = model(**{name: value for name, value in batch.items() if name != "labels"})
    logits = getattr(output, "logits", output)
    labels = batch["labels"]
    loss = nn.functional.cross_entropy(logits, labels)
    return Outcome(loss, len(labels), int((logits.argmax(-1) == labels).sum()))


def rows(split: Batch, index: Tensor | slice) -> Batch:
    """Some examples of a split."""
    return {name: value[index] for name, value in split.items()}


def evaluate(problem: Problem, split: str, examples: int) -> dict[str, float]:
    """Mean loss, and accuracy where the task has one, on the first `examples` examples of a split."""
    problem.model.eval()
    data = problem.splits[split]
    size = min(examples, len(next(iter(data.values()))))
    total, count, correct = 0.0, 0, 0
    with torch.no_grad():
        for start in range(0, size, EVALUATION_BATCH):
            outcome = problem.score(problem.model, rows(data, slice(start, min(start + EVALUATION_BATCH, size))))
            total, count = total + float(outcome.loss) * outcome.count, count + outcome.count
            correct = None if outcome.correct is None or correct is None else correct + outcome.correct
    result = {"loss": total / count}
    return result if correct is None else result | {"accuracy": correct / count}


# Cache --------------------------------------------------------------------------------------------------------------------


def cached(name: str, settings: dict, make: Callable[[], dict]) -> dict:
    """What `make` returns (tensors, numbers, text), from a file of the cache if one has it for these settings."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    path = CACHE / f"{name}-{digest}.pt"
    with _alone(path):
        if not path.exists():
            made = make()
            temporary = path.with_suffix(".tmp")
            torch.save(made, temporary)
            temporary.replace(path)
    return torch.load(path, weights_only=True)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Only one process at a time is inside, so that two do not make the same thing side by side."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
