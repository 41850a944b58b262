"""The discrete cosine basis, and products with it: by the matrix, or by a Fourier transform (Makhoul 1980).

    D_jk = sqrt(2/s) cos(pi k (2j + 1) / (2s)),  column 0 further times sqrt(1/2);   D^T D = 1

Column k is the wave with k half periods, so that x D is the DCT-II of each row of x. There is one D for each size s, dtype and
device. All tensors and all optimizers of the process share it. D is not a part of any state.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..kernels.devices import kind

# The tensors that were made, by (kind, size, dtype, device). They are kept as long as the process runs.
MADE: dict[tuple[str, int, torch.dtype, torch.device], Tensor] = {}
# The size from which the Fourier transform is faster, by kind of device: docs/benchmarks/dct.md. None: it was never measured.
FFT_FROM: dict[str, int | None] = {"cpu": 128, "cuda": None}


def basis(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Give D, (size, size), whose columns are the basis. D is shared, and must not be changed in place."""
    key = "basis", size, dtype, device
    if key not in MADE:
        j, k = torch.arange(size, device=device)[:, None], torch.arange(size, device=device)
        # Integers are reduced to one period first: an angle of about s^2 would have lost its last digits.
        d = ((2 * j + 1) * k % (4 * size)).double().mul_(math.pi / (2 * size)).cos_().mul_(math.sqrt(2 / size))
        d[:, 0] *= math.sqrt(0.5)
        MADE[key] = d.to(dtype)
    return MADE[key]


def transform(x: Tensor, method: str = "auto") -> Tensor:
    """Give x D for x (..., s).

    Args:
        x: fp32 or fp64.
        method: "matmul", "fft", or "auto", which takes the one that was faster for this size on this kind of device.
    """
    size = x.shape[-1]
    least = FFT_FROM.get(kind(x.device))
    if method == "fft" or (method == "auto" and least is not None and size >= least):
        return dct(x)
    d = basis(size, x.dtype, x.device)
    return x @ d if x.ndim < 3 else torch.bmm(x, d.expand(len(x), -1, -1))


def dct(x: Tensor) -> Tensor:
    """Give the orthonormal DCT-II of each row of x (..., s) by one real Fourier transform of length s.

    v = (x_0, x_2, ..., x_3, x_1) has the transform V; X_k = Re(w_k V_k) and X_(s-k) = -Im(w_k V_k), w_k = e^(-i pi k / 2s).
    """
    size = x.shape[-1]
    v = torch.cat([x[..., ::2], x[..., 1::2].flip(-1)], -1)
    waves = torch.view_as_real(torch.fft.rfft(v) * _twiddles(size, x.dtype, x.device))
    real, imaginary = waves[..., 0], waves[..., 1]
    return torch.cat([real, imaginary[..., 1 : (size + 1) // 2].neg().flip(-1)], -1)


def _twiddles(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Give w_k times the factors of D's columns, (s // 2 + 1,) complex."""
    key = "twiddles", size, dtype, device
    if key not in MADE:
        angle = torch.arange(size // 2 + 1, device=device).double() * (-math.pi / (2 * size))
        lengths = torch.full_like(angle, math.sqrt(2 / size))
        lengths[0] *= math.sqrt(0.5)
        MADE[key] = torch.polar(lengths, angle).to(torch.complex128 if dtype == torch.float64 else torch.complex64)
    return MADE[key]
