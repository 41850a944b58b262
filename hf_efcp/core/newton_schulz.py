"""The polar factor of matrices by Newton-Schulz: five odd polynomials, which move all singular values towards 1.

    X = B / (|B|_F + 1e-7),   five times:  Z = X^T X,  X <- a X + X (b Z + c Z^2)

At each step a singular value s becomes a s + b s^3 + c s^5, and the singular vectors stay. The result is not exact. Values that
are not small end between about 0.7 and 1.2. Values near 0 grow 400 times or more and stay small. 0 stays 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels.devices import kind
from .linalg import as_it_is, lengths

# (a, b, c) of each step. muon: Muon's coefficients, the same five times. dion: five different ones, which end nearer to 1.
SCHEDULES: dict[str, tuple[tuple[float, float, float], ...]] = {
    "muon": ((3.4445, -4.7750, 2.0315),) * 5,
    "dion": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
}
_GUARD = 1e-7


def newton_schulz(b: Tensor, schedule: str = "muon", total: Callable[[Tensor], Tensor] = as_it_is) -> Tensor:
    """Give nearly U V^T for each matrix B = U S V^T, by products in bf16 on a GPU, in fp32 on a CPU, in fp64 for fp64 matrices.

    Args:
        b: (n, long, r) in fp32 or fp64.
        schedule: a key of `SCHEDULES`.
        total: where `b` is some rows of larger matrices, sums a tensor in place over the processes that hold rows of them.

    Returns:
        (n, long, r) in the dtype of `b`.
    """
    x = b / (lengths(b.flatten(1)[:, :, None], 1, total) + _GUARD).to(b.dtype)
    if kind(b.device) == "cuda" and b.dtype == torch.float32:
        x = x.bfloat16()
    for first, third, fifth in SCHEDULES[schedule]:
        z = total(x.mT @ x)
        x = torch.baddbmm(x, x, torch.baddbmm(z, z, z, beta=third, alpha=fifth), beta=first)
    return x.to(b.dtype)
