"""`prune`: Iterative Optimal Brain Surgeon on the layers of a model (arXiv 2408.17163)."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Sequence
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..options import OptionError, build
from .banded import Banded
from .layers import Layer, Moments, in_order, layers_of, moments_of
from .masks import Masks
from .options import PruningOptions
from .patterns import Pattern
from .projection import model_value, restricted_least_squares
from .supports import SUPPORTS, by_magnitude
from .window import filled_window, prune_by_window

logger = logging.getLogger(__name__)


class Problem:
    """A layer's problem, min |W X - T|^2 / 2n + damping |W - W_dense|^2 / 2, as w^T H w / 2 - b^T w for each row w of W.

    Args:
        dense: W_dense, (outputs, inputs) fp64.
        moments: of its inputs; T is W_dense X, or W_dense X_dense.
        damping: times the mean of the diagonal of X^T X / n; inputs that are always zero get it too, and lose their weights.

    Attributes:
        hessian, inverse: H = X^T X / n + damping I, and H^-1, (inputs, inputs) fp64.
        target: b, (outputs, inputs) fp64.
    """

    def __init__(self, dense: Tensor, moments: Moments, damping: float):
        diagonal = moments.hessian.diagonal()
        self.dead = diagonal == 0
        ridge = torch.eye(len(diagonal), dtype=torch.float64, device=dense.device) * (
            damping * diagonal.mean() if diagonal.any() else 1.0
        )
        dense = dense.masked_fill(self.dead, 0)
        self.hessian = moments.hessian + ridge
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(self.hessian))
        self.target = dense @ (moments.cross + ridge)
        self.solution = self.target @ self.inverse
        self._scale = model_value(torch.zeros_like(dense), dense, moments.hessian).sum()

    def refined(self, w: Tensor, options: PruningOptions) -> Tensor:
        """Give w after Newton or gradient steps, which may refill zeros; a whole Newton step ends at the dense solution."""
        newton = options.refinement == "newton"
        rate = options.step / (1.0 if newton else float(torch.linalg.matrix_norm(self.hessian, 2)))
        for _ in range(options.refinement_steps):
            gradient = w @ self.hessian - self.target
            w = w - rate * (gradient @ self.inverse if newton else gradient)
        return w

    def projected(self, z: Tensor, keep: Tensor) -> Tensor:
        """Give the minimiser of (w - z)^T H (w - z) / 2 with zeros outside of `keep`: the OBS projection of z."""
        return restricted_least_squares(self.hessian, z @ self.hessian, keep)

    def error(self, w: Tensor) -> float:
        """Give by how much w is worse than the dense solution, relative to the square of what is to be reproduced."""
        return float(model_value(w, self.solution, self.hessian).sum() / self._scale.clamp_min(1e-300))


@overload
def prune(
    model: nn.Module,
    calibration: Iterable[Any] | None = None,
    sparsity: float | None = None,
    pattern: str = "unstructured",
    *,
    modules: Sequence[str] | str | None = None,
    training: Literal["banded"],
    band: float = ...,
) -> Banded: ...
@overload
def prune(
    model: nn.Module,
    calibration: Iterable[Any] | None = None,
    sparsity: float | None = None,
    pattern: str = "unstructured",
    *,
    modules: Sequence[str] | str | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    training: Literal["masked"] = "masked",
    **options: Any,
) -> Masks: ...
def prune(
    model: nn.Module,
    calibration: Iterable[Any] | None = None,
    sparsity: float | None = None,
    pattern: str = "unstructured",
    *,
    modules: Sequence[str] | str | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    training: str = "masked",
    **options: Any,
) -> Masks | Banded:
    """Set weights of a model to zero, and change the others so that its layers compute almost what they did.

    A layer's problem is made from its inputs in the present model and from the outputs that it should give. It takes a Newton
    (or gradient) step towards its solution, which may refill zeros, chooses the weights to keep, and solves for them exactly
    (Iterative Optimal Brain Surgeon, arXiv 2408.17163). Sums over batches and all that is solved are in fp64.

    With target="dense" a layer should give the outputs of the dense model. The layers are pruned one after the other, so that
    each has the inputs that it will have. Whole Newton steps then need one iteration, and no more is made. With
    target="layer", the paper's, it should give what its dense weights make of its present inputs, and all layers of an
    iteration are pruned together. The first of these iterations alone is one-shot OBS.

    Under torch.distributed every process calls this, with its share of the batches; all of them get the first one's result.

    Args:
        model: is changed in place. Linear layers, 2-D convolutions without groups and transformers' Conv1D are pruned.
        calibration: batches as the model takes them: mappings, tuples, or tensors; with labels for method="mfac". Only
            method="magnitude", and "mfac" with an `optimizer`, need none.
        sparsity: the share of zeros in every layer (method="mfac": in all layers together), in [0, 1). N:M has its own.
        pattern: "unstructured", "N:M" such as "2:4" and "4:8", or blocks of R outputs times C inputs, "RxC".
        modules: parts of names of layers; None: all layers of the base model (a head is left alone).
        optimizer: for method="mfac", an M-FAC optimizer of ours that holds a window of the model's gradients.
        training: "masked": the zeros are chosen now. "banded" (arXiv 2506.01863): the layers compute with their largest weights
            from now on, whichever these are, and training chooses; call it before the optimizer is made. It needs no calibration.
        **options: the fields of `PruningOptions`.

    Returns:
        The masks; `masks.hold(optimizer)` keeps the zeros during later training. With training="banded" a `Banded`, whose
        `finish()` ends it.

    Raises:
        OptionError: a bad option or pattern, no layer, no calibration, or a layer without inputs.
    """
    o = build(PruningOptions, options | {"training": training}, "prune")
    shape = Pattern.parse(pattern)
    share = shape.sparsity(sparsity)
    support = _support(o, shape)
    layers = layers_of(model, modules, shape)
    if o.training == "banded":
        if shape != Pattern("unstructured"):
            raise OptionError(f"pattern={pattern!r}: training='banded' needs unstructured")
        return Banded(model, layers, share, o.band)
    batches = [] if calibration is None else list(calibration)
    if not batches and o.method != "magnitude" and optimizer is None:
        raise OptionError(f"calibration={calibration!r}: method={o.method!r} needs batches of data")
    if o.method == "mfac":
        source = optimizer or filled_window(model, layers, batches, o)
        masks = Masks(model, prune_by_window(source, layers, shape, share))
    elif o.method == "magnitude":
        masks = Masks(model, _by_magnitude(layers, shape, share))
    else:
        masks = _by_iterations(model, layers, batches, shape, share, support, o)
    masks.apply()
    _agree(masks, layers)
    return masks


def _support(o: PruningOptions, pattern: Pattern) -> str:
    support = o.support or ("sweep" if pattern.block == (1, 1) else "cost")
    if pattern.block != (1, 1) and support in ("sweep", "greedy"):
        raise OptionError(f"support={support!r}: pattern={pattern.text!r} needs cost or magnitude")
    return support


def _by_magnitude(layers: Sequence[Layer], pattern: Pattern, sparsity: float) -> dict[str, Tensor]:
    eye = torch.empty(0)
    return {x.parameter: x.weight_of(by_magnitude(x.matrix, eye, eye, pattern, sparsity)) for x in layers}


def _dense(model: nn.Module, layers: Sequence[Layer]) -> nn.Module:
    """A copy of the model in which only the weights to prune are copied."""
    pruned = {id(x.weight) for x in layers}
    shared = {id(x): x for x in (*model.parameters(), *model.buffers()) if id(x) not in pruned}
    return copy.deepcopy(model, shared)


def _by_iterations(
    model: nn.Module, layers: Sequence[Layer], batches: Sequence[Any], pattern: Pattern, sparsity: float, support: str, o: Any
) -> Masks:
    dense = _dense(model, layers)
    beside = dense if o.target == "dense" else None
    # To make up for the errors before it, a layer has to see the inputs that it will have, so that all before it are done.
    groups, once = in_order(model, layers, batches[0]) if beside is not None else ([layers], False)
    # Then the first layer's problem is the same in each iteration, hence its weights, hence the next layer's problem; a layer
    # that is called again sees its own errors.
    settled = once and o.refinement == "newton" and o.step == 1
    keep: dict[str, Tensor] = {}
    errors: dict[str, list[float]] = {x.name: [] for x in layers}
    for iteration in range(1 if settled else o.iterations):
        for group in groups:
            moments = moments_of(model, group, batches, beside, stop=once)
            for x in group:
                problem = Problem(Layer(x.name, dense.get_submodule(x.name)).matrix, moments.pop(x.name), o.damping)
                z = problem.refined(x.matrix, o)
                mask = SUPPORTS[support](z, problem.hessian, problem.inverse, pattern, sparsity)
                w = problem.projected(z, mask)
                errors[x.name].append(problem.error(w))
                keep[x.parameter] = x.weight_of(mask)
                x.put(w)
        mean = sum(e[-1] for e in errors.values()) / len(errors)
        logger.info("iteration %d: mean layer error %.4g", iteration + 1, mean)
    masks = Masks(model, keep)
    masks.layer_errors = errors
    return masks


@torch.no_grad()
def _agree(masks: Masks, layers: Sequence[Layer]) -> None:
    """Give all processes the first one's weights and masks: sums over processes may differ in their last bits."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        for x in layers:
            dist.broadcast(x.weight.detach(), 0)
            mask = masks.keep[x.parameter].to(x.weight.device, torch.uint8).contiguous()
            dist.broadcast(mask, 0)
            masks.keep[x.parameter] = mask.bool()
