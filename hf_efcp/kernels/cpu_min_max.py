"""Four bits between two bounds on CPUs, by numba: `core.codecs.MinMaxQuantizer.encode` for a row."""

from __future__ import annotations

import numpy as np

from .constants import BF16_SHIFT, BLOCK, INT4_BITS, INT4_MASK, LARGEST_BOUND, NAN_16, SIGN_16
from .cpu_tools import REORDERED, bounds, compiled

# There is no NaN: maxima are vectorized.
FINITE = {"nnan", "nsz"}


@compiled
def pack(e, a, zero):
    """e <- the codes a[x] + zero, 0 ... 15, two to a byte."""
    for i in range(a.size >> 1):
        e[i] = np.uint8((np.int32(a[2 * i]) + zero) | ((np.int32(a[2 * i + 1]) + zero) << INT4_BITS))
    if a.size % 2:
        e[a.size >> 1] = np.uint8(np.int32(a[a.size - 1]) + zero)


def write_between_bounds(e, scale, a, factor, keys, single, limit):
    """e, scale <- a for a row: `cpu_keep._write` for `core.codecs.MinMaxQuantizer`. It compiles as a part of that."""
    for run in range(len(scale)):
        part = a[run * BLOCK : (run + 1) * BLOCK]
        least, largest = _ends(part)
        if not (np.isfinite(least) and np.isfinite(largest)):
            scale[run, 0], scale[run, 1] = np.int16(NAN_16), np.int16(NAN_16)  # noticed at the next step
            part[:] = 0
            continue
        scale[run, 0] = np.int16(_bf16_below(least))
        scale[run, 1] = np.int16(_bf16_below(-largest) ^ np.int32(SIGN_16))
        _codes(part, *bounds(scale, run, a))
    pack(e, a, np.int32(0))


@compiled(relaxed=REORDERED)
def _ends(a):
    """The least and the largest of a; NaN where a number is not finite."""
    check = a.dtype.type(0)
    for x in range(a.size):
        check += a[x] * a.dtype.type(0)
    least, largest = _finite_ends(a)
    return least + check, largest + check


@compiled(relaxed=FINITE)
def _finite_ends(a):
    least, largest = a[0], a[0]
    for x in range(a.size):
        least, largest = min(least, a[x]), max(largest, a[x])
    return least, largest


@compiled(relaxed=FINITE)
def _codes(a, lo, unit):
    """a <- its codes: `core.codecs.MinMaxQuantizer.encode`."""
    zero, top, half = a.dtype.type(0), a.dtype.type(INT4_MASK), a.dtype.type(0.5)
    by = a.dtype.type(1) if unit == 0 else unit
    for x in range(a.size):
        a[x] = min(max(np.floor((a[x] - lo) / by + half), zero), top)


@compiled
def _bf16_below(x):
    """The bits, int32, of the largest bf16 number that is not above x: `core.codecs._bf16_below`."""
    within = min(max(np.float64(x), -LARGEST_BOUND), LARGEST_BOUND)
    near = np.float32(within)
    single = np.nextafter(near, np.float32(-np.inf)) if near > within else near
    bits = np.float32(single).view(np.int32)
    cut = bits >> np.int32(BF16_SHIFT)  # towards zero
    below = np.int32(cut + (single < 0 and (cut << np.int32(BF16_SHIFT)) != bits))
    return below
