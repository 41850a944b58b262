"""The diagonal P inside of PEFT's LoRA layers: what follows A while training, and what an adapter is at a chosen rank.

PEFT's A is (r, in) and its B (out, r): row i of A here is column i of the paper's A. PEFT multiplies by its own scaling, which is
s_r; so the buffers hold P / s_r.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..core.nested import masks, staircase, training_diagonals
from ..options import OptionError

SUM = "sum"
# What weighs the leading columns at a rank: "own", s_rho, as the paper has it; "trained", the P of training, which is ours.
WEIGHTS = ("own", "trained")


class Draw:
    """The rank that DyLoRA has drawn for this forward of the model: all layers of an adapter share it.

    The first layer that asks draws, each time it is called, from torch's CPU generator: a run that resumes with the generator's
    state draws the same ranks, and so does a forward that gradient checkpointing repeats.
    """

    def __init__(self) -> None:
        self.index = torch.zeros((), dtype=torch.int64)
        self.leader: nn.Module | None = None

    def for_(self, layer: nn.Module, count: int) -> Tensor:
        """Give the index of the drawn rank, 0 ... count - 1, as a tensor () on the CPU."""
        if self.leader is None:
            self.leader = layer
        if self.leader is layer:
            self.index = torch.randint(count, ())
        return self.index


class NestedLinear(nn.Linear):
    """A of an adapter, whose outputs are multiplied by P while training, and by what the chosen rank asks for otherwise.

    Args:
        weight: of PEFT's A, (r, in); stays the same parameter.
        kind, train_ranks, rank_scale: as of MatryoshkaConfig.
        draw: shared by the layers of an adapter.

    Attributes:
        p: buffer (k, r), P / s_r of every draw, fp32 (fp64 where the weight is), whatever the model is cast to. Not saved: the
            configuration tells it.
        rank: the rank outside of training: an integer, or "sum" for the whole P.
        weights: of the leading columns, one of WEIGHTS.
    """

    p: Tensor

    def __init__(self, weight: Any, kind: str, train_ranks: list[int], rank_scale: str, draw: Draw):
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = weight
        self.kind, self.train_ranks, self.rank_scale, self.draw = kind, train_ranks, rank_scale, draw
        self.rank: int | str = self.out_features
        self.weights = WEIGHTS[0]
        self.register_buffer("p", None, persistent=False)
        self._write()

    def forward(self, x: Tensor) -> Tensor:
        """A x times the diagonal: (..., in) -> (..., r), in the dtype of A x."""
        h = functional.linear(x, self.weight)
        diagonal = self._of_training(h.device) if self.training else self.of_rank()
        return h if diagonal is None else (h * diagonal.to(h.device)).to(h.dtype)

    def of_rank(self) -> Tensor | None:
        """The diagonal of the chosen rank, (r,), over s_r; None: all ones."""
        if self.rank == self.out_features and self.weights == "own":
            return None
        if self.rank == SUM or self.weights == "trained":
            p = staircase(*self._plan())
            if self.rank != SUM:
                p[self.rank :] = 0
            return self._over_s_r(p)
        return self._over_s_r(self._mask()[0])

    @contextlib.contextmanager
    def folded(self) -> Iterator[None]:
        """The diagonal of the chosen rank inside of the weight, for the code of PEFT that multiplies B by A."""
        diagonal, weight = self.of_rank(), self.weight.data
        if diagonal is not None:
            self.weight.data = (weight * diagonal.to(weight.device)[:, None]).to(weight.dtype)
        try:
            yield
        finally:
            self.weight.data = weight

    def _of_training(self, device: torch.device) -> Tensor | None:
        if self.kind == "lora":
            return None
        if self.p.device != device:
            self.p = self.p.to(device)
        return self.p[self.draw.for_(self, len(self.p))] if self.kind == "dylora" else self.p[0]

    def _plan(self) -> tuple[int, list[int], str]:
        return self.out_features, self.train_ranks, self.rank_scale

    def _mask(self) -> Tensor:
        assert isinstance(self.rank, int)
        return masks(self.out_features, [self.rank], self.rank_scale)

    def _over_s_r(self, diagonals: Tensor) -> Tensor:
        s_r = masks(self.out_features, [self.out_features], self.rank_scale)[0, 0]
        dtype = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        return (diagonals / s_r).to(dtype)

    def _write(self) -> None:
        device = torch.device("cpu") if self.weight.is_meta else self.weight.device
        self.p = self._over_s_r(training_diagonals(self.kind, *self._plan())).to(device)

    def _apply(self, fn: Any, recurse: bool = True) -> NestedLinear:
        super()._apply(fn, recurse)
        self._write()  # a model that is cast to bf16 keeps p
        return self


class NestedLayer:
    """What is added to a class of PEFT's LoRA layers: the weight that it merges is that of the chosen rank."""

    lora_A: nn.ModuleDict

    def get_delta_weight(self, adapter: str, *args: Any) -> Tensor:
        """Give the weight that the adapter adds to its base layer, at the chosen rank, as PEFT's own layers do."""
        a = self.lora_A[adapter]
        with a.folded() if isinstance(a, NestedLinear) else contextlib.nullcontext():
            return super().get_delta_weight(adapter, *args)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _made, (type(self).__bases__[1],), self.__dict__


@functools.cache
def _nested(cls: type) -> type:
    return type(f"Nested{cls.__name__}", (NestedLayer, cls), {})


def _made(cls: type) -> Any:
    made: Any = _nested(cls)
    return made.__new__(made)


def adopt(layer: Any, adapter: str, name: str, config: Any, draw: Draw) -> None:
    """Put P behind A of one adapter of a LoRA layer.

    Args:
        layer: of PEFT.
        adapter: its name.
        name: of the layer, for messages.
        config: a MatryoshkaConfig.
        draw: shared by the layers of the adapter.

    Raises:
        OptionError: the layer is not linear.
    """
    a = layer.lora_A[adapter] if adapter in getattr(layer, "lora_A", {}) else None
    if type(a) is not nn.Linear or isinstance(layer.get_base_layer(), nn.MultiheadAttention):
        kind = type(layer.get_base_layer()).__name__
        raise OptionError(f"target_modules: {name!r} is {kind}; MatryoshkaConfig takes linear layers, nothing else")
    if config.reference_init and config.init_lora_weights is True and not a.weight.is_meta:
        nn.init.uniform_(a.weight, -(a.out_features**-0.5), a.out_features**-0.5)
    nested = NestedLinear(a.weight, config.kind, list(config.train_ranks), config.rank_scale, draw)
    layer.lora_A[adapter] = nested.train(a.training)
    if not isinstance(layer, NestedLayer):
        cls: Any = type(layer)
        layer.__class__ = _nested(cls)
