"""A small LLaMA with LoRA adapters that are always the same, its batches, and its training loop."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import hf_efcp
from tests.optim.helpers import same
from tests.reference import each, few_names, info, known_to

by_name = pytest.mark.parametrize("name", each())
by_few_names = pytest.mark.parametrize("name", few_names())
# Options that compress matrices as thin as 4 x 32, and wrap around after 4 steps.
SMALL = {"window_size": 4, "update_rms": 0.5, "error_dtype": "bf16", "adjust_lr_fn": "match_rms_adamw", "adam_lr_ratio": 1.0}
LOSSY = {"low rank": {"rank": 1}, "sparse": {"density": 0.1, "block_size": 32}, "dense": {}}
_STATE_DTYPES = {
    "window_p": torch.float32,
    "window_q": torch.float32,
    "window_indices": torch.int16,
    "window_values": torch.float32,
    "window_rows": torch.float32,
    "warm_start": torch.float32,
    "error": torch.bfloat16,
    "gram": torch.float64,
    "step": torch.int64,
    "skipped": torch.int64,
}
# Without a window: `step` is each tensor's own, and the ring's numbers are in the method's own default.
_WITHOUT_WINDOW = {
    **dict.fromkeys(("left", "right", "left_root", "right_root"), torch.float32),
    "projector": torch.float32,
    "indices": torch.int32,
    "exp_avg": torch.float32,
    "exp_avg_sq": torch.float32,
    "window_indices": torch.int16,
    "window_values": torch.bfloat16,
    "error": torch.bfloat16,
    "step": torch.float32,
    "counter": torch.int64,
    "skipped": torch.int64,
}


def state_dtypes(name):
    """State entry -> dtype, as `options` have them."""
    return _STATE_DTYPES if info(name).windowed else _WITHOUT_WINDOW


def options(name, **more):
    return known_to(name, {**SMALL, **LOSSY[info(name).compression], **more})


def make(name, params, lr=5e-3, **more):
    return hf_efcp.create_optimizer(name, params, lr=lr, **options(name, **more))


def lora(**given):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **given})


def tiny_llama(dtype=torch.float32, linear=None):
    """Two layers, grouped queries, random weights, always the same; `linear` replaces the decoder's linear layers."""
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        initializer_range=0.2,  # so that the frozen head passes gradients on
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    if linear is not None:
        for module in list(model.model.layers.modules()):
            for name, child in list(module.named_children()):
                if type(child) is nn.Linear:
                    setattr(module, name, linear(child))
    return model.to(dtype) if linear is None else model


class QuantizedLinear(nn.Linear):
    """A linear layer as QLoRA's: its weight is a frozen parameter of bytes, made floating for every product."""

    def __init__(self, source: nn.Linear):
        super().__init__(source.in_features, source.out_features, bias=False)
        self.register_buffer("scale", source.weight.detach().abs().amax(1, keepdim=True) / 127)
        self.weight = nn.Parameter(((source.weight / self.scale).round() + 128).to(torch.uint8), requires_grad=False)

    def forward(self, x):
        return x @ ((self.weight.to(x.dtype) - 128) * self.scale.to(x.dtype)).T


def with_lora(model, seed=1, adapter_dtype=None, **given):
    """The model with adapters, always the same ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(model, lora(**given), autocast_adapter_dtype=False)
    if adapter_dtype is not None:
        for p in model.parameters():
            if p.requires_grad:
                p.data = p.data.to(adapter_dtype)
    return model


def adapters(model, part=""):
    return {name: p for name, p in model.named_parameters() if p.requires_grad and part in name}


def batch(t):
    """Step t's 8 sequences of 8 tokens, all from the first quarter of the vocabulary: a loss of log 8 is in reach."""
    tokens = torch.randint(0, 8, (8, 8), generator=torch.Generator().manual_seed(t))
    return {"input_ids": tokens, "labels": tokens}


def loss_of(model, t=10_000):
    with torch.no_grad():
        return float(model(**batch(t)).loss)


def train(model, optimizer, start, stop, autocast=False):
    for t in range(start, stop):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**batch(t)).loss
        loss.backward()
        optimizer.step()


def copies(params):
    return {name: p.detach().clone() for name, p in params.items()}


def moved(before, params):
    return {name for name, p in params.items() if not same(before[name], p)}
