"""From a contender of a spec to an optimizer: this package's by their names, all others by their import paths."""

import contextlib
import dataclasses
import importlib
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import hf_efcp
from hf_efcp.bench.peers import split_matrices
from hf_efcp.core.linalg import multiplies_bf16
from hf_efcp.registry import get_optimizer_info

# Import name -> what to install.
_PACKAGES = {
    "galore_torch": "galore-torch bitsandbytes",
    "apollo_torch": "apollo-torch",
    "pytorch_optimizer": "pytorch_optimizer",
}


class Unavailable(Exception):
    """A contender cannot be built: an unknown option, or a package that is not installed. The message is one line."""


@dataclasses.dataclass(frozen=True)
class Contender:
    """An optimizer with options.

    Attributes:
        name: in specs and results.
        optimizer: one of `hf_efcp.list_optimizers()`, or the import path of a class of torch optimizers.
        options: of the class; weight decay is 0 unless given.
        matrix_options: more options for the matrices inside the model (no embedding, no head of a language model).
        rest: import path of the class that takes all other tensors, at its defaults; None: `optimizer` takes them.
    """

    name: str
    optimizer: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    matrix_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rest: str | None = None

    @property
    def is_ours(self) -> bool:
        """Whether this package registers it."""
        return self.optimizer in hf_efcp.list_optimizers()

    def identity(self) -> dict[str, Any]:
        """What tells contenders apart: class and options; of this package's, all that differ from the class defaults."""
        options = self._resolved() if self.is_ours else dict(self.options)
        found = {"optimizer": self.optimizer, "options": {k: v if _plain(v) else str(v) for k, v in options.items()}}
        return found | {k: v for k in ("matrix_options", "rest") if (v := getattr(self, k))}

    def _resolved(self) -> dict[str, Any]:
        """The options of a run with `--optim`, where they differ from the class defaults."""
        info = get_optimizer_info(self.optimizer)
        options = info.merged(hf_efcp.optim_defaults(self.optimizer, **self.options))
        usual = {**vars(info.cls.options_type()), "preset": "measured", "shard": "auto"}
        return {name: value for name, value in vars(options).items() if value != usual[name]}

    def check(self) -> None:
        """Raise Unavailable where `build` would fail: a package that is missing, an option that this version has not."""
        try:
            if self.is_ours:
                get_optimizer_info(self.optimizer).check(hf_efcp.optim_defaults(self.optimizer, **self.options))
            else:
                _import(self.optimizer)
        except hf_efcp.OptionError as error:
            raise Unavailable(f"{self.name}: {error}") from None

    def build(self, model: nn.Module, rate: float) -> torch.optim.Optimizer:
        """The optimizer of the model's trainable parameters."""
        if self.is_ours:
            options = hf_efcp.optim_defaults(self.optimizer, **self.options)
            return hf_efcp.create_optimizer(self.optimizer, hf_efcp.parameter_groups(model), lr=rate, **options)
        cls, given = _import(self.optimizer), {"lr": rate, "weight_decay": 0.0, **_tuples(self.options)}
        if not self.matrix_options and self.rest is None:
            return cls([p for p in model.parameters() if p.requires_grad], **given)
        matrices, others = split_matrices(model)
        if self.rest is None:
            return cls([g for g in ({"params": others}, {"params": matrices, **self.matrix_options}) if g["params"]], **given)
        parts = [cls(matrices, **given)] if matrices else []
        return Together(parts + ([_import(self.rest)(others, lr=rate, weight_decay=0.0)] if others else []))


class Together:
    """Several optimizers, each of its own parameters, that step as one."""

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        self.parts = parts
        self.param_groups = list(itertools.chain.from_iterable(part.param_groups for part in parts))

    @property
    def state(self) -> dict:
        """State by parameter, of all parts."""
        return {p: state for part in self.parts for p, state in part.state.items()}

    def step(self) -> None:
        """One step of every part."""
        slow = not multiplies_bf16(self.param_groups[0]["params"][0].device)
        with ProductsInFp32() if slow else contextlib.nullcontext():
            for part in self.parts:
                part.step()

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for part in self.parts:
            part.zero_grad()


class ProductsInFp32(TorchDispatchMode):
    """Forms products of bf16 matrices in fp32 and rounds them to bf16 once, as instructions for bf16 do.

    Muon multiplies in bf16. A processor without these instructions takes about 17 times as long by torch's own way.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """See TorchDispatchMode."""
        kwargs = kwargs or {}
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default) and args[0].dtype == torch.bfloat16:
            factors: list[Tensor] = [factor.float() for factor in args]
            return func(*factors, **kwargs).bfloat16()
        return func(*args, **kwargs)


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str | list)


def _tuples(options: Mapping[str, Any]) -> dict[str, Any]:
    """A YAML list, such as betas, is a tuple to torch."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}


def _import(path: str) -> type:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        package = _PACKAGES.get(module.partition(".")[0])
        hint = f"; pip install {package}" if package else ""
        raise Unavailable(f"{path}: {error}{hint}") from None
