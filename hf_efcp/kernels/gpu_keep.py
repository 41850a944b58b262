"""e <- decay * e + g - c on GPUs, by Triton: each number of g is read once, and the new e is rounded once, in registers.

Rounding is that of `core.cells`: stochastic where e has few bits, by the random numbers of `core.random`. A run of numbers that
share a scale lies in one program's tile, which is as wide as a run: the program finds the largest number of the run alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import Blocks, Entry, Error, Matrices, Rounding, Scale
from .constants import BLOCK, LARGEST_INT4, LARGEST_INT8
from .gpu_codes import quantized
from .gpu_tools import (
    INT4,
    INT4_ZERO,
    PLAIN,
    RUN,
    Addresses,
    Errors,
    accumulated_tile,
    col_factors,
    factors,
    noise,
    on,
    reads,
    row_factors,
    tensor_key,
    tile,
    tiling,
    to_bf16,
)

# The largest rank of a low-rank entry, and the most kept numbers in a block of a sparse entry. For more, torch's matrix products
# and scattering are faster.
_LARGEST_RANK = 64
_MOST_KEPT = 64
# Numbers of a program's tile, by the bytes of a number.
_NUMBERS = {4: 2048, 8: 1024}
# A tile lies in one block of a sparse entry, if it then still has this many columns.
_NARROW = 32
_INT4 = tl.constexpr(INT4)


@triton.jit
def _without_sparse(
    a, indices, values, t, row, col, first, inside, rows, cols, per_row, block, kept, kept_tail,
    MOST: tl.constexpr, IN_ONE: tl.constexpr,
):  # fmt: skip
    """Give a tile without the kept numbers of its blocks.

    The index of a kept number is compared with every column of the block, so an index out of range meets none. IN_ONE: the whole
    tile lies in one block, so that a kept number is loaded once for a row of the tile.
    """
    within = col % block
    number = (first + tl.zeros([1, 1], tl.int32) if IN_ONE else col) // block
    count = tl.where(number == cols // block, kept_tail, kept)
    begin = (t * rows + row) * per_row + number * kept
    for i in range(MOST):
        here = inside & (count > i)
        index = tl.load(indices + begin + i, mask=here, other=-1).to(tl.int32)
        value = tl.load(values + begin + i, mask=here, other=0.0).to(a.dtype)
        a -= tl.where(index == within, value, 0.0)
    return a


@triton.jit
def _without_low_rank(a, p, q, t, row, col, down, across, rows, cols, RANK: tl.constexpr):
    """Give a tile without p^T q."""
    for s in range(RANK):
        left = tl.load(p + (t * RANK + s) * rows + row, mask=down, other=0.0).to(a.dtype)
        right = tl.load(q + (t * RANK + s) * cols + col, mask=across, other=0.0).to(a.dtype)
        a -= left * right
    return a


@triton.jit(do_not_specialize=["row_0", "col_0"])
def _keep(
    table, like, error, scales, left, right, one, two, accepted, step, salts, rows, cols, row_0, col_0,
    per_row, block, kept, kept_tail,
    DECAY: tl.constexpr, FORMAT: tl.constexpr, SCALED: tl.constexpr, MASKED: tl.constexpr, MANY: tl.constexpr,
    SPARSE: tl.constexpr, IN_ONE: tl.constexpr, LARGEST: tl.constexpr, LIMIT: tl.constexpr, TINY: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A program for each tile. `one` and `two` hold the entry c.

    SPARSE: they are indices and values, at most MANY in a block. Else they are p and q of rank MANY. With MANY = 0 both are c.
    """
    t, row, first = tile(rows, cols, ROWS, COLS)
    col = first + tl.arange(0, COLS)[None, :]
    many = tl.where(tl.load(table + t) == 0, 0, rows)  # an absent tensor has no rows
    if MASKED:
        many = tl.where(tl.load(accepted) == 0, 0, many)
    down, across = row < many, col < cols
    mask = down & across
    a = accumulated_tile(table, like, error, scales, left, right, t, row, col, mask, rows, cols, DECAY, FORMAT, SCALED)
    if SPARSE:
        inside = down if IN_ONE else mask
        a = _without_sparse(
            a, one, two, t, row, col, first, inside, rows, cols, per_row, block, kept, kept_tail, MANY, IN_ONE
        )  # fmt: skip
    elif MANY == 0:
        a -= tl.load(one + (t * rows + row) * cols + col, mask=mask, other=0.0).to(a.dtype)
    else:
        a = _without_low_rank(a, one, two, t, row, col, down, across, rows, cols, MANY)

    number = t * rows + row
    if (LARGEST != 0) or (error.dtype.element_ty == tl.bfloat16):
        key = tensor_key(step, salts + t)
        by_row, by_col = row_factors(key, row + row_0), col_factors(key, col.to(tl.int64) + col_0)
    if LARGEST != 0:
        code, scale = quantized(a, mask, noise(by_row, by_col), LARGEST, LIMIT, TINY, False)
        # Other threads may have to read the codes and scales that a thread overwrites: wait for them.
        tl.debug_barrier()
        tl.store(scales + number * tl.cdiv(cols, RUN) + first // RUN, scale, mask=down)
        if FORMAT == _INT4:
            halves = tl.where(mask, code + INT4_ZERO, 0)  # 0: the empty half of the last byte
            low, high = tl.split(tl.reshape(halves, (ROWS, COLS // 2, 2)))
            byte = first // 2 + tl.arange(0, COLS // 2)[None, :]
            tl.store(error + number * tl.cdiv(cols, 2) + byte, (low | (high << 4)).to(tl.uint8), mask=down & (byte * 2 < cols))
        else:
            tl.store(error + number * cols + col, code.to(tl.int8), mask=mask)
    elif error.dtype.element_ty == tl.bfloat16:
        tl.store(error + number * cols + col, to_bf16(a, by_row, by_col), mask=mask)
    else:
        tl.store(error + number * cols + col, a.to(error.dtype.element_ty), mask=mask)


def keep(
    error: Error,
    gradients: Matrices,
    entry: Entry,
    rounding: Rounding,
    absent: Sequence[int],
    blocks: Blocks | None = None,
    scale: Scale = None,
    decay: float = 1.0,
    accepted: bool | Tensor = True,
    wide: bool = False,
) -> bool:
    """Compute e <- decay * e + g - c in place, for n matrices at once: see `hf_efcp.kernels.keep`.

    Args:
        error: e, as `Errors` takes it.
        gradients: g, n matrices (rows, cols) in fp32 or fp64.
        entry: int16 indices and values (n, rows, k), at most 64 in a block; or p (n, r, rows) and q (n, r, cols), r at most 64;
            or c (n, rows, cols) alone.
        rounding: the step, () int64; a salt for each tensor, (n,) int64; their origin: see `core.random.counted_bits`.
        absent: tensors whose error stays as it is.
        blocks: of a sparse entry.
        scale: of g.
        decay: a number, for which the kernel is compiled.
        accepted: whether e changes at all; a 0-D flag where only the device knows it.
        wide: has no effect on a GPU.

    Returns:
        Whether it was done.
    """
    many = max(blocks[1:]) if blocks else entry[0].shape[1] if len(entry) > 1 else 0
    dtype = gradients[0].dtype
    if error is None or not reads(error) or dtype not in (torch.float32, torch.float64):
        return False
    if many > (_MOST_KEPT if blocks else _LARGEST_RANK):
        return False
    if accepted is False:
        return True
    g = Addresses(gradients, absent)
    e, (x, y, scaled), (step, salts, origin) = Errors(error, g.like), factors(scale, g.like), rounding
    one, two = entry[0].contiguous(), entry[-1].contiguous()
    _, rows, cols = g.shape
    block, kept, kept_tail = blocks or (cols, 0, 0)
    widest, in_one = _widest(cols, block, e.format != PLAIN)
    grid, height, width = tiling(g.shape, _NUMBERS[dtype.itemsize] // (1 if in_one else 2), widest)
    flag = g.table if accepted is True else torch.as_tensor(accepted, device=g.like.device).bool().view(torch.uint8)
    with on(g.like):
        _keep[grid](
            g.table, g.like, *e.arrays, x, y, one, two, flag, step.to(g.like.device), salts.contiguous(), rows, cols, *origin,
            one.shape[2] if blocks else 0, block, kept, kept_tail,
            DECAY=float(decay), FORMAT=e.format, SCALED=scaled, MASKED=accepted is not True, MANY=many,
            SPARSE=blocks is not None, IN_ONE=in_one,
            LARGEST=0.0 if e.format == PLAIN else float(LARGEST_INT4 if e.format == INT4 else LARGEST_INT8),
            LIMIT=e.limit, TINY=torch.finfo(dtype).tiny, ROWS=height, COLS=width, num_warps=max(1, min(4, height * width // 256)),
        )  # fmt: skip
    return True


def _widest(cols: int, block: int, coded: bool) -> tuple[int | None, bool]:
    """Give the most columns of a tile (None: any number), and whether every tile then lies in one block of the entry."""
    if cols <= block:
        return BLOCK if coded else None, True
    divisor = block & -block
    widest = BLOCK if coded or divisor < _NARROW else divisor
    return widest, block % widest == 0
