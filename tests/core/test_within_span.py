"""M-FAC's coefficients of dependent entries on a GPU, which has no eigenvalues, against those by eigenvalues."""

import pytest
import torch

from hf_efcp.core.coefficients import _within_span, spectral
from tests.reference import relative

M, D = 16, 24


# The ratio of the largest entry to the smallest is 10^spread; each direction is there about twice.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-8), (torch.float64, 1e-4)], ids=str)
@pytest.mark.parametrize("damping", [1e-4, 1.0])
@pytest.mark.parametrize("spread", [0, 3, 4])
def test_dependent_entries_of_different_sizes(spread, damping, dtype, tolerance):
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(M // 2 + 1, D, generator=generator, dtype=torch.float64)
        chosen = torch.randint(0, len(directions), (M,), generator=generator)
        sizes = 10 ** (spread * (torch.rand(M, 1, generator=generator, dtype=torch.float64) - 0.5))
        window = directions[chosen] * 2.0 ** sizes.log2().round()
        gram, w, shift = (window @ window.T)[None], torch.zeros(1, M, dtype=torch.float64), torch.full((1, 1), M * damping)
        w[0, M // 2] = 1
        c = _within_span(gram, w, shift, M, dtype)
        expected = spectral(gram, w, lambda s, shift=shift: M / (s + shift), dtype)
        assert relative(c @ window, expected @ window) < tolerance
