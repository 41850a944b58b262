"""The layers that can be pruned, their weights as matrices (outputs, inputs), and the second moments of their inputs."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..core.linalg import ieee_matmul
from ..options import OptionError, unknown_name
from .patterns import Pattern


class Layer:
    """A module with a weight that multiplies its inputs: Linear, a convolution in 2-D without groups, or transformers' Conv1D.

    Args:
        name: of the module in its model.
        module: the module.
    """

    def __init__(self, name: str, module: nn.Module):
        self.name, self.module = name, module
        self.weight: nn.Parameter = module.weight  # type: ignore[assignment]
        self._transposed = type(module).__name__ == "Conv1D"

    @property
    def parameter(self) -> str:
        """The weight's name."""
        return f"{self.name}.weight" if self.name else "weight"

    def matrix_of(self, x: Tensor) -> Tensor:
        """Give a tensor of the weight's shape as (outputs, inputs)."""
        return x.mT if self._transposed else x.flatten(1)

    def weight_of(self, matrix: Tensor) -> Tensor:
        """Give a matrix (outputs, inputs) in the weight's shape."""
        return (matrix.mT if self._transposed else matrix).reshape(self.weight.shape)

    @property
    def matrix(self) -> Tensor:
        """A copy of the weight as (outputs, inputs) in fp64."""
        return self.matrix_of(self.weight.detach()).to(torch.float64, copy=True)

    @torch.no_grad()
    def put(self, matrix: Tensor) -> None:
        """Write (outputs, inputs) into the weight."""
        self.weight.copy_(self.weight_of(matrix))

    def inputs(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Give what the weight multiplies, (n, inputs) in fp32 or fp64, without the tokens that `mask` (batch, tokens) hides."""
        m: Any = self.module
        x = x.detach()
        x = x if x.dtype == torch.float64 else x.float()
        if isinstance(m, nn.Conv2d):
            padded = nn.functional.pad(
                x, m._reversed_padding_repeated_twice, "constant" if m.padding_mode == "zeros" else m.padding_mode
            )
            columns = nn.functional.unfold(padded, m.kernel_size, m.dilation, stride=m.stride)
            return columns.mT.flatten(0, 1)
        if mask is not None and x.shape[:-1] == mask.shape:
            return x[mask.bool()]
        return x.reshape(-1, x.shape[-1])


def _prunable(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and not isinstance(module, nn.modules.lazy.LazyModuleMixin)
    kind = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    weight = getattr(module, "weight", None)
    return kind and isinstance(weight, nn.Parameter) and weight.is_floating_point() and weight.ndim == 2


def layers_of(model: nn.Module, modules: Sequence[str] | str | None, pattern: Pattern | None = None) -> list[Layer]:
    """Give the layers to prune, each weight once.

    Args:
        model: any module.
        modules: parts of names: a layer is taken where one of them is in its name. None: all layers of the base model, so that a
            head is left alone; all layers of a model that is not from transformers.
        pattern: that the matrices have to fit.

    Raises:
        OptionError: no such layer, a weight that is divided among processes, or one that the pattern does not fit.
    """
    base = getattr(model, "base_model", None)
    inside = set(base.modules()) if modules is None and isinstance(base, nn.Module) and base is not model else None
    find_head: Any = getattr(model, "get_output_embeddings", None)
    head = find_head() if find_head is not None else None
    there = {name: module for name, module in model.named_modules() if _prunable(module)}
    if modules is not None:
        wanted = [modules] if isinstance(modules, str) else list(modules)
        for part in wanted:
            if not any(part in name for name in there):
                raise OptionError(unknown_name("layer", part, there, "modules"))
        there = {name: module for name, module in there.items() if any(part in name for part in wanted)}
    else:
        embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        there = {
            name: module
            for name, module in there.items()
            if (inside is None or module in inside) and module is not head and id(module.weight) not in embedded
        }
    if not there:
        raise OptionError(f"{type(model).__name__} has no layer to prune: Linear, Conv2d without groups, or Conv1D")
    layers = list({id(module.weight): Layer(name, module) for name, module in there.items()}.values())
    for layer in layers:
        if hasattr(layer.weight, "device_mesh"):
            raise OptionError(f"{layer.parameter} is divided among processes (FSDP2): prune before the model is divided")
        if pattern is not None and (why := pattern.misfit(*layer.matrix_of(layer.weight).shape)):
            raise OptionError(f"pattern={pattern.text!r} does not fit {layer.parameter}: {why}; choose layers by modules")
    return layers


class Moments:
    """What a layer's problem is made of: X^T X and X_dense^T X, each divided by the number of input rows.

    Attributes:
        hessian: X^T X / n, (d, d) fp64.
        cross: X_dense^T X / n, (d, d) fp64; `hessian` itself where there is no dense model beside.
        count: n.
    """

    def __init__(self, d: int, device: torch.device, crossed: bool):
        self.hessian = torch.zeros(d, d, dtype=torch.float64, device=device)
        self.cross = torch.zeros_like(self.hessian) if crossed else self.hessian
        self.count = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, x: Tensor, dense: Tensor | None) -> None:
        """Add input rows x (n, d), and those of the dense model."""
        self.hessian += x.mT @ x
        self.count += len(x)
        if dense is not None:
            self.cross += dense.mT @ x

    def finish(self) -> None:
        """Sum over the processes, if there are several; divide."""
        crossed = self.cross is not self.hessian
        for total in (self.hessian, self.count, *([self.cross] if crossed else [])):
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(total)
        for total in (self.hessian, *([self.cross] if crossed else [])):
            total /= self.count.clamp_min(1)


def moments_of(
    model: nn.Module, layers: Sequence[Layer], batches: Iterable[Any], dense: nn.Module | None = None, stop: bool = False
) -> dict[str, Moments]:
    """Run the model on all batches and give the moments of each layer's inputs, by its name.

    Args:
        model: is set to evaluation meanwhile.
        layers: of it.
        batches: mappings, tuples or tensors, as the model takes them; with an `attention_mask` (batch, tokens), the tokens that
            it leaves out do not count.
        dense: another model of the same kind, whose inputs are wanted beside.
        stop: end each run of a model where all these layers have had an input: the model calls each of them once.

    Raises:
        OptionError: a layer has seen no input, or inputs that are not finite.
    """
    device = layers[0].weight.device
    found = {x.name: Moments(x.matrix_of(x.weight).shape[1], x.weight.device, dense is not None) for x in layers}
    seen: dict[str, deque[Tensor]] = {x.name: deque() for x in layers}
    mask: Tensor | None = None

    waiting: set[str] = set()

    def had(layer: Layer) -> None:
        waiting.discard(layer.name)
        if stop and not waiting:
            raise _Enough

    def keep(layer: Layer) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            seen[layer.name].append(layer.inputs(_first(args, kwargs), mask))
            had(layer)

        return hook

    def add(layer: Layer) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            x = layer.inputs(_first(args, kwargs), mask)
            found[layer.name].add(x, seen[layer.name].popleft() if dense is not None else None)
            had(layer)

        return hook

    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(ieee_matmul(device))
        stack.enter_context(evaluating(model))
        for layer in layers:
            stack.enter_context(_hooked(layer.module, add(layer)))
            if dense is not None:
                stack.enter_context(_hooked(dense.get_submodule(layer.name), keep(layer)))
        for batch in batches:
            batch = on_device(batch, device)
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            for runs in (model,) if dense is None else (dense, model):
                waiting.update(found)
                with contextlib.suppress(_Enough):
                    called(runs, batch)
    for name, moments in found.items():
        moments.finish()
        if not moments.count:
            raise OptionError(f"layer {name!r} saw no calibration input: leave it out by modules")
        if not moments.hessian.isfinite().all():
            raise OptionError(f"layer {name!r} saw calibration inputs that are not finite")
    return found


@torch.no_grad()
def in_order(model: nn.Module, layers: Sequence[Layer], batch: Any) -> tuple[list[list[Layer]], bool]:
    """Give the layers in the order in which the model first calls them; those of the same input (q, k and v) together.

    Layers that the batch does not call come last, each alone. Also tell whether each layer is called only once. All processes
    get the first one's answer.
    """
    inputs: dict[str, Tensor] = {}  # holds them, so that no other tensor gets the identity of one
    calls = 0

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            nonlocal calls
            calls += 1
            inputs.setdefault(name, _first(args, kwargs))

        return hook

    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for layer in layers:
            stack.enter_context(_hooked(layer.module, keep(layer.name)))
        called(model, on_device(batch, layers[0].weight.device))
    together: dict[int, list[str]] = {}
    for name, x in inputs.items():
        together.setdefault(id(x), []).append(name)
    names = [*together.values(), *([x.name] for x in layers if x.name not in inputs)]
    answer: list[Any] = [names, calls == len(inputs)]
    if dist.is_available() and dist.is_initialized():
        dist.broadcast_object_list(answer, 0)
    known = {x.name: x for x in layers}
    return [[known[name] for name in group] for group in answer[0]], answer[1]


class _Enough(Exception):
    """What follows in the model is not needed."""


def _first(args: Any, kwargs: Mapping[str, Any]) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))


@contextlib.contextmanager
def _hooked(module: nn.Module, hook: Any) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation meanwhile; each in its own mode again afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def on_device(batch: Any, device: torch.device) -> Any:
    """Give a batch on the device: a mapping, a tuple or list, or a tensor."""
    if isinstance(batch, Mapping):
        return {key: on_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return tuple(on_device(value, device) for value in batch)
    return batch.to(device) if isinstance(batch, Tensor) else batch


def called(model: nn.Module, batch: Any) -> Any:
    """Call the model on a batch."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)
