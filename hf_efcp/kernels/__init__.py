"""Fast versions of what a step does most, chosen by device: Triton on GPUs, numba on CPUs where it is installed.

Plain torch, in core, is what they are tested against and what runs without them: an operation here returns None or False where
no kernel can do it, and the caller goes on in torch. Nothing is compiled before it is first used. HF_EFCP_KERNELS=0 in the
environment turns all of them off.

Words: a window holds m entries c_1 ... c_m. An entry is sparse (the kept numbers of a matrix: indices and values) or low rank
(factors p and q). n tensors of one shape are handled at once, as matrices (rows, cols).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .calls import attempt as _try

# n matrices (rows, cols) of one shape and dtype, fp32 or fp64: a list, which nobody has to copy together, or (n, rows, cols).
Matrices = Tensor | Sequence[Tensor]


class Held(list[Tensor]):
    """n matrices that several operations of a step take: where they are is found out once.

    Attributes:
        places: what a kernel has found out; None: nothing yet.
    """

    places: Any = None


# Length of a block, numbers kept in each, numbers kept in a shorter last one (0: there is none).
Blocks = tuple[int, int, int]
# A new entry. Sparse: int16 indices in the block and values, (n, rows, k). Low rank: p (n, r, rows) and q (n, r, cols). Where it
# says so, dense: c (n, rows, cols).
Entry = tuple[Tensor, ...]
# A sparse window: int16 indices and values (n, rows, m, k), and None; or (`codecs.SparseCodec`) indices and values in one int16,
# None, and uint8 scales (n, rows, m, blocks).
Stored = tuple[Tensor, Tensor | None, Tensor | None]
# The error e: (n, rows, cols) and None, or codes and scales (`codecs.BlockQuantizer`) or, on CPUs, bounds (`MinMaxQuantizer`).
Error = tuple[Tensor, Tensor | None] | None
# e and n weights: weight * e of each tensor.
Kept = tuple[Error, Tensor]
# x (n, rows) and y (n, cols) in g's dtype: g stands for diag(x) g diag(y); None: for itself.
Scale = tuple[Tensor, Tensor] | None
# The step, () int64; the tensors' salts, (n,) int64; their origin, the row and column of a larger matrix at which they begin:
# see `core.random.counted_bits`.
Rounding = tuple[Tensor, Tensor, tuple[int, int]]

# A piece of a whole model (DeepSpeed) is one longer row. The sparse kernels divide their work by rows.
_LONGEST_ROW = 2**20


def squares(gradients: Matrices) -> tuple[Tensor, Tensor] | None:
    """The sums of g^2 over rows and over columns, (n, rows) and (n, cols) fp64: see `core.moments.squares`."""
    return _try("squares", gradients[0], gradients)


def measure(
    gradients: Matrices, r: Tensor, c: Tensor, count: Tensor, beta: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """The factors of a metric that contains g: see `core.moments.measured`."""
    return _try("measure", gradients[0], gradients, r, c, count, beta, eps)


def measure_vectors(
    gradients: Matrices, v: Tensor, mean: Tensor, count: Tensor, beta: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """v with g in it, S^-1 and S^-1 g, (n, 1, cols), the sum of S^2 and the mean of g^2, (n,): see `core.metric.Diagonal`."""
    return _try("measure_vectors", gradients[0], gradients, v, mean, count, beta, eps)


def remember_factored(
    state: tuple[Tensor, Tensor, Tensor], rows: Tensor, means: Tensor, scale: Scale, beta: float, accepted: bool | Tensor
) -> bool:
    """Let the state (r, c, count) of a metric contain a gradient where `accepted`, else let `scale` be 0. Whether it was done."""
    return bool(_try("remember_factored", rows, state, rows, means, scale, beta, accepted))


def remember_diagonal(
    state: tuple[Tensor, Tensor, Tensor], values: Tensor, means: Tensor, inverse: Tensor, beta: float, accepted: bool | Tensor
) -> bool:
    """Do the same for the state (v, mean, count) of vectors, and their S^-1. Whether it was done."""
    return bool(_try("remember_diagonal", values, state, values, means, inverse, beta, accepted))


def remember(state: Tensor, new: Tensor, alive: Tensor, accepted: bool | Tensor) -> bool:
    """Copy `new` into the state (n, ...) where `accepted` and where `alive`, n numbers, is not 0. Whether it was done."""
    return bool(_try("remember", new, state, new, alive, accepted))


def top_k(gradients: Matrices, error: Error, blocks: Blocks, scale: Scale = None) -> tuple[Tensor, Tensor] | None:
    """The largest magnitudes of every block of e + g: see `BlockTopK`."""
    return _try_sparse("top_k", gradients[0], gradients, error, blocks, scale)


def extract(error: Error, gradients: Matrices, blocks: Blocks, rounding: Rounding, absent: Sequence[int]) -> Entry | None:
    """`top_k` and `keep` of what it gives in one pass: see `Accumulated.extract`."""
    return _try_sparse("extract", gradients[0], error, gradients, blocks, rounding, absent)


def dots(stored: Stored, entry: Entry, cols: int, blocks: Blocks, j: Tensor | None = None) -> Tensor | None:
    """Inner products of a sparse entry with a sparse window, (n, m) fp64: see `SparseWindow`.

    Slot j, (1,) int64, counts as the entry itself; None: as what is there.
    """
    return _try_sparse("dots", stored[0][0], stored, entry, cols, blocks, j)


def combine(stored: Stored, c: Tensor, cols: int, blocks: Blocks, rows: slice) -> Tensor | None:
    """Rows `rows` of G^T c for a sparse window and c (n, m), (n, rows, cols) in c's dtype: see `SparseWindow`."""
    return _try_sparse("combine", stored[0][0], stored, c, cols, blocks, rows)


def apply(
    stored: Stored,
    c: Tensor,
    cols: int,
    blocks: Blocks,
    params: Matrices,
    scale: float | Tensor,
    decay: float | Tensor,
    factors: Scale = None,
) -> bool:
    """p <- decay * p + scale * diag(x) G^T c diag(y) for a sparse window, in place: see `SparseWindow`. Whether it was done."""
    return bool(_try_sparse("apply", stored[0][0], stored, c, cols, blocks, params, scale, decay, factors))


def adam(stored: Stored, one: Tensor, two: Tensor, eps: float, cols: int, blocks: Blocks, rows: slice) -> Tensor | None:
    """Rows `rows` of m / (sqrt(v) + eps), (n, rows, cols), for weights (n, m) in its dtype: see `core.sparse_window.adam`."""
    return _try_sparse("adam", stored[0][0], stored, one, two, eps, cols, blocks, rows)


def move(
    stored: Stored, one: Tensor, two: Tensor, eps: float, cols: int, blocks: Blocks, params: Matrices, scale: float, decay: float
) -> bool:
    """p <- decay * p + scale * u in place for `adam`'s u, and n matrices in any dtype. Whether it was done."""
    return bool(_try_sparse("move", stored[0][0], stored, one, two, eps, cols, blocks, params, scale, decay))


def adamw(
    gradients: Matrices, moments: tuple[Tensor, Tensor], t: Tensor, betas: tuple[float, float], eps: float, *update: Any
) -> bool:
    """AdamW's step for moments m and v (n, rows, cols), in place, and counts t (n,): see `engine.adamw`.

    Args:
        gradients: g.
        moments, t, betas, eps: as above.
        update: p, n matrices in any dtype; `scale` and `decay` of p <- decay * p + scale * u.

    Returns:
        Whether it was done.
    """
    return bool(_try("adamw", gradients[0], gradients, moments, t, betas, eps, *update))


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
    """e <- decay * e + g - c in place, rounded as e is stored: see `Accumulated.keep`.

    Args:
        error: e.
        gradients: g.
        entry: c: sparse where `blocks` are given, else low rank, c = p^T q; on a GPU perhaps dense.
        rounding: what the random numbers of stochastic rounding are counted by.
        absent: tensors whose error stays as it is.
        blocks: of a sparse entry.
        scale: of g.
        decay: a number.
        accepted: whether e changes at all; a 0-D flag where that is known on the device only.
        wide: see `times`.

    Returns:
        Whether it was done.
    """
    attempt = _try if blocks is None else _try_sparse
    return bool(attempt("keep", gradients[0], error, gradients, entry, rounding, absent, blocks, scale, decay, accepted, wide))


def square(error: Error, cols: int, dtype: torch.dtype) -> Tensor | None:
    """The sum of the squares of e, (n,) fp64, for rows of `cols` numbers which are read in `dtype`."""
    return None if error is None else _try("square", error[0], error, cols, dtype)


def add_kept(params: Matrices, error: Error, weights: Tensor, scale: Scale) -> bool:
    """p <- p + weight * diag(x) e diag(y) in place, for matrices in the dtype of weights (n,). Whether it was done."""
    return bool(_try("add_kept", params[0], params, error, weights, scale))


def start(last: Tensor, step: Tensor, salts: Tensor, dead: float) -> Tensor | None:
    """The Q that a power iteration starts from, (n, cols, r): see `PowerIteration.start`, whose last one is (n, cols, r).

    A column is dead that is not longer than `dead` times the longest. `step` and `salts` are as in `core.random.counted_bits`.
    """
    return _try("start", last, last, step, salts, dead)


def orthonormal(a: Tensor) -> Tensor | None:
    """An orthonormal basis of the columns of a (n, rows, r), of the same shape; dependent columns become 0."""
    return _try("orthonormal", a, a)


def times(gradients: Matrices, error: Error, q: Tensor, scale: Scale = None, wide: bool = False) -> Tensor | None:
    """(e + g) q^T for q (n, r, cols), (n, rows, r): see `PowerIteration`.

    `wide`: on a CPU in tiles, for larger r too, and with sums in another order. Window methods do without: their numbers stay
    what they were.
    """
    return _try("times", q[0], gradients, error, q, scale, wide)


def transposed_times(gradients: Matrices, error: Error, p: Tensor, scale: Scale = None, wide: bool = False) -> Tensor | None:
    """p (e + g) for p (n, r, rows), (n, r, cols): see `PowerIteration`, and `times`."""
    return _try("transposed_times", p[0], gradients, error, p, scale, wide)


def inner(a: Tensor, b: Tensor) -> Tensor | None:
    """Inner products of rows, (n, M, N) fp64: see `core.linalg.inner`."""
    return _try("inner", a, a, b)


def factor_dots(window: Entry, entry: Entry, j: Tensor) -> Tensor | None:
    """Inner products of a low-rank entry with a window's, (n, m) fp64; slot j, (1,) int64, counts as the entry itself.

    Args:
        window: P (n, m, r, rows) and Q (n, m, r, cols); or codes of them, see `LowBitLowRankWindow`, and Q's scales.
        entry: p (n, r, rows) and q (n, r, cols), in the same dtypes or, where the window is codes, in that of the scales.
        j: on the device.
    """
    return _try("factor_dots", entry[0], window, entry, j)


def dense_dots(codes: Tensor, scales: Tensor, entry: Tensor, j: Tensor) -> Tensor | None:
    """The same for entries in int8, see `LowBitDenseWindow`, and a new one (n, rows, cols) in the dtype of the scales."""
    return _try("dense_dots", entry, codes, scales, entry, j)


def dense_combine(codes: Tensor, scales: Tensor, c: Tensor, rows: slice) -> Tensor | None:
    """Rows `rows` of G^T c for entries in int8 and c (n, m) in the dtype of the scales, (n, rows, cols)."""
    return _try("dense_combine", codes, codes, scales, c, rows)


def encode(x: Tensor, float8: bool = False, in_place: bool = False) -> tuple[Tensor, Tensor, Tensor] | None:
    """Codes of x (..., cols), rounded to nearest, int8 and their scales; or uint8 and no scales where `float8`: `core.codecs`.

    And the numbers that they stand for, like x; `in_place`: in place of x.
    """
    return _try("encode", x, x, float8, in_place)


def encode_sparse(indices: Tensor, values: Tensor, blocks: Blocks, cols: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """A sparse entry in 16 bits, its scales, and the values that it stands for: see `core.codecs.SparseCodec`."""
    return _try("encode_sparse", values, indices, values, blocks, cols)


def store(buffer: Tensor, entry: Tensor, dim: int, j: Tensor, accepted: bool | Tensor) -> bool:
    """Write `entry` into slot j of dimension `dim` of `buffer`, which `entry` has not, where `accepted`. Whether it was done."""
    return bool(_try("store", entry, buffer, entry, dim, j, accepted))


def scaled(factor: Tensor, c: Tensor | None, sizes: Tensor | None = None) -> Tensor | None:
    """c_i * factor_i diag(sizes) in bf16, for factors (n, m, r, length), c (n, m) and sizes (n, length): see `LowRankWindow`."""
    return _try("scaled", factor, factor, c, sizes)


def decode(
    codes: Tensor, scales: Tensor | None, out: tuple[torch.dtype, torch.dtype], c: Tensor | None, sizes: Tensor | None
) -> Tensor | None:
    """`scaled` for codes (n, m, r, length) of `encode`, and scales of int8; `out`: dtypes of the arithmetic and of the result."""
    return _try("decode", codes, codes, scales, out, c, sizes)


def add(
    params: Matrices,
    update: Tensor,
    scale: float | Tensor,
    decay: float | Tensor,
    rounding: Rounding | None = None,
    sizes: Scale = None,
    kept: Kept | None = None,
    first: int = 0,
) -> bool:
    """p <- decay * p + scale * diag(x) (u + weight * e) diag(y) in place, for n matrices in any float dtype.

    Args:
        params: p.
        update: u, (n, rows, cols).
        scale, decay: numbers, or 0-D tensors on the device.
        rounding: where p is bf16 and rounded stochastically, what the random numbers are counted by; None: to nearest.
        sizes: x (n, rows) and y (n, cols); None: ones.
        kept: e and the weights (n,); None: there is none.
        first: where p and u are some rows of n matrices, the first of them: x and e are of whole matrices.

    Returns:
        Whether it was done.
    """
    return bool(_try("add", update, params, update, scale, decay, rounding, sizes, kept, first))


def _try_sparse(name: str, example: Tensor, *args: Any) -> Any:
    """`_try`, and None for one long row."""
    return None if len(example) == 1 and example.numel() > _LONGEST_ROW else _try(name, example, *args)
