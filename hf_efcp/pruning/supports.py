"""Which weights to keep: by magnitude, by Optimal Brain Surgeon's scores, by a sweep over the columns, or one after the other.

Each takes rows z (rows, d), H and H^-1 (d, d), and gives keep, (rows, d) bool. What a kept weight becomes is not decided here:
`restricted_least_squares` solves for all of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .patterns import Pattern
from .projection import pieces_of

# Columns of the sweep that are decided together, as SparseGPT has it.
SWEEP_COLUMNS = 128
Choice = Callable[[Tensor, Tensor, Tensor, Pattern, float], Tensor]


def by_magnitude(z: Tensor, hessian: Tensor, inverse: Tensor, pattern: Pattern, sparsity: float) -> Tensor:
    """Keep the weights, or the blocks, of the largest norm: T_k(z)."""
    return pattern.keep(pattern.blocks(z.square()).sum((2, 3)), sparsity)


def by_cost(z: Tensor, hessian: Tensor, inverse: Tensor, pattern: Pattern, sparsity: float) -> Tensor:
    """Keep what it costs most to remove by itself: z_j^2 / [H^-1]_jj, or z_B^T (H^-1[B, B])^-1 z_B of a block (OBS)."""
    c = pattern.block[1]
    if c == 1:
        return pattern.keep(pattern.blocks(z.square() / inverse.diagonal()).sum((2, 3)), sparsity)
    parts = torch.arange(len(inverse), device=z.device).view(-1, c)
    within = torch.linalg.inv(inverse[parts[:, :, None], parts[:, None, :]])  # (d / C, C, C)
    blocks = pattern.blocks(z)
    return pattern.keep(torch.einsum("abrc,bcd,abrd->ab", blocks, within, blocks), sparsity)


def by_sweep(z: Tensor, hessian: Tensor, inverse: Tensor, pattern: Pattern, sparsity: float) -> Tensor:
    """Go through the columns once, as SparseGPT does (arXiv 2301.00774): later weights make up for those removed before.

    Rows decide for themselves, and share H^-1: after column j it is that of the columns behind j, whichever of them are removed.
    An unstructured layer loses the same share in each run of 128 columns.
    """
    z, keep = z.clone(), torch.zeros_like(z, dtype=torch.bool)
    # Row j of R, with H^-1 = R^T R, holds what is left of H^-1 at column j, divided by its root.
    r = torch.linalg.cholesky(inverse, upper=True)
    part = pattern if pattern.of else Pattern("unstructured")
    width = max(pattern.of, SWEEP_COLUMNS - SWEEP_COLUMNS % (pattern.of or 1))
    for start in range(0, z.shape[1], width):
        end = min(start + width, z.shape[1])
        block, together = z[:, start:end].mT.contiguous(), pattern.of or width  # (columns, rows): a column is in one piece
        removed = torch.zeros_like(block)
        for i, j in enumerate(range(start, end)):
            if i % together == 0:
                some = slice(i, i + together)
                scores = (block[some] / r.diagonal()[start:end][some, None]).square().mT
                keep[:, start:end][:, some] = part.keep(scores, sparsity)
            torch.div(block[i], r[j, j], out=removed[i])
            removed[i].masked_fill_(keep[:, j], 0)
            block[i:].addr_(r[j, j:end], removed[i], alpha=-1)
        z[:, end:].addmm_(removed.mT, r[start:end, end:], alpha=-1)  # columns behind the block, once
    return keep


def one_by_one(z: Tensor, hessian: Tensor, inverse: Tensor, pattern: Pattern, sparsity: float) -> Tensor:
    """Remove the weight of each row that costs least, with H^-1 of those that are left (OBC, arXiv 2208.11580).

    Each row has an H^-1 of its own: time grows with rows * d^3. Of an unstructured layer, a row loses as many weights as
    `by_cost` takes from it; the paper has one row only, and leaves that open.
    """
    budget = (~by_cost(z, hessian, inverse, pattern, sparsity)).sum(1)
    keep = torch.ones_like(z, dtype=torch.bool)
    for rows in pieces_of(*z.shape):
        keep[rows] = _greedy(z[rows], inverse, budget[rows], pattern)
    return keep


def greedy_support(z: Tensor, inverse: Tensor, k: int) -> Tensor:
    """Remove d - k weights of each row one by one; give what is kept, (rows, d) bool."""
    budget = torch.full((len(z),), z.shape[1] - k, device=z.device)
    return torch.cat([_greedy(z[rows], inverse, budget[rows], Pattern("unstructured")) for rows in pieces_of(*z.shape)])


def _greedy(z: Tensor, inverse: Tensor, budget: Tensor, pattern: Pattern) -> Tensor:
    """Remove `budget` weights of each row, (rows,), one by one: j = argmin z_j^2 / [H^-1]_jj, then z and H^-1 without j."""
    z, own = z.clone(), inverse.expand(len(z), -1, -1).clone()
    keep, every = torch.ones_like(z, dtype=torch.bool), torch.arange(len(z), device=z.device)
    for step in range(int(budget.max()) if len(budget) else 0):
        diagonal = own.diagonal(dim1=1, dim2=2)
        cost = torch.where(keep, z.square() / diagonal, torch.inf)
        if pattern.of:  # a group that has lost M - N loses no more
            left = keep.unflatten(1, (-1, pattern.of)).sum(2, keepdim=True) > pattern.kept
            cost = torch.where(left.expand(-1, -1, pattern.of).flatten(1), cost, torch.inf)
        j = cost.argmin(1)
        live = (budget > step).to(z.dtype)
        column = own[every, :, j]
        pivot = column[every, j]
        z -= column * (live * z[every, j] / pivot)[:, None]
        own -= (column * (live / pivot)[:, None])[:, :, None] * column[:, None, :]
        keep[every, j] &= live == 0
        own[every, j, j] += live  # of a removed weight nothing is read again, but for this division
    return keep


SUPPORTS: dict[str, Choice] = {"sweep": by_sweep, "cost": by_cost, "magnitude": by_magnitude, "greedy": one_by_one}
