"""What the compiled CPU functions share: matrices by address, the error's formats, rounding by hashes, and threads.

Work is cut by rows of the tensors and given to as many threads as torch uses: the compiled functions hold no lock. Every row is
one thread's, and sums over rows are cut by the shape alone: the result does not depend on the number of threads.

numba keeps compiled code by the file that a function is in. Who edits what others compile in, as all that is here, has to delete
`__pycache__`.
"""

from __future__ import annotations

import collections
import ctypes
import functools
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import torch
from numba import types
from numba.extending import intrinsic, overload
from torch import Tensor

from . import Error

# Less than this many entries are not worth a turn of another thread.
_SMALL = 2**16
# Turns of each thread: what else a core has to do delays one of them, not half of the work.
_TURNS = 4
# Into how many parts a sum over rows is cut, whatever the number of threads.
PARTS = 16
# Sums may be taken in any order, so that loops are vectorized; NaN and infinity stay what they are.
REORDERED = {"reassoc", "contract", "nsz"}
# There is no NaN: maxima are vectorized.
FINITE = {"nnan", "nsz"}
# Numbers that share a scale: `core.codecs.BLOCK`.
BLOCK = 256
# dtypes that the kernels read and write; bf16, which numpy does not know, as its bits.
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def compiled(function=None, *, relaxed: set[str] | None = None):
    """Decorator: compile at the first call, keep the code on disk, hold no lock. `relaxed`: LLVM's fast-math flags."""
    if function is None:
        return functools.partial(compiled, relaxed=relaxed)
    options = {"nogil": True, "fastmath": relaxed or False}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # nowhere to keep compiled code: compile in every process
        return numba.njit(**options)(function)


def real(x):
    """The number x, or the one whose bf16 bits x are."""
    raise NotImplementedError  # compiled code only


@overload(real)
def _real(x):
    if isinstance(x, types.Integer):
        return lambda x: np.int32(np.int32(x) << np.int32(16)).view(np.float32)
    return lambda x: x


@intrinsic
def _pointer(typing, address, like):
    """`address` as a pointer to numbers of the dtype of the array `like`."""
    pointer = types.CPointer(like.dtype)

    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(pointer))

    return pointer(address, like), generate


@compiled
def matrix_row(address, row, cols, like):
    """Row `row` of the matrix with `cols` columns at `address`, in the dtype of `like`."""
    return numba.carray(_pointer(address + row * cols * like.itemsize, like), (cols,))


def _code(codes, x):
    raise NotImplementedError  # compiled code only


@overload(_code)
def _code_compiled(codes, x):
    """Code x of a row of `core.codecs.BlockQuantizer`, in 8 or 4 bits."""
    if codes.dtype == types.uint8:
        one = np.uint64(1)
        return lambda codes, x: np.float32(np.int32((codes[x >> one] >> np.uint8(np.uint8(4) * np.uint8(x & one))) & 15) - 8)
    return lambda codes, x: np.float32(codes[x])


@compiled
def add_error(a, g, error, scale, t, row, start):
    """a <- g + e, for the columns from `start` on of a row.

    `error` is (n, rows, cols), or empty; or codes, with the scales of their blocks in `scale`, which is empty else.
    """
    if error.size == 0:
        for x in range(a.size):
            a[x] = g[x]
    elif scale.size == 0:
        e = error[t, row, start : start + a.size]
        for x in range(a.size):
            a[x] = g[x] + real(e[x])
    else:
        codes, scales, first = error[t, row], scale[t, row], 0
        while first < a.size:
            block = (start + first) // BLOCK
            stop, size = min((block + 1) * BLOCK - start, a.size), scales[block]
            part, g_part, at = a[first:stop], g[first:stop], np.uint64(start + first)
            for x in range(part.size):
                part[x] = g_part[x] + _code(codes, at + np.uint64(x)) * size
            first = stop


@compiled
def _mix(x):
    """`core.linalg._mix`."""
    x = ((x ^ (x >> 16)) * 0x045D9F3B) & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x045D9F3B) & 0xFFFFFFFF
    return x ^ (x >> 16)


@compiled
def column_keys(step, salt, first, keys):
    """The columns' factors of `core.linalg.counted_bits`, into `keys`; returns what `row_key` takes."""
    key = _mix(_mix(step & 0x7FFFFFFF) ^ _mix(salt + 0x9E3779B9))
    mixed = _mix(key)
    for x in range(keys.size):
        keys[x] = np.int32(_mix(mixed ^ (first + x)) | 1)
    return key


@compiled
def row_key(key, row):
    """A row's factor."""
    return np.int32(_mix(key ^ row) | 1)


def write_error(e, scale, a, factor, keys, single, limit):
    """e <- a for a row, as `core.error_feedback` does it: plain, or rounded by the hashes factor * keys.

    Args:
        e: fp32 or fp64; the bits of bf16; or int8 or packed 4-bit codes.
        scale: where e is codes, those of its blocks.
        a: the row, which may be overwritten.
        factor, keys: what the numbers of `counted_bits` are the products of.
        single: room for a row of fp32.
        limit: the largest scale that may be stored.
    """
    raise NotImplementedError  # compiled code only


@compiled
def _noise(factor, key):
    return (np.int32(factor * key) >> np.int32(16)) & np.int32(0xFFFF)


@overload(write_error)
def _write_error(e, scale, a, factor, keys, single, limit):
    if isinstance(e.dtype, types.Float):
        return _write_plain
    if e.dtype == types.int16:
        return _write_bf16
    return _write_bytes if e.dtype == types.int8 else _write_halves


def _write_plain(e, scale, a, factor, keys, single, limit):
    for x in range(a.size):
        e[x] = a[x]


def _write_bf16(e, scale, a, factor, keys, single, limit):
    bits = single.view(np.int32)
    for x in range(a.size):
        single[x] = a[x]
    for x in range(a.size):
        e[x] = np.int16(np.int32(bits[x] + _noise(factor, keys[x])) >> np.int32(16))


def _write_bytes(e, scale, a, factor, keys, single, limit):
    _encode(scale, a, factor, keys, 127, limit)
    for x in range(a.size):
        e[x] = np.int8(a[x])


def _write_halves(e, scale, a, factor, keys, single, limit):
    _encode(scale, a, factor, keys, 7, limit)
    for x in range(0, a.size - 1, 2):
        e[x >> 1] = np.uint8((np.int32(a[x]) + 8) | ((np.int32(a[x + 1]) + 8) << 4))
    if a.size % 2:
        e[a.size >> 1] = np.uint8(np.int32(a[a.size - 1]) + 8)


@compiled
def _encode(scale, a, factor, keys, largest_code, limit):
    """a <- its codes, rounded stochastically: `core.codecs.BlockQuantizer.encode`."""
    top, finite = np.finfo(a.dtype).max, True
    for x in range(a.size):
        finite &= abs(a[x]) <= top
    if finite:
        _quantize(scale, a, factor, keys, largest_code, limit)
        return
    for block in range(scale.size):  # noticed at the next step
        scale[block] = np.nan
    for x in range(a.size):
        a[x] = 0


@compiled(relaxed=FINITE)
def _quantize(scale, a, factor, keys, largest_code, limit):
    """`_encode` for finite numbers."""
    tiny, half, unit = np.finfo(a.dtype).tiny, np.float32(0.5), np.float32(2.0**-16)
    top = a.dtype.type(largest_code)
    for block in range(scale.size):
        part, key = a[block * BLOCK : (block + 1) * BLOCK], keys[block * BLOCK : (block + 1) * BLOCK]
        largest = a.dtype.type(0)
        for x in range(part.size):
            largest = max(largest, abs(part[x]))
        size = min(largest / top, limit)
        size = a.dtype.type(0) if size < tiny else size
        scale[block], by = size, (a.dtype.type(1) if size == 0 else size)
        for x in range(part.size):
            noise = (np.float32(_noise(factor, key[x])) + half) * unit
            part[x] = min(max(np.floor(part[x] / by + noise), -top), top)


def array(x: Tensor) -> np.ndarray:
    """x for compiled functions; shares memory where x is contiguous."""
    x = x.contiguous()
    return (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()


class Matrices:
    """n matrices of one shape and dtype for compiled functions, where they are.

    Attributes:
        addresses: (n,) int64; valid as long as this object lives.
        shape: (n, rows, cols).
        dtype: of the numbers.
    """

    def __init__(self, matrices: Sequence[Tensor]):
        self._held = [x.resolve_neg().contiguous() for x in matrices]
        self.addresses = np.array([x.data_ptr() for x in self._held], np.int64)
        self.shape = (len(self._held), *self._held[0].shape)
        self.dtype = self._held[0].dtype


class Errors:
    """The error e for compiled functions.

    Args:
        error: e, (n, rows, cols) in fp32, fp64 or bf16, and None; or its codes and scales (`BlockQuantizer`); or None.
        dtype: of the gradients.

    Attributes:
        arrays: e or its codes, and its scales; empty where there are none.
        limit: the largest scale that may be stored.
    """

    def __init__(self, error: Error, dtype: torch.dtype):
        stored, scale = (torch.empty(0, 0, 0, dtype=dtype), None) if error is None else error
        scale = torch.empty(0, 0, 0, dtype=dtype) if scale is None else scale
        self.arrays = array(stored), array(scale)
        range_ = torch.finfo(dtype)
        largest = 127 if stored.dtype == torch.int8 else 7
        self.limit = self.arrays[1].dtype.type(range_.max / largest * (1 - 2 * range_.eps))


def reads(error: Error) -> bool:
    """Whether `Errors` knows the format."""
    known = error is None or error[0].dtype in DTYPES or error[1] is not None
    return known and (error is None or all(x is None or x.is_contiguous() for x in error))


def marked(some: Sequence[int], n: int) -> np.ndarray:
    """(n,) bool: whether a number is among `some`."""
    flags = np.zeros(n, bool)
    flags[list(some)] = True
    return flags


def share(function, total: int, work: int, *args) -> None:
    """function(lo, hi, *args) over range(total), each item of `work` entries, by as many threads as torch uses."""
    turns = max(1, min(total, total * work // _SMALL))
    threads = min(torch.get_num_threads(), turns)
    turns = min(turns, _TURNS * threads) if threads > 1 else 1
    todo = collections.deque(itertools.pairwise([total * i // turns for i in range(turns + 1)]))

    def work_off() -> None:
        while True:
            try:
                lo, hi = todo.popleft()  # gives a turn to one thread
            except IndexError:
                return
            function(lo, hi, *args)

    if threads == 1:
        work_off()
    elif _gomp_parallel is not None and os.getpid() == _HOME:
        _in_team(work_off)
    else:
        others = [_pool(os.getpid()).submit(work_off) for _ in range(threads - 1)]
        try:
            work_off()
        finally:
            for other in others:
                other.result()


# torch's own threads, where it has GNU's OpenMP: after each of torch's loops they look for work, at full speed, for some
# milliseconds, and threads of our own would share their cores with them. They do not survive a fork. (numba's pools would abort
# where two threads step at once, or in a process forked after a step, and choosing one is a global setting.)
_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_gomp_parallel = getattr(ctypes.CDLL(None), "GOMP_parallel", None) if sys.platform == "linux" else None
_HOME = os.getpid()


def _in_team(work: Callable[[], None]) -> None:
    """work() in every thread of the team that torch's loops have when called from this thread."""
    raised = []

    def guarded(_) -> None:
        try:
            work()
        except BaseException as error:  # would be printed and forgotten
            raised.append(error)

    _gomp_parallel(_CALLBACK(guarded), None, ctypes.c_uint(torch.get_num_threads()), ctypes.c_uint(0))
    if raised:
        raise raised[0]


@functools.cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Of this process: threads do not survive a fork. A thread is started when none is idle."""
    return ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="hf_efcp")
