"""The sparse family on GPUs, by Triton. Nothing is added atomically: the same input gives the same bits.

TRITON_INTERPRET=1 runs the kernels on CPU tensors, which is how they are tested where there is no GPU.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import Blocks, Entry, Error, Matrices, Scale, Stored
from .gpu_tools import cdiv, power_of_2

# How many rows one program of `dots` sums over, and how many slots at once.
_ROWS = 64
_SLOTS = 64
# Where more is kept in a block, comparing all pairs of numbers takes longer than torch's way through a dense row.
_PAIRS = 64


@triton.jit
def _top_k(gradient, error, indices, values, cols, per_row, block, kept, kept_tail, HAS_ERROR: tl.constexpr, WIDTH: tl.constexpr):
    """A program a block. Magnitudes are compared as integers; the kept-th largest is found bit by bit, by counting."""
    row, number = tl.program_id(0).to(tl.int64), tl.program_id(1)
    within = tl.arange(0, WIDTH)
    col = number * block + within
    inside = (within < block) & (col < cols)
    a = tl.load(gradient + row * cols + col, mask=inside, other=0.0)
    if HAS_ERROR:
        a += tl.load(error + row * cols + col, mask=inside, other=0.0).to(a.dtype)
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
    indices, values, new_indices, new_values, out, rows, m, per_row, kept, kept_tail, full, parts,
    BLOCKS: tl.constexpr, KEPT: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """A program for some slots and some rows of a tensor. In each block, the new number with the same index is looked for."""
    t, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    slot = tl.program_id(1) * SLOTS + tl.arange(0, SLOTS)
    within = tl.arange(0, SIZE)
    total = tl.zeros([SLOTS, SIZE], dtype=tl.float64)
    for i in range(ROWS):
        row = part * ROWS + i
        new = (t * rows + row).to(tl.int64) * per_row
        for number in range(BLOCKS):
            begin = number * kept
            here = tl.where(row < rows, tl.where(number == full, kept_tail, kept), 0)
            mask = (slot[:, None] < m) & (within[None, :] < here)
            place = new * m + slot[:, None] * per_row + begin + within[None, :]
            index = tl.load(indices + place, mask=mask, other=-1)
            value = tl.load(values + place, mask=mask, other=0.0)
            met = tl.zeros([SLOTS, SIZE], dtype=value.dtype)
            for e in range(KEPT):
                wanted = tl.load(new_indices + new + begin + e, mask=e < here, other=-2)
                met = tl.where(index == wanted, tl.load(new_values + new + begin + e, mask=e < here, other=0.0), met)
            total += met.to(tl.float64) * value.to(tl.float64)
    tl.store(out + tl.program_id(0).to(tl.int64) * m + slot, tl.sum(total, 1), mask=slot < m)


@triton.jit
def _combine(
    indices, values, c, out, rows, window_rows, start, cols, per_row, block, kept, kept_tail, full,
    M: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """A program of one warp for a block of a row, which adds slot after slot to the zeros in `out`.

    A slot's numbers have different indices (or are zeros), so that they cannot meet; between slots the warp waits for itself.
    """
    place, number = tl.program_id(0).to(tl.int64), tl.program_id(1)
    t, row = place // rows, place % rows
    within = tl.arange(0, SIZE)
    mask = within < tl.where(number == full, kept_tail, kept)
    width = tl.minimum(block, cols - number * block)
    window = (t * window_rows + start + row) * M * per_row + number * kept + within
    u = out + place * cols + number * block
    for i in range(M):
        index = tl.load(indices + window + i * per_row, mask=mask, other=-1).to(tl.int32)
        value = tl.load(values + window + i * per_row, mask=mask, other=0.0)
        weight = tl.load(c + t * M + i)
        inside = (index >= 0) & (index < width)  # a damaged checkpoint must not reach beyond the row
        tl.store(u + index, tl.load(u + index, mask=inside) + weight * value.to(weight.dtype), mask=inside)
        tl.debug_barrier()


def top_k(gradients: Matrices, error: Error, blocks: Blocks, scale: Scale = None) -> Entry | None:
    """As in cpu_top_k.py; of equal magnitudes the first ones. None for errors in codes."""
    plain, codes_scale = error or (None, None)
    if codes_scale is not None:
        return None
    if isinstance(gradients, Tensor):
        gradient = gradients
    else:
        gradient = gradients[0][None] if len(gradients) == 1 else torch.stack(list(gradients))
    if scale is not None:
        gradient = gradient * scale[0][:, :, None] * scale[1][:, None]
    n, rows, cols = gradient.shape
    block, kept, kept_tail = blocks
    full, tail = divmod(cols, block)
    per_row = full * kept + (kept_tail if tail else 0)
    indices = torch.empty(n, rows, per_row, dtype=torch.int16, device=gradient.device)
    values = gradient.new_empty(n, rows, per_row)
    gradient = gradient.contiguous()
    width = power_of_2(block)
    with _on(gradient):
        _top_k[n * rows, full + bool(tail)](
            gradient, gradient if plain is None else plain.contiguous(), indices, values, cols, per_row, block, kept, kept_tail,
            HAS_ERROR=plain is not None, WIDTH=width, num_warps=max(1, min(16, width // 1024)),
        )  # fmt: skip
    return indices, values


def dots(stored: Stored, entry: Entry, cols: int, blocks: Blocks) -> Tensor | None:
    """As in cpu_sparse.py; None for a window in 16 bits."""
    indices, values, scales = stored
    if values is None or scales is not None:
        return None
    n, rows, m, per_row = values.shape
    block, kept, kept_tail = blocks
    if max(kept, kept_tail) > _PAIRS:
        return None
    parts = cdiv(rows, min(_ROWS, rows))
    out = torch.empty(n, parts, m, dtype=torch.float64, device=values.device)
    slots = min(_SLOTS, power_of_2(m))
    with _on(values):
        _dots[n * parts, cdiv(m, slots)](
            indices, values, *(x.contiguous() for x in entry), out, rows, m, per_row, kept, kept_tail, cols // block, parts,
            BLOCKS=cdiv(cols, block), KEPT=max(kept, kept_tail), SIZE=power_of_2(max(kept, kept_tail)),
            ROWS=min(_ROWS, rows), SLOTS=slots,
        )  # fmt: skip
    return out.sum(1)


def combine(stored: Stored, c: Tensor, cols: int, blocks: Blocks, rows: slice) -> Tensor | None:
    """As in cpu_sparse.py; None for a window in 16 bits."""
    indices, values, scales = stored
    if values is None or scales is not None:
        return None
    n, window_rows, m, per_row = values.shape
    block, kept, kept_tail = blocks
    many = rows.stop - rows.start
    out = torch.zeros(n, many, cols, dtype=c.dtype, device=c.device)
    with _on(values):
        _combine[n * many, cdiv(cols, block)](
            indices, values, c.contiguous(), out, many, window_rows, rows.start, cols, per_row, block, kept, kept_tail,
            cols // block, M=m, SIZE=power_of_2(max(kept, kept_tail)), num_warps=1, num_stages=1,
        )  # fmt: skip
    return out


def _on(x: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
