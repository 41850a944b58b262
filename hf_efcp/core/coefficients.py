"""Coefficients c of the update u = G^T c: pure spectral functions of K in fp64, batched over Gram matrices.

The window G holds m entries g_i, and K_ij = <g_i, g_j>.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .deferred import readable

# By entry dtype. Where `cancellation` is above _CANCELLATION / eps, the null space of K has to be cut away.
_CANCELLATION = {torch.float32: 1e-5, torch.float64: 1e-10}
# Eigenvalues of the entries' correlation matrix below this fraction of the largest are rounding noise, not directions.
_NULL_SPACE = {torch.float32: 1e-10, torch.float64: 1e-13}
# The same fraction for the eigenvalues of the entries' covariance.
_CENTERED_NULL_SPACE = 1e-10
# GGT's decay: entries with a smaller D_ii count as forgotten, because D^-1 would blow them up.
_FORGOTTEN = 1e-8


def weights(gram: Tensor, ages: Tensor, momentum: float, nesterov: bool = False, normalized: bool = False) -> Tensor:
    """Give the weights w of the vector G^T w that is preconditioned: e_j, or w_i = (1-beta) beta^age(i).

    Zero entries get no weight: they have no direction, and only add to the null space of K.

    Args:
        gram: (groups, m, m) fp64.
        ages: (m,) int64, 0 for the newest slot.
        momentum: beta in [0, 1).
        nesterov: w <- beta w + (1-beta) e_j afterwards.
        normalized: w <- w / sum(w) before that.

    Returns:
        (groups, m) fp64.
    """
    alive, newest = gram.diagonal(dim1=-2, dim2=-1) > 0, (ages == 0).double()
    w = torch.where(alive, (1 - momentum) * momentum ** ages.double() if momentum else newest, 0.0)
    if normalized:
        total = w.sum(-1, keepdim=True)
        w = w / torch.where(total > 0, total, 1.0)
    return momentum * w + (1 - momentum) * torch.where(alive, newest, 0.0) if nesterov else w


def mfac(
    gram: Tensor,
    w: Tensor,
    damping: Tensor | float,
    divisor: Tensor | float,
    entry_dtype: torch.dtype,
    centered: Tensor | None = None,
) -> Tensor:
    """Give c = N (M K + N*damping*I)^-1 w, so that G^T c = (damping*I + G^T M G / N)^-1 G^T w.

    The form is M-FAC's (arXiv 2107.03356) for a preconditioned vector in the span of the window. It has no difference of two
    nearly equal vectors. Woodbury's form x/damping - G^T(...) has one, and loses 3e-2 in fp32 at damping 1e-6.

    Args:
        gram: K, (groups, m, m) fp64.
        w: (groups, m) fp64.
        damping: a number or (groups,).
        divisor: N, a number or a 0-D tensor: m, or the number of filled slots.
        entry_dtype: the dtype in which G^T c will be summed.
        centered: the filled slots, (m,) bool. M subtracts the mean over them, see `subtract_mean`. None: M = I.

    Returns:
        (groups, m) fp64.
    """
    shift = (gram.new_ones(gram.shape[0]) * (damping * divisor))[:, None]
    if centered is not None:
        return _centered_mfac(gram, w, shift, divisor, entry_dtype, centered)
    factor, failed = torch.linalg.cholesky_ex(gram + torch.diag_embed(shift.expand_as(w)))
    c = divisor * _solve(factor, w)
    limit = _CANCELLATION[entry_dtype] / torch.finfo(entry_dtype).eps
    bad = (failed != 0) | ~(cancellation(gram, c) <= limit)
    if not readable(c.device):
        return torch.where(bad[:, None], _within_span(gram, w, shift, divisor, entry_dtype), c)
    if bad.any():
        c[bad] = spectral(gram[bad], w[bad], lambda s: divisor / (s + shift[bad]), entry_dtype)
    return c


def _within_span(gram: Tensor, w: Tensor, shift: Tensor, divisor: Tensor | float, entry_dtype: torch.dtype) -> Tensor:
    """Give c = N (K + N*damping*I)^-1 w up to the null space of dependent entries. No eigenvalues, so the host does not wait.

    Let K = S R S as in `spectral`, F F^T = R + delta I, and X = (R + delta I)^-1 R, which is 1 in the span of R and nearly 0 in
    its null space. C = X^T X takes the place of the kept eigenvectors. R is outermost on both sides of C, so that the rounding
    errors of X, which lie in the null space, do not reach C. There S of entries of different sizes would blow them up:

        B = S C F,   c = N S^-1 C F^-T (N*damping*I + B^T B)^-1 B^T w
    """
    norms = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    inverse = torch.where(norms > 0, 1 / norms, 0.0)
    correlations = inverse[..., None] * gram * inverse[..., None, :]
    factor = torch.linalg.cholesky_ex(correlations + torch.diag_embed(torch.full_like(w, _NULL_SPACE[entry_dtype]))).L
    half = torch.linalg.solve_triangular(factor, correlations, upper=False)
    span = torch.linalg.solve_triangular(factor.mT, half, upper=True)
    span = span.mT @ span
    b = norms[..., None] * (span @ factor)
    z = _solve(torch.linalg.cholesky_ex(b.mT @ b + torch.diag_embed(shift.expand_as(w))).L, _apply(b.mT, w))
    y = torch.linalg.solve_triangular(factor.mT, z[..., None], upper=True)
    c = divisor * inverse * (span @ y).squeeze(-1)
    return torch.where(c.isfinite().all(-1, keepdim=True), c, 0.0)


def _solve(factor: Tensor, x: Tensor) -> Tensor:
    """Give (L L^T)^-1 x for L (groups, m, m). cholesky_solve is not used, since it waits for a GPU in older versions of torch."""
    half = torch.linalg.solve_triangular(factor, x[..., None], upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True).squeeze(-1)


def _centered_mfac(
    gram: Tensor, w: Tensor, shift: Tensor, divisor: Tensor | float, entry_dtype: torch.dtype, filled: Tensor
) -> Tensor:
    """Compute `mfac` with M K, which is not symmetric, by LU."""
    matrix = subtract_mean(gram, filled) + torch.diag_embed(shift.expand_as(w))
    c = divisor * torch.linalg.solve_ex(matrix, w[..., None]).result.squeeze(-1)
    return _without_null_space(gram, c, entry_dtype)


def _without_null_space(gram: Tensor, c: Tensor, entry_dtype: torch.dtype) -> Tensor:
    """Cut the part in dependent entries' null space out of the c that have a large one: it would be noise in G^T c."""
    bad = ~(cancellation(gram, c) <= _CANCELLATION[entry_dtype] / torch.finfo(entry_dtype).eps)
    if readable(c.device) and not bad.any():
        return c
    return torch.where(bad[:, None], spectral(gram, c.nan_to_num(), torch.ones_like, entry_dtype), c)


def subtract_mean(x: Tensor, filled: Tensor) -> Tensor:
    """Give M x with M = I - 1 1^T / n on the n filled slots, so that G^T M G / n is the entries' covariance.

    Args:
        x: (groups, m, ...) fp64, with zeros in slots that are not filled.
        filled: (m,) bool.
    """
    mean = x.sum(1, keepdim=True) / filled.sum().clamp_min(1)  # none: the first step was refused
    return x - mean * filled.view(1, -1, *[1] * (x.ndim - 2))


def ggt(
    gram: Tensor,
    w: Tensor,
    decay: Tensor,
    eps: Tensor | float,
    entry_dtype: torch.dtype,
    centered: Tensor | None = None,
) -> Tensor:
    """Give c = D phi(D K D) D^-1 w with phi(s) = 1 / (sqrt(s) + eps), so that G^T c = ((A^T A)^1/2 + eps*I)^-1 G^T w, A = D G.

    With `centered`, D = I and G^T c = ((G^T M G)^1/2 + eps*I)^-1 G^T w, by

        c = phi(0) w + M V psi(s) V^T M K w,   M K M = V diag(s) V^T,   psi(s) = (phi(s) - phi(0)) / s

    This is full-matrix Adagrad on the window (GGT, arXiv 1806.02958). Both sides take the decayed entries A. The update would be
    off by tens of percent with the eigenvectors of D K D but entries without decay.

    Args:
        gram: K, (groups, m, m) fp64.
        w: (groups, m) fp64.
        decay: the diagonal of D, (m,) fp64: beta2^age.
        eps: a number or (groups,), in units of the gradient's norm; 0 where there is no gradient yet.
        entry_dtype: the dtype in which G^T c will be summed.
        centered: the filled slots, (m,) bool; None: M = I.

    Returns:
        (groups, m) fp64.
    """
    eps = (gram.new_ones(len(gram)) * eps)[:, None]
    if centered is not None:
        eps = torch.where(eps > 0, eps, 1.0)  # eps = 0: there is no gradient yet to precondition
        s, v = torch.linalg.eigh(subtract_mean(subtract_mean(gram, centered).mT, centered))
        # M K M always has the eigenvalue 0, at which psi is infinite.
        kept = s > _CENTERED_NULL_SPACE * s[..., -1:]
        s = torch.where(kept, s, 1.0)
        psi = torch.where(kept, (1 / (s.sqrt() + eps) - 1 / eps) / s, 0.0)
        c = w / eps + _apply(v, psi * _apply(v.mT, subtract_mean(_apply(gram, w), centered)))
        return _without_null_space(gram, c, entry_dtype)
    known = decay >= _FORGOTTEN
    decay = torch.where(known, decay, 0.0)
    inner_w = torch.where(known, w / decay, 0.0)
    decayed = gram * decay * decay[:, None]
    return decay * spectral(decayed, inner_w, lambda s: 1 / (s.sqrt() + eps), entry_dtype)


def cancellation(gram: Tensor, c: Tensor) -> Tensor:
    """Give kappa = (sum c_i^2 |g_i|^2)^1/2 / |G^T c| for each Gram matrix. 1 to 3 is healthy; a zero update has 0."""
    terms = (c.square() * gram.diagonal(dim1=-2, dim2=-1)).sum(-1).sqrt()
    return torch.where(terms > 0, terms / quadratic(gram, c).sqrt(), 0.0)


def quadratic(gram: Tensor, c: Tensor) -> Tensor:
    """Give |G^T c|^2 = c^T K c, (groups,), at least 0."""
    return (c * _apply(gram, c)).sum(-1).clamp_min(0)


def spectral(gram: Tensor, w: Tensor, function: Callable[[Tensor], Tensor], entry_dtype: torch.dtype) -> Tensor:
    """Give function(K) w, without the null space of dependent entries.

    The correlations R show which entries depend on each other: K = S R S with S_ii = |g_i|. In K itself, one huge gradient would
    make all others look like noise. With R = V L V^T over the kept eigenvalues, M = L^1/2 V^T S^2 V L^1/2 is G G^T in an
    orthonormal basis of the span, and function(K) = S^-1 V L^-1/2 function(M) L^1/2 V^T S.

    Args:
        gram: K, (groups, m, m) fp64.
        w: (groups, m) fp64.
        function: eigenvalues (groups, m) -> values (groups, m), fp64.
        entry_dtype: the dtype in which G^T c will be summed.
    """
    norms = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    inverse = torch.where(norms > 0, 1 / norms, 0.0)
    eigenvalues, v = torch.linalg.eigh(inverse[..., None] * gram * inverse[..., None, :])
    kept = eigenvalues > _NULL_SPACE[entry_dtype] * eigenvalues[..., -1:]
    root = torch.where(kept, eigenvalues, 0.0).sqrt()
    scaled = norms[..., None] * v * root[..., None, :]  # S V L^1/2
    s, q = torch.linalg.eigh(scaled.mT @ scaled)
    # Small eigenvalues carry the rounding error of the largest: none is taken for less than this error.
    s = s.maximum(torch.finfo(s.dtype).eps * s[..., -1:])
    values = torch.where(s > 0, function(s.clamp_min(0)), 0.0)
    x = values * _apply(q.mT, _apply(scaled.mT, w))
    x = torch.where(kept, 1 / root, 0.0) * _apply(q, x)
    return inverse * _apply(v, x)


def _apply(matrix: Tensor, x: Tensor) -> Tensor:
    return (matrix @ x[..., None]).squeeze(-1)
