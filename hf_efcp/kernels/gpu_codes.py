"""Low-bit windows on GPUs, by Triton: the codes of `core.codecs`, rounded to nearest, bit for bit; products of dense codes.

E4M3 codes are made by integer arithmetic, which any GPU has. A step needs the decoded numbers too, so codes and decoded numbers
are written together. If a run holds a number that is not finite, its scale is NaN as in plain torch, but its codes may differ:
the step is refused.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import Blocks, constants
from .gpu_tools import FLOAT8, INT8, RUN, cdiv, divided, from_float8, on, power_of_2, stored, tile, tiling

# Numbers of a program's tile.
_NUMBERS = 2048
# Numbers of a program's tile where its rows are blocks of a sparse entry, each of which is reduced alone.
_BLOCKS = 512
# Slots of a window, and numbers of each slot, that are multiplied at once.
_SLOTS, _LENGTH = 8, 256
_INT8, _FLOAT8 = tl.constexpr(INT8), tl.constexpr(FLOAT8)
_FLOAT8_SCALE = tl.constexpr(constants.FLOAT8_SCALE)
_BIAS, _SHIFT = tl.constexpr(constants.EXPONENT_BIAS), tl.constexpr(constants.EXPONENT_SHIFT)
_BIAS_64, _SHIFT_64 = tl.constexpr(1023), tl.constexpr(52)
_FRACTION, _FRACTION_64 = tl.constexpr((1 << constants.EXPONENT_SHIFT) - 1), tl.constexpr((1 << 52) - 1)
# E4M3, in the bits of fp32. Numbers below 2^-6 are subnormal; all from 480 on are NaN. The last bit of the fp32 number 2^14 is
# 2^-9, so that adding 2^14 rounds a small number to a multiple of 2^-9.
_SUBNORMAL, _NAN_FROM, _ENDS = tl.constexpr(121 << 23), tl.constexpr(1087 << 20), tl.constexpr(141 << 23)
_VALUE_BITS, _VALUE_MASK = tl.constexpr(constants.VALUE_BITS), tl.constexpr(constants.VALUE_MASK)
_VALUE_ZERO, _LARGEST_VALUE = tl.constexpr(constants.VALUE_ZERO), tl.constexpr(constants.LARGEST_VALUE)
_16_BITS, _NOT_FINITE = tl.constexpr(constants.LOWER_16_BITS), tl.constexpr(constants.NOT_FINITE)


# In kernels ---------------------------------------------------------------------------------------------------------------


@triton.jit
def _divide(a, b):
    """Give a / b for tensors, rounded to nearest as in torch. Triton's operator is less exact in fp32."""
    return tl.div_rn(a, b) if a.dtype == tl.float32 else a / b


@triton.jit
def _nearest(x):
    """Round small x to the nearest integer, ties to even: a sum with 1.5 * 2^23, or in fp64 with 1.5 * 2^52, has no fraction."""
    large = 12582912.0 if x.dtype == tl.float32 else 6755399441055744.0
    return (x + large) - large


@triton.jit
def _largest(x):
    """Give the largest magnitude of each row of a tile, (ROWS, 1); infinity if the row has a NaN, which a maximum would lose."""
    size = tl.abs(x)
    return tl.max(tl.where(size < float("inf"), size, float("inf")), 1)[:, None]


@triton.jit
def quantized(
    a, mask, random, LARGEST: tl.constexpr, LIMIT: tl.constexpr, TINY: tl.constexpr, NEAREST: tl.constexpr
):  # fmt: skip
    """Give codes, int32, and scales (ROWS, 1) of a tile whose rows are runs: `core.codecs.BlockQuantizer.encode`.

    NEAREST rounds to nearest. Without NEAREST, the uniform numbers `random` round stochastically.
    """
    largest = _largest(tl.where(mask, a, 0.0))  # outside the mask, a kept number may have been subtracted
    finite = largest < float("inf")
    scale = _divide(largest, tl.full(largest.shape, LARGEST, largest.dtype))
    scale = tl.where(scale > LIMIT, LIMIT, scale)
    scale = tl.where(scale < TINY, 0.0, scale)
    code = _divide(a, tl.where(scale == 0, 1.0, scale))
    code = _nearest(code) if NEAREST else tl.floor(code + random)
    code = tl.where(finite, code, 0.0)
    code = tl.minimum(tl.maximum(code, -LARGEST), LARGEST)
    return code.to(tl.int32), tl.where(finite, scale, float("nan"))


@triton.jit
def _to_float8(x):
    """Give codes of `core.codecs.encode_float8`, int32."""
    y = (x * _FLOAT8_SCALE).to(tl.float32)
    bits = y.to(tl.int32, bitcast=True)
    sign, bits = (bits >> 24) & 128, bits & 0x7FFFFFFF
    small = (tl.abs(y) + 16384.0).to(tl.int32, bitcast=True) - _ENDS
    code = (bits - (120 << 23) + 0x7FFFF + ((bits >> 20) & 1)) >> 20
    code = tl.where(bits < _SUBNORMAL, small, code)
    return tl.where(bits < _NAN_FROM, code, 127) | sign


@triton.jit
def _power(scale, like):
    """Give 2^e for a scale of `core.codecs.SparseCodec`, in the type that `like` points to."""
    return (scale.to(tl.int32) << _SHIFT).to(tl.float32, bitcast=True).to(like.dtype.element_ty)


@triton.jit
def unpacked(number, scale, like):
    """Give indices, int32, and values, in the type that `like` points to, for numbers and scales of `core.codecs.SparseCodec`."""
    number = number.to(tl.int32)
    value = ((number & _VALUE_MASK) - _VALUE_ZERO).to(like.dtype.element_ty) * _power(scale, like)
    return (number & _16_BITS) >> _VALUE_BITS, value


@triton.jit
def _exponent(x):
    """Give the least e with x <= 2^e, int32, within the exponents of fp32's normal numbers; 0 for x = 0."""
    if x.dtype == tl.float32:
        bits = x.to(tl.int32, bitcast=True)
        e = (bits >> _SHIFT) - _BIAS + ((bits & _FRACTION) != 0).to(tl.int32)
    else:
        bits = x.to(tl.int64, bitcast=True)
        e = ((bits >> _SHIFT_64) - _BIAS_64).to(tl.int32) + ((bits & _FRACTION_64) != 0).to(tl.int32)
    return tl.where(x == 0, 0, tl.minimum(tl.maximum(e, 1 - _BIAS), _BIAS))


@triton.jit
def _encode(
    x, codes, scales, numbers, rows, cols,
    FORMAT: tl.constexpr, LARGEST: tl.constexpr, LIMIT: tl.constexpr, TINY: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A program encodes a tile, whose rows are runs for INT8."""
    _, row, first = tile(rows, cols, ROWS, COLS)
    col = first + tl.arange(0, COLS)[None, :]
    mask = (row < rows) & (col < cols)
    a = tl.load(x + row * cols + col, mask=mask, other=0.0)
    if FORMAT == _FLOAT8:
        code = _to_float8(a)
        number = from_float8(code, numbers)
    else:
        code, scale = quantized(a, mask, 0.0, LARGEST, LIMIT, TINY, True)
        number = code.to(a.dtype) * scale
        tl.store(scales + row * tl.cdiv(cols, RUN) + first // RUN, scale, mask=row < rows)
    # `numbers` may be x: all threads must have read x before one writes.
    tl.debug_barrier()
    tl.store(codes + row * cols + col, code.to(codes.dtype.element_ty), mask=mask)
    tl.store(numbers + row * cols + col, number, mask=mask)


@triton.jit
def _encode_sparse(
    indices, values, entries, scales, numbers, many, per_row, kept, kept_tail, full, blocks,
    ROWS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """A program encodes ROWS blocks."""
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    row, number, within = place // blocks, place % blocks, tl.arange(0, SIZE)[None, :]
    at = row * per_row + number * kept + within
    mask = (place < many) & (within < tl.where(number == full, kept_tail, kept))
    value = tl.load(values + at, mask=mask, other=0.0)
    largest = _largest(value)
    exponent = _exponent(_divide(largest, tl.full(largest.shape, _LARGEST_VALUE, largest.dtype)))
    scale = tl.where(largest == 0, 0, tl.where(largest < float("inf"), exponent + _BIAS, _NOT_FINITE))
    power = _power(scale, values)
    code = _nearest(_divide(value, tl.where(power == 0, 1.0, power)))
    code = tl.where(code == code, code, 0.0)
    code = tl.minimum(tl.maximum(code, -_LARGEST_VALUE), _LARGEST_VALUE)
    index = tl.load(indices + at, mask=mask, other=0).to(tl.int32)
    tl.store(entries + at, ((index << _VALUE_BITS) | (code.to(tl.int32) + _VALUE_ZERO)).to(tl.int16), mask=mask)
    tl.store(numbers + at, code * power, mask=mask)
    tl.store(scales + place, scale.to(tl.uint8), mask=place < many)


@triton.jit
def _dense_dots(
    codes, scales, entry, j, out, m, rows, cols, length, parts, each, SLOTS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A program sums over a part of a tensor, for some slots: out (n, parts, m)."""
    part, rest, groups = tl.program_id(0) % parts, tl.program_id(0) // parts, tl.cdiv(m, SLOTS)
    t, slot = (rest // groups).to(tl.int64), (rest % groups * SLOTS + tl.arange(0, SLOTS))[:, None]
    own, place = slot == tl.load(j), t * m + slot
    runs = tl.cdiv(cols, RUN)
    total = tl.zeros([SLOTS, BLOCK], dtype=tl.float64)
    begin = part.to(tl.int64) * each
    for start in range(begin, tl.minimum(begin + each, length), BLOCK):
        at = start + tl.arange(0, BLOCK)[None, :]
        y = tl.load(entry + t * length + at, mask=at < length, other=0.0)
        run = (place * rows + at // cols) * runs + at % cols // RUN
        x = stored(codes, scales, place * length + at, run, (slot < m) & (at < length), entry, _INT8)
        total += tl.where(own, y, x).to(tl.float64) * y.to(tl.float64)
    tl.store(out + (t * parts + part) * m + slot, tl.sum(total, 1)[:, None], mask=slot < m)


@triton.jit
def _dense_combine(codes, scales, c, out, m, window_rows, begin, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """A program forms a tile of the sum. Its rows are counted from row `begin` of the window's entries."""
    t, row, first = tile(rows, cols, ROWS, COLS)
    col = first + tl.arange(0, COLS)[None, :]
    mask = (row < rows) & (col < cols)
    total = tl.zeros([ROWS, COLS], dtype=out.dtype.element_ty)
    for i in range(m):
        place = (t * m + i) * window_rows + begin + row
        run = place * tl.cdiv(cols, RUN) + col // RUN
        total += tl.load(c + t * m + i) * stored(codes, scales, place * cols + col, run, mask, out, _INT8)
    tl.store(out + (t * rows + row) * cols + col, total, mask=mask)


# Around them --------------------------------------------------------------------------------------------------------------


def encode(x: Tensor, float8: bool, in_place: bool) -> tuple[Tensor, Tensor, Tensor] | None:
    """Give codes of x, their scales, and the decoded numbers; see `hf_efcp.kernels.encode`."""
    if x.dtype not in (torch.float32, torch.float64) or (in_place and not x.is_contiguous()):
        return None
    x, cols, range_ = x.contiguous(), x.shape[-1], torch.finfo(x.dtype)
    codes = torch.empty(x.shape, dtype=torch.uint8 if float8 else torch.int8, device=x.device)
    scales = x.new_empty(*x.shape[:-1], 0 if float8 else cdiv(cols, constants.BLOCK))
    numbers, rows = x if in_place else torch.empty_like(x), x.numel() // cols
    grid, height, width = tiling((1, rows, cols), _NUMBERS, None if float8 else constants.BLOCK)
    with on(x):
        _encode[grid](
            x, codes, scales, numbers, rows, cols, FORMAT=FLOAT8 if float8 else INT8,
            LARGEST=float(constants.LARGEST_INT8), LIMIT=range_.max / constants.LARGEST_INT8 * (1 - 2 * range_.eps),
            TINY=range_.tiny, ROWS=height, COLS=width,
        )  # fmt: skip
    return codes, scales, numbers


def encode_sparse(indices: Tensor, values: Tensor, blocks: Blocks, cols: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Give a sparse entry in 16 bits a number, its scales, and its decoded values; see `hf_efcp.kernels.encode_sparse`."""
    if values.dtype not in (torch.float32, torch.float64):
        return None
    block, kept, kept_tail = blocks
    (n, rows, per_row), across = values.shape, cdiv(cols, block)
    entries = torch.empty(n, rows, per_row, dtype=torch.int16, device=values.device)
    scales = torch.empty(n, rows, across, dtype=torch.uint8, device=values.device)
    numbers, many = torch.empty(values.shape, dtype=values.dtype, device=values.device), n * rows * across
    size = power_of_2(max(kept, kept_tail))
    height = max(1, min(_BLOCKS // size, power_of_2(many)))
    with on(values):
        _encode_sparse[(cdiv(many, height),)](
            indices.contiguous(), values.contiguous(), entries, scales, numbers, many, per_row, kept, kept_tail,
            cols // block, across, ROWS=height, SIZE=size,
        )  # fmt: skip
    return entries, scales, numbers


def dense_dots(codes: Tensor, scales: Tensor, entry: Tensor, j: Tensor) -> Tensor:
    """Give the inner products with a window in int8, (n, m) fp64, formed and summed in fp64; see `hf_efcp.kernels.dense_dots`."""
    n, m, rows, cols = codes.shape
    slots, length = min(_SLOTS, power_of_2(m)), min(_LENGTH, power_of_2(rows * cols))
    programs = n * cdiv(m, slots)
    parts, each = divided(rows * cols, length, programs)
    out = torch.empty(n, parts, m, dtype=torch.float64, device=codes.device)
    with on(codes):
        _dense_dots[(programs * parts,)](
            codes.contiguous(), scales.contiguous(), entry.contiguous(), j, out, m, rows, cols, rows * cols, parts, each,
            SLOTS=slots, BLOCK=length,
        )  # fmt: skip
    return out[:, 0] if parts == 1 else out.sum(1)


def dense_combine(codes: Tensor, scales: Tensor, c: Tensor, rows: slice) -> Tensor:
    """Give rows `rows` of G^T c for a window in int8, in c's dtype; see `hf_efcp.kernels.dense_combine`."""
    n, m, window_rows, cols = codes.shape
    out = c.new_empty(n, rows.stop - rows.start, cols)
    grid, height, width = tiling((n, out.shape[1], cols), _NUMBERS)
    with on(codes):
        _dense_combine[grid](
            codes.contiguous(), scales.contiguous(), c.contiguous(), out, m, window_rows, rows.start, out.shape[1], cols,
            ROWS=height, COLS=width,
        )  # fmt: skip
    return out
