"""Figures of a window method's step that cost nothing: norms and cosines are entries of K."""

from __future__ import annotations

import torch

from ..core.coefficients import cancellation, quadratic
from .setup import Setup


def of_last_step(setup: Setup) -> dict[str, float]:
    """Give figures of the last accepted step; before the first accepted step, at most the number of refused steps.

    With scope="layer", norms are over all tensors, and kappa is the largest of the tensors'. The two error figures read the error
    feedback once, here and not in the step. All other figures come from K and c.

    Returns:
        step, skipped_steps: entries written, and steps refused for a gradient that is not finite.
        rows: filled slots of the window.
        row_norm: |c_j|, of the newest entry. update_norm: |u|, rescaled, but before lr, momentum and weight decay.
        update_rms: |u| / sqrt(d).
        cosine_update_row: between u and the newest entry. cosine_rows: mean |cosine| of the newest entry to the others.
        kappa: (sum c_i^2 |c_i|^2)^1/2 / |u|, the cancellation in G^T c; 1 to 3 is healthy.
        weight_newest: share of the newest entry in sum_i |c_i| |entry_i|. weight_age: mean age under these shares, in steps.
        A probed step also has (see `of_window`):
        condition: largest over smallest eigenvalue of K. directions: (sum of them)^2 / sum of their squares.
        weight_age_0, weight_age_1, weight_age_2_3, ...: shares of the entries of these ages.
        error_norm: |e| (with residual="momentum": of its running mean). error_share: |e|^2 / (|e|^2 + |c_j|^2), the share that
            compression holds back. Both are left out where several processes train, because each has a part of
            e, and processes do not communicate here.
    """
    gram = setup.counters
    if setup.last is None or gram.step == 0:
        skipped = int(gram.skipped)
        return {"step": float(gram.step), "skipped_steps": float(skipped)} if skipped else {}
    c, j, k = setup.last, (gram.step - 1).view(1) % gram.window_size, gram.matrix
    squares = k.diagonal(dim1=-2, dim2=-1)
    newest = k[:, :, j].squeeze(-1)  # (groups, m)
    row = squares[:, j].sum().sqrt()
    update = (quadratic(k, c).sum() + setup.rest).sqrt()
    shares = (c.abs() * squares.sqrt()).sum(0)
    shares = shares / shares.sum().clamp_min(torch.finfo(shares.dtype).tiny)
    others = newest.sum(0).abs() / (squares.sum(0).sqrt() * row)
    others = others[others.isfinite() & (gram.ages(j) > 0)]
    values = {
        "step": gram.step,
        "skipped_steps": gram.skipped,
        "rows": gram.filled,
        "row_norm": row,
        "update_norm": update,
        "update_rms": _ratio(update, setup.size**0.5),
        "cosine_update_row": _ratio((newest * c).sum(), row * update),
        "cosine_rows": others.mean() if len(others) else 0.0,
        "kappa": cancellation(k, c).max(),
        "weight_newest": shares[j],
        "weight_age": (shares * gram.ages(j)).sum(),
    }
    if setup.probe is not None:
        values |= of_window(k, shares, gram.ages(j), int(gram.filled))
    if setup.placement.alone:
        cells = [cell for s in setup.stacks if (cell := s.error or s.residual) is not None]
        error = sum(cell.square() for cell in cells)
        values |= {"error_norm": error**0.5, "error_share": _ratio(error, error + float(row) ** 2)}
    return {name: float(value) for name, value in values.items()}


def of_window(k: torch.Tensor, shares: torch.Tensor, ages: torch.Tensor, filled: int) -> dict[str, float]:
    """Give figures of the whole window from K, and the weight of its entries by age.

    Args:
        k: (groups, m, m) fp64.
        shares: of each entry in the update, (m,).
        ages: of each entry, (m,).
        filled: how many entries there are.
    """
    values = torch.linalg.eigvalsh(k[:, :filled, :filled].cpu()).clamp_min(0)
    largest = values[:, -1].clamp_min(torch.finfo(values.dtype).tiny)
    least = torch.maximum(values[:, 0], torch.finfo(values.dtype).eps * largest)  # less than that is rounding
    sums = values.sum(1).square() / values.square().sum(1).clamp_min(torch.finfo(values.dtype).tiny)
    found = {"condition": float((largest / least).max()), "directions": float(sums.mean())}
    by_age = torch.zeros(len(ages), dtype=torch.float64).index_add_(0, ages.cpu(), shares.cpu())
    first = 0
    while first < filled:
        end = min(len(ages), max(1, 2 * first))
        name = str(first) if end == first + 1 else f"{first}_{end - 1}"
        found[f"weight_age_{name}"] = float(by_age[first:end].sum())
        first = end
    return found


def _ratio(a: torch.Tensor | float, b: torch.Tensor | float) -> float:
    return float(a) / float(b) if float(b) > 0 else 0.0
