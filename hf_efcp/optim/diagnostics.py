"""What a step can tell about itself for free: norms and cosines are entries of K."""

from __future__ import annotations

import torch

from ..core.coefficients import cancellation, quadratic


class DiagnosticsMixin:
    """Figures of a WindowedOptimizer's last step."""

    @torch.no_grad()
    def diagnostics(self) -> dict[str, float]:
        """Figures of the last step that was taken; before the first, at most the number of skipped ones.

        With scope="layer" norms are over all tensors, and of kappa the largest is given. Everything but the two error figures
        comes from K and c; those read the error feedback once, here and not in the step.

        Returns:
            step, skipped_steps: rows written, and steps refused for a gradient that is not finite.
            rows: filled slots of the window.
            row_norm: |c_j|, the newest row. update_norm: |u|, rescaled and before lr, momentum and weight decay.
            update_rms: |u| / sqrt(d).
            cosine_update_row: between u and the newest row. cosine_rows: mean |cosine| of the newest row to the others.
            kappa: (sum c_i^2 |row_i|^2)^1/2 / |u|, the cancellation in G^T c; 1 to 3 is healthy.
            weight_newest: share of the newest row in sum_i |c_i| |row_i|. weight_age: mean age under these shares, in steps.
            error_norm: |e|. error_share: |e|^2 / (|e|^2 + |c_j|^2), what compression holds back. Neither where the state is
                sharded or comm="factors": each process has a part of e, and processes do not meet here.
        """
        if self._last is None or self._gram.step == 0:
            skipped = 0 if self._gram is None else int(self._gram.skipped)
            return {"step": float(self._gram.step), "skipped_steps": float(skipped)} if skipped else {}
        c, j = self._last, (self._gram.step - 1).view(1) % self._gram.window_size
        gram = self._gram.matrix
        squares = gram.diagonal(dim1=-2, dim2=-1)
        newest = gram[:, :, j].squeeze(-1)  # (groups, m)
        row = squares[:, j].sum().sqrt()
        update = quadratic(gram, c).sum().sqrt()
        shares = (c.abs() * squares.sqrt()).sum(0)
        shares = shares / shares.sum().clamp_min(torch.finfo(shares.dtype).tiny)
        others = newest.sum(0).abs() / (squares.sum(0).sqrt() * row)
        others = others[others.isfinite() & (self._gram.ages(j) > 0)]
        values = {
            "step": self._gram.step,
            "skipped_steps": self._gram.skipped,
            "rows": self._gram.filled,
            "row_norm": row,
            "update_norm": update,
            "update_rms": update / self._coordinates**0.5,
            "cosine_update_row": _ratio((newest * c).sum(), row * update),
            "cosine_rows": others.mean() if len(others) else 0.0,
            "kappa": cancellation(gram, c).max(),
            "weight_newest": shares[j],
            "weight_age": (shares * self._gram.ages(j)).sum(),
        }
        if self._several is None:
            error = sum(float(s.feedback.square()) for s in self._stacks)
            values |= {"error_norm": error**0.5, "error_share": _ratio(error, error + float(row) ** 2)}
        return {name: float(value) for name, value in values.items()}


def _ratio(a, b) -> float:
    return float(a) / float(b) if float(b) > 0 else 0.0
