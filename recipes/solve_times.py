"""Milliseconds of the m x m work of a step: M-FAC's Cholesky, an incremental inverse in its place, GGT's eigendecompositions.

python recipes/solve_times.py
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from hf_efcp.core.coefficients import ggt, mfac

SIZES = (32, 128, 512, 1024)
DAMPING = 1e-6


def milliseconds(call: Callable[[], object], times: int = 9) -> float:
    """Median of several calls."""
    call()
    found = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        found.append(1e3 * (time.perf_counter() - start))
    return statistics.median(found)


def renewed(inverse: Tensor, column: Tensor, j: int) -> Tensor:
    """The inverse after row and column j are replaced: without the old ones, then bordered by `column`, in two rank-1 updates."""
    removed = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    y = removed @ column
    return removed + torch.outer(y, y) / (column[j] - column @ y)


def main() -> None:
    """Print the table."""
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| m | Cholesky, two solves | incremental inverse | GGT |\n|---|---|---|---|")
    for m in SIZES:
        rows = torch.randn(m, 4000, generator=torch.Generator().manual_seed(m), dtype=torch.float64)
        gram = rows @ rows.T / 4000
        w = torch.nn.functional.one_hot(torch.tensor([3]), m).double()
        inverse = torch.linalg.inv(gram + DAMPING * m * torch.eye(m, dtype=torch.float64))
        decay = torch.ones(m, dtype=torch.float64)
        columns = (
            milliseconds(lambda: mfac(gram[None], w, DAMPING, m, torch.float32)),  # noqa: B023
            milliseconds(lambda: renewed(inverse, gram[3], 3)),  # noqa: B023
            milliseconds(lambda: ggt(gram[None], w, decay, 1e-5, torch.float32), 3),  # noqa: B023
        )
        print(f"| {m} | " + " | ".join(f"{t:.2f}" for t in columns) + " |")


if __name__ == "__main__":
    main()
