"""What the compiled CPU functions share: the compiler's settings, matrices by address, and the formats of the error."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from numba import types
from numba.extending import intrinsic, overload
from torch import Tensor

from . import Blocks, Error, Matrices, Scale
from .constants import BF16_SHIFT, BLOCK, HALF_BF16, INT4_BITS, INT4_MASK, INT4_ZERO, LARGEST_INT4, LARGEST_INT8
from .cpu_compiling import ANNOUNCEMENT, KernelCache
from .devices import is_plain

# LLVM may sum in any order, so that loops are vectorized. NaN and infinity stay as they are.
REORDERED = {"reassoc", "contract", "nsz"}
# LLVM may add a product without rounding it first. The order of sums stays.
CONTRACTED = {"contract"}
# The most columns of a factor. With more, a library of matrix products is faster.
SKINNY = 16
# The most columns where products are formed in tiles.
WIDE = 128
# The dtypes that the kernels read and write. numpy does not know bf16: it is handled as its bits.
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def compiled(function: Callable[..., Any] | None = None, *, relaxed: set[str] | None = None) -> Any:
    """Decorate a function: compile it at the first call, keep the code on disk, hold no lock.

    `relaxed` are LLVM's fast-math flags.
    """
    if function is None:
        return functools.partial(compiled, relaxed=relaxed)
    # A division by zero gives infinity or NaN, as in torch. A check at each division would keep loops from being vectorized.
    options = {"nogil": True, "fastmath": relaxed or False, "error_model": "numpy"}
    dispatcher = numba.njit(**options)(function)
    try:
        dispatcher._cache = KernelCache(function)
    except RuntimeError:  # nowhere to keep compiled code: compile in every process
        ANNOUNCEMENT.kept = False
    return dispatcher


def real(x):
    """Give the number x; if x is an integer, the number whose bf16 bits x holds."""
    raise NotImplementedError  # compiled code only


@overload(real)
def _real(x):
    if isinstance(x, types.Integer):
        return lambda x: np.int32(np.int32(x) << np.int32(BF16_SHIFT)).view(np.float32)
    return lambda x: x


def narrowed(x, like):
    """Give the number x as an element of the array `like`: itself, or the bits of the nearest bf16 number."""
    raise NotImplementedError  # compiled code only


@overload(narrowed)
def _narrowed(x, like):
    if isinstance(like.dtype, types.Integer):
        return lambda x, like: bf16_bits(np.float32(x).view(np.int32))
    return lambda x, like: x


@compiled
def bf16_bits(bits):
    """Give the bits of the bf16 number nearest to the fp32 number whose bits are given; ties to even."""
    return np.int16((bits + np.int32(HALF_BF16) + ((bits >> np.int32(BF16_SHIFT)) & np.int32(1))) >> np.int32(BF16_SHIFT))


@intrinsic
def pointer(typing, address, like):
    """Give the address as a pointer to numbers in the dtype of the array `like`."""
    pointer = types.CPointer(like.dtype)

    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(pointer))

    return pointer(address, like), generate


@compiled
def matrix_row(address, row, cols, like):
    """Row `row` of the matrix with `cols` columns at `address`, in the dtype of `like`."""
    return numba.carray(pointer(address + row * cols * like.itemsize, like), (cols,))


def _add_run(a, g, codes, at, scales, run, by):
    raise NotImplementedError  # compiled code only


@overload(_add_run)
def _add_run_compiled(a, g, codes, at, scales, run, by):
    """Compute a <- g + by * e for the numbers from `at` on, which lie in one run; scales are those of `core.codecs`."""
    if codes.dtype not in (types.int8, types.uint8):  # `add_error` adds plain numbers by itself
        return lambda a, g, codes, at, scales, run, by: None
    if codes.dtype == types.int8:
        return _add_bytes
    return _add_between_bounds if scales.ndim == 2 else _add_scaled


def _add_bytes(a, g, codes, at, scales, run, by):
    size = by * scales[run]
    for x in range(a.size):
        a[x] = g[x] + np.float32(codes[at + np.uint64(x)]) * size


def _add_scaled(a, g, codes, at, scales, run, by):
    _add_halves(a, g, codes, at, np.int32(INT4_ZERO), by * scales[run], a.dtype.type(0), a.dtype.type(1))


def _add_between_bounds(a, g, codes, at, scales, run, by):
    lo, unit = bounds(scales, run, a)
    _add_halves(a, g, codes, at, np.int32(0), unit, lo, by)


@compiled
def _add_halves(a, g, codes, at, zero, unit, lo, by):
    """Compute a <- g + by * ((code - zero) * unit + lo), for 4-bit codes: two to a byte, number 2i in the low half of byte i."""
    odd = np.int64(at & np.uint64(1))
    if odd:
        code = (np.int32(codes[at >> np.uint64(1)]) >> np.int32(INT4_BITS)) - zero
        a[0] = g[0] + by * (a.dtype.type(code) * unit + lo)
    to, of, pairs = a[odd:], g[odd:], codes[np.int64(at + np.uint64(1)) >> 1 :]
    many = to.size >> 1
    for i in range(many):  # a loop over bytes is vectorized
        byte = np.int32(pairs[i])
        low, high = (byte & np.int32(INT4_MASK)) - zero, (byte >> np.int32(INT4_BITS)) - zero
        to[2 * i] = of[2 * i] + by * (a.dtype.type(low) * unit + lo)
        to[2 * i + 1] = of[2 * i + 1] + by * (a.dtype.type(high) * unit + lo)
    if to.size & 1:
        code = (np.int32(pairs[many]) & np.int32(INT4_MASK)) - zero
        to[2 * many] = of[2 * many] + by * (a.dtype.type(code) * unit + lo)


@compiled
def bounds(scales, run, like):
    """Give lo and u = (hi - lo) / 15 of a run of `core.codecs.MinMaxQuantizer`, from the bits of its bounds (runs, 2)."""
    lo, hi = like.dtype.type(real(scales[run, 0])), like.dtype.type(real(scales[run, 1]))
    return lo, (hi - lo) / like.dtype.type(INT4_MASK)


@compiled
def add_error(a, g, error, scale, t, row, start, decay=1.0):
    """Compute a <- g + decay * e, for the columns from `start` on of a row of tensor t.

    `error` is e (n, rows, cols), or empty, with `scale` empty; or codes of e, with the scales or bounds of blocks in `scale`.
    """
    by = a.dtype.type(decay)
    if error.size == 0:
        for x in range(a.size):
            a[x] = g[x]
    elif scale.size == 0:
        e = error[t, row, start : start + a.size]
        for x in range(a.size):
            a[x] = g[x] + by * real(e[x])
    else:
        codes, scales, first = error[t, row], scale[t, row], 0
        while first < a.size:
            block = (start + first) // BLOCK
            stop = min((block + 1) * BLOCK - start, a.size)
            _add_run(a[first:stop], g[first:stop], codes, np.uint64(start + first), scales, block, by)
            first = stop


@compiled
def read_row(a, room, g, x, y, error, scale, t, row, start, decay=1.0):
    """Do `add_error` with x[t, row] * g * y[t] in place of g; with g itself where x and y are empty. `room` is as long as a."""
    if y.size == 0:
        add_error(a, g, error, scale, t, row, start, decay)
        return
    by = a.dtype.type(decay)
    factor, factors, scaled = x[t, row], y[t, start : start + a.size], room[: a.size]
    if error.size and not scale.size:
        e = error[t, row, start : start + a.size]
        for k in range(a.size):
            a[k] = (factor * g[k]) * factors[k] + by * real(e[k])
        return
    for k in range(a.size):
        scaled[k] = (factor * g[k]) * factors[k]
    add_error(a, scaled, error, scale, t, row, start, decay)


def array(x: Tensor) -> np.ndarray:
    """Give x for compiled functions, bf16 as its bits in int16. The array shares memory with x where x is contiguous."""
    x = x.contiguous()
    return (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()


def example(dtype: torch.dtype) -> np.ndarray:
    """Give an empty array of the dtype that `array` gives for `dtype`."""
    return array(torch.empty(0, dtype=dtype))


def writes(params: Matrices, dtype: torch.dtype) -> bool:
    """Tell whether parameters can be updated in place by numbers of `dtype`: contiguous, in this dtype, or bf16 for fp32."""
    known = params[0].dtype == dtype or (params[0].dtype, dtype) == (torch.bfloat16, torch.float32)
    return known and all(map(is_plain, params))


class Addresses:
    """The addresses of n matrices of one shape and dtype, for compiled functions.

    Attributes:
        array: the addresses, (n,) int64; valid as long as this object lives.
        shape: (n, rows, cols).
        dtype: of the numbers.
    """

    def __init__(self, matrices: Matrices):
        self._held = [x.resolve_neg().contiguous() for x in matrices]
        self.array = np.array([x.data_ptr() for x in self._held], np.int64)
        rows, cols = self._held[0].shape
        self.shape = (len(self._held), rows, cols)
        self.dtype = self._held[0].dtype


class Errors:
    """The error e for compiled functions.

    Args:
        error: e, (n, rows, cols) in fp32, fp64 or bf16, and None; or codes of e and scales (`BlockQuantizer`) or bounds
            (`MinMaxQuantizer`); or None.
        dtype: of the gradients.

    Attributes:
        arrays: e or its codes, and its scales or bounds; each is empty where there is nothing.
        limit: the largest scale that may be stored.
    """

    def __init__(self, error: Error, dtype: torch.dtype):
        stored, scale = (torch.empty(0, 0, 0, dtype=dtype), None) if error is None else error
        scale = torch.empty(0, 0, 0, dtype=dtype) if scale is None else scale
        self.arrays = array(stored), array(scale)
        range_ = torch.finfo(dtype)
        largest = LARGEST_INT8 if stored.dtype == torch.int8 else LARGEST_INT4
        self.limit = array(torch.empty(0, dtype=dtype)).dtype.type(range_.max / largest * (1 - 2 * range_.eps))


def factors(scale: Scale, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Give x and y for compiled functions; empty where there are none."""
    x, y = (torch.empty(0, 0, dtype=dtype),) * 2 if scale is None else scale
    return array(x), array(y)


def reads(error: Error) -> bool:
    """Tell whether `Errors` knows the format of e, and e is contiguous."""
    known = error is None or error[0].dtype in DTYPES or error[1] is not None
    return known and (error is None or all(x is None or x.is_contiguous() for x in error))


def fits(gradients: Matrices, error: Error, factor: Tensor, wide: bool = False) -> bool:
    """Tell whether kernels can multiply e + g by `factor` (n, r, ...): r is small, and they know the formats of e and g."""
    return reads(error) and factor.shape[1] <= (WIDE if wide else SKINNY) and gradients[0].dtype in (torch.float32, torch.float64)


def kept_places(cols: int, blocks: Blocks) -> tuple[np.ndarray, np.ndarray]:
    """Give for each kept number of a row the column where its block starts, and the block's number; both (k,) int32."""
    block, kept, kept_tail = blocks
    full = np.repeat(np.arange(cols // block, dtype=np.int32), kept)
    number = np.append(full, np.full(kept_tail if cols % block else 0, cols // block, np.int32))
    return number * np.int32(block), number
