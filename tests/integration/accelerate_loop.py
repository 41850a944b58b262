"""A plain Accelerate loop on a small model, for the tests of what Accelerate does to an optimizer."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

import hf_efcp
from tests.optim.helpers import M, snapshot
from tests.reference import each, known_to, lossy_options

by_name = pytest.mark.parametrize("name", each())
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def _reset():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def new_accelerator(**given):
    """On the CPU, as in a new process."""
    _reset()
    return Accelerator(cpu=True, **given)


def make(name, model, **options):
    """As under --optim, but for a window and rows so small that every format compresses and wraps around."""
    defaults = {
        "lr": 5e-3,
        "window_size": M,
        "update_rms": 0.5,
        "error_dtype": "bf16",
        "adam_lr_ratio": 1.0,
        **lossy_options(name),
    }
    return hf_efcp.create_optimizer(name, model, **known_to(name, {**defaults, **options}))


def small_model(seed=0, dtype=torch.float32):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = torch.nn.Linear(12, 40), torch.nn.LayerNorm(40), torch.nn.Dropout(0.2), torch.nn.Linear(40, 3)
        return torch.nn.Sequential(*layers).to(dtype)


def batch_at(t, dtype=torch.float32, size=8):
    """Batch t: inputs, and classes that depend on them."""
    inputs = torch.randn(size, 12, generator=torch.Generator().manual_seed(100 + t), dtype=torch.float64)
    return inputs.to(dtype), inputs[:, :3].argmax(-1)


def train(accelerator, model, optimizer, start, stop, scheduler=None, max_norm=None):
    """Steps start ... stop - 1; returns their losses."""
    losses = []
    for t in range(start, stop):
        inputs, labels = batch_at(t, next(model.parameters()).dtype)
        with accelerator.accumulate(model):
            loss = torch.nn.functional.cross_entropy(model(inputs).float(), labels)
            accelerator.backward(loss)
            if max_norm is not None:
                accelerator.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def look(optimizer, model):
    """A snapshot of a bare or a wrapped optimizer and its model."""
    return snapshot(getattr(optimizer, "optimizer", optimizer), list(model.parameters()))


def dtypes(optimizer):
    return {f"{i} {name}": t.dtype for i, entry in enumerate(optimizer.state.values()) for name, t in entry.items()}
