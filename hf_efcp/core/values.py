"""Which numbers an entry of state may hold. A checkpoint's numbers are checked before they become the state.

The check `sure` takes about as long as reading. If it says no, the check `exact` decides. `exact` may take longer and may look at
other entries of the same parameter: for example, a code means nothing if its scale is zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels.constants import (
    BLOCK,
    INT4_BITS,
    INT4_MASK,
    LARGEST_BOUND,
    LARGEST_INT4,
    LARGEST_INT8,
    LOWER_16_BITS,
    VALUE_BITS,
    VALUE_MASK,
)
from .codecs import SparseCodec, unpack_codes

if TYPE_CHECKING:
    from .cells import Spec

# The largest integers up to which all are exact in fp64, and in fp32.
_MOST, _MOST_FP32 = 2**53, 2**24
_NAN_FLOAT8 = 0x7F
# The largest scale of a sparse block that gives finite fp32 numbers whatever the codes are.
_SURE_SCALE = 250


@dataclasses.dataclass(frozen=True)
class Values:
    """The numbers that are allowed in an entry.

    Attributes:
        expected: the allowed numbers in words, for messages.
        sure: some rows of the entry, (k, cols), not empty -> 0-D bool, whether they are certainly allowed.
        exact: the parameter's entries by name -> whether this entry is allowed, where `sure` says no; None: `sure` decides.
    """

    expected: str
    sure: Callable[[Tensor], Tensor]
    exact: Callable[[Mapping[str, Tensor]], Tensor] | None = None


def values_of(spec: Spec) -> Values | None:
    """Give the numbers that are allowed in an entry; None: all numbers of its dtype."""
    if spec.values is not None:
        return spec.values
    if spec.dtype.is_floating_point:  # `exact` is needed, since the sum of finite numbers may overflow
        return Values("finite numbers", lambda x: x.sum().isfinite(), lambda entry: entry[spec.name].isfinite().all())
    return {torch.int64: COUNT, torch.int8: INT8}.get(spec.dtype)


def _positive(x: Tensor) -> Tensor:
    least, most = torch.aminmax(x)
    return (least >= 0) & (most < torch.inf)


POSITIVE = Values("finite numbers >= 0", _positive)
COUNT = Values("a number of steps, 0 ... 2^53", lambda x: ((x >= 0) & (x <= _MOST)).all())
COUNT_FP32 = Values("a number of steps, 0 ... 2^24", lambda x: ((x >= 0) & (x <= _MOST_FP32) & (x == x.floor())).all())
INT8 = Values(f"codes -{LARGEST_INT8} ... {LARGEST_INT8}", lambda x: x.amin() >= -LARGEST_INT8)
FLOAT8 = Values("8-bit floats, none of them NaN", lambda x: (x & _NAN_FLOAT8).amax() < _NAN_FLOAT8)


def code_scales(bits: int) -> Values:
    """Allow scales of `BlockQuantizer` whose product with the largest code is finite."""
    largest = LARGEST_INT8 if bits == 8 else LARGEST_INT4

    def sure(x: Tensor) -> Tensor:
        least, most = torch.aminmax(x)
        return (least >= 0) & (most <= torch.finfo(x.dtype).max / largest)

    return Values("finite scales >= 0", sure)


def int4(name: str, cols: int) -> Values:
    """Allow 4-bit codes of `BlockQuantizer`, for rows of `cols` numbers. -8 is no code, but allowed where the scale is zero."""

    def sure(x: Tensor) -> Tensor:
        low = (x & INT4_MASK).amin() > 0
        return low & (x[:, : cols // 2].amin() >= 1 << INT4_BITS) if cols > 1 else low

    def exact(entry: Mapping[str, Tensor]) -> Tensor:
        dead = unpack_codes(entry[name], cols) == 0
        return ~(dead & (entry[f"{name}_scale"].repeat_interleave(BLOCK, -1)[..., :cols] != 0)).any()

    return Values(f"codes -{LARGEST_INT4} ... {LARGEST_INT4}", sure, exact)


def _ordered(x: Tensor) -> Tensor:
    return (x.abs() <= LARGEST_BOUND).all() & (x[:, 0] <= x[:, 1]).all()


BOUNDS = Values("finite bounds, the lower one first", _ordered)


def indices(blocks: tuple[int, int, int], cols: int) -> Values:
    """Allow indices of block top-k entries; `blocks` and `cols` are those of BlockTopK."""
    block, kept, kept_tail = blocks
    head, tail = cols // block * kept, cols % block

    def sure(x: Tensor) -> Tensor:
        return _below(x, head, block, tail)

    more = f", 0 ... {tail - 1} in a row's last one" if kept_tail else ""
    return Values(f"indices 0 ... {block - 1} in a block{more}", sure)


def sparse_codes(blocks: tuple[int, int, int], cols: int, codec: SparseCodec, dtype: torch.dtype) -> tuple[Values, Values]:
    """Allow numbers and scales of `SparseCodec`; `dtype`: of the decoded values."""
    block, kept, _ = blocks
    head, tail = cols // block * kept, cols % block

    def known(x: Tensor) -> Tensor:
        return _below((x.int() & LOWER_16_BITS) >> VALUE_BITS, head, block, tail)

    def exact(entry: Mapping[str, Tensor]) -> Tensor:
        x = entry["window_entries"]
        values = codec.decode(x, entry["window_scale"], dtype)[1]
        return known(x.flatten(0, -2)) & ~((x & VALUE_MASK == 0) & (values != 0)).any()

    def finite(entry: Mapping[str, Tensor]) -> Tensor:
        return codec.decode(entry["window_entries"], entry["window_scale"], dtype)[1].isfinite().all()

    return (
        Values(f"indices 0 ... {block - 1} in a block, with codes", lambda x: known(x) & ((x & VALUE_MASK).amin() > 0), exact),
        Values("scales of finite numbers", lambda x: x.amax() <= _SURE_SCALE, finite),
    )


def _below(x: Tensor, head: int, block: int, tail: int) -> Tensor:
    """Tell whether numbers (k, cols) are in 0 ... block - 1, and those from column `head` on in 0 ... tail - 1."""
    ok = x.amin() >= 0
    if head:
        ok = ok & (x[:, :head].amax() < block)
    return ok & (x[:, head:].amax() < tail) if head < x.shape[1] else ok
