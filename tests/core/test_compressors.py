"""Compressors against their definitions."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from hf_efcp.core.accumulated import Accumulated
from hf_efcp.core.cells import Cell, Turn
from hf_efcp.core.compressors import BlockTopK, Identity, PowerIteration

STEP = torch.tensor(3)


def factors(compressor, a):
    """P (n, rows, r) and Q (n, cols, r) of a."""
    return [part.mT for part in compressor.compress(Accumulated(a), STEP).parts]


@pytest.mark.parametrize(("cols", "block", "density"), [(10, 4, 0.5), (16, 4, 0.25), (7, 1024, 0.01), (2500, 1024, 0.01)])
def test_block_top_k_keeps_the_largest_of_every_block(cols, block, density):
    a = torch.randn(2, 5, cols, generator=torch.Generator().manual_seed(0))
    compressor = BlockTopK(cols, density, block)
    entry = compressor.compress(Accumulated(a), STEP)
    indices, values = entry.parts
    assert indices.dtype == torch.int16 and indices.shape == values.shape == (2, 5, compressor.per_row)
    dense = torch.zeros_like(a).scatter(2, indices.long() + compressor.offsets(a.device), values)
    assert torch.equal(entry.dense(), dense)
    for start in range(0, cols, block):
        piece, kept = a[..., start : start + block], dense[..., start : start + block]
        k = max(1, round(density * piece.shape[-1]))
        assert ((kept != 0).sum(-1) == k).all()
        assert torch.equal(kept[kept != 0], piece[kept != 0])
        smallest = kept.abs().masked_fill(kept == 0, torch.inf).amin(-1)
        assert (smallest >= piece.abs().masked_fill(kept != 0, 0).amax(-1)).all()


def test_block_indices_reach_the_end_of_the_largest_block():
    a = torch.zeros(1, 1, 32768)
    a[..., -1] = 1
    compressor = BlockTopK(32768, 1e-9, 32768)
    indices, values = compressor.compress(Accumulated(a), STEP).parts
    assert (indices.item(), values.item()) == (32767, 1.0)


def low_rank(rank, rows, cols, scale=1.0, n=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(n, size, rank, generator=generator, dtype=torch.float64) for size in (rows, cols))
    return scale * left @ right.mT


def power(n, cols, rank, dtype=torch.float64, **options):
    warm_start = Cell(torch.zeros(n, cols, rank, dtype=dtype), Turn(torch.arange(n)), dtype)
    return PowerIteration(warm_start, **options)


@pytest.mark.parametrize("scale", [1e-5, 1.0, 1e5])
def test_power_iteration_is_exact_on_matrices_of_its_rank(scale):
    a = low_rank(3, 20, 30, scale)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        p, q = factors(power(2, 30, 3, dtype), a.to(dtype))
        assert ((p @ q.mT).double() - a).norm() / a.norm() < tolerance
        torch.testing.assert_close(p.mT @ p, torch.eye(3, dtype=dtype).expand(2, 3, 3), rtol=0, atol=1e-6)


def test_warm_start_converges_to_the_best_approximation():
    a = torch.randn(1, 20, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    best = torch.linalg.svdvals(a)[0, 4:].norm()
    compressor, errors = power(1, 30, 4), []
    for _ in range(60):
        p, q = factors(compressor, a)
        compressor.commit()
        errors.append((a - p @ q.mT).norm() / best)
    assert errors[0] > 1.05 and errors[-1] < 1.001
    p, q = factors(power(1, 30, 4, power_iterations=60), a)
    torch.testing.assert_close((a - p @ q.mT).norm() / best, errors[-1])


def test_zero_start_recovers():
    """LoRA's B: the first gradients are zero, and a direction must be found when they stop being so."""
    compressor = power(2, 30, 3)
    p, q = factors(compressor, torch.zeros(2, 20, 30, dtype=torch.float64))
    compressor.commit()
    assert not q.any() and p.isfinite().all()
    a = low_rank(3, 20, 30)
    p, q = factors(compressor, a)
    assert (p @ q.mT - a).norm() / a.norm() < 1e-12


def test_redrawn_columns_differ_by_step_tensor_and_column_and_draw_from_no_generator():
    before = torch.get_rng_state()
    draws = [power(2, 30, 3).start(torch.tensor(s)) for s in (0, 1)]
    flat = torch.cat(draws).mT.reshape(12, 30)
    cosine = (flat / flat.norm(dim=1, keepdim=True)) @ (flat / flat.norm(dim=1, keepdim=True)).T
    assert (cosine - torch.eye(12)).abs().max() < 0.6
    assert torch.equal(torch.get_rng_state(), before)


def test_compress_without_commit_changes_nothing():
    a = low_rank(4, 20, 30)
    compressor = power(2, 30, 3)
    first, again = factors(compressor, a), factors(compressor, a)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True)) and not compressor.warm_start.buffer.any()


def test_identity():
    a = torch.randn(2, 3, 4)
    assert Identity().compress(Accumulated(a), STEP).parts[0] is a


@pytest.mark.parametrize("scale", [1e-30, 1e18])
def test_more_rounds_stay_in_range(scale):
    a = low_rank(3, 20, 30, scale).float()
    p, q = factors(power(2, 30, 3, torch.float32, power_iterations=3), a)
    assert (p.double() @ q.double().mT - a.double()).norm() / a.double().norm() < 1e-5


def test_places_of_a_step_that_is_only_counted_are_not_kept():
    grid = BlockTopK(10, 0.5, 4)
    with FakeTensorMode():
        assert isinstance(grid.offsets(torch.device("cpu")), FakeTensor)
    assert grid.offsets(torch.device("cpu")).tolist() == [0, 0, 4, 4, 8]
