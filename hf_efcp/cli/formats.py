"""Formats of numbers by name, for `hf-efcp capacity`: what each costs in bits, and the error that it makes."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core import capacity as core
from ..core.capacity import Fit, Gmse
from ..core.codecs import BlockQuantizer, MinMaxQuantizer, SparseCodec
from ..core.compressors import BlockTopK
from ..kernels.constants import BLOCK
from ..options import OptionError, unknown_name

# What the command shows where no format is named.
SHOWN = (
    *("bf16", "e4m3", "int8", "int6", "int4", "int3", "int2", "int1", "window_int8", "error_int4", "minmax4=32", "minmax4=256"),
    *("nf4=64", "fp4=32", "vq=2x4", "vq=4x2", "sparse=0.5", "sparse=0.75", "sparse=0.9", "sparse=0.99", "2:4", "4:8"),
    *("top=0.01", "low_bit_top=0.01", "rank=8/768x768", "2:4*int4", "sparse=0.5*int8", "ideal=4"),
)
# The 16 levels of NF4 (arXiv 2305.14314): means of equal shares of a normal number, with a zero.
_NF4_OFFSET = 0.9677083
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # E2M1
_HELP = {
    "bf16": "rounded to 16 bits; fp16 and fp32 too",
    "e4m3": "8-bit float at its best scale; e5m2 too",
    "int4": "equal steps at the best distance, 1 to 12 bits",
    "window_int8": f"window_format=low_bit: the largest of {BLOCK} numbers is the scale",
    "error_int8": "error_format=int8: the same, rounded stochastically; error_int4 too",
    "error_minmax4": f"error_format=minmax4: 4 bits between the least and the largest of {BLOCK} numbers",
    "minmax4=64": "4 bits between the least and the largest of 64 numbers; 1 to 8 bits",
    "nf4=64": "NF4 of bitsandbytes, blocks of 64; fp4=32 is E2M1",
    "vq=2x4": "vectors of 2 numbers, 4 bits for each number, a learned codebook",
    "sparse=0.9": "90% of the numbers are zero, the smallest ones",
    "2:4": "the 2 largest of every 4 numbers",
    "top=0.01": "1% of every block of 1024 numbers, as the windows of the sparse optimizers",
    "low_bit_top=0.01": "the same with window_format=low_bit: 16 bits for index and value together",
    "rank=8/768x768": "the best matrix of rank 8 for one of 768 x 768",
    "ideal=4": "the least error that 4 bits for each number allow",
    "2:4*int4": "several formats, one after the other: capacities multiply",
}


@dataclasses.dataclass(frozen=True)
class Format:
    """A format and its error on standard normal numbers.

    Attributes:
        name: as typed.
        bits: for each number, with scales and indices; of a product they are those of what is kept.
        gmse: its error; of a product None.
        parts: of a product, in order.
    """

    name: str
    bits: float
    gmse: Gmse | None
    parts: tuple[Format, ...] = ()

    def capacity(self, fit: Fit) -> float:
        """rho, under a fit."""
        if self.gmse is None:
            return core.composed([part.capacity(fit) for part in self.parts])
        return core.capacity(self.gmse.value, fit)

    def capacity_error(self, fit: Fit) -> float:
        """The standard error of rho: what a change of the GMSE by its standard error changes; 0 where nothing is sampled."""
        if self.gmse is not None:
            return abs(core.capacity(self.gmse.value + self.gmse.error, fit) - core.capacity(self.gmse.value, fit))
        relative = [part.capacity_error(fit) / part.capacity(fit) for part in self.parts if part.capacity(fit)]
        return self.capacity(fit) * math.hypot(*relative)


def parse(text: str, samples: int = 1_000_000) -> Format:
    """A format by name, such as int4, 2:4, sparse=0.9 or 2:4*int4.

    Args:
        text: the name.
        samples: numbers to sample where there is no integral.

    Raises:
        OptionError: no such format, or a number that it does not take.
    """
    parts = [_single(part.strip(), samples) for part in text.split("*")]
    if len(parts) == 1:
        return parts[0]
    bits = parts[-1].bits
    for part in reversed(parts[:-1]):  # kept numbers are stored in the format that follows
        bits = _kept(part.name) * bits + _index_bits(part.name)
    return Format(text, bits, None, tuple(parts))


def described() -> str:
    """The formats, one a line."""
    width = max(map(len, _HELP))
    return "\n".join(f"  {name:<{width}}  {told}" for name, told in _HELP.items())


def _single(name: str, samples: int) -> Format:
    for pattern, make in _KINDS.items():
        found = re.fullmatch(pattern, name)
        if found:
            try:
                bits, gmse = make(samples, *found.groups())
            except (ValueError, ArithmeticError) as error:
                raise OptionError(f"format={name!r}: {error}") from None
            return Format(name, bits, gmse)
    raise OptionError(unknown_name("format", name, _HELP))


def _kept(name: str) -> float:
    """The part of the numbers that a sparse or low-rank format stores."""
    if found := re.fullmatch(r"(\d+):(\d+)", name):
        return int(found[1]) / int(found[2])
    if found := re.fullmatch(r"rank=(\d+)/(\d+)x(\d+)", name):
        rank, rows, cols = map(int, found.groups())
        return rank * (rows + cols) / (rows * cols)
    kind, _, value = name.partition("=")
    if kind not in ("sparse", "top"):
        raise OptionError(f"format={name!r}: only sparse=..., top=..., rank=... and N:M can stand before *")
    return 1 - float(value) if kind == "sparse" else float(value)


def _index_bits(name: str) -> float:
    """Bits for each number that say which are kept: of N:M the number of the choice; else a bit each, or 16 for each kept."""
    if found := re.fullmatch(r"(\d+):(\d+)", name):
        return math.ceil(math.log2(math.comb(int(found[2]), int(found[1])))) / int(found[2])
    return 0.0 if name.startswith("rank") else min(1.0, 16 * _kept(name))


def _integer(bits: str, least: int = 1, most: int = 8) -> int:
    if not least <= int(bits) <= most:
        raise ValueError(f"{bits} bits: must be from {least} to {most}")
    return int(bits)


def _rounded(samples: int, dtype: str) -> tuple[float, Gmse]:
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    return 8.0 * kind.itemsize, core.sampled(lambda x: x.to(kind).double(), 256, samples)


def _float8(samples: int, name: str) -> tuple[float, Gmse]:
    dtype = torch.float8_e4m3fn if name == "e4m3" else torch.float8_e5m2
    levels = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    return 8.0, core.scaled_code(levels[levels.isfinite()].unique())


def _uniform(samples: int, bits: str) -> tuple[float, Gmse]:
    return float(bits), core.uniform(int(bits))


def _of_states(samples: int, kind: str, bits: str) -> tuple[float, Gmse]:
    quantizer = BlockQuantizer(int(bits))
    noise = torch.Generator().manual_seed(2)

    def round_trip(x: Tensor) -> Tensor:
        drawn = torch.rand(x.shape, dtype=x.dtype, generator=noise) if kind == "error" else None
        return quantizer.decode(*quantizer.encode(x, drawn), BLOCK)

    return int(bits) + 32 / BLOCK, core.sampled(round_trip, BLOCK, samples)


def _of_microadam(samples: int) -> tuple[float, Gmse]:
    quantizer = MinMaxQuantizer(torch.float64)
    return 4 + 32 / BLOCK, core.sampled(lambda x: quantizer.decode(*quantizer.encode(x), BLOCK), BLOCK, samples)


def _min_max(samples: int, bits: str, block: str) -> tuple[float, Gmse]:
    if not 2 <= int(block) <= samples // 2:
        raise ValueError(f"blocks of {block}: must be from 2 to {samples // 2}, half of the samples")
    return _integer(bits) + 32 / int(block), core.min_max(_integer(bits), int(block), samples)


def _four_bits(samples: int, kind: str, block: str) -> tuple[float, Gmse]:
    if not 2 <= int(block) <= samples // 2:
        raise ValueError(f"blocks of {block}: must be from 2 to {samples // 2}, half of the samples")
    return 4 + 16 / int(block), core.abs_max(_nf4() if kind == "nf4" else _fp4(), int(block), samples)


def _nf4() -> Tensor:
    """-1 ... 1: 8 positive and 7 negative quantiles, and zero."""
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)
    positive = normal.icdf(torch.linspace(_NF4_OFFSET, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -normal.icdf(torch.linspace(_NF4_OFFSET, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([negative, positive.new_zeros(1), positive]).sort().values
    return levels / levels.abs().max()


def _fp4() -> Tensor:
    positive = torch.tensor(_FP4, dtype=torch.float64) / _FP4[-1]
    return torch.cat([-positive, positive]).unique()


def _vectors(samples: int, dim: str, bits: str) -> tuple[float, Gmse]:
    return float(bits), core.vectors(int(dim), float(bits), min(samples, 100_000))


def _sparse(samples: int, sparsity: str) -> tuple[float, Gmse]:
    return (1 - float(sparsity)) * 32 + _index_bits(f"sparse={sparsity}"), core.sparse(float(sparsity))


def _n_of_m(samples: int, n: str, m: str) -> tuple[float, Gmse]:
    gmse = core.n_of_m(int(n), int(m))
    return int(n) / int(m) * 32 + _index_bits(f"{n}:{m}"), gmse


def _top(samples: int, low_bit: str | None, density: str) -> tuple[float, Gmse]:
    if not 0 < float(density) <= 1:
        raise ValueError(f"density {density}: must be in (0, 1]")
    grid = BlockTopK(1024, float(density), 1024)
    codec = SparseCodec(1024, 1, grid.per_row, 0)

    def round_trip(x: Tensor) -> Tensor:
        indices = x.abs().topk(grid.per_row, dim=1).indices
        values = x.gather(1, indices)
        if low_bit:
            indices, values = codec.decode(*codec.encode(indices, values), x.dtype)
        return torch.zeros_like(x).scatter_(1, indices, values)

    bits = grid.per_row / 1024 * (16 if low_bit else 48) + (8 / 1024 if low_bit else 0)
    return bits, core.sampled(round_trip, 1024, samples)


def _rank(samples: int, rank: str, rows: str, cols: str) -> tuple[float, Gmse]:
    gmse = core.low_rank(int(rank), int(rows), int(cols))
    return 32 * _kept(f"rank={rank}/{rows}x{cols}"), gmse


def _ideal(samples: int, bits: str) -> tuple[float, Gmse]:
    return float(bits), core.ideal(float(bits))


_NUMBER = r"(\d+(?:\.\d*)?|\.\d+)"
_KINDS: dict[str, Callable[..., Any]] = {
    r"(bf16|fp16|fp32)": _rounded,
    r"(e4m3|e5m2)": _float8,
    r"int(\d+)": _uniform,
    r"(window|error)_int(4|8)": _of_states,
    r"error_minmax4": _of_microadam,
    r"minmax(\d+)=(\d+)": _min_max,
    r"(nf4|fp4)=(\d+)": _four_bits,
    rf"vq=(\d+)x{_NUMBER}": _vectors,
    rf"sparse={_NUMBER}": _sparse,
    r"(\d+):(\d+)": _n_of_m,
    rf"(low_bit_)?top={_NUMBER}": _top,
    r"rank=(\d+)/(\d+)x(\d+)": _rank,
    rf"ideal={_NUMBER}": _ideal,
}
