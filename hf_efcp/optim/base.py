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
from ..core.deferred import DelayedFlag, masked, readable
from ..core.gram import GramMatrix
from ..core.linalg import ieee_matmul
from ..core.windows import Window
from ..distributed.ddp import Shards
from ..distributed.fsdp2 import MeshShards, is_sharded, local_gradient, problem
from ..distributed.plan import Owners
from ..engine.phases import phase
from ..options import GroupOptions, OptionError, ParamGroupOptions, annotations, build
from .budget import free_options
from .choice import ChoiceMixin
from .communication import CommunicationMixin
from .diagnostics import DiagnosticsMixin
from .footprint import FootprintMixin
from .sharding import ShardingMixin
from .stacks import Layout, Stack, compute_dtype
from .state import StateDictMixin


class WindowedOptimizer(
    CommunicationMixin, ShardingMixin, ChoiceMixin, FootprintMixin, StateDictMixin, DiagnosticsMixin, torch.optim.Optimizer
):
    """A preconditioner phi(K) on a window of compressed gradients: u = G^T c, c = phi(K) w.

    Subclasses give `options_type`, `row_format` (compressor and window of a stack) and `coefficients` (phi).

    Args:
        params: tensors, parameter groups, or (name, tensor) pairs. Groups may set `lr`, `weight_decay`, and `compress`
            (false: rows of the group's tensors enter the window whole).
        lr: learning rate.
        weight_decay: decoupled, p <- (1 - lr*wd) p.
        process_group: torch.distributed's; its processes, which hold the same parameters and gradients, share the state. None:
            `shard` decides.
        **options: the fields of `options_type`.

    Raises:
        OptionError: unknown option, wrong type, value out of range, or a parameter that cannot be optimized.
    """

    options_type: ClassVar[type]

    def __init__(self, params, lr: float, *, weight_decay: float = 0.0, process_group=None, **options: Any):
        name = type(self).__name__
        group = build(GroupOptions, {"lr": lr, "weight_decay": weight_decay}, name)
        self.options = build(self.options_type, options, name)
        self._free, self._chosen = free_options(self.options, options), False  # when the parameters are known
        self._process_group = process_group
        self._given_plain = False
        self._forget()
        super().__init__(params, {"lr": group.lr, "weight_decay": group.weight_decay})

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "options_type" in vars(cls):
            cls.__signature__ = _signature(cls)

    def row_format(self, layout: Layout) -> tuple[Any, Window] | None:
        """Compressor and window of a stack; None where a plain row is no larger (and exact)."""
        raise NotImplementedError

    def coefficients(self, gram: GramMatrix, j: Tensor, row_dtype: torch.dtype) -> Tensor:
        """c = phi(K) w, (groups, m), for the newest slot j; `row_dtype` is that in which G^T c will be summed."""
        raise NotImplementedError

    @torch._disable_dynamo  # as torch's own methods: a compiled training step calls this one as it is
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
        if self._params and self._has_work():
            with ieee_matmul(self._gram.matrix.device):
                self._step(stacks, self._gram)
            self._warn_of_skips()
        return loss

    # fmt: off
    def _step(self, stacks: list[Stack], gram: GramMatrix) -> None:
        j, l2, dots = gram.next_slot(), self._l2(), []
        self._check_factors()
        for s in self._factor_stacks:
            s.stage(gram.step)                                              # P and Q are there: see communication.py
        for s in stacks:
            with phase("compress"):
                s.stage(gram.step, l2[s.group])                             # a = e + g;  c_j = C(a), as the window stores it
            with phase("dots"):
                dots.append(s.dots(j))                                      # <c_j, c_i> for all i
        k_j = self._reduce(stacks, dots)
        accepted = self._is_finite(k_j)
        if accepted is False:
            gram.skipped += 1
            return
        for s in (*stacks, *self._factor_stacks):
            with phase("feedback"):
                s.commit(j, gram.step, l2[s.group], accepted)               # e <- a - c_j;  row j of G <- c_j
        with phase("solve"):
            gram.update(j, k_j, accepted)
            c = self._rescale(self.coefficients(gram, j, self._row_dtype))  # c = phi(K) w
        c = masked(accepted, c, 0.0)
        for s in stacks:
            group = self.param_groups[s.group]
            decay = 0.0 if l2[s.group] else group["weight_decay"]
            rounding = gram.step if self.options.stochastic_rounding else None
            with phase("update"):
                share = self._share(c, s)                                   # u = G^T c;  p <- (1 - lr*wd) p - lr u
                s.update(share, float(group["lr"]), decay, self.options.momentum, accepted, rounding)
        self._hand_out()
        self._last = c if self._last is None else masked(accepted, c, self._last)
        self._started = True
    # fmt: on

    def _l2(self) -> list[float]:
        """The weight decay that enters the gradient, by group."""
        return [g["weight_decay"] if self.options.weight_decay_mode == "l2" else 0.0 for g in self.param_groups]

    def _reduce(self, stacks: list[Stack], dots: list[Tensor]) -> Tensor:
        """The new row of K, (groups, m): summed over all tensors, or one per tensor; and over all processes."""
        k_j = torch.zeros_like(self._gram.matrix[:, 0])
        for s, d in zip(stacks, dots, strict=True):
            if self.options.scope == "layer":
                k_j.index_add_(0, s.numbers.to(k_j.device), d.to(k_j.device))
            else:
                k_j += d.sum(0).to(k_j.device)
        return k_j if self._meeting is None else self._meeting.sum(k_j)

    def _share(self, c: Tensor, s: Stack) -> Tensor:
        """The stack's coefficients, (n, m)."""
        c = c.to(s.device)
        return c.index_select(0, s.numbers) if self.options.scope == "layer" else c.expand(len(s.pieces), -1)

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
        grads = [g for g in map(local_gradient, self._params) if g is not None]
        if self._started or self._gram.step > 0:
            return bool(grads) or self._several is not None
        work = any(bool((g.coalesce().values() if g.is_sparse else g).any()) for g in grads)
        return work if self._several is None else self._several.any(work, self._gram.matrix.device)

    def _is_finite(self, k_j: Tensor) -> bool | Tensor:
        """Whether the staged row may enter: a flag, or on a GPU the tensor that holds it, which masks every write.

        A gradient with NaN or infinity leaves its mark in the row's own norm.
        """
        finite = k_j.isfinite().all()
        return bool(finite) if readable(finite.device) else finite

    def _warn_of_skips(self) -> None:
        count = self._skips.exchange(self._gram.skipped)
        if count <= self._skips_known:
            return
        self._skips_known = count
        if count & (count - 1) == 0:  # the 1st, 2nd, 4th, 8th, ... time
            warnings.warn(
                f"{type(self).__name__}: a gradient is not finite, or its square is out of range: step skipped, state "
                f"unchanged ({count} skipped so far)",
                RuntimeWarning,
                stacklevel=5,  # the caller of step(), past torch's two wrappers
            )

    def _listen_anew(self) -> None:
        """The state is another: what was known a step ago is not its past, and whoever saved it was warned of its skips."""
        self._skips, self._skips_known = DelayedFlag(), int(self._gram.skipped)

    # Parameters and state -------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its tensors join the running window with zero rows.

        Raises:
            OptionError: a bad lr or weight_decay, an option of the whole optimizer, or a parameter of a kind that cannot be
                optimized (complex; a flat FSDP1 shard; a DTensor that is not divided by rows).
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
        self._given_plain |= any(type(p) is Tensor for p in self.param_groups[-1]["params"])

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
                    self._check_replaced(p)
            self._params = [p for params in groups for p in params]
            self._adopt(self._build(groups), self._params)
            self._stacks_key = key
        return self._stacks

    def _forget(self) -> None:
        """No stacks: the next step builds them from `state`."""
        self._stacks: list[Stack] | None = None
        self._params: list[Tensor] = []  # that have state, in the order in which they are numbered
        self._gram: GramMatrix | None = None
        self._last: Tensor | None = None
        self._started = False
        self._shards: Shards | MeshShards | None = None
        self._forget_factors()
        self._owners: dict[Tensor, Owners] = {}
        self._copied_from = 1  # the number of processes that `_owners` is for

    @property
    def _coordinates(self) -> int:
        """d, the number of coordinates of all groups that are trained."""
        return self._flat[1] if self._flat else sum(p.numel() for p in self._params if p.requires_grad)

    @property
    def _row_dtype(self) -> torch.dtype:
        dtypes = {compute_dtype(p) for p in self._params}
        return torch.float32 if torch.float32 in dtypes else torch.float64


def _tensor(entry: Any) -> Any:
    return entry[1] if isinstance(entry, tuple) else entry


def _check_parameter(p: Any, name: str) -> None:
    """Refuse what would go wrong silently or late; what is no tensor is torch's to refuse."""
    if not isinstance(p, Tensor) or not p.requires_grad:
        return
    if p.is_complex():
        raise OptionError(f"{name} has no complex arithmetic: pass torch.view_as_real(p) instead of the {p.dtype} parameter")
    if hasattr(p, "_is_flat_param") or hasattr(p, "_fsdp_flattened"):
        raise OptionError(f"{name} needs whole matrices, and FSDP1 hands it flat pieces: use FSDP2 (fully_shard) or DDP")
    if hasattr(p, "ds_id") or hasattr(p, "ds_tensor"):
        raise OptionError(f"{name} needs whole parameters, and DeepSpeed's ZeRO-3 divides them: use DDP or FSDP2")
    if p.device.type == "mps":
        raise OptionError(f"{name} forms inner products in fp64, which the mps device does not have: train on cpu or cuda")
    if is_sharded(p) and (what := problem(p)):
        raise OptionError(f"{name}: {what}")


def _signature(cls: type) -> inspect.Signature:
    """The constructor's signature with the options spelled out, for help() and editors."""
    kinds = inspect.Parameter
    parameters = [
        kinds("params", kinds.POSITIONAL_OR_KEYWORD),
        kinds("lr", kinds.POSITIONAL_OR_KEYWORD, annotation=float),
        kinds("weight_decay", kinds.KEYWORD_ONLY, default=0.0, annotation=float),
        kinds("process_group", kinds.KEYWORD_ONLY, default=None),
    ]
    defaults = cls.options_type()
    for name, annotation in annotations(cls.options_type).items():
        parameters.append(kinds(name, kinds.KEYWORD_ONLY, default=getattr(defaults, name), annotation=annotation))
    return inspect.Signature(parameters)
