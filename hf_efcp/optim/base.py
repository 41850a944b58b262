"""THE step: what every windowed full-matrix optimizer does, whatever its compressor and its spectral function."""

from __future__ import annotations

import difflib
import inspect
import math
import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.coefficients import quadratic
from ..core.deferred import Later, masked, readable
from ..core.gram import GramMatrix
from ..core.linalg import ieee_matmul
from ..core.windows import Window
from .diagnostics import DiagnosticsMixin
from .options import GroupOptions, OptionError, ParamGroupOptions, annotations, build
from .stacks import Stack, build_stacks, compute_dtype
from .state import StateDictMixin


class WindowedOptimizer(StateDictMixin, DiagnosticsMixin, torch.optim.Optimizer):
    """A preconditioner phi(K) on a window of compressed gradients: u = G^T c, c = phi(K) w.

    Subclasses give `options_type`, `row_format` (compressor and window of a stack) and `coefficients` (phi).

    Args:
        params: tensors, parameter groups, or (name, tensor) pairs. Groups may set `lr`, `weight_decay`, and `compress`
            (false: rows of the group's tensors enter the window whole).
        lr: learning rate.
        weight_decay: decoupled, p <- (1 - lr*wd) p.
        **options: the fields of `options_type`.

    Raises:
        OptionError: unknown option, wrong type, value out of range, or a parameter that cannot be optimized.
    """

    options_type: ClassVar[type]

    def __init__(self, params, lr: float, *, weight_decay: float = 0.0, **options: Any):
        name = type(self).__name__
        group = build(GroupOptions, {"lr": lr, "weight_decay": weight_decay}, name)
        self.options = build(self.options_type, options, name)
        self._forget()
        super().__init__(params, {"lr": group.lr, "weight_decay": group.weight_decay})

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "options_type" in vars(cls):
            cls.__signature__ = _signature(cls)

    def row_format(self, n: int, rows: int, cols: int, first: Tensor, salt: Tensor) -> tuple[Any, Window] | None:
        """Compressor and window for n tensors of rows x cols; None where a plain row is no larger (and exact)."""
        raise NotImplementedError

    def coefficients(self, gram: GramMatrix, j: Tensor, row_dtype: torch.dtype) -> Tensor:
        """c = phi(K) w, (groups, m), for the newest slot j; `row_dtype` is that in which G^T c will be summed."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure=None):
        """One step. A non-finite gradient skips it: nothing changes, and the skip is counted and warned about.

        On a GPU the host does not wait for the device: the warning comes one step later.

        Args:
            closure: re-evaluates the model and returns the loss.

        Returns:
            The closure's loss, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        stacks = self._prepare()
        if stacks and self._has_work():
            with ieee_matmul(self._gram.matrix.device):
                self._step(stacks, self._gram)
            self._warn_of_skips()
        return loss

    # fmt: off
    def _step(self, stacks: list[Stack], gram: GramMatrix) -> None:
        j, l2, dots = gram.next_slot(), self._l2(), []
        for s in stacks:
            s.stage(gram.step, l2[s.group])                                 # a = e + g;  c_j = C(a), as the window stores it
            dots.append(s.dots(j))                                          # <c_j, c_i> for all i
        k_j = self._reduce(dots)
        accepted = self._is_finite(k_j)
        for s in stacks:
            s.commit(j, gram.step, l2[s.group], accepted)                   # e <- a - c_j;  row j of G <- c_j
        gram.update(j, k_j, accepted)
        if accepted is False:
            return
        c = self._rescale(self.coefficients(gram, j, self._row_dtype))      # c = phi(K) w
        c = masked(accepted, c, 0.0)
        for s, c_s in zip(stacks, self._share(c), strict=True):
            group = self.param_groups[s.group]
            decay = 0.0 if l2[s.group] else group["weight_decay"]
            u = s.window.combine(c_s.to(s.device))                          # u = G^T c
            s.apply(u, float(group["lr"]), decay, self.options.momentum, accepted)  # p <- (1 - lr*wd) p - lr u
        self._last = c if self._last is None else masked(accepted, c, self._last)
        self._started = True
    # fmt: on

    def _l2(self) -> list[float]:
        """The weight decay that enters the gradient, by group."""
        return [g["weight_decay"] if self.options.weight_decay_mode == "l2" else 0.0 for g in self.param_groups]

    def _reduce(self, dots: list[Tensor]) -> Tensor:
        """The new row of K, (groups, m): summed over all tensors, or one per tensor."""
        device = self._gram.matrix.device
        if self.options.scope == "layer":
            return torch.cat([d.to(device) for d in dots])
        return torch.stack([d.sum(0).to(device) for d in dots]).sum(0, keepdim=True)

    def _share(self, c: Tensor) -> list[Tensor]:
        """Each stack's coefficients, (n, m)."""
        sizes = [len(s.params) for s in self._stacks]
        return [c.expand(n, -1) for n in sizes] if self.options.scope == "model" else list(c.split(sizes))

    def _rescale(self, c: Tensor) -> Tensor:
        """c times update_rms * sqrt(d) / |u|: |u|^2 = c^T K c is free, so no pass over the parameters is needed."""
        if self.options.update_rms is not None:
            norm = quadratic(self._gram.matrix, c).sum().sqrt()
            c = c * torch.where(norm > 0, self.options.update_rms * math.sqrt(self._coordinates) / norm, 0.0)
        # Gradients near the smallest fp32 number ask for coefficients beyond the largest: they are zeros.
        return torch.where(c.abs().amax(-1, keepdim=True) < torch.finfo(self._row_dtype).max / 2**20, c, 0.0)

    def _has_work(self) -> bool:
        """Whether there is a gradient; on empty state, one that is not zero.

        torch.distributed.checkpoint takes a step on zero gradients to have the state allocated.
        """
        grads = [p.grad for s in self._stacks for p in s.params if p.grad is not None]
        if self._started or self._gram.step > 0:
            return bool(grads)
        return any(bool((g.coalesce().values() if g.is_sparse else g).any()) for g in grads)

    def _is_finite(self, k_j: Tensor) -> bool | Tensor:
        """Whether the staged row may enter: a flag, or on a GPU the tensor that holds it, which masks every write.

        A gradient with NaN or infinity leaves its mark in the row's own norm.
        """
        finite = k_j.isfinite().all()
        return bool(finite) if readable(finite.device) else finite

    def _warn_of_skips(self) -> None:
        skipped = self._gram.skipped
        count = int(skipped) if readable(skipped.device) else self._skips.put(skipped)
        new, self._skips_known = count is not None and count > self._skips_known, count or self._skips_known
        if new and count & (count - 1) == 0:  # the 1st, 2nd, 4th, 8th, ... time
            warnings.warn(
                f"{type(self).__name__}: a gradient is not finite, or its square is out of range: step skipped, state "
                f"unchanged ({count} skipped so far)",
                RuntimeWarning,
                stacklevel=5,  # the caller of step(), past torch's two wrappers
            )

    # Parameters and state -------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its tensors join the running window with zero rows.

        Raises:
            OptionError: a bad lr or weight_decay, an option of the whole optimizer, or a parameter of a kind that cannot be
                optimized (complex; a flat FSDP1 shard; a DTensor).
        """
        name = type(self).__name__
        if not isinstance(param_group, dict):
            raise TypeError(f"{name}: a parameter group must be a dict, got {type(param_group).__name__}")
        valid = annotations(ParamGroupOptions)
        for key in param_group:
            if key in annotations(self.options_type):
                raise OptionError(f"{key} is an option of the whole optimizer {name}, not of a parameter group")
            near = difflib.get_close_matches(key, valid, n=1, cutoff=0.8)
            if key not in valid and near:
                raise OptionError(f"unknown key {key!r} in a parameter group of {name}: did you mean {near[0]!r}?")
        given = {k: v for k, v in param_group.items() if k in valid}
        checked = build(ParamGroupOptions, given, name)
        params = param_group["params"]
        if not isinstance(params, Tensor | set):  # torch refuses a set, with a good message
            params = list({id(_tensor(entry)): entry for entry in params}.values())  # tied weights once
            for entry in params:
                _check_parameter(_tensor(entry), name)
            params = self._named_alike(params)
        super().add_param_group({**param_group, **{k: getattr(checked, k) for k in given}, "params": params})

    def _named_alike(self, params: list) -> list:
        """`params` as (name, tensor) pairs or as tensors, as the groups so far: torch refuses a mixture."""
        if not self.param_groups or not params:
            return params
        if "param_names" not in self.param_groups[0]:
            return [_tensor(entry) for entry in params]
        number = len(self.param_groups)
        return [e if isinstance(e, tuple) else (f"group{number}.{i}", e) for i, e in enumerate(params)]

    def _trainable(self) -> list[list[Tensor]]:
        """The parameters with state in each group: a parameter that is frozen later keeps its rows, which K counts."""
        return [[p for p in g["params"] if p.requires_grad or p in self.state] for g in self.param_groups]

    def _prepare(self) -> list[Stack]:
        """The stacks of the current parameters, built at the first step and again when the parameters changed."""
        groups = self._trainable()
        key = [(i, id(p), p.shape, p.dtype, p.device) for i, params in enumerate(groups) for p in params]
        if self._stacks is None or key != self._stacks_key:
            for params in groups:
                for p in params:
                    _check_parameter(p, type(self).__name__)
            formats = [self.row_format if g.get("compress", True) else None for g in self.param_groups]
            self._adopt(build_stacks(groups, self.options, formats))
            self._stacks_key = key
        return self._stacks

    def _forget(self) -> None:
        """No stacks: the next step builds them from `state`."""
        self._stacks: list[Stack] | None = None
        self._gram: GramMatrix | None = None
        self._last: Tensor | None = None
        self._started = False
        self._skips, self._skips_known = Later(), 0

    @property
    def _coordinates(self) -> int:
        """d, the number of coordinates of all groups that are trained."""
        return sum(p.numel() for s in self._stacks for p in s.params if p.requires_grad)

    @property
    def _row_dtype(self) -> torch.dtype:
        dtypes = {compute_dtype(s.params[0]) for s in self._stacks}
        return torch.float32 if torch.float32 in dtypes else torch.float64


def _tensor(entry: Any) -> Any:
    return entry[1] if isinstance(entry, tuple) else entry


def _check_parameter(p: Any, name: str) -> None:
    """Refuse what would go wrong silently or late; what is no tensor is torch's to refuse."""
    if not isinstance(p, Tensor) or not p.requires_grad:
        return
    if p.is_complex():
        raise OptionError(f"{name} has no complex arithmetic: pass torch.view_as_real(p) instead of the {p.dtype} parameter")
    if hasattr(p, "_is_flat_param") or hasattr(p, "_is_fsdp_flattened"):
        raise OptionError(f"{name} needs whole matrices, and FSDP1 hands it flat pieces: use FSDP2 (fully_shard) or DDP")
    if p.device.type == "mps":
        raise OptionError(f"{name} forms inner products in fp64, which the mps device does not have: train on cpu or cuda")
    if hasattr(p, "device_mesh"):
        raise OptionError(f"{name} does not yet train sharded parameters (DTensor: FSDP2, tensor parallel): use DDP")


def _signature(cls: type) -> inspect.Signature:
    """The constructor's signature with the options spelled out, for help() and editors."""
    kinds = inspect.Parameter
    parameters = [
        kinds("params", kinds.POSITIONAL_OR_KEYWORD),
        kinds("lr", kinds.POSITIONAL_OR_KEYWORD, annotation=float),
        kinds("weight_decay", kinds.KEYWORD_ONLY, default=0.0, annotation=float),
    ]
    defaults = cls.options_type()
    for name, annotation in annotations(cls.options_type).items():
        parameters.append(kinds(name, kinds.KEYWORD_ONLY, default=getattr(defaults, name), annotation=annotation))
    return inspect.Signature(parameters)
