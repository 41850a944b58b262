"""Fast versions of the operations that take most of a step: by Triton on GPUs, by numba on CPUs where numba is installed.

The package `core` has the same operations in plain torch. Tests compare the kernels with plain torch, and plain torch runs where
there is no kernel: an operation here then returns None or False, and the caller goes on in torch. A kernel is compiled at its
first use. HF_EFCP_KERNELS=0 in the environment turns all kernels off.

Words: a window holds m entries c_1 ... c_m. An entry is sparse (indices and values of the kept numbers of a matrix) or low rank
(factors p and q). An operation handles n tensors of one shape at once, as matrices (rows, cols).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .calls import attempt as _try

# n matrices (rows, cols) of one shape and dtype, fp32 or fp64: a tensor (n, rows, cols), or a list, which saves a copy.
Matrices = Tensor | Sequence[Tensor]


class Held(list[Tensor]):
    """n matrices that several operations of a step take. The first kernel keeps their addresses here for the others.

    Attributes:
        places: the contiguous tensors and their addresses; None before a kernel has looked.
    """

    places: Any = None


# Length of a block, numbers kept in each block, numbers kept in a shorter last block (0: there is none).
Blocks = tuple[int, int, int]
# A new entry. Sparse: int16 indices in the block, and values, both (n, rows, k). Low rank: p (n, r, rows) and q (n, r, cols).
# Dense, where an operation says that it takes dense entries: c (n, rows, cols).
Entry = tuple[Tensor, ...]
# A sparse window. Plain: int16 indices (n, rows, m, k), values (n, rows, m, k), None. In `codecs.SparseCodec`: index and value
# in one int16 (n, rows, m, k), None, uint8 scales (n, rows, m, blocks).
Stored = tuple[Tensor, Tensor | None, Tensor | None]
# The error e. Plain: (n, rows, cols) and None. Quantized: codes and scales (`codecs.BlockQuantizer`); on CPUs also codes and
# bounds (`codecs.MinMaxQuantizer`).
Error = tuple[Tensor, Tensor | None] | None
# e, and a weight for each of the n tensors: they stand for weight * e.
Kept = tuple[Error, Tensor]
# x (n, rows) and y (n, cols) in g's dtype: the operation takes diag(x) g diag(y) in place of g. None: it takes g.
Scale = tuple[Tensor, Tensor] | None
# The step, () int64; a salt for each tensor, (n,) int64; their origin, which is the row and the column of a larger matrix at
# which they begin. Random numbers are counted by these: see `core.random.counted_bits`.
Rounding = tuple[Tensor, Tensor, tuple[int, int]]

# A sparse kernel divides its work by rows, so it leaves one longer row to torch: a flat piece of a whole model (DeepSpeed).
_LONGEST_ROW = 2**20


def squares(gradients: Matrices) -> tuple[Tensor, Tensor] | None:
    """Give the sums of g^2 over rows and over columns, (n, rows) and (n, cols) fp64: see `core.moments.squares`."""
    return _try("squares", gradients[0], gradients)


def measure(
    gradients: Matrices, r: Tensor, c: Tensor, count: Tensor, beta: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """Give the factors of a metric whose running means contain g: see `core.moments.measured`."""
    return _try("measure", gradients[0], gradients, r, c, count, beta, eps)


def measure_vectors(
    gradients: Matrices, v: Tensor, mean: Tensor, count: Tensor, beta: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """Measure the metric of vectors: see `core.metric.Diagonal`.

    Returns:
        v with g in it, S^-1 and S^-1 g, each (n, 1, cols); the sum of S^2 and the mean of g^2, each (n,).
    """
    return _try("measure_vectors", gradients[0], gradients, v, mean, count, beta, eps)


def remember_factored(
    state: tuple[Tensor, Tensor, Tensor], rows: Tensor, means: Tensor, scale: Scale, beta: float, accepted: bool | Tensor
) -> bool:
    """Put a gradient into a metric's state (r, c, count) if `accepted`, else set `scale` to 0. Whether it was done."""
    return bool(_try("remember_factored", rows, state, rows, means, scale, beta, accepted))


def remember_diagonal(
    state: tuple[Tensor, Tensor, Tensor], values: Tensor, means: Tensor, inverse: Tensor, beta: float, accepted: bool | Tensor
) -> bool:
    """Put a gradient into the state (v, mean, count) of vectors if `accepted`, else set S^-1 to 0. Whether it was done."""
    return bool(_try("remember_diagonal", values, state, values, means, inverse, beta, accepted))


def remember(state: Tensor, new: Tensor, alive: Tensor, accepted: bool | Tensor) -> bool:
    """Copy `new` into the state (n, ...) if `accepted`, for the tensors whose `alive` (n,) is not 0. Whether it was done."""
    return bool(_try("remember", new, state, new, alive, accepted))


def top_k(gradients: Matrices, error: Error, blocks: Blocks, scale: Scale = None) -> tuple[Tensor, Tensor] | None:
    """Give the numbers of largest magnitude in every block of e + g: see `BlockTopK`."""
    return _try_sparse("top_k", gradients[0], gradients, error, blocks, scale)


def extract(error: Error, gradients: Matrices, blocks: Blocks, rounding: Rounding, absent: Sequence[int]) -> Entry | None:
    """Do `top_k`, and `keep` of the result of `top_k`, in one pass: see `Accumulated.extract`."""
    return _try_sparse("extract", gradients[0], error, gradients, blocks, rounding, absent)


def dots(stored: Stored, entry: Entry, cols: int, blocks: Blocks, j: Tensor | None = None) -> Tensor | None:
    """Give the inner products of a sparse entry with a sparse window, (n, m) fp64: see `SparseWindow`.

    With j, (1,) int64, slot j counts as the entry itself. With None, every slot counts as it is stored.
    """
    return _try_sparse("dots", stored[0][0], stored, entry, cols, blocks, j)


def combine(stored: Stored, c: Tensor, cols: int, blocks: Blocks, rows: slice) -> Tensor | None:
    """Give rows `rows` of G^T c, (n, rows, cols) in c's dtype, for a sparse window and c (n, m): see `SparseWindow`."""
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
    """Compute p <- decay * p + scale * diag(x) G^T c diag(y) for a sparse window, in place: see `SparseWindow`.

    Returns:
        Whether it was done.
    """
    return bool(_try_sparse("apply", stored[0][0], stored, c, cols, blocks, params, scale, decay, factors))


def adam(stored: Stored, one: Tensor, two: Tensor, eps: float, cols: int, blocks: Blocks, rows: slice) -> Tensor | None:
    """Give rows `rows` of m / (sqrt(v) + eps), (n, rows, cols), in the weights' dtype: see `core.sparse_window.adam`.

    The weights `one` and `two` are (n, m).
    """
    return _try_sparse("adam", stored[0][0], stored, one, two, eps, cols, blocks, rows)


def move(
    stored: Stored, one: Tensor, two: Tensor, eps: float, cols: int, blocks: Blocks, params: Matrices, scale: float, decay: float
) -> bool:
    """Compute p <- decay * p + scale * u in place, with `adam`'s u, for n matrices in any dtype; tell whether it was done."""
    return bool(_try_sparse("move", stored[0][0], stored, one, two, eps, cols, blocks, params, scale, decay))


def adamw(
    gradients: Matrices, moments: tuple[Tensor, Tensor], t: Tensor, betas: tuple[float, float], eps: float, *update: Any
) -> bool:
    """AdamW's step for moments m and v (n, rows, cols), in place, and counts t (n,): see `engine.adamw`.

    Args:
        gradients: g.
        moments, t, betas, eps: as above.
        update: p, which is n matrices in any dtype; then `scale` and `decay` of p <- decay * p + scale * u.

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
    """Compute e <- decay * e + g - c in place, rounded as e is stored: see `Accumulated.keep`.

    Args:
        error: e.
        gradients: g.
        entry: c. It is sparse where `blocks` are given, else low rank, c = p^T q. On a GPU c may be dense.
        rounding: counts the random numbers of stochastic rounding.
        absent: tensors whose error stays as it is.
        blocks: of a sparse entry.
        scale: of g.
        decay: a number.
        accepted: whether e changes at all; a 0-D flag where only the device knows it.
        wide: see `times`.

    Returns:
        Whether it was done.
    """
    attempt = _try if blocks is None else _try_sparse
    return bool(attempt("keep", gradients[0], error, gradients, entry, rounding, absent, blocks, scale, decay, accepted, wide))


def square(error: Error, cols: int, dtype: torch.dtype) -> Tensor | None:
    """Give the sum of the squares of e, (n,) fp64. A row of e has `cols` numbers, which are read in `dtype`."""
    return None if error is None else _try("square", error[0], error, cols, dtype)


def add_kept(params: Matrices, error: Error, weights: Tensor, scale: Scale) -> bool:
    """Compute p <- p + weight * diag(x) e diag(y) in place, for matrices in the dtype of weights (n,).

    Returns:
        Whether it was done.
    """
    return bool(_try("add_kept", params[0], params, error, weights, scale))


def start(last: Tensor, step: Tensor, salts: Tensor, dead: float) -> Tensor | None:
    """Give the Q that a power iteration starts from, (n, cols, r), for the Q before it (n, cols, r): see `PowerIteration.start`.

    A column is dead if it is at most `dead` times as long as the longest column. A dead column is redrawn. Its random numbers
    are counted by `step` and `salts`, see `core.random.counted_bits`.
    """
    return _try("start", last, last, step, salts, dead)


def orthonormal(a: Tensor) -> Tensor | None:
    """Give an orthonormal basis of the columns of a (n, rows, r), in a's shape. A column that depends on others becomes 0."""
    return _try("orthonormal", a, a)


def times(gradients: Matrices, error: Error, q: Tensor, scale: Scale = None, wide: bool = False) -> Tensor | None:
    """Give (e + g) q^T for q (n, r, cols), (n, rows, r): see `PowerIteration`.

    With `wide`, a CPU forms the product in tiles. Then r may be larger, and sums have another order. Window methods do not set
    `wide`, so that their numbers stay as they were.
    """
    return _try("times", q[0], gradients, error, q, scale, wide)


def transposed_times(gradients: Matrices, error: Error, p: Tensor, scale: Scale = None, wide: bool = False) -> Tensor | None:
    """Give p (e + g) for p (n, r, rows), (n, r, cols): see `PowerIteration`, and `times`."""
    return _try("transposed_times", p[0], gradients, error, p, scale, wide)


def inner(a: Tensor, b: Tensor) -> Tensor | None:
    """Give the inner products of rows, (n, M, N) fp64: see `core.linalg.inner`."""
    return _try("inner", a, a, b)


def factor_dots(window: Entry, entry: Entry, j: Tensor) -> Tensor | None:
    """Give the inner products of a low-rank entry with a window's, (n, m) fp64; slot j, (1,) int64, counts as the entry itself.

    Args:
        window: P (n, m, r, rows) and Q (n, m, r, cols); or codes of P, codes of Q and Q's scales, see `LowBitLowRankWindow`.
        entry: p (n, r, rows) and q (n, r, cols), in the window's dtypes; for a window of codes, in the dtype of the scales.
        j: the slot, on the device.
    """
    return _try("factor_dots", entry[0], window, entry, j)


def dense_dots(codes: Tensor, scales: Tensor, entry: Tensor, j: Tensor) -> Tensor | None:
    """Give the inner products, (n, m) fp64, of a dense entry with a window in int8, see `LowBitDenseWindow`.

    The new entry is (n, rows, cols) in the dtype of the scales. Slot j, (1,) int64, counts as the new entry itself.
    """
    return _try("dense_dots", entry, codes, scales, entry, j)


def dense_combine(codes: Tensor, scales: Tensor, c: Tensor, rows: slice) -> Tensor | None:
    """Give rows `rows` of G^T c, (n, rows, cols), for entries in int8 and c (n, m) in the dtype of the scales."""
    return _try("dense_combine", codes, codes, scales, c, rows)


def encode(x: Tensor, float8: bool = False, in_place: bool = False) -> tuple[Tensor, Tensor, Tensor] | None:
    """Give codes of x (..., cols), rounded to nearest: see `core.codecs`.

    Args:
        x: numbers.
        float8: whether the codes are E4M3, in uint8 and without scales; else they are int8 with scales.
        in_place: whether the decoded numbers overwrite x.

    Returns:
        The codes, their scales, and the decoded numbers, which have the shape and dtype of x.
    """
    return _try("encode", x, x, float8, in_place)


def encode_sparse(indices: Tensor, values: Tensor, blocks: Blocks, cols: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Give a sparse entry in 16 bits a number, its scales, and its decoded values: see `core.codecs.SparseCodec`."""
    return _try("encode_sparse", values, indices, values, blocks, cols)


def store(buffer: Tensor, entry: Tensor, dim: int, j: Tensor, accepted: bool | Tensor) -> bool:
    """Write `entry` into `buffer` at slot j of dimension `dim`, where `accepted`. Whether it was done.

    The shape of `entry` is that of `buffer` without dimension `dim`.
    """
    return bool(_try("store", entry, buffer, entry, dim, j, accepted))


def scaled(factor: Tensor, c: Tensor | None, sizes: Tensor | None = None) -> Tensor | None:
    """Give c_i * factor_i diag(sizes) in bf16, for factors (n, m, r, length), c (n, m), sizes (n, length).

    It is used by `LowRankWindow`.
    """
    return _try("scaled", factor, factor, c, sizes)


def decode(
    codes: Tensor, scales: Tensor | None, out: tuple[torch.dtype, torch.dtype], c: Tensor | None, sizes: Tensor | None
) -> Tensor | None:
    """Compute `scaled` for codes (n, m, r, length) that `encode` made, with scales for int8 codes.

    `out` holds two dtypes: that of the arithmetic and that of the result.
    """
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
    """Compute p <- decay * p + scale * diag(x) (u + weight * e) diag(y) in place, for n matrices in any float dtype.

    Args:
        params: p.
        update: u, (n, rows, cols).
        scale, decay: numbers, or 0-D tensors on the device.
        rounding: counts the random numbers by which bf16 parameters are rounded stochastically; None: round to nearest.
        sizes: x (n, rows) and y (n, cols); None: ones.
        kept: e and the weights (n,); None: there is no e.
        first: the first row, where p and u are some rows of n matrices. x and e are always those of the whole matrices.

    Returns:
        Whether it was done.
    """
    return bool(_try("add", update, params, update, scale, decay, rounding, sizes, kept, first))


def _try_sparse(name: str, example: Tensor, *args: Any) -> Any:
    """`_try`; None for one row that is longer than `_LONGEST_ROW`."""
    return None if len(example) == 1 and example.numel() > _LONGEST_ROW else _try(name, example, *args)
