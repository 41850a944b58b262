"""Low-bit storage: linear block quantization, around zero or between two bounds; 8-bit floats; sparse entries in 16 bits.

Tensors are (..., cols). Numbers that share a scale lie in one run of the last dimension, so that a matrix that is divided by rows
has the same codes as on one process. NaN and infinity come back as NaN, and are noticed before anything is written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.constants import (
    BF16_SHIFT,
    BLOCK,
    EXPONENT_BIAS,
    EXPONENT_SHIFT,
    FLOAT8_SCALE,
    INDEX_BITS,
    INT4_BITS,
    INT4_MASK,
    INT4_ZERO,
    LARGEST_BOUND,
    LARGEST_INT4,
    LARGEST_INT8,
    LARGEST_VALUE,
    LOWER_16_BITS,
    NOT_FINITE,
    VALUE_BITS,
    VALUE_MASK,
    VALUE_ZERO,
)


class BlockQuantizer:
    """Linear symmetric quantization (absmax int8 and int4): x = code * scale, with scale = max |x| of the block / q.

    q is 127 or 7, so that zero has a code of its own. A block is a run of `BLOCK` numbers in the last dimension; the last block
    may be shorter. Numbers whose scale would be subnormal become zero.

    Args:
        bits: 8, an int8 for each number; or 4, two codes in a uint8. Byte i has number 2i in its low half and number 2i + 1 in
            its high half, each as code + 8. An odd length leaves the last high half empty.

    Attributes:
        stochastic: True: a state that numbers are added to needs `encode` with noise.
    """

    stochastic = True

    def __init__(self, bits: int):
        self.bits = bits
        self.largest = LARGEST_INT8 if bits == 8 else LARGEST_INT4

    def shapes(self, *shape: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Give the shapes of codes and scales for numbers of `shape`."""
        *lead, cols = shape
        return (*lead, -(-cols * self.bits // 8)), (*lead, -(-cols // BLOCK))

    def zeros(self, *shape: int, scale_dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """Give codes and scales of zeros of `shape`."""
        code_shape, scale_shape = self.shapes(*shape)
        # A scale of zero makes a block zero, whatever its codes.
        codes = torch.zeros(code_shape, dtype=torch.int8 if self.bits == 8 else torch.uint8, device=device)
        return codes, torch.zeros(scale_shape, dtype=scale_dtype, device=device)

    def encode(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Give codes, int8 or packed in uint8, and scales (..., blocks) of x (..., cols).

        Args:
            x: fp32 or fp64; the scales are in its dtype.
            noise: like x, uniform in (0, 1). Rounding is then stochastic: right in the mean, and off by less than one scale.
                None: rounding is to nearest, off by at most half a scale.
        """
        cols = x.shape[-1]
        blocks, range_ = _blocks(x), torch.finfo(x.dtype)
        largest = blocks.abs().amax(-1)
        scale = (largest / self.largest).clamp_max(range_.max / self.largest * (1 - 2 * range_.eps))  # decoding cannot overflow
        scale = torch.where(scale < range_.tiny, 0.0, scale)
        codes = blocks / torch.where(scale == 0, 1.0, scale)[..., None]
        codes = codes.flatten(-2)[..., :cols]
        codes = codes.round() if noise is None else codes.add_(noise).floor_()
        codes = codes.nan_to_num(nan=0.0).clamp_(-self.largest, self.largest)
        scale = torch.where(largest.isfinite(), scale, torch.nan)
        return codes.to(torch.int8) if self.bits == 8 else _pack(codes.to(torch.int8)), scale

    def decode(self, codes: Tensor, scale: Tensor, cols: int) -> Tensor:
        """Give x (..., cols) in the dtype of the scales."""
        codes = codes if self.bits == 8 else _unpack(codes, cols)
        blocks = _blocks(codes.to(scale.dtype))
        return blocks.mul_(scale[..., None]).flatten(-2)[..., :cols]


class MinMaxQuantizer:
    """Four-bit codes between the least and the largest number of a run: x = lo + code * u, u = (hi - lo) / 15 (MicroAdam).

    Runs are the blocks of `BlockQuantizer`, and codes are packed as its 4-bit codes. lo is rounded down to bf16, and hi up, so
    that each number lies between them and is off by at most u / 2. Zero has no code of its own. A run of equal numbers has code
    0, and is exact if bf16 has the number. Bounds stay within 2^126 in magnitude.

    Args:
        dtype: of the numbers, fp32 or fp64.

    Attributes:
        stochastic: False: rounding is to nearest, as in the paper.
    """

    stochastic = False

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def shapes(self, *shape: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Give the shapes of codes, uint8, and bounds (..., runs, 2), bf16, for numbers of `shape`."""
        codes, runs = BlockQuantizer(4).shapes(*shape)
        return codes, (*runs, 2)

    def encode(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Give codes and bounds, lo and hi, of x (..., cols); code = floor((x - lo) / u + 1/2). `noise` is not used."""
        cols = x.shape[-1]
        lo, hi = _blocks(x, torch.inf).amin(-1), _blocks(x, -torch.inf).amax(-1)
        finite = (lo.isfinite() & hi.isfinite())[..., None]
        bounds = torch.stack([_bf16_below(lo), -_bf16_below(-hi)], -1)
        first, unit = self._scales(bounds)
        codes = (_blocks(x) - first) / torch.where(unit == 0, 1.0, unit)
        codes = codes.flatten(-2)[..., :cols].add_(0.5).floor_().nan_to_num_(nan=0.0).clamp_(0, INT4_MASK)
        return _pack_codes(codes), torch.where(finite, bounds, torch.nan)

    def decode(self, codes: Tensor, bounds: Tensor, cols: int) -> Tensor:
        """Give x (..., cols) in `dtype`."""
        first, unit = self._scales(bounds)
        return _blocks(unpack_codes(codes, cols).to(self.dtype)).mul_(unit).add_(first).flatten(-2)[..., :cols]

    def _scales(self, bounds: Tensor) -> tuple[Tensor, Tensor]:
        """Give lo and u, (..., runs, 1)."""
        lo, hi = bounds.to(self.dtype).split(1, -1)
        return lo, (hi - lo) / INT4_MASK


def _bf16_below(x: Tensor) -> Tensor:
    """Give the largest bf16 number that is not above x, within `LARGEST_BOUND` in magnitude."""
    x = x.clamp(-LARGEST_BOUND, LARGEST_BOUND)
    single = x.float()
    single = torch.where(single > x, torch.nextafter(single, torch.full_like(single, -torch.inf)), single)
    bits = single.view(torch.int32)
    cut = bits & (-1 << BF16_SHIFT)  # towards zero
    cut = torch.where((single < 0) & (cut != bits), cut + (1 << BF16_SHIFT), cut)
    return cut.view(torch.float32).to(torch.bfloat16)


def _blocks(x: Tensor, filling: float = 0.0) -> Tensor:
    """Give x (..., cols) as (..., blocks, BLOCK), or as one shorter block, perhaps in x's memory. The last block is filled up."""
    cols = x.shape[-1]
    size = max(1, min(BLOCK, cols))
    if cols % size:
        x = torch.nn.functional.pad(x, (0, -cols % size), value=filling)
    return x.unflatten(-1, (-1 if cols else 0, size))


def _pack(codes: Tensor) -> Tensor:
    return _pack_codes(codes + INT4_ZERO)


def _pack_codes(codes: Tensor) -> Tensor:
    """Give codes 0 ... 15, two to a byte."""
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    codes = codes.to(torch.uint8)
    return codes[..., 0::2] | (codes[..., 1::2] << INT4_BITS)


def _unpack(codes: Tensor, cols: int) -> Tensor:
    return unpack_codes(codes, cols).to(torch.int8) - INT4_ZERO


def unpack_codes(codes: Tensor, cols: int) -> Tensor:
    """Give codes 0 ... 15 (..., cols), from codes that are packed two to a byte."""
    return torch.stack([codes & INT4_MASK, codes >> INT4_BITS], dim=-1).flatten(-2)[..., :cols]


def encode_float8(x: Tensor) -> Tensor:
    """Give x with |x| <= 1 as E4M3 (4 bits of exponent, 3 of mantissa), without a scale, in uint8.

    Down to 6e-5 a number is off by at most 1/16 of itself; below, by at most 4e-6. The format is for orthonormal columns: it
    needs no maximum over a column, whose other rows may be on other processes.
    """
    return (x * FLOAT8_SCALE).to(torch.float8_e4m3fn).view(torch.uint8)


def decode_float8(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Give the numbers that `encode_float8` stored, exactly, in `dtype`."""
    return codes.view(torch.float8_e4m3fn).to(dtype).mul_(1 / FLOAT8_SCALE)


class SparseCodec:
    """The kept numbers of a block top-k entry in 16 bits each: 10 bits of index, 6 of value. Each block has a scale of 8 bits.

    A number is stored as index << 6 | code + 32, with code = round(value / 2^e) in -31 ... 31. e is the least number with
    max |value| <= 31 * 2^e. The scale is e + 127 (E8M0 of the OCP microscaling formats: the exponent of an fp32 number). Scale 0
    means that all numbers are zero, and scale 255 that a number is not finite.

    Args:
        block: length of a block, at most 1024.
        full, kept, kept_tail: the number of whole blocks in a row, the numbers kept in each, and in a shorter last block.

    Raises:
        ValueError: block is larger than 1024.
    """

    def __init__(self, block: int, full: int, kept: int, kept_tail: int):
        if block > 2**INDEX_BITS:
            raise ValueError(f"block must be at most {2**INDEX_BITS} ({INDEX_BITS} bits of index), got {block}")
        self.full, self.kept, self.kept_tail = full, kept, kept_tail
        self.blocks = full + (kept_tail > 0)

    def encode(self, indices: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Give stored numbers (..., k) int16 and scales (..., blocks) uint8, for BlockTopK's indices and values (..., k)."""
        size, head = values.abs(), self.full * self.kept
        largest = size[..., :head].unflatten(-1, (self.full, self.kept)).amax(-1)
        if self.kept_tail:
            largest = torch.cat([largest, size[..., head:].amax(-1, keepdim=True)], -1)
        mantissa, exponent = torch.frexp(largest / LARGEST_VALUE)
        exponent = (exponent - (mantissa == 0.5).int()).clamp(1 - EXPONENT_BIAS, EXPONENT_BIAS)
        scales = torch.where(largest == 0, 0, exponent + EXPONENT_BIAS)
        scales = torch.where(largest.isfinite(), scales, NOT_FINITE).to(torch.uint8)
        codes = (values / self._powers(scales, values.dtype)).round_().nan_to_num_(nan=0.0)
        codes = codes.clamp_(-LARGEST_VALUE, LARGEST_VALUE).int()
        return ((indices.int() << VALUE_BITS) | (codes + VALUE_ZERO)).to(torch.int16), scales

    def decode(self, numbers: Tensor, scales: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Give indices int64 and values in `dtype`, both (..., k). Decoding does not round."""
        indices = (numbers.long() & LOWER_16_BITS) >> VALUE_BITS
        return indices, ((numbers & VALUE_MASK) - VALUE_ZERO).to(dtype).mul_(self._powers(scales, dtype))

    def _powers(self, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """Give 2^e of every kept number's block, (..., k)."""
        powers = (scales.int() << EXPONENT_SHIFT).view(torch.float32).to(dtype)
        head = powers[..., : self.full].repeat_interleave(self.kept, -1)
        if not self.kept_tail:
            return head
        return torch.cat([head, powers[..., self.full :].expand(*head.shape[:-1], self.kept_tail)], -1)
