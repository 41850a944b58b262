"""Codecs against the numbers they stored: exact sizes, error bounds for every entry, rounding that is right in the mean."""

import pytest
import torch

from hf_efcp.core.accumulated import Accumulated
from hf_efcp.core.codecs import BlockQuantizer, SparseCodec, decode_float8, encode_float8
from hf_efcp.core.compressors import BlockTopK
from hf_efcp.core.random import counted_uniform
from hf_efcp.kernels.constants import BLOCK

BITS = pytest.mark.parametrize("bits", [8, 4])
# One number, odd, one short block, exactly one, one and a half, several.
LENGTHS = pytest.mark.parametrize("cols", [1, 7, 100, BLOCK, BLOCK + 129, 3 * BLOCK])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def numbers(*shape, dtype=torch.float32, seed=0):
    """Blocks of very different sizes, with a few large entries."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) ** 3
    return (x * 10.0 ** torch.randint(-8, 8, (*shape[:-1], 1), generator=generator)).to(dtype)


def scale_of_entries(scale, cols):
    return scale.repeat_interleave(BLOCK, -1)[..., :cols]


@DTYPES
@LENGTHS
@BITS
def test_nearest_is_off_by_half_a_scale_and_stochastic_by_one(bits, cols, dtype):
    quantizer, x = BlockQuantizer(bits), numbers(2, 5, cols, dtype=dtype)
    for noise, bound in ((None, 0.5), (torch.rand(x.shape, generator=torch.Generator().manual_seed(1)), 1.0)):
        codes, scale = quantizer.encode(x, noise)
        assert (tuple(codes.shape), tuple(scale.shape)) == quantizer.shapes(2, 5, cols)
        assert codes.shape[-1] == (cols if bits == 8 else (cols + 1) // 2) and codes.element_size() == 1
        found = quantizer.decode(codes, scale, cols)
        assert found.dtype == dtype and found.shape == x.shape
        error = (found - x).abs() / scale_of_entries(scale, cols)
        assert error.max() <= bound * (1 + 1e-5)
        # The largest of every block is stored exactly, up to rounding: no code is wasted.
        largest = torch.stack([part.abs().amax(-1) for part in x.split(BLOCK, -1)], -1)
        torch.testing.assert_close(scale * (2 ** (bits - 1) - 1), largest, rtol=1e-5, atol=0)


@LENGTHS
def test_four_bits_pack_and_unpack_the_same_neighbours(cols):
    x = torch.arange(2 * cols).view(2, cols).remainder(15).sub(7).float()
    x[:, ::BLOCK] = 7
    codes, scale = BlockQuantizer(4).encode(x)
    assert (scale == 1).all()
    assert torch.equal(BlockQuantizer(4).decode(codes, scale, cols), x)
    assert torch.equal((codes[:, 0] & 15).int() - 8, x[:, 0].int())


@BITS
def test_stochastic_rounding_is_right_in_the_mean(bits):
    quantizer, x = BlockQuantizer(bits), numbers(3, 40, seed=2)
    total, trials = torch.zeros_like(x, dtype=torch.float64), 4000
    for t in range(trials):
        noise = counted_uniform(torch.tensor(t), torch.tensor([5]), 3, 40)[0]
        codes, scale = quantizer.encode(x, noise)
        total += quantizer.decode(codes, scale, 40)
    bias = (total / trials - x) / scale_of_entries(scale, 40)
    assert bias.abs().max() < 4.5 * 0.5 / trials**0.5  # of the standard deviation, at most half a scale
    assert bias.mean().abs() < 4 * 0.5 / (trials * x.numel()) ** 0.5


def test_counted_uniform_is_uniform_and_that_of_the_whole():
    whole = counted_uniform(torch.tensor(3), torch.tensor([4, 9]), 50, 64)
    assert whole.min() > 0 and whole.max() < 1 and (whole.mean() - 0.5).abs() < 0.02
    assert torch.equal(whole[:, 20:30], counted_uniform(torch.tensor(3), torch.tensor([4, 9]), 10, 64, (20, 0)))


@DTYPES
@BITS
def test_zero_tiny_and_not_finite_blocks(bits, dtype):
    quantizer = BlockQuantizer(bits)
    x = torch.zeros(5, BLOCK + 3, dtype=dtype)
    x[1] = torch.finfo(dtype).tiny / 4
    x[2, 1], x[3, 2] = torch.nan, -torch.inf
    x[4] = torch.finfo(dtype).max
    codes, scale = quantizer.encode(x, torch.full_like(x, 0.9))
    found = quantizer.decode(codes, scale, BLOCK + 3)
    assert (found[:2] == 0).all() and (scale[:2] == 0).all()
    assert found[2:4, :BLOCK].isnan().all() and (found[2:4, BLOCK:] == 0).all()
    assert found[4].isfinite().all() and (found[4] / x[4] - 1).abs().max() < 1e-5
    empty = quantizer.zeros(2, 300, scale_dtype=dtype, device="cpu")
    assert (quantizer.decode(*empty, 300) == 0).all()


def test_float8_keeps_four_bits_of_what_is_at_most_one():
    x = torch.cat([torch.tensor([0.0, 1.0, -1.0, 0.5]), numbers(1, 5000)[0].clamp(-1, 1)])
    found = decode_float8(encode_float8(x), torch.float32)
    assert torch.equal(found[:4], x[:4])
    assert ((found - x).abs() <= torch.clamp_min(x.abs() / 16, 4e-6)).all()
    assert decode_float8(encode_float8(torch.tensor([torch.nan])), torch.float64).isnan().all()


@DTYPES
@pytest.mark.parametrize(("cols", "density", "block"), [(1, 0.1, 4), (50, 0.1, 16), (2100, 0.01, 1024), (1024, 1.0, 1024)])
def test_sparse_entries_take_16_bits_and_keep_their_index(cols, density, block, dtype):
    top = BlockTopK(cols, density, block)
    codec = SparseCodec(top.block, top.full, top.kept, top.kept_tail)
    indices, values = top.compress(Accumulated(numbers(2, 4, cols, dtype=dtype)), torch.tensor(0)).parts
    values[0, 0] = 0
    entries, scales = codec.encode(indices, values)
    assert entries.dtype == torch.int16 and scales.dtype == torch.uint8 and entries.shape == values.shape
    assert scales.shape == (2, 4, -(-cols // top.block))
    found_indices, found = codec.decode(entries, scales, dtype)
    assert torch.equal(found_indices, indices.long()) and found.dtype == dtype
    of_entry = (top.offsets("cpu") // top.block).expand(values.shape)
    largest = torch.zeros(scales.shape, dtype=dtype).scatter_reduce(2, of_entry, values.abs(), "amax")
    # The step is the power of two that gives the largest value 16 to 31 steps.
    assert ((found - values).abs() <= largest.gather(2, of_entry) / 15.5 / 2).all()
    assert (found[0, 0] == 0).all()
    again = codec.encode(indices, found)
    assert torch.equal(codec.decode(*again, dtype)[1], found)


def test_sparse_entries_that_are_not_finite_stay_so():
    codec = SparseCodec(4, 1, 2, 2)
    indices = torch.zeros(3, 4, dtype=torch.int16)
    values = torch.tensor([[1.0, torch.inf, 1.0, 2.0], [torch.nan, 0.0, 1.0, 2.0], [3e38, 1.0, 1e-45, 0.0]])
    _, found = codec.decode(*codec.encode(indices, values), torch.float32)
    assert not found[:2, :2].isfinite().any()
    assert torch.equal(found[:2, 2:], values[:2, 2:])
    assert found[2].isfinite().all() and (found[2, 0] / 3e38 - 1).abs() < 0.03
    with pytest.raises(ValueError, match="1024"):
        SparseCodec(1025, 1, 2, 2)
