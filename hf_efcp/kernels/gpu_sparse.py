"""Kernels of sparse methods on GPUs, by Triton. Nothing is added atomically: the same input gives the same bits.

TRITON_INTERPRET=1 runs the kernels on CPU tensors. Tests use that where there is no GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import Blocks, Entry, Error, Matrices, Scale, Stored
from .gpu_codes import unpacked
from .gpu_tools import Addresses, Errors, accumulated_tile, cdiv, divided, factors, on, power_of_2, reads
from .gpu_update import add

# Rows that one program of `dots` sums over, and slots that it takes at once.
_ROWS = 64
_SLOTS = 64
# If more numbers are kept in a block, comparing all pairs of numbers takes longer than torch's way through a dense row.
_PAIRS = 64
# The most bytes of an update that are formed at once.
_UPDATES = 2**28


@triton.jit
def _top_k(
    table, like, error, scales, left, right, indices, values, rows, cols, per_row, block, kept, kept_tail, blocks,
    FORMAT: tl.constexpr, SCALED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A program for each block. Magnitudes are compared as integers; the kept-th largest is found bit by bit, by counting."""
    row, number = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    within = tl.arange(0, WIDTH)
    col = number * block + within
    inside = (within < block) & (col < cols)
    t = row // rows
    a = accumulated_tile(table, like, error, scales, left, right, t, row % rows, col, inside, rows, cols, 1.0, FORMAT, SCALED)
    bits: tl.constexpr = a.dtype.primitive_bitwidth
    magnitude = tl.abs(a).to(tl.int32 if bits == 32 else tl.int64, bitcast=True)
    magnitude = tl.where(inside, magnitude, -1)
    wanted = tl.where((number + 1) * block > cols, kept_tail, kept)
    least = tl.max(magnitude) * 0
    for i in range(bits - 1):
        higher = least | ((least * 0 + 1) << (bits - 2 - i))
        least = tl.where(tl.sum((magnitude >= higher).to(tl.int32)) >= wanted, higher, least)
    equal = magnitude == least
    room = wanted - tl.sum((magnitude > least).to(tl.int32))
    chosen = (magnitude > least) | (equal & (tl.cumsum(equal.to(tl.int32)) <= room))
    place = row * per_row + number * kept + tl.cumsum(chosen.to(tl.int32)) - 1
    tl.store(indices + place, within.to(tl.int16), mask=chosen)
    tl.store(values + place, a, mask=chosen)


@triton.jit
def _dots(
    indices, values, scales, new_indices, new_values, j, out, rows, m, per_row, kept, kept_tail, full, parts,
    sections, each, groups, blocks,
    CODED: tl.constexpr, OWN: tl.constexpr, KEPT: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """A program sums over some rows and some blocks of a tensor, for some slots: out (n, parts, sections, m).

    For each number of the window, it looks for the block's new number with the same index. Where OWN, slot j is the new entry.
    """
    group, rest = tl.program_id(0) % groups, tl.program_id(0) // groups
    section = rest % sections
    t, part = rest // sections // parts, rest // sections % parts
    slot = group * SLOTS + tl.arange(0, SLOTS)
    within = tl.arange(0, SIZE)
    own = slot[:, None] < 0
    if OWN:
        own = slot[:, None] == tl.load(j)
    total = tl.zeros([SLOTS, SIZE], dtype=tl.float64)
    for i in range(ROWS):
        row = part * ROWS + i
        new = (t * rows + row).to(tl.int64) * per_row
        for number in range(section * each, tl.minimum((section + 1) * each, blocks)):
            begin = number * kept
            here = tl.where(row < rows, tl.where(number == full, kept_tail, kept), 0)
            mask = (slot[:, None] < m) & (within[None, :] < here)
            stored = new * m + slot[:, None] * per_row + begin + within[None, :]
            index = tl.load(indices + stored, mask=mask, other=-1)
            if CODED:
                place = ((t * rows + row).to(tl.int64) * m + slot[:, None]) * blocks + number
                scale = tl.load(scales + place, mask=slot[:, None] < tl.where(here > 0, m, 0), other=0)  # one for all of a block
                index, value = unpacked(index, scale, new_values)
                index = tl.where(mask, index, -1)
            else:
                value = tl.load(values + stored, mask=mask, other=0.0)
            met = tl.zeros([SLOTS, SIZE], dtype=value.dtype)
            for e in range(KEPT):
                wanted = tl.load(new_indices + new + begin + e, mask=e < here, other=-2)
                met = tl.where(index == wanted, tl.load(new_values + new + begin + e, mask=e < here, other=0.0), met)
            if OWN:
                itself = tl.load(new_values + new + begin + within, mask=within < here, other=0.0)[None, :]
                value, met = tl.where(own, itself, value), tl.where(own, itself, met)
            total += met.to(tl.float64) * value.to(tl.float64)
    tl.store(out + rest.to(tl.int64) * m + slot, tl.sum(total, 1), mask=slot < m)


@triton.jit
def _combine(
    indices, values, scales, c, out, rows, window_rows, start, cols, per_row, block, kept, kept_tail, full, blocks,
    CODED: tl.constexpr, M: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """A program of one warp for each block of a row. It adds slot after slot to `out`, which is zero before.

    The numbers of a slot have different indices (or are zeros), so no two of them meet. Between slots, the threads wait for each
    other.
    """
    place, number = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    t, row = place // rows, place % rows
    within = tl.arange(0, SIZE)
    mask = within < tl.where(number == full, kept_tail, kept)
    width = tl.minimum(block, cols - number * block)
    window = (t * window_rows + start + row) * M * per_row + number * kept + within
    u = out + place * cols + number * block
    scale_at = (t * window_rows + start + row) * M * blocks + number
    for i in range(M):
        index = tl.load(indices + window + i * per_row, mask=mask, other=-1).to(tl.int32)
        if CODED:
            index, value = unpacked(index, tl.load(scales + scale_at + i * blocks), out)
            index = tl.where(mask, index, -1)
        else:
            value = tl.load(values + window + i * per_row, mask=mask, other=0.0)
        weight = tl.load(c + t * M + i)
        inside = (index >= 0) & (index < width)  # a damaged checkpoint must not reach beyond the row
        tl.store(u + index, tl.load(u + index, mask=inside) + weight * value.to(weight.dtype), mask=inside)
        tl.debug_barrier()


def top_k(gradients: Matrices, error: Error, blocks: Blocks, scale: Scale = None) -> Entry | None:
    """See cpu_top_k.py. Of equal magnitudes, the first ones are kept."""
    if not reads(error):
        return None
    g = Addresses(gradients)
    n, rows, cols = g.shape
    e, (x, y, scaled) = Errors(error, g.like), factors(scale, g.like)
    block, kept, kept_tail = blocks
    full, tail = divmod(cols, block)
    per_row, many = full * kept + (kept_tail if tail else 0), full + bool(tail)
    indices = torch.empty(n, rows, per_row, dtype=torch.int16, device=g.like.device)
    values = torch.empty(n, rows, per_row, dtype=g.like.dtype, device=g.like.device)
    width = power_of_2(block)
    with on(g.like):
        _top_k[(n * rows * many,)](
            g.table, g.like, *e.arrays, x, y, indices, values, rows, cols, per_row, block, kept, kept_tail, many,
            FORMAT=e.format, SCALED=scaled, WIDTH=width, num_warps=max(1, min(16, width // 512)),
        )  # fmt: skip
    return indices, values


def dots(stored: Stored, entry: Entry, cols: int, blocks: Blocks, j: Tensor | None = None) -> Tensor | None:
    """See cpu_sparse.py. With j, (1,) int64 on the device, slot j counts as the entry. None where a block keeps more than 64."""
    indices, values, scales = _arrays(stored)
    n, rows, m, per_row = indices.shape
    block, kept, kept_tail = blocks
    if max(kept, kept_tail) > _PAIRS:
        return None
    many, parts = cdiv(cols, block), cdiv(rows, min(_ROWS, rows))
    slots = min(_SLOTS, power_of_2(m))
    groups = cdiv(m, slots)
    sections, each = divided(many, 1, n * parts * groups)
    out = torch.empty(n, parts * sections, m, dtype=torch.float64, device=indices.device)
    with on(indices):
        _dots[(n * parts * sections * groups,)](
            indices, values, scales, *(x.contiguous() for x in entry), indices if j is None else j, out, rows, m, per_row,
            kept, kept_tail, cols // block, parts, sections, each, groups, many,
            CODED=stored[2] is not None, OWN=j is not None, KEPT=max(kept, kept_tail), SIZE=power_of_2(max(kept, kept_tail)),
            ROWS=min(_ROWS, rows), SLOTS=slots,
        )  # fmt: skip
    return out.sum(1)


def combine(stored: Stored, c: Tensor, cols: int, blocks: Blocks, rows: slice) -> Tensor | None:
    """See cpu_sparse.py."""
    indices, values, scales = _arrays(stored)
    n, window_rows, m, per_row = indices.shape
    block, kept, kept_tail = blocks
    many = rows.stop - rows.start
    out = torch.zeros(n, many, cols, dtype=c.dtype, device=c.device)
    across = cdiv(cols, block)
    with on(indices):
        _combine[(n * many * across,)](
            indices, values, scales, c.contiguous(), out, many, window_rows, rows.start, cols, per_row, block, kept, kept_tail,
            cols // block, across,
            CODED=stored[2] is not None, M=m, SIZE=power_of_2(max(kept, kept_tail)), num_warps=1, num_stages=1,
        )  # fmt: skip
    return out


def apply(
    stored: Stored,
    c: Tensor,
    cols: int,
    blocks: Blocks,
    params: Matrices,
    scale: float | Tensor,
    decay: float | Tensor,
    sizes: Scale = None,
) -> bool:
    """See cpu_sparse.py. Here u is formed, for some tensors at a time."""
    rows, limit = len(params[0]), max(1, _UPDATES // (params[0].numel() * c.element_size()))
    for start in range(0, len(params), limit):
        some = slice(start, start + limit)
        few = stored[0][some], None if stored[1] is None else stored[1][some], None if stored[2] is None else stored[2][some]
        u = combine(few, c[some], cols, blocks, slice(0, rows))
        part = None if sizes is None else (sizes[0][some], sizes[1][some])
        if u is None or not add(params[some], u, scale, decay, None, part):
            return False
    return True


def _arrays(stored: Stored) -> tuple[Tensor, Tensor, Tensor]:
    """Give the window's tensors. The first one takes the place of a tensor that the format does not have."""
    first, values, scales = stored
    return first, first if values is None else values, first if scales is None else scales
