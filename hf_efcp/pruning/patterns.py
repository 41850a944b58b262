"""Sparsity patterns: which of a matrix's weights may be zero together, and what is kept of a score.

A pattern is `unstructured`, `N:M` (of every M inputs in a row, N are kept: 2:4, 4:8), or a block `RxC` (R outputs times C inputs
are kept or removed together: 1x4, 16x16).
"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from torch import Tensor

from ..options import OptionError

EXAMPLES = "unstructured, 2:4, 4:8 or another N:M, or a block such as 1x4 or 16x16"


class Pattern(NamedTuple):
    """What weights are removed together.

    Attributes:
        text: as it was given.
        kept, of: N and M of N:M; 0 and 0 for others.
        block: (R, C); (1, 1) for others.
    """

    text: str
    kept: int = 0
    of: int = 0
    block: tuple[int, int] = (1, 1)

    @classmethod
    def parse(cls, text: object) -> Pattern:
        """Read a pattern.

        Raises:
            OptionError: it is none.
        """
        found = re.fullmatch(r"(\d+)([:x])(\d+)", text) if isinstance(text, str) else None
        if text == "unstructured":
            return cls("unstructured")
        if found is not None:
            a, b = int(found[1]), int(found[3])
            if found[2] == ":" and 0 < a < b:
                return cls(found[0], kept=a, of=b)
            if found[2] == "x" and a > 0 and b > 0:
                return cls(found[0], block=(a, b))
        raise OptionError(f"pattern={text!r}: must be {EXAMPLES}; N:M keeps N of M, with 0 < N < M")

    def misfit(self, rows: int, cols: int) -> str | None:
        """Say why a matrix cannot have this pattern; None if it can."""
        if self.of and cols % self.of:
            return f"{cols} inputs are no multiple of {self.of}"
        r, c = self.block
        return None if rows % r == 0 and cols % c == 0 else f"{rows} x {cols} is not made of blocks of {r} x {c}"

    def sparsity(self, asked: float | None) -> float:
        """Give the share of zeros.

        Raises:
            OptionError: none is asked for where the pattern does not fix it, it is out of range, or another than the pattern's.
        """
        if self.of:
            fixed = 1 - self.kept / self.of
            if asked is not None and abs(asked - fixed) > 1e-9:
                raise OptionError(f"sparsity={asked!r}: the pattern {self.text} has {fixed:g}; leave it out")
            return fixed
        if isinstance(asked, bool) or not isinstance(asked, int | float) or not 0 <= asked < 1:
            raise OptionError(f"sparsity={asked!r}: must be a number in [0, 1)")
        return float(asked)

    def blocks(self, x: Tensor) -> Tensor:
        """Give x (rows, cols) as blocks, (rows / R, cols / C, R, C)."""
        r, c = self.block
        return x.unflatten(1, (-1, c)).unflatten(0, (-1, r)).transpose(1, 2)

    def keep(self, scores: Tensor, sparsity: float) -> Tensor:
        """Keep the largest scores: of the whole matrix, or of each group of M.

        Args:
            scores: (rows, cols); for blocks the scores of blocks, (rows / R, cols / C).
            sparsity: the share of what is not kept; it is that of N:M itself there.

        Returns:
            (rows, cols) bool.
        """
        if self.of:
            groups = scores.unflatten(1, (-1, self.of))
            order = groups.sort(dim=2, descending=True, stable=True).indices[:, :, : self.kept]
            return torch.zeros_like(groups, dtype=torch.bool).scatter_(2, order, True).flatten(1)
        flat = scores.flatten()
        order = flat.sort(descending=True, stable=True).indices[: flat.numel() - round(sparsity * flat.numel())]
        chosen = torch.zeros_like(flat, dtype=torch.bool).index_fill_(0, order, True).view_as(scores)
        r, c = self.block
        return chosen.repeat_interleave(r, 0).repeat_interleave(c, 1)
