"""What the Triton kernels share: matrices by address, the formats of the error, counted random numbers.

A kernel's grid has one dimension, since the other dimensions end at 65,535. TRITON_INTERPRET=1 runs the kernels on CPU tensors.
Tests use that where there is no GPU.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Container, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import Error, Held, Matrices, Scale, constants
from .tables import TABLES

_MULTIPLIER = tl.constexpr(constants.HASH_MULTIPLIER)
_COUNTER = tl.constexpr(constants.COUNTER_MASK)
_MASK = tl.constexpr(constants.HASH_MASK)
_SALT = tl.constexpr(constants.SALT_OFFSET)
_UNIFORM = tl.constexpr(constants.UNIFORM_UNIT)
# How many numbers share a scale, and what is added to a code of 4 bits.
RUN = tl.constexpr(constants.BLOCK)
INT4_ZERO = tl.constexpr(constants.INT4_ZERO)

# The kernels' names for formats: no numbers; plain numbers; 8-bit and 4-bit codes, with scales; E4M3 codes, without scales.
NONE, PLAIN, INT8, INT4, FLOAT8 = 0, 1, 8, 4, 3
_INT8, _INT4, _FLOAT8 = tl.constexpr(INT8), tl.constexpr(INT4), tl.constexpr(FLOAT8)
# A number in E4M3 is an integer below 2^18 times E4M3's least number 2^-9. Here 2^-9 is divided by the codec's scale.
_FLOAT8_UNIT = tl.constexpr(2.0**-9 / constants.FLOAT8_SCALE)
# How many tables of addresses are kept. A step needs about three for each stack, mostly the same as the step before.
_TABLES = 4096
# The number of programs that keeps a large GPU busy, and the fewest blocks of a sum that are worth a program.
_PROGRAMS, _FEWEST_BLOCKS = 512, 2


# In kernels ---------------------------------------------------------------------------------------------------------------


@triton.jit
def matrix(table, t, like):
    """Give the address of matrix t, as a pointer of the type of `like`; 0 for a matrix that the kernel leaves out."""
    return tl.load(table + t).to(like.dtype)


@triton.jit
def mix(x):
    """Compute `core.random._mix` of int64 numbers, which are below 2^63."""
    x = ((x ^ (x >> 16)) * _MULTIPLIER) & _MASK
    x = ((x ^ (x >> 16)) * _MULTIPLIER) & _MASK
    return x ^ (x >> 16)


@triton.jit
def tensor_key(step, salt):
    """Give the key of a tensor's counted numbers, for `row_factors` and `col_factors`. `step` and `salt` are addresses."""
    return mix(mix(tl.load(step) & _COUNTER) ^ mix(tl.load(salt) + _SALT))


@triton.jit
def row_factors(key, row):
    """Give the rows' factors of `core.random.counted_bits`, int32."""
    return (mix(key ^ row) | 1).to(tl.int32, bitcast=False)


@triton.jit
def col_factors(key, col):
    """Give the columns' factors of `core.random.counted_bits`, int32."""
    return (mix(mix(key) ^ col) | 1).to(tl.int32, bitcast=False)


@triton.jit
def noise_16(rows, cols):
    """Give the upper 16 bits of products of factors: uniform numbers 0 ... 65535, int32."""
    return ((rows * cols) >> 16) & 0xFFFF


@triton.jit
def noise(rows, cols):
    """Give uniform numbers in (0, 1), fp32, from products of factors."""
    return (noise_16(rows, cols).to(tl.float32) + 0.5) * _UNIFORM


@triton.jit
def to_bf16(x, rows, cols):
    """Give x in bf16, rounded stochastically as `core.random.stochastic_round` does."""
    bits = x.to(tl.float32).to(tl.int32, bitcast=True) + noise_16(rows, cols)
    return (bits & -65536).to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit
def from_float8(code, like):
    """Decode codes of `core.codecs.encode_float8`, int32, by integer arithmetic: Triton's 8-bit floats need a newer GPU."""
    exponent, mantissa = (code >> 3) & 15, code & 7
    size = tl.where(exponent == 0, mantissa, (mantissa | 8) << tl.maximum(exponent - 1, 0))
    x = size.to(like.dtype.element_ty) * _FLOAT8_UNIT
    x = tl.where((code & 127) == 127, float("nan"), x)
    return tl.where(code > 127, -x, x)


@triton.jit
def stored(numbers, scales, place, run, mask, like, FORMAT: tl.constexpr):
    """Give numbers at `place` of a buffer, in the type that `like` points to. Any format but INT4; the scales are at `run`."""
    code = tl.load(numbers + place, mask=mask, other=0)
    if FORMAT == _INT8:
        x = code.to(like.dtype.element_ty) * tl.load(scales + run, mask=mask, other=0.0)
    elif FORMAT == _FLOAT8:
        x = from_float8(code.to(tl.int32), like)
    else:
        x = code.to(like.dtype.element_ty)
    return x


@triton.jit
def error_tile(error, scales, t, row, col, mask, rows, cols, like, FORMAT: tl.constexpr):
    """Give numbers of e at (row, col) of tensor t, in the type that `like` points to.

    Args:
        error, scales: e of n matrices (rows, cols) in the format FORMAT. `scales` are read for codes only.
        row, col: int64 and int32 tensors of a tile.
        mask: which places of the tile are inside the matrix.
    """
    where = t * rows + row
    run = where * tl.cdiv(cols, RUN) + col // RUN
    if FORMAT == _INT4:
        pair = tl.load(error + where * tl.cdiv(cols, 2) + col // 2, mask=mask, other=0).to(tl.int32)
        code = (((pair >> (4 * (col % 2))) & 15) - INT4_ZERO).to(like.dtype.element_ty)
        e = code * tl.load(scales + run, mask=mask, other=0.0)
    else:
        e = stored(error, scales, where * cols + col, run, mask, like, FORMAT)
    return e


@triton.jit
def accumulated_at(
    gradient, error, scales, left, right, t, row, col, mask, rows, cols, DECAY: tl.constexpr, FORMAT: tl.constexpr,
    SCALED: tl.constexpr,
):  # fmt: skip
    """Give `accumulated_tile`, for a loop that has already found the address of g, which is the matrix of tensor t."""
    a = tl.load(gradient + row * cols + col, mask=mask, other=0.0)
    if SCALED:
        x = tl.load(left + t * rows + row, mask=row < rows, other=0.0)
        a = (a * x) * tl.load(right + t * cols + col, mask=col < cols, other=0.0)
    if FORMAT != 0:
        a += error_tile(error, scales, t, row, col, mask, rows, cols, gradient, FORMAT) * DECAY
    return a


@triton.jit
def accumulated_tile(
    table, like, error, scales, left, right, t, row, col, mask, rows, cols,
    DECAY: tl.constexpr, FORMAT: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Give numbers of a = DECAY * e + diag(x) g diag(y) at (row, col) of tensor t.

    Args:
        table, like: of g, see `matrix`.
        error, scales, row, col, mask: see `error_tile`.
        left, right: x (n, rows) and y (n, cols), where SCALED; otherwise a = DECAY * e + g.
    """
    gradient = matrix(table, t, like)
    return accumulated_at(gradient, error, scales, left, right, t, row, col, mask, rows, cols, DECAY, FORMAT, SCALED)


@triton.jit
def tile(rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Give this program's tile: the tensor, the rows (ROWS, 1), and the first of COLS columns. See `tiling`."""
    across = tl.cdiv(cols, COLS)
    each = across * tl.cdiv(rows, ROWS)
    program = tl.program_id(0)
    row = program % each // across * ROWS + tl.arange(0, ROWS)
    return (program // each).to(tl.int64), row.to(tl.int64)[:, None], program % across * COLS


# Around them --------------------------------------------------------------------------------------------------------------


# Triton's own functions of these names take the host several microseconds a call.
def cdiv(x: int, y: int) -> int:
    """Give x / y, rounded up."""
    return -(-x // y)


def power_of_2(x: int) -> int:
    """Give the least power of 2 that is not below x."""
    return 1 << (x - 1).bit_length()


class Addresses:
    """The addresses of n matrices of one shape and dtype, for kernels.

    Args:
        matrices: the matrices. One that is not contiguous is copied.
        but: positions of the matrices that a kernel shall leave out. Their address is 0.

    Attributes:
        table: the addresses, (n,) int64 on the device; valid as long as this object lives.
        like: one of the matrices; in a CUDA graph, where matrices may move, another tensor of their dtype.
        shape: (n, rows, cols).
    """

    def __init__(self, matrices: Matrices, but: Container[int] = ()):
        self._held, addresses = _places(matrices)
        self.like, table = self._held[0], None
        self.shape = (len(matrices), *matrices[0].shape)
        left = tuple(0 if i in but else address for i, address in enumerate(addresses)) if but else addresses
        if (tables := TABLES.get()) is not None:
            self.like, table = tables.like(self.like), tables.table(left)
        self.table = _on_device(self.like.device, left) if table is None else table


def _places(matrices: Matrices) -> tuple[Sequence[Tensor], tuple[int, ...]]:
    """Give contiguous tensors, which have to live as long as their addresses are used, and the matrices' addresses."""
    if isinstance(matrices, Tensor):  # the matrices lie one behind another
        whole = matrices.resolve_neg().contiguous()
        first, step = whole.data_ptr(), whole[0].numel() * whole.element_size()
        return [whole], tuple(first + i * step for i in range(len(whole)))
    if isinstance(matrices, Held) and matrices.places is not None:
        return matrices.places
    held = [x.resolve_neg().contiguous() for x in matrices]
    places = held, tuple(x.data_ptr() for x in held)
    if isinstance(matrices, Held):
        matrices.places = places
    return places


@functools.lru_cache(maxsize=_TABLES)
def _on_device(device: torch.device, addresses: tuple[int, ...]) -> Tensor:
    # "cpu" is explicit, since the user's default device may be another.
    if device.type != "cuda":
        return torch.tensor(addresses, dtype=torch.int64, device="cpu")
    # The copy comes from pinned memory, since any other copy would wait for the device.
    return torch.tensor(addresses, dtype=torch.int64, device="cpu", pin_memory=True).to(device, non_blocking=True)


def divided(length: int, block: int, programs: int) -> tuple[int, int]:
    """Tell how to cut a sum, so that a GPU is busy: the number of parts, and the length of a part, a multiple of `block`.

    The more `programs` there are already, the fewer parts. The device has no influence: all devices give the same bits.
    """
    blocks = cdiv(length, block)
    wanted = max(1, min(cdiv(blocks, _FEWEST_BLOCKS), _PROGRAMS // programs))
    each = cdiv(blocks, wanted)
    return cdiv(blocks, each), each * block


class Errors:
    """The error e for kernels.

    Args:
        error: e, (n, rows, cols) in fp32, fp64 or bf16, and None; or codes of e and scales (`BlockQuantizer`); or None.
        like: a tensor that takes the place of a missing one.

    Attributes:
        arrays: e or its codes, and its scales.
        format: NONE, PLAIN, INT8 or INT4.
        limit: the largest scale that may be stored.
    """

    def __init__(self, error: Error, like: Tensor):
        stored, scale = (None, None) if error is None else error
        self.format = NONE if stored is None else PLAIN if scale is None else INT8 if stored.dtype == torch.int8 else INT4
        self.arrays = like if stored is None else stored, like if scale is None else scale
        range_ = torch.finfo(like.dtype)
        self.limit = (
            range_.max / (constants.LARGEST_INT4 if self.format == INT4 else constants.LARGEST_INT8) * (1 - 2 * range_.eps)
        )


def factors(scale: Scale, like: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Give x, y, and whether there are any."""
    return (like, like, False) if scale is None else (scale[0].contiguous(), scale[1].contiguous(), True)


def reads(error: Error) -> bool:
    """Tell whether kernels know the format of e (not that of `MinMaxQuantizer`), and e is contiguous."""
    return error is None or all(x is None or (x.ndim < 4 and x.is_contiguous()) for x in error)


def tiling(shape: tuple[int, int, int], numbers: int, widest: int | None = None) -> tuple[tuple[int], int, int]:
    """Divide n matrices (rows, cols) into tiles of at most `numbers` numbers.

    Args:
        shape: (n, rows, cols).
        numbers: a power of two, at least `RUN`.
        widest: the most columns of a tile, a power of two; None: any number.

    Returns:
        The grid, with a program for each tile, and the rows and columns of a tile, which are powers of two.
    """
    n, rows, cols = shape
    longest = min(max(2, power_of_2(cols)), widest or numbers)  # 2: codes of 4 bits share a byte
    height = min(power_of_2(rows), numbers // min(longest, constants.BLOCK))
    width = min(longest, numbers // height)
    return (n * cdiv(rows, height) * cdiv(cols, width),), height, width


def on(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the device of x the current one, on which Triton launches."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)
