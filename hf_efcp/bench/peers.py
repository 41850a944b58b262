"""Other people's optimizers for `bench --peers`: name -> how to make it. What is missing or fails is skipped, and said so."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..groups import parameter_groups
from ..options import OptionError

LR = 1e-4
# Settings of the projections of GaLore and APOLLO. They are their papers' choices for models of this size.
_RANK = 128


def split_matrices(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The matrices inside the model, and everything else (embeddings, head, vectors)."""
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for group in parameter_groups(model):
        for _, p in group["params"]:
            (matrices if group["kind"] == "matrix" and p.ndim == 2 else others).append(p)
    return matrices, others


def _torch(name: str, **options: Any) -> Callable:
    return lambda model, m: getattr(torch.optim, name)(model.parameters(), lr=LR, **options)


def _low_rank(module: str, name: str, **options: Any) -> Callable:
    def make(model: nn.Module, m: int) -> torch.optim.Optimizer:
        matrices, others = split_matrices(model)
        groups = [{"params": others}, {"params": matrices, "rank": _RANK, "update_proj_gap": 200, "proj_type": "std", **options}]
        return getattr(importlib.import_module(module), name)([g for g in groups if g["params"]], lr=LR)

    return make


def _plain(module: str, name: str, **options: Any) -> Callable:
    return lambda model, m: getattr(importlib.import_module(module), name)(model.parameters(), lr=LR, **options)


def _muon(model: nn.Module, m: int) -> torch.optim.Optimizer:
    matrices, others = split_matrices(model)
    groups = [{"params": matrices, "use_muon": True}, {"params": others, "use_muon": False}]
    return importlib.import_module("pytorch_optimizer").Muon([g for g in groups if g["params"]], lr=LR)


def _daslab(name: str, windowed: bool = False, **options: Any) -> Callable:
    """The research code; `windowed`: its window is as long as ours."""

    def make(model: nn.Module, m: int) -> torch.optim.Optimizer:
        if not next(model.parameters()).is_cuda:
            raise RuntimeError("needs a GPU")
        if name == "MicroAdam" and any(p.dtype != torch.bfloat16 for p in model.parameters()):  # its kernel would end the process
            raise RuntimeError("needs parameters in bfloat16")
        cls = getattr(importlib.import_module("ista_daslab_optimizers"), name)
        return cls(list(model.parameters()), lr=LR, **({"m": m} if windowed else {}), **options)

    return make


def _torch_muon(model: nn.Module, m: int) -> torch.optim.Optimizer:
    matrices, others = split_matrices(model)
    rest = torch.optim.AdamW(others, lr=LR, fused=True)

    class Muon(torch.optim.Muon):  # torch has it since 2.9
        """Muon for matrices, AdamW for the other tensors."""

        def step(self, closure: Any = None) -> Any:
            """Take a step of both."""
            super().step(closure)
            rest.step()
            self.state.update(rest.state)

    return Muon(matrices, lr=LR)


# name -> (package, function of the model and the window size m).
PEERS: dict[str, tuple[str, Callable[[nn.Module, int], torch.optim.Optimizer]]] = {
    "torch AdamW foreach": ("torch", _torch("AdamW", foreach=True)),
    "torch AdamW fused": ("torch", _torch("AdamW", fused=True)),
    "torch Adafactor": ("torch", _torch("Adafactor")),
    "torch Muon": ("torch", _torch_muon),
    "GaLore AdamW": ("galore-torch", _low_rank("galore_torch", "GaLoreAdamW", scale=0.25)),
    "APOLLO AdamW": ("apollo-torch", _low_rank("apollo_torch", "APOLLOAdamW", scale=1.0, proj="random", scale_type="channel")),
    "torchao AdamW8bit": ("torchao", _plain("torchao.optim", "AdamW8bit")),
    "torchao AdamW4bit": ("torchao", _plain("torchao.optim", "AdamW4bit")),
    "bitsandbytes AdamW8bit": ("bitsandbytes", _plain("bitsandbytes.optim", "AdamW8bit")),
    # Blocks of 512; inverse roots every 10 steps, beyond `steps` they would not be seen at all.
    "pytorch-optimizer Shampoo": (
        "pytorch_optimizer",
        _plain("pytorch_optimizer", "ScalableShampoo", start_preconditioning_step=2, preconditioning_compute_steps=10),
    ),
    "pytorch-optimizer SOAP": ("pytorch_optimizer", _plain("pytorch_optimizer", "SOAP")),
    "pytorch-optimizer Muon": ("pytorch_optimizer", _muon),
    # Its window size must be a multiple of 32, up to 1024.
    "ista-daslab SparseMFAC": (
        "ista-daslab-optimizers",
        _daslab("SparseMFAC", True, damp=1e-6, k_init=0.01, weight_decay=0.0, use_bf16=False),
    ),
    "ista-daslab MicroAdam": ("ista-daslab-optimizers", _daslab("MicroAdam", m=10, quant_block_size=100_000, k_init=0.01)),
    "ista-daslab DCTAdamW": (
        "ista-daslab-optimizers",
        _daslab("DCTAdamW", weight_decay=0.0, rank=_RANK, proj="dct", use_ef=True, q_ef=8),
    ),
}
# AdamW in plain fp32: their roofline is known too.
ADAMW = ("torch AdamW foreach", "torch AdamW fused")
# Names that are taken only for a word of the optimizer's own name. At m = 1024 on an H100 (CUDA 13, BERT-base) a kernel of
# SparseMFAC made an illegal memory access, which ends the whole command.
ONLY_BY_NAME = ("ista-daslab SparseMFAC",)


def _fits(word: str, name: str) -> bool:
    """Tell whether a word takes a peer."""
    if name in ONLY_BY_NAME:
        return word in name.lower().split()[-1]
    return word == "all" or word in name.lower()


def named(words: str) -> list[str]:
    """Give the peers that have one of the words in their names, in upper or lower case.

    Args:
        words: such as "soap,muon", or "all". `ONLY_BY_NAME` are taken only for words such as "sparsemfac".

    Raises:
        OptionError: for a word that is in no name.
    """
    found: set[str] = set()
    for word in [w.strip() for w in words.split(",") if w.strip()]:
        fitting = [name for name in PEERS if _fits(word.lower(), name)]
        if not fitting:
            near = difflib.get_close_matches(word.lower(), {w.lower() for name in PEERS for w in name.split()}, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise OptionError(f"peers={word!r}: no peer has this in its name; {hint}there are {', '.join(PEERS)}")
        found |= set(fitting)
    return [name for name in PEERS if name in found]


def version(package: str) -> str | None:
    """Give the version of an installed package; None: it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
