"""Masks: which weights of a model are zero, and that they stay zero while it is trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..options import OptionError
from .layers import layers_of

FILE = "pruning_masks.pt"


class Masks:
    """The zeros of a pruned model.

    Args:
        model: whose parameters they are.
        keep: name of a parameter -> which of its entries are kept, bool of its shape.

    Attributes:
        layer_errors: name of a layer -> after each iteration of method="iobs", by how much the layer's squared error is above its
            dense solution's, relative to the square of what the layer has to reproduce.

    Raises:
        OptionError: a parameter that the model has not, or has in another shape.
    """

    def __init__(self, model: nn.Module, keep: Mapping[str, Tensor]):
        params = dict(model.named_parameters())
        for name, mask in keep.items():
            if name not in params or params[name].shape != mask.shape:
                shape = tuple(params[name].shape) if name in params else "no such parameter"
                raise OptionError(f"mask of {name}: {tuple(mask.shape)}, and the model has {shape}")
        self.keep = {name: mask.bool() for name, mask in keep.items()}
        self.layer_errors: dict[str, list[float]] = {}
        self._params = {name: params[name] for name in keep}
        self._handles: list[Any] = []

    @classmethod
    def of_zeros(cls, model: nn.Module, modules: Any = None) -> Masks:
        """Read the masks of a sparse model: a weight that is exactly zero is a pruned one.

        Args:
            model, modules: as for `prune`; layers without any zero have no mask.

        Raises:
            OptionError: no layer has a zero.
        """
        found = {x.parameter: x.weight.detach() != 0 for x in layers_of(model, modules)}
        found = {name: mask for name, mask in found.items() if not mask.all()}
        if not found:
            raise OptionError(f"{type(model).__name__} has no zero in a layer's weight: it was not pruned")
        return cls(model, found)

    def sparsity(self) -> float:
        """Give the share of zeros in all masks."""
        total = sum(mask.numel() for mask in self.keep.values())
        return 1 - sum(int(mask.sum()) for mask in self.keep.values()) / max(1, total)

    def are_zero(self) -> bool:
        """Tell whether all pruned weights are zero now."""
        return all(bool((p.detach()[~self._on(name, p.device)] == 0).all()) for name, p in self._params.items())

    @torch.no_grad()
    def apply(self) -> None:
        """Set the pruned weights to zero."""
        for name, p in self._params.items():
            p.masked_fill_(~self._on(name, p.device), 0)

    def hold(self, optimizer: torch.optim.Optimizer | None = None) -> Masks:
        """Keep the zeros during training, with any optimizer; give the masks.

        Pruned weights get no gradient, so that momentum, moments and windows know nothing of them. An update that moves them all
        the same, as one of low rank does, is undone at the end of the step.

        Args:
            optimizer: torch's, or what Accelerate made of it; None: call `apply` after each step yourself.
        """
        self.release()
        for name, p in self._params.items():
            if p.requires_grad:
                self._handles.append(p.register_hook(lambda g, name=name: g.masked_fill(~self._on(name, g.device), 0)))
        inner: Any = optimizer
        while hasattr(inner, "optimizer"):  # what Accelerate made of it
            inner = inner.optimizer
        if inner is not None:
            self._handles.append(inner.register_step_post_hook(lambda *_: self.apply()))
        self.apply()
        return self

    def release(self) -> None:
        """Hold the zeros no longer."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _on(self, name: str, device: torch.device) -> Tensor:
        if self.keep[name].device != device:
            self.keep[name] = self.keep[name].to(device)
        return self.keep[name]

    # Files ----------------------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write the masks to `pruning_masks.pt` in a folder: one bit for each weight."""
        packed = {name: (list(mask.shape), _packed(mask)) for name, mask in self.keep.items()}
        Path(folder).mkdir(parents=True, exist_ok=True)
        torch.save(packed, Path(folder, FILE))

    @classmethod
    def load(cls, model: nn.Module, folder: str | Path) -> Masks:
        """Read the masks that `save` wrote.

        Raises:
            OptionError: no such file, not masks, or masks of another model.
        """
        file = Path(folder, FILE)
        try:
            packed = torch.load(file, map_location="cpu", weights_only=True)
            keep = {name: _unpacked(bits, torch.Size(shape)) for name, (shape, bits) in packed.items()}
        except FileNotFoundError:
            raise OptionError(f"{file}: no such file") from None
        except Exception as error:
            raise OptionError(f"{file} holds no masks: {error}") from None
        return cls(model, keep)


def _packed(mask: Tensor) -> Tensor:
    """Give 8 entries a byte, the first in the lowest bit."""
    flat = mask.detach().cpu().flatten().to(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    return (flat << torch.arange(8, dtype=torch.uint8, device=flat.device)).sum(1).to(torch.uint8)


def _unpacked(bits: Tensor, shape: torch.Size) -> Tensor:
    flat = (bits[:, None] >> torch.arange(8, dtype=torch.uint8, device=bits.device)) & 1
    return flat.flatten()[: shape.numel()].bool().view(shape)
