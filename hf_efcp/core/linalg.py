"""Functions that windows and compressors share: work in chunks, exact inner products, IEEE products, orthonormal bases."""

from __future__ import annotations

import contextlib
import platform
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..kernels.devices import kind
from .deferred import readable

# Bytes that a temporary of a chunked loop may take, by kind of device. On a GPU every chunk needs more launches.
CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 256 * 2**20}
# The same for a temporary that should stay in a CPU's cache.
CACHE_BYTES = 4 * 2**20


def chunk_bytes(device: torch.device) -> int:
    """Give the bytes of a temporary that is used at once: it should stay in a CPU's cache, or fill a GPU."""
    return CACHE_BYTES if kind(device) == "cpu" else room_bytes(device)


def room_bytes(device: torch.device) -> int:
    """Give the bytes of a temporary that need not stay in the cache."""
    return CHUNK_BYTES.get(kind(device), CHUNK_BYTES["cuda"])


# A vector is nothing but rounding errors if it is at most this many times eps as long as the longest of its kind.
_NOISE = 32
# Eigenvalues of a correlation matrix in fp64 below this fraction of the largest are rounding noise.
_DEPENDENT = 1e-14


def chunks(total: int, bytes_each: int, limit: int) -> Iterator[slice]:
    """Give slices of range(total), each of at least one item. `bytes_each` bytes for each item of a slice stay within `limit`."""
    size = max(1, limit // max(1, bytes_each))
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def row_chunks(x: kernels.Matrices) -> list[slice]:
    """Give slices of the rows of n matrices (rows, cols), such that a temporary for each slice stays within `chunk_bytes`."""
    rows, cols = x[0].shape
    return list(chunks(rows, len(x) * cols * (8 if x[0].dtype == torch.float64 else 4), chunk_bytes(x[0].device)))


def stacked(matrices: kernels.Matrices, rows: slice = slice(None)) -> Tensor:
    """Give rows `rows` of n matrices (rows, cols), as (n, rows, cols): a copy; for a tensor, or for n = 1, a view."""
    if isinstance(matrices, Tensor):
        return matrices if rows == slice(None) else matrices[:, rows]
    return matrices[0][None, rows] if len(matrices) == 1 else torch.stack([x[rows] for x in matrices])


class _Precision:
    """torch's precision of fp32 products, a setting of the process: full while any thread asks for it, then as before."""

    def __init__(self) -> None:
        self._lock, self._users, self._restore = threading.Lock(), 0, contextlib.ExitStack()

    def take(self) -> None:
        """Ask for full precision."""
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._raise()

    def give_back(self) -> None:
        """Ask for full precision no longer."""
        with self._lock:
            self._users -= 1
            if not self._users:
                self._restore.close()

    def _raise(self) -> None:
        # torch >= 2.9 has the setting under two names, and refuses to give the old one while the two disagree.
        known: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
        backends = [b for b in known if _has_new_name(b)]
        for b in backends:
            self._restore.callback(setattr, b, "fp32_precision", b.fp32_precision)
        with contextlib.suppress(RuntimeError):
            self._restore.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        torch.set_float32_matmul_precision("highest")
        for b in backends:
            b.fp32_precision = "ieee"


_PRECISION = _Precision()


@contextlib.contextmanager
def ieee_matmul(device: torch.device) -> Iterator[None]:
    """Compute fp32 matrix products inside in full fp32 (no TF32, no bf16, no autocast), whatever the user's settings are."""
    _PRECISION.take()
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        _PRECISION.give_back()


@contextlib.contextmanager
def cpu_by_default() -> Iterator[None]:
    """Make tensors without a device on the CPU inside, whatever torch.set_default_device says. Decorates functions too."""
    usual = torch.empty(0).device.type == "cpu"  # before torch 2.8, get_default_device sees no `with torch.device`
    with contextlib.nullcontext() if usual else torch.device("cpu"):
        yield


def _has_new_name(backend: object) -> bool:
    try:
        return hasattr(backend, "fp32_precision")
    except AssertionError:  # torch 2.6: an unknown attribute of cuda.matmul
        return False


def multiplies_bf16(device: torch.device) -> bool:
    """Tell whether the device has instructions for products of bf16 matrices that torch uses. Without them, fp32 is faster."""
    if kind(device) != device.type:  # a pretended GPU counts as a new one
        return True
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported()  # AMX comes with it
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Give the inner products of rows, formed and summed in fp64. The products are exact for rows stored in fp32 or less.

    Products in fp32 would put noise of 1e-7 * max(K) into K, more than the small eigenvalues of dependent entries.

    Args:
        a: (n, M, L), any float dtype.
        b: (n, N, L), any float dtype.

    Returns:
        (n, M, N) fp64.
    """
    fast = kernels.inner(a, b)
    if fast is not None:
        return fast
    n, m, length = a.shape
    # A converted piece of a should stay in the cache, in long runs. CPU libraries are fast if the short side comes first.
    out, limit = a.new_zeros(n, b.shape[1], m, dtype=torch.float64), chunk_bytes(a.device)
    for cols in chunks(length, n * b.shape[1] * 8, limit):
        b_cols, each = b[..., cols].double(), (cols.stop - cols.start) * 8
        for tensors in chunks(n, m * each, limit):
            for rows in chunks(m, (tensors.stop - tensors.start) * each, limit):
                out[tensors, :, rows] += torch.bmm(b_cols[tensors], a[tensors, rows, cols].double().mT)
    return out.mT


def add_scaled_(x: Tensor, y: Tensor, scale: float | Tensor) -> Tensor:
    """Compute x <- x + scale * y, for a number or a 0-D tensor on the device; returns x."""
    return x.addcmul_(y, scale) if isinstance(scale, Tensor) else x.add_(y, alpha=scale)


def reciprocal(x: Tensor) -> Tensor:
    """Give 1 / x, elementwise; 0 where x is not above 0."""
    return torch.where(x > 0, 1 / x, 0.0)


def as_it_is(x: Tensor) -> Tensor:
    """Give x, which is the sum over processes if there is one process."""
    return x


def lengths(x: Tensor, dim: int, total: Callable[[Tensor], Tensor] = as_it_is) -> Tensor:
    """Give the 2-norms of x (n, ..., ...) along `dim`, which is kept, in fp64. `total` sums over processes that share `dim`."""
    return total(torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.float64).square()).sqrt()


def without_noise(x: Tensor, dim: int, total: Callable[[Tensor], Tensor] = as_it_is) -> Tensor:
    """Give x (n, ..., ...), with 0 for vectors along `dim` that are rounding errors of the longest: Adam would blow them up.

    Args:
        x, dim, total: see `lengths`.
    """
    length = lengths(x, dim, total)
    longest = length.amax(3 - dim, keepdim=True)
    return torch.where(length > _NOISE * torch.finfo(x.dtype).eps * longest, x, 0.0)


def orthonormalize(a: Tensor, reduce: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Give an orthonormal basis of the columns of each matrix, in the order of the columns: that of QR, up to signs.

    A column that depends on earlier columns is replaced by QR, so that the set is orthonormal. The GPU's kernel and `reduce` make
    such a column zero. (The kernel exists because libraries take one matrix after another.)

    Args:
        a: (n, rows, r) with r <= rows.
        reduce: where `a` is some rows of larger matrices, sums a tensor over all processes that hold rows. The basis then comes
            from the r x r Gram matrix in fp64, in two passes: the first leaves errors of condition^2 * 1e-16.

    Returns:
        (n, rows, r), same dtype.
    """
    if reduce is None:
        fast = kernels.orthonormal(a)
        return torch.linalg.qr(a, mode="reduced").Q if fast is None else fast
    p, r = a.double(), torch.eye(a.shape[2], dtype=torch.float64, device=a.device)
    for _ in range(2):
        gram = reduce(p.mT @ p).nan_to_num(nan=0.0, posinf=0.0)  # else eigh would raise; p keeps what is not finite
        norms = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
        scale = norms.reciprocal().nan_to_num(posinf=0.0)  # the columns' sizes do not matter
        eigenvalues, v = torch.linalg.eigh(scale[..., None] * gram * scale[..., None, :])
        kept = eigenvalues > _DEPENDENT * eigenvalues[..., -1:]
        roots = torch.where(kept, eigenvalues, 0.0).sqrt()
        basis = scale[..., None] * v * roots.reciprocal().nan_to_num(posinf=0.0)[..., None, :]
        p = p @ basis.flip(-1)  # zero columns come last, as with QR: the next step redraws the same columns
        r = (roots[..., None] * v.mT * norms[..., None, :]).flip(-2) @ r
    # a = P R. P times the Q factor of R is the basis of a's own QR: low-bit factors equal those of one process, up to signs.
    return (p @ torch.linalg.qr(r).Q).to(a.dtype)


def completed(a: Tensor, noise: Callable[[], Tensor], reduce: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Give an orthonormal basis of the columns of each matrix, always with r columns, and the same on any number of processes.

    Args:
        a, reduce: see `orthonormalize`.
        noise: gives (n, rows, r), whose columns take the place of dependent columns.

    Returns:
        (n, rows, r), same dtype.
    """

    def basis(x: Tensor) -> Tensor:
        # QR is not used here: libraries differ in what they put in the place of dependent columns.
        fast = kernels.orthonormal(x) if reduce is None else None
        return orthonormalize(x, reduce or (lambda gram: gram)) if fast is None else fast

    p = basis(a)
    squares = p.square().sum(1, keepdim=True)
    dead = (squares if reduce is None else reduce(squares)) < 0.5
    if readable(dead.device) and not dead.any():
        return p
    return basis(torch.where(dead, noise().to(p.dtype), p))
