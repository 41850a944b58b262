"""Newton-Schulz against the recursion of each singular value, on spectra down to 1e-8."""

import pytest
import torch

from hf_efcp.core.newton_schulz import SCHEDULES, newton_schulz
from hf_efcp.kernels.devices import pretending
from tests.reference import relative

SPECTRA = {
    "equal": lambda r: torch.ones(r, dtype=torch.float64),
    "down to 1e-8": lambda r: torch.logspace(0, -8, r, dtype=torch.float64),
    "of rank 1": lambda r: torch.eye(r, dtype=torch.float64)[0],
}


def recursion(values, schedule, size=None):
    """Singular values after the five steps, from those of B."""
    x = values / ((values.norm() if size is None else size) + 1e-7)
    for a, b, c in SCHEDULES[schedule]:
        x = a * x + b * x**3 + c * x**5
    return x


def matrices(spectrum, n=2, long=20, r=6):
    """B, with U and V^T."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, k, r, generator=generator, dtype=torch.float64))[0] for k in (long, r))
    values = SPECTRA[spectrum](r)
    return u * values @ v.mT, u, values, v.mT


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_every_singular_value_goes_its_own_way(spectrum, schedule):
    b, u, values, vt = matrices(spectrum)
    expected = u * recursion(values, schedule) @ vt
    assert relative(newton_schulz(b, schedule), expected) < 1e-12
    assert newton_schulz(b.float(), schedule).dtype == torch.float32
    assert relative(newton_schulz(b.float(), schedule).double(), expected) < 1e-4


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_on_a_gpu_it_is_in_bf16(schedule):
    b, u, values, vt = matrices("equal")
    with pretending("cuda"):
        assert 1e-3 < relative(newton_schulz(b.float(), schedule).double(), u * recursion(values, schedule) @ vt) < 0.05


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_values_that_are_not_small_come_near_1_and_small_ones_grow(schedule):
    values = torch.linspace(0.05, 1, 200, dtype=torch.float64)
    assert ((recursion(values, schedule, 1.0) > 0.6) & (recursion(values, schedule, 1.0) < 1.3)).all()
    assert recursion(torch.tensor(1e-8, dtype=torch.float64), schedule, 1.0) > 4e-6


def test_zeros_stay_zeros_and_one_of_a_batch_does_not_feel_the_others():
    b = matrices("equal")[0]
    b[0] = 0
    both, alone = newton_schulz(b), newton_schulz(b[1:])
    assert not both[0].any() and relative(both[1:], alone) < 1e-14
