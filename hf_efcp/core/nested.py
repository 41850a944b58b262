"""Nested low-rank adapters: a pair A, B whose leading columns are an adapter of every rank (MatryoshkaLoRA, arXiv 2605.07850).

x is (..., in), A is (in, r), B is (r, out), S are the trained ranks, and s_rho is the scale of rank rho. In training, a layer
adds (x A * p) B with p = diag(P), (r,). At rank rho, it adds s_rho x A[:, :rho] B[:rho, :], without P.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

RANK_SCALES = ("none", "sqrt", "rank")
KINDS = ("matryoshka", "dylora", "lora")


def rank_scale_of(rank: int, rank_scale: str) -> float:
    """Give s_rho for rank rho: 1 ("none"), 1 / sqrt(rho) ("sqrt") or 1 / rho ("rank")."""
    return {"none": 1.0, "sqrt": 1 / math.sqrt(rank), "rank": 1 / rank}[rank_scale]


def staircase(r: int, train_ranks: Sequence[int], rank_scale: str = "sqrt") -> Tensor:
    """Give p_i, the sum of s_rho over the ranks rho > i of S, (r,) fp64, so that (x A * p) B is the sum of all nested adapters.

    Columns from the largest rank on have p_i = 0, and are never trained.

    Args:
        r: the number of columns.
        train_ranks: S, each at most r.
        rank_scale: "none", "sqrt" or "rank".
    """
    return masks(r, train_ranks, rank_scale).sum(0)


def masks(r: int, train_ranks: Sequence[int], rank_scale: str = "sqrt") -> Tensor:
    """Give P for each rank of S alone, (len(S), r) fp64: s_rho in the first rho columns, 0 after them. DyLoRA draws one P."""
    columns = torch.arange(r)
    scales = torch.tensor([rank_scale_of(rank, rank_scale) for rank in train_ranks], dtype=torch.float64)
    return (columns < torch.tensor(list(train_ranks))[:, None]) * scales[:, None]


def training_diagonals(kind: str, r: int, train_ranks: Sequence[int], rank_scale: str) -> Tensor:
    """Give the diagonals P that training takes, (k, r) fp64: for DyLoRA one for each rank of S, else one."""
    every = masks(r, train_ranks, rank_scale)
    return every if kind == "dylora" else every.sum(0, keepdim=True)


def powers_of_two(r: int) -> list[int]:
    """Give the powers of two up to r, and r: 1, 2, 4, ..., r."""
    return sorted({2**i for i in range(r.bit_length())} | {r})


def aurac(ranks: Sequence[int], accuracies: Sequence[float], version: int = 2) -> float:
    """Give the area under the curve of accuracy over rank, divided by its width: a mean accuracy, in the unit of `accuracies`.

    Args:
        ranks: the ranks at which the adapter was evaluated: different integers >= 1, in any order.
        accuracies: an accuracy for each rank.
        version: 1: over the rank, by the trapezoid rule. Most of the width is between the largest ranks. 2: over log2 of the
            rank, so that every doubling has the same weight. Name the version with every figure.

    Returns:
        The mean accuracy; for a single rank, its accuracy.

    Raises:
        ValueError: another version, no rank, a rank that is there twice or is below 1, or not one accuracy for each rank.
    """
    if version not in (1, 2):
        raise ValueError(f"version={version!r}: must be 1 (over the rank) or 2 (over log2 of the rank)")
    if not len(ranks) or len(ranks) != len(accuracies):
        raise ValueError(f"ranks, accuracies: there must be one accuracy for each rank, got {len(ranks)} and {len(accuracies)}")
    if min(ranks) < 1 or len(set(ranks)) < len(ranks):
        raise ValueError(f"ranks={list(ranks)}: must be different integers >= 1")
    points = sorted(zip(ranks, map(float, accuracies), strict=True))
    x = [float(rank) if version == 1 else math.log2(rank) for rank, _ in points]
    a = [accuracy for _, accuracy in points]
    if len(points) == 1:
        return a[0]
    area = sum((x[i + 1] - x[i]) * (a[i] + a[i + 1]) / 2 for i in range(len(x) - 1))
    return area / (x[-1] - x[0])
