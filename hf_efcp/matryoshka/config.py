"""MatryoshkaConfig: which ranks one LoRA adapter is trained for; how PEFT learns of it."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig
from peft.config import PeftConfigMixin
from peft.tuners.lora import LoraModel

from ..core.nested import KINDS, RANK_SCALES, powers_of_two, rank_scale_of
from ..options import OptionError, unknown_name
from .layers import Draw, adopt

# Fields of LoraConfig that change what A and B mean, and the value that leaves them alone.
_REFUSED = {
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "lora_bias": False,
    "target_parameters": None,
    "megatron_config": None,
    "use_qalora": False,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "use_bdlora": None,
    "kasa_config": None,
    "monteclora_config": None,
    "velora_config": None,
    "ensure_weight_tying": False,
}
_INITS = (True, False, "gaussian", "orthogonal")
_OURS = ("kind", "train_ranks", "rank_scale")


@dataclass
class MatryoshkaConfig(LoraConfig):
    """A LoRA adapter whose leading columns are an adapter of every rank (MatryoshkaLoRA, arXiv 2605.07850).

    For `peft.get_peft_model`. While training, a fixed diagonal P stands between A and B: P is the sum of s_rho over the ranks of
    S that a column belongs to. In evaluation mode the adapter has its largest rank, or that of `set_rank`, without P. s_r is
    PEFT's own scaling, lora_alpha / r; s_rho follows from it.

    The adapter is saved as a LoRA adapter: plain PEFT, and whatever else loads LoRA, takes it for the adapter of rank r. With
    `hf_efcp.matryoshka` imported it loads as what it is.

    Args:
        kind: "matryoshka"; "dylora", where each forward draws one rank of S (arXiv 2210.07558); "lora", where S is r alone.
        train_ranks: S; None: 1, 2, 4, ... up to r, and r.
        rank_scale: how s_rho depends on rho: "none" 1, "sqrt" 1 / sqrt(rho), "rank" 1 / rho.
        lora_alpha: the scale of rank r is lora_alpha / r, as in PEFT; None: what makes s_rho the paper's.
        reference_init: A starts uniform within 1 / sqrt(r), as in the authors' code, and not within 1 / sqrt(in).

    Raises:
        OptionError: a value that is not allowed, or an option of LoraConfig that changes what A and B mean.
    """

    lora_alpha: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "The scale of rank r is lora_alpha / r. Default: what makes it the paper's."}
    )
    kind: str = field(default="matryoshka", metadata={"help": "matryoshka, dylora or lora."})
    train_ranks: list[int] | None = field(
        default=None, metadata={"help": "The ranks to train for, the largest of them r. Default: the powers of two up to r."}
    )
    rank_scale: str = field(default="sqrt", metadata={"help": "How the scale depends on the rank: none, sqrt or rank."})
    reference_init: bool = field(
        default=False, metadata={"help": "A starts within 1 / sqrt(r), as in the authors' code, and not within 1 / sqrt(in)."}
    )

    def __post_init__(self) -> None:
        for name, value, known in (("kind", self.kind, KINDS), ("rank_scale", self.rank_scale, RANK_SCALES)):
            if value not in known:
                raise OptionError(unknown_name(name, value, known))
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise OptionError(f"r={self.r!r}: must be an integer >= 1")
        self.train_ranks = _checked(self.train_ranks, self.kind, self.r)
        if self.lora_alpha is None:
            self.lora_alpha = rank_scale_of(self.r, self.rank_scale) * (self.r**0.5 if self.use_rslora else self.r)
        if not 0 < self.lora_alpha < float("inf"):
            raise OptionError(f"lora_alpha={self.lora_alpha!r}: must be a finite number > 0")
        for name, allowed in _REFUSED.items():
            if getattr(self, name, allowed) not in (allowed, None):
                raise OptionError(f"{name}={getattr(self, name)!r}: MatryoshkaConfig does not take it; leave it out")
        if self.init_lora_weights not in _INITS:
            names = ", ".join(map(repr, _INITS))
            raise OptionError(f"init_lora_weights={self.init_lora_weights!r}: MatryoshkaConfig takes one of {names}")
        super().__post_init__()

    def scale(self, rank: int) -> float:
        """Give s_rho."""
        s_r = self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)  # type: ignore[operator]
        return s_r * rank_scale_of(rank, self.rank_scale) / rank_scale_of(self.r, self.rank_scale)


def _checked(ranks: list[int] | None, kind: str, r: int) -> list[int]:
    """The ranks to train for, in order."""
    if ranks is None:
        return [r] if kind == "lora" else powers_of_two(r)
    if not isinstance(ranks, list | tuple | set) or any(isinstance(x, bool) or not isinstance(x, int) for x in ranks):
        raise OptionError(f"train_ranks={ranks!r}: must be a list of integers, such as {powers_of_two(r)}")
    ordered = sorted(ranks)
    if not ordered or len(set(ordered)) < len(ordered) or ordered[0] < 1 or ordered[-1] > r:
        raise OptionError(f"train_ranks={ranks!r}: must be different integers from 1 to r={r}")
    if ordered[-1] < r:
        raise OptionError(f"train_ranks={ranks!r}: columns {ordered[-1]} to {r - 1} would never be trained; set r={ordered[-1]}")
    if kind == "lora" and ordered != [r]:
        raise OptionError(f"train_ranks={ranks!r}: kind='lora' trains rank r={r} alone")
    return ordered


# What PEFT is told -----------------------------------------------------------------------------------------------------------


def tell_peft() -> None:
    """Let PEFT build adapters of a MatryoshkaConfig, and read one from a folder. Idempotent."""
    if not hasattr(create := LoraModel._create_and_replace, "_hf_efcp"):
        setattr(LoraModel, create.__name__, _nesting(create))
    if not hasattr(read := PeftConfigMixin.__dict__["from_peft_type"].__func__, "_hf_efcp"):
        setattr(PeftConfigMixin, read.__name__, classmethod(_reading(read)))


def _nesting(original: Callable[..., None]) -> Callable[..., None]:
    """`LoraModel._create_and_replace`, after which an adapter of ours has P behind A."""

    @functools.wraps(original)
    def _create_and_replace(
        self: LoraModel, lora_config: Any, adapter_name: str, target: Any, target_name: str, parent: Any, *args: Any, **kw: Any
    ) -> None:
        original(self, lora_config, adapter_name, target, target_name, parent, *args, **kw)
        if isinstance(lora_config, MatryoshkaConfig):
            draws = self.__dict__.setdefault("_hf_efcp_draws", {})
            if adapter_name not in draws or draws[adapter_name].leader is not None:  # an adapter of that name was deleted
                draws[adapter_name] = Draw()
            draw = draws[adapter_name]
            adopt(getattr(parent, target_name), adapter_name, kw.get("current_key", target_name), lora_config, draw)

    _create_and_replace._hf_efcp = True  # type: ignore[attr-defined]
    return _create_and_replace


def _reading(original: Callable[..., Any]) -> Callable[..., Any]:
    """`from_peft_type`, which makes a MatryoshkaConfig of a LoRA configuration that has our fields."""

    @functools.wraps(original)
    def from_peft_type(cls: type, **kwargs: Any) -> Any:
        if str(kwargs.get("peft_type", "")).endswith("LORA") and all(name in kwargs for name in _OURS):
            known = {f.name for f in dataclasses.fields(MatryoshkaConfig)}
            if unknown := sorted(kwargs.keys() - known):
                warnings.warn(
                    f"the adapter's configuration has {', '.join(unknown)}, which this PEFT does not know", stacklevel=2
                )
            return MatryoshkaConfig(**{name: value for name, value in kwargs.items() if name in known})
        return original(cls, **kwargs)

    from_peft_type._hf_efcp = True  # type: ignore[attr-defined]
    return from_peft_type
