"""The options that methods share: how state is stored and divided, and what a window is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from ..options import OptionError, fraction, non_negative, option, parse_bytes, positive

STATE_DTYPES = (torch.float64, torch.float32, torch.bfloat16)

# preset="measured" of the window methods: METRIC for all, with the metric and updates of Adam's size. SPARSE and LOW_RANK are for
# the methods that compress: entries in bf16.
METRIC: Mapping[str, Any] = MappingProxyType(
    {
        "window_size": 16,
        "metric": "factored",
        "window_momentum": 0.8,
        "window_nesterov": True,
        "update_rms": 1.0,
        "rms_mode": "adam",
        "residual": "momentum",
        "error_dtype": torch.bfloat16,
    }
)
SPARSE: Mapping[str, Any] = MappingProxyType({"window_dtype": torch.bfloat16})
LOW_RANK: Mapping[str, Any] = MappingProxyType(
    {"rank": 8, "max_rank_fraction": 0.25, "window_dtype": torch.bfloat16, "window_update_dtype": torch.bfloat16}
)


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """Options of every method."""

    preset: str = option(
        "paper",
        "what options start from that are not given; paper: the class defaults; measured: what trains well at AdamW's rates",
        choices=("paper", "measured"),
    )
    weight_decay_mode: str = option(
        "decoupled",
        "decoupled: parameters shrink by lr * weight_decay of themselves in each step, as with AdamW; l2: weight_decay times the "
        "parameters is added to the gradient before compression",
        choices=("decoupled", "l2"),
    )
    stochastic_rounding: bool = option(
        False,
        "round each update of bf16 parameters stochastically, so that small updates count in the mean; this needs no fp32 copy "
        "(refused under DeepSpeed ZeRO, which trains an fp32 copy)",
    )
    shard: str = option(
        "off",
        "auto: where torch.distributed runs, its processes share the state; off: unless given a process_group",
        choices=("off", "auto"),
    )


@dataclasses.dataclass(frozen=True)
class StateOptions(StepOptions):
    """Options of every method with error feedback."""

    error_dtype: torch.dtype | None = option(
        None,
        "dtype of the error feedback, bf16 rounded stochastically; none: fp64 for fp64 parameters, else fp32",
        choices=STATE_DTYPES,
    )
    error_format: str = option(
        "plain",
        "how the error feedback is stored; plain: in error_dtype; int8, int4: with a scale for each 256 numbers, rounded "
        "stochastically",
        choices=("plain", "int8", "int4"),
    )


@dataclasses.dataclass(frozen=True)
class WindowOptions(StateOptions):
    """Options of every method that keeps a window of gradients."""

    window_size: int = option(1024, "number m of gradients in the window", allowed="an integer >= 1", check=positive)
    window_momentum: float = option(
        0.0,
        "momentum before preconditioning: the update starts from a running mean of the window's gradients with this decay; the "
        "mean takes no memory",
        allowed="a number in [0, 1)",
        check=fraction,
    )
    window_nesterov: bool = option(False, "with window_momentum: the newest gradient counts once more, as in Nesterov's momentum")
    centered: bool = option(
        False, "precondition by the covariance of the window's entries around their mean, not by their second moment"
    )
    momentum: float = option(
        0.0,
        "momentum after preconditioning: a running mean of the updates with this decay; it is stored, 4 bytes per parameter",
        allowed="a number in [0, 1)",
        check=fraction,
    )
    scope: str = option("model", "one Gram matrix over all tensors, or one per tensor", choices=("model", "layer"))
    residual: str = option(
        "feedback",
        "what becomes of the part of a gradient that compression leaves out; feedback: the part is added to the next gradient; "
        "momentum: a running mean of these parts, with the decay window_momentum, is added to the update",
        choices=("feedback", "momentum"),
    )
    update_rms: float | None = option(
        None,
        "rescale the whole update to this root mean square per coordinate (a weighted one with a metric); none: the update is "
        "not rescaled",
        allowed="a number > 0, or none",
        check=positive,
    )
    rms_mode: str = option(
        "constant",
        "size of the update; constant: always update_rms; adam: smaller where gradients are noise, as Adam's updates are: "
        "update_rms times the size of the mean gradient, relative to the size of one gradient",
        choices=("constant", "adam"),
    )
    metric: str = option(
        "none",
        "scale gradients by a running mean of their squares before they enter the window, and scale the update likewise; "
        "factored: a mean for each row and each column (0.02 bytes per parameter); diagonal: for each coordinate (4 bytes); "
        "tensor: for each tensor",
        choices=("none", "factored", "diagonal", "tensor"),
    )
    metric_beta: float = option(0.99, "decay of the metric's running means", allowed="a number in [0, 1)", check=fraction)
    metric_eps: float = option(
        1e-3, "added to the metric, relative to its mean", allowed="a finite number >= 0", check=non_negative
    )
    window_dtype: torch.dtype | None = option(
        None, "dtype of the window's numbers; none: fp64 for fp64 parameters, else fp32", choices=STATE_DTYPES
    )
    window_format: str = option(
        "plain",
        "how the window is stored; plain: in window_dtype; low_bit: 8 bits a number, or 16 a sparse entry with its index",
        choices=("plain", "low_bit"),
    )
    window_update_dtype: torch.dtype | None = option(
        None,
        "dtype in which the window's entries are added up to the update; bfloat16 takes half the time where the processor has "
        "instructions for it; none: the arithmetic's dtype. For low-rank windows, and dense windows in bf16; refused with sparse "
        "windows",
        choices=(torch.bfloat16,),
    )
    memory_budget: int | None = option(
        None,
        "bytes of state (2GiB) for each process: chooses window_size, rank or density, and formats, unless they are given",
        allowed="a number >= 1, with a unit or without, or none",
        check=positive,
        parse=parse_bytes,
    )
    verify: bool = option(
        False,
        "on loading a checkpoint, compute the Gram matrix from its window and compare it with the saved one, even if that takes "
        "more than a second",
    )
    save_window: bool = option(
        True,
        "false: checkpoints leave out the window; a resumed run starts with an empty window, and with residual=momentum its "
        "running mean of the compression error starts at zero too",
    )

    def __post_init__(self) -> None:
        block = getattr(self, "block_size", 1)  # of the sparse methods
        if self.window_format == "low_bit" and block > 1024:
            raise OptionError(f"block_size={block}: at most 1024 with window_format=low_bit, where an index has 10 bits")
        if self.window_update_dtype is not None and hasattr(self, "density"):
            raise OptionError(
                "window_update_dtype=bfloat16: sparse entries are added one by one, without a product that could be faster: "
                "leave it out"
            )

        if getattr(self, "comm", "gradients") == "factors" and self.metric not in ("none", "factored"):
            raise OptionError(f"metric={self.metric!r}: with comm=factors allowed are none and factored")
        if self.residual == "momentum" and getattr(self, "comm", "gradients") == "factors":
            raise OptionError("residual='momentum': with comm=factors allowed is feedback")

    @property
    def averaging(self) -> float:
        """The momentum before preconditioning, whichever option gives it."""
        return self.window_momentum


@dataclasses.dataclass(frozen=True)
class LowRankOptions:
    """Options of the low-rank compressor."""

    rank: int = option(
        4, "rank of the compressed gradients, clamped to min(rows, cols)", allowed="an integer >= 1", check=positive
    )
    max_rank_fraction: float = option(
        1.0,
        "a matrix's rank is at most this fraction of its shorter side, if that is at least 8: with 0.25 that of 8 x 4096 is 2",
        allowed="a number in (0, 1]",
        check=lambda x: 0 < x <= 1,
    )
    power_iterations: int = option(
        1, "rounds of subspace iteration per step, each two products with the gradient", allowed="an integer >= 1", check=positive
    )
    comm: str = option(
        "gradients",
        "what the processes of DDP all-reduce: gradients, or the rank-r factors of their mean (needs max_grad_norm=0, no fp16)",
        choices=("gradients", "factors"),
    )


@dataclasses.dataclass(frozen=True)
class SparseOptions:
    """Options of the block top-k compressor."""

    density: float = option(0.01, "fraction of each block that is kept", allowed="a number in (0, 1]", check=lambda x: 0 < x <= 1)
    block_size: int = option(
        1024,
        "length of a top-k block, a run inside one row of a tensor",
        allowed="an integer in [1, 32768] (indices are int16)",
        check=lambda x: 1 <= x <= 32768,
    )


@dataclasses.dataclass(frozen=True)
class SubspaceOptions:
    """Option of AdamW in a subspace."""

    adjust_lr_fn: str = option(
        "original",
        "match_rms_adamw: updates of low-rank matrices times sqrt(side / r), which gives them the size of AdamW's; original: "
        "smaller ones",
        choices=("original", "match_rms_adamw"),
    )


@dataclasses.dataclass(frozen=True)
class ColumnsOptions:
    """Options of methods that project onto columns of the cosine basis."""

    rank: int = option(
        128, "number r of columns of the cosine basis, clamped to min(rows, cols)", allowed="an integer >= 1", check=positive
    )
    ell_norm: int = option(
        1, "norm by which the columns are chosen: the largest ones of a times the basis; 2: least is lost", choices=(1, 2)
    )
    dct_method: str = option(
        "auto",
        "how a times the basis is formed; matmul: by the matrix; fft: by a Fourier transform; auto: whichever was measured to be "
        "faster for the size, on CPUs",
        choices=("auto", "matmul", "fft"),
    )
