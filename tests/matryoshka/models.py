"""A small model with adapters that are not zero."""

import torch
from peft.tuners.lora import LoraLayer
from torch import nn


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 5)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def mlp():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MLP()


def layers_of(model):
    return [m for m in model.modules() if isinstance(m, LoraLayer)]


def filled(model, seed=1, part="lora_"):
    """The model with numbers in A and B, always the same ones."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if part in name:
            p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64).mul_(0.3).to(p.dtype)
    return model
