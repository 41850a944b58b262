"""One training run: a plain loop that is the same for every contender, and what it records."""

import functools
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.linalg import LinAlgError

import hf_efcp
from hf_efcp.bench import measuring

from .tasks.base import Problem, Task, evaluate, rows

CLIPPING = 1.0
RECORD_EVERY = 10


def factor(step: int, steps: int, warmup: float) -> float:
    """Learning rate of a step, counted from 0, over the highest: grows over the first share `warmup`, then falls to 0."""
    growing = max(1, round(warmup * steps))
    return min((step + 1) / growing, (steps - step) / max(1, steps - growing), 1.0)


def order(size: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Index tensors of the batches, epoch after epoch, without end; they depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        permutation = torch.randperm(size, generator=generator)
        yield from permutation[: size - size % batch_size].split(batch_size)


def fit(problem: Problem, optimizer: torch.optim.Optimizer, task: Task, rate: float, seed: int) -> dict[str, Any]:
    """Train `problem.model` in place.

    Clipping at 1.0, warm-up and linear decay, the same batches and the same dropout for every optimizer with this seed.

    Returns:
        "steps", "losses" (mean over the steps since the one before), "seconds" (of training so far), "optimizer_seconds",
        "train_seconds", and "diverged_at": the step whose loss or solution is no number, None if there is none. Seconds are
        `clock`'s.
    """
    model, data = problem.model, problem.splits["train"]
    params = [p for p in model.parameters() if p.requires_grad]
    device = params[0].device
    batches = order(len(next(iter(data.values()))), task.batch_size, seed)
    record: dict[str, Any] = {"steps": [], "losses": [], "seconds": [], "diverged_at": None}
    recent: list[Tensor] = []
    stepping, start = 0.0, clock(device)
    model.train()
    for step in range(task.steps):
        torch.manual_seed(1_000_003 * (seed + 1) + step)  # so that dropout does not depend on what an optimizer draws
        loss = problem.score(model, rows(data, next(batches))).loss
        recent.append(loss.detach())
        if not torch.isfinite(loss):
            record["diverged_at"] = step
            break
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, CLIPPING)
        for group in optimizer.param_groups:
            group["lr"] = rate * factor(step, task.steps, task.warmup)
        before = clock(device)
        try:
            optimizer.step()
        except LinAlgError:  # an eigenvalue problem with NaN in it
            record["diverged_at"] = step
            break
        stepping += clock(device) - before
        optimizer.zero_grad()
        if (step + 1) % RECORD_EVERY == 0 or step + 1 == task.steps:
            record["steps"].append(step + 1)
            record["losses"].append(round(float(torch.stack(recent).mean()), 5))
            record["seconds"].append(round(clock(device) - start, 3))
            recent.clear()
    return record | {"optimizer_seconds": round(stepping, 3), "train_seconds": round(clock(device) - start, 3)}


def clock(device: torch.device) -> float:
    """Seconds: on a CPU this process's CPU time, so that other work does not count; on a GPU wall time, its work included."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def train(
    task: Task, build: Callable[[nn.Module, float], torch.optim.Optimizer], rate: float, seed: int, device: str = "cpu"
) -> dict[str, Any]:
    """Make the task's model, train it on `device` by `build(model, rate)`, evaluate it.

    Returns:
        What `fit` returns, and "parameters", "state_bytes", "bytes_per_parameter", "validation" and "test" (loss and maybe
        accuracy; None after a divergence) and "evaluation_seconds".
    """
    problem = task.make(seed).to(device)
    torch.manual_seed(seed)
    optimizer = build(problem.model, rate)
    record = fit(problem, optimizer, task, rate, seed)
    parameters = sum(p.numel() for p in problem.model.parameters() if p.requires_grad)
    state = sum(measuring.state_bytes(optimizer).values())
    record |= {"parameters": parameters, "state_bytes": state, "bytes_per_parameter": round(state / parameters, 3)}
    start = clock(torch.device(device))
    for split in ("validation", "test"):
        record[split] = None if record["diverged_at"] is not None else evaluate(problem, split, task.examples)
        if record[split] is not None and not record[split]["loss"] < float("inf"):
            record |= {split: None, "diverged_at": task.steps}
    return record | {"evaluation_seconds": round(clock(torch.device(device)) - start, 3)}


@functools.lru_cache(maxsize=1)
def facts(device: str = "cpu") -> dict[str, Any]:
    """Code and machine of a run: "commit" (with a + where files differ from it), versions, "cpu", "threads", perhaps "gpu"."""
    machine = measuring.machine(torch.device(device))
    versions = {"hf_efcp": hf_efcp.__version__, "transformers": transformers.__version__}
    names = [name for name in ("torch", "python", "cpu", "threads", "gpu") if name in machine]
    return {"commit": _commit(), **versions, **{name: machine[name] for name in names}}


def _commit() -> str | None:
    def git(*words: str) -> str:
        call = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":(top)hf_efcp", ":(top)recipes/*.py")
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
