"""Random numbers that are counted, not drawn: each number depends on (counter, salt, row, column) only.

There is no generator. So no global state changes, a number does not depend on how the work is divided, and nothing has to be read
back from the device. `salt` is (n,) int64, a number for each tensor. `origin` is the row and the column at which the numbers
begin. For example, the part of a larger matrix from row 20 on has the origin (20, 0).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.constants import BF16_SHIFT, COUNTER_MASK, HASH_MASK, HASH_MULTIPLIER, LOWER_16_BITS, SALT_OFFSET, UNIFORM_UNIT


def _mix(x: Tensor) -> Tensor:
    """Give a 32-bit integer hash, in int64 arithmetic: every input bit affects every output bit."""
    x = ((x ^ (x >> 16)) * HASH_MULTIPLIER) & HASH_MASK
    x = ((x ^ (x >> 16)) * HASH_MULTIPLIER) & HASH_MASK
    return x ^ (x >> 16)


def counted_factors(
    counter: Tensor, salt: Tensor, rows: int, cols: int, origin: tuple[int, int] = (0, 0)
) -> tuple[Tensor, Tensor]:
    """Give the factors of `counted_bits`: (n, rows) and (n, cols) int32."""
    device = salt.device
    key = _mix(_mix(counter.to(device) & COUNTER_MASK) ^ _mix(salt + SALT_OFFSET))
    row = _mix(key[:, None] ^ torch.arange(origin[0], origin[0] + rows, device=device)) | 1
    col = _mix(_mix(key[:, None]) ^ torch.arange(origin[1], origin[1] + cols, device=device)) | 1
    return row.to(torch.int32), col.to(torch.int32)


def counted_bits(counter: Tensor, salt: Tensor, rows: int, cols: int, origin: tuple[int, int] = (0, 0)) -> Tensor:
    """Give pseudo-random numbers whose upper 16 bits are uniform, (n, rows, cols) int32.

    A number is the product of two odd hashes, one of the row and one of the column. The matrix has no low-rank structure, which a
    compressor would take for a gradient.

    Args:
        counter: 0-D int64, the step.
        salt: (n,) int64, one number per tensor.
        rows, cols: the numbers of rows and columns.
        origin: the row and the column at which the numbers begin.
    """
    row, col = counted_factors(counter, salt, rows, cols, origin)
    return row[:, :, None] * col[:, None, :]


def counted_noise(counter: Tensor, salt: Tensor, rows: int, cols: int) -> Tensor:
    """Give `counted_bits` as uniform numbers in (-1, 1), (n, rows, cols) fp32."""
    return (counted_bits(counter, salt, rows, cols) >> 16).float().add_(0.5).mul_(2 * UNIFORM_UNIT)


def counted_uniform(counter: Tensor, salt: Tensor, rows: int, cols: int, origin: tuple[int, int] = (0, 0)) -> Tensor:
    """Give `counted_bits` as uniform numbers in (0, 1), (n, rows, cols) fp32."""
    return _upper_bits(counter, salt, rows, cols, origin).float().add_(0.5).mul_(UNIFORM_UNIT)


def stochastic_round(x: Tensor, dtype: torch.dtype, counter: Tensor, salt: Tensor, origin: tuple[int, int] = (0, 0)) -> Tensor:
    """Give x (n, rows, cols) in `dtype`. To bf16, x is rounded stochastically, so that small additions survive in the mean.

    Rounding to nearest would lose every addition below 1/256 of a number. To other dtypes, x is rounded to nearest. x may be a
    part of a larger tensor, from the row and column `origin` on. It is then rounded as in the larger tensor.
    """
    if dtype != torch.bfloat16:
        return x.to(dtype)
    x = x.float()
    _, rows, cols = x.shape
    # Add a uniform number below one unit of bf16, and cut: this rounds up with the probability of the part that is cut off.
    sum_ = _upper_bits(counter, salt, rows, cols, origin).add_(x.view(torch.int32))
    return sum_.bitwise_and_(-1 << BF16_SHIFT).view(torch.float32).to(dtype)


def _upper_bits(counter: Tensor, salt: Tensor, rows: int, cols: int, origin: tuple[int, int]) -> Tensor:
    """Give the upper 16 bits of `counted_bits`: uniform numbers 0 ... 65535, (n, rows, cols) int32."""
    return counted_bits(counter, salt, rows, cols, origin).bitwise_right_shift_(16).bitwise_and_(LOWER_16_BITS)
