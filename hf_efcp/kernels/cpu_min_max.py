"""Four-bit codes between two bounds on CPUs, by numba: `core.codecs.MinMaxQuantizer.encode` for a row."""

from __future__ import annotations

import numpy as np
from numba import types
from numba.extending import overload

from .constants import BF16_SHIFT, BLOCK, INT4_BITS, INT4_MASK, LARGEST_BOUND, NAN_16, SIGN_16
from .cpu_tools import bounds, compiled

# For numbers without NaN: with these flags, maxima are vectorized.
FINITE = {"nnan", "nsz"}


@compiled
def pack(e, a, zero):
    """Compute e <- the codes a[x] + zero, which are 0 ... 15, two to a byte."""
    for i in range(a.size >> 1):
        e[i] = np.uint8((np.int32(a[2 * i]) + zero) | ((np.int32(a[2 * i + 1]) + zero) << INT4_BITS))
    if a.size % 2:
        e[a.size >> 1] = np.uint8(np.int32(a[a.size - 1]) + zero)


def write_between_bounds(e, scale, a, factor, keys, single, limit):
    """Write e, scale <- a for a row: `cpu_keep.write` for `core.codecs.MinMaxQuantizer`, as a part of which it is compiled."""
    for run in range(len(scale)):
        part, codes = a[run * BLOCK : (run + 1) * BLOCK], e[run * BLOCK // 2 :]
        least, largest = _ends(part)
        if not (np.isfinite(least) and np.isfinite(largest)):
            scale[run, 0], scale[run, 1] = np.int16(NAN_16), np.int16(NAN_16)  # the next step notices NaN
            codes[: (part.size + 1) >> 1] = 0
            continue
        scale[run, 0] = np.int16(_bf16_below(least))
        scale[run, 1] = np.int16(_bf16_below(-largest) ^ np.int32(SIGN_16))
        _encode(codes, part, *bounds(scale, run, a))


def _ends(a):
    """Give the least and the largest number of a. If a number is not finite, one of the two is not finite."""
    raise NotImplementedError  # compiled code only


@overload(_ends)
def _ends_compiled(a):
    """Compare integers in the floats' order, with NaN at an end: minima of integers are vectorized, minima of floats are not."""
    kind, number = (np.int32, np.float32) if a.dtype == types.float32 else (np.int64, np.float64)
    sign, most = kind(8 * kind().itemsize - 1), kind(np.iinfo(kind).max)

    def ends(a):
        bits, lo, hi = a.view(kind), most, kind(-most)
        for x in range(bits.size):
            key = kind(bits[x] ^ ((bits[x] >> sign) & most))
            lo, hi = min(lo, key), max(hi, key)
        return kind(lo ^ ((lo >> sign) & most)).view(number), kind(hi ^ ((hi >> sign) & most)).view(number)

    return ends


@compiled(relaxed=FINITE)
def _encode(e, a, lo, unit):
    """Compute e <- the codes of a, two to a byte: `core.codecs.MinMaxQuantizer.encode`. No number is negative: a cut is floor."""
    zero, top, half = a.dtype.type(0), a.dtype.type(INT4_MASK), a.dtype.type(0.5)
    by = a.dtype.type(1) if unit == 0 else unit
    for i in range(a.size >> 1):
        low = np.int32(min(max((a[2 * i] - lo) / by + half, zero), top))
        high = np.int32(min(max((a[2 * i + 1] - lo) / by + half, zero), top))
        e[i] = np.uint8(low | (high << np.int32(INT4_BITS)))
    if a.size & 1:
        e[a.size >> 1] = np.uint8(np.int32(min(max((a[a.size - 1] - lo) / by + half, zero), top)))


@compiled
def _bf16_below(x):
    """Give the bits, int32, of the largest bf16 number that is not above x, within the bounds: `core.codecs._bf16_below`."""
    within = min(max(np.float64(x), -LARGEST_BOUND), LARGEST_BOUND)
    near = np.float32(within)
    single = np.nextafter(near, np.float32(-np.inf)) if near > within else near
    bits = np.float32(single).view(np.int32)
    cut = bits >> np.int32(BF16_SHIFT)  # towards zero
    below = np.int32(cut + (single < 0 and (cut << np.int32(BF16_SHIFT)) != bits))
    return below
