"""The names users type: `efcp_lowrank_mfac` and its relatives, each with class, description and `--optim` defaults."""

from __future__ import annotations

import dataclasses
import fnmatch
import inspect
import json
import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Literal, overload

import torch

from .engine.asked import merged
from .engine.base import EngineOptimizer
from .optim import DASH, DCTAdamW, DenseGGT, DenseMFAC, LDAdamW, LowRankGGT, LowRankMFAC, MicroAdam, SparseGGT, SparseMFAC, Trion
from .options import GroupOptions, OptionError, build, field_types, unknown_name


@dataclasses.dataclass(frozen=True)
class OptimizerInfo:
    """One registered optimizer: everything that listings, tests and tools know of a method without reading its name.

    Attributes:
        name: what `--optim` and `create_optimizer` take.
        cls: the class, a `torch.optim.Optimizer` with `options_type`, the dataclass of its options, and `measured`, its values of
            preset="measured".
        description: one line.
        family: the preconditioner, "mfac" or "ggt", or a method that is one of its own.
        compression: what is kept of a gradient, "low rank", "sparse" or "dense".
        paper: arXiv number.
        windowed: whether it keeps a window of gradients and their Gram matrix.
        lossy: option values under which small tensors (12 x 30) are handled as large ones are: they lose something in
            compression, or are cut into the smallest blocks; empty: nothing is ever lost or cut.
        exact: option values under which compression loses nothing.
    """

    name: str
    cls: type[EngineOptimizer]
    description: str
    family: str
    compression: str
    paper: str
    windowed: bool = True
    lossy: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    exact: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def options(self) -> dict[str, Any]:
        """Option name -> type annotation, the group options (lr, weight_decay) included."""
        return {**field_types(GroupOptions), **field_types(self.cls.options_type)}

    def merged(self, given: Mapping[str, Any]) -> Any:
        """All options that the class makes of those given, an instance of its `options_type`; raises OptionError."""
        own = {name: value for name, value in given.items() if name not in field_types(GroupOptions)}
        return merged(self.cls.options_type, self.cls.measured, own, self.name)

    def check(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """`given` with every value typed and checked; raises OptionError for a bad one."""
        groups = field_types(GroupOptions)
        typed = build(self.cls.options_type, {k: v for k, v in given.items() if k not in groups}, self.name)
        group = build(GroupOptions, {k: v for k, v in given.items() if k in groups}, self.name)
        return {k: getattr(group if k in groups else typed, k) for k in given}


# What `--optim NAME` starts from. The state is divided whatever the preset is: that changes no mathematics.
_OPTIM_DEFAULTS: Mapping[str, Any] = MappingProxyType({"preset": "measured", "shard": "auto"})

_LOW_RANK: dict[str, Any] = {"compression": "low rank", "paper": "2306.06098", "lossy": {"rank": 2}, "exact": {"rank": 10_000}}
_SPARSE: dict[str, Any] = {
    "compression": "sparse",
    "paper": "2306.06098",
    "lossy": {"density": 0.2, "block_size": 16},
    "exact": {"density": 1.0},
}
_MFAC: dict[str, Any] = {"family": "mfac"}
_GGT: dict[str, Any] = {"family": "ggt"}

_REGISTRY: dict[str, OptimizerInfo] = {}


def add_optimizer(info: OptimizerInfo) -> None:
    """Register a method: its name becomes valid for `create_optimizer`, and for `--optim` after `hf_efcp.register()`.

    Raises:
        OptionError: the name does not start with `efcp_`, or another class has it.
    """
    known = _REGISTRY.get(info.name)
    if not info.name.startswith("efcp_"):
        raise OptionError(f"optimizer name {info.name!r}: must start with efcp_")
    if known is not None and known.cls is not info.cls:
        raise OptionError(f"optimizer name {info.name!r}: it is {known.cls.__name__}'s already")
    _REGISTRY[info.name] = info


_WHOLE = "uncompressed gradients: the reference, 4*window_size bytes per parameter"
for _info in (
    OptimizerInfo(
        "efcp_lowrank_mfac",
        LowRankMFAC,
        "M-FAC on low-rank gradients with error feedback",
        **_MFAC,
        **_LOW_RANK,
    ),
    OptimizerInfo("efcp_sparse_mfac", SparseMFAC, "M-FAC on block top-k gradients with error feedback", **_MFAC, **_SPARSE),
    OptimizerInfo("efcp_dense_mfac", DenseMFAC, f"M-FAC on {_WHOLE}", compression="dense", paper="2107.03356", **_MFAC),
    OptimizerInfo(
        "efcp_lowrank_ggt", LowRankGGT, "full-matrix Adagrad (GGT) on low-rank gradients with error feedback", **_GGT, **_LOW_RANK
    ),
    OptimizerInfo(
        "efcp_sparse_ggt", SparseGGT, "full-matrix Adagrad (GGT) on block top-k gradients with error feedback", **_GGT, **_SPARSE
    ),
    OptimizerInfo(
        "efcp_dense_ggt", DenseGGT, f"full-matrix Adagrad (GGT) on {_WHOLE}", compression="dense", paper="1806.02958", **_GGT
    ),
    OptimizerInfo(
        "efcp_ldadamw",
        LDAdamW,
        "AdamW in a low-rank subspace that drifts, with error feedback; AdamW for embeddings, head and vectors",
        family="ldadam",
        windowed=False,
        **{**_LOW_RANK, "paper": "2410.16103"},
    ),
    OptimizerInfo(
        "efcp_dct_adamw",
        DCTAdamW,
        "AdamW in chosen columns of a cosine basis, with error feedback; AdamW for embeddings, head and vectors",
        family="dct_adamw",
        windowed=False,
        **{**_LOW_RANK, "paper": "2505.17967"},
    ),
    OptimizerInfo(
        "efcp_trion",
        Trion,
        "Muon in chosen columns of a cosine basis, error feedback in its momentum; AdamW for embeddings, head and vectors",
        family="trion",
        windowed=False,
        **{**_LOW_RANK, "paper": "2505.17967", "exact": {"rank": 10_000, "momentum": 0.0}},
    ),
    OptimizerInfo(
        "efcp_microadam",
        MicroAdam,
        "MicroAdam: Adam's moments from the last block top-k gradients, error feedback in 4 bits",
        family="microadam",
        compression="sparse",
        paper="2405.15593",
        windowed=False,
        lossy={"density": 0.2, "block_size": 16, "window_dtype": None, "error_format": "plain"},
        exact={"density": 1.0, "window_dtype": None, "error_format": "plain"},
    ),
    OptimizerInfo(
        "efcp_dash",
        DASH,
        "DASH: Shampoo of blocks, whose inverse roots are formed together, with the size of Adam's updates",
        family="shampoo",
        compression="dense",
        paper="2602.02016",
        windowed=False,
        lossy={"block_size": 1},
    ),
):
    add_optimizer(_info)


@overload
def list_optimizers(pattern: str = "*", with_description: Literal[False] = False) -> list[str]: ...
@overload
def list_optimizers(pattern: str = "*", *, with_description: Literal[True]) -> list[tuple[str, str]]: ...
@overload
def list_optimizers(pattern: str, with_description: Literal[True]) -> list[tuple[str, str]]: ...


def list_optimizers(pattern: str = "*", with_description: bool = False) -> list[str] | list[tuple[str, str]]:
    """Registered names that match a shell pattern, in order; as (name, description) pairs if `with_description`."""
    infos = [info for info in all_optimizers() if fnmatch.fnmatch(info.name, pattern)]
    return [(i.name, i.description) for i in infos] if with_description else [i.name for i in infos]


def all_optimizers() -> list[OptimizerInfo]:
    """Every registry entry, in the order in which they were added."""
    return list(_REGISTRY.values())


def get_optimizer_info(name: str) -> OptimizerInfo:
    """The registry entry of `name`; raises OptionError, with the nearest name, if there is none."""
    if not isinstance(name, str) or name not in _REGISTRY:
        raise OptionError(unknown_name("optimizer", name, _REGISTRY))
    return _REGISTRY[name]


def optim_defaults(name: str, **options: Any) -> dict[str, Any]:
    """The options that `--optim NAME` starts from, preset="measured" and shard="auto", and `options` over them.

    The preset makes AdamW's learning rates work: `create_optimizer(name, model, lr=1e-4, **optim_defaults(name))`. What it stands
    for is in `optimizer.options`, and in `hf-efcp list --options`.

    Raises:
        OptionError: unknown name.
    """
    get_optimizer_info(name)
    return {**_OPTIM_DEFAULTS, **options}


@overload
def create_optimizer(name: str, model_or_params: torch.nn.Module | Iterable[Any], /, **options: Any) -> EngineOptimizer: ...
@overload
def create_optimizer(*, name: str, model_or_params: torch.nn.Module | Iterable[Any], **options: Any) -> EngineOptimizer: ...
@overload
def create_optimizer(model_or_params: torch.nn.Module | Iterable[Any], /, *, name: str, **options: Any) -> EngineOptimizer: ...


def create_optimizer(*first: Any, **options: Any) -> EngineOptimizer:
    """Build an optimizer by name: `create_optimizer(name, model)`, or `create_optimizer(params, name=name)`.

    The second form is for programs that call a factory with the parameters, and with options from a configuration (torchtune).

    Args:
        name: one of `list_optimizers()`.
        model_or_params: a module (its trainable parameters are taken, by name), or anything that a torch optimizer takes:
            tensors, groups, or (name, tensor) pairs.
        process_group: torch.distributed's, of processes that share the state; None: as the option `shard` says.
        **options: `lr` and the options of the class; class defaults apply, unless preset="measured"; those of `--optim`
            are `optim_defaults(name)`.

    Raises:
        OptionError: unknown name or option, wrong type, value out of range.
    """
    return _create(options.pop("name"), *first, **options) if "name" in options else _create(*first, **options)


def _create(
    name: str,
    model_or_params: torch.nn.Module | Iterable[Any],
    *,
    process_group: torch.distributed.ProcessGroup | None = None,
    **options: Any,
) -> EngineOptimizer:
    info = get_optimizer_info(name)
    if isinstance(model_or_params, torch.nn.Module):
        named = list(model_or_params.named_parameters())
        model_or_params = [(n, p) for n, p in named if p.requires_grad]
        if named and not model_or_params:
            raise OptionError(f"the model has nothing to train: all of its {len(named)} parameters are frozen (requires_grad)")
    group: dict[str, Any] = {} if process_group is None else {"process_group": process_group}
    return info.cls(model_or_params, **group, **info.check(options))


create_optimizer.__signature__ = inspect.signature(_create)  # type: ignore[attr-defined]  # its first form, for help()


def parse_optim_args(text: str | Mapping[str, Any] | None, owner: str = "") -> dict[str, Any]:
    """`--optim_args` as a dict: `"rank=4,window_size=32"`, a JSON object, a dict, or nothing.

    Raises:
        OptionError: no text, JSON or dict; a piece without "=", a repeated name, or JSON that is no object.
    """
    if text is None:
        return {}
    if isinstance(text, Mapping):
        return dict(text)
    if not isinstance(text, str):
        raise OptionError(f"optim_args={text!r}: expected text (rank=4,window_size=32), JSON or a dict")
    if text.strip().startswith("{"):
        try:
            return json.loads(text, object_pairs_hook=_once)
        except json.JSONDecodeError as error:
            raise OptionError(f"optim_args={text!r}: not valid JSON ({error})") from None
    parsed: dict[str, Any] = {}
    for piece in filter(None, (piece.strip() for piece in text.split(","))):
        name, equals, value = (part.strip() for part in piece.partition("="))
        if not equals or not name or not value:
            raise OptionError(f"optim_args: {piece!r} is not of the form name=value (example: rank=4,window_size=32)")
        if ";" in value or "=" in value:
            meant = ",".join("=".join(pair) for pair in re.findall(r"([\w-]+)\s*=+\s*([^\s;=]+)", piece))
            raise OptionError(f"optim_args: {piece!r}: options are written as name=value, with commas between them: {meant}")
        _once([*parsed.items(), (name, value)])
        parsed[name] = value
    return parsed


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise OptionError(f"optim_args: {twice!r} is given twice")
    return dict(pairs)
