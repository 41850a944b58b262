"""Counts against numbers worked out by hand, and what the roofline makes of them."""

import math

import pytest
import torch

from hf_efcp.bench import roofline
from hf_efcp.engine.costs import Count
from tests.bench.helpers import started

# Without a metric, whose passes are not counted.
COMMON = {"preset": "paper", "window_size": 32, "error_dtype": "bf16", "update_rms": 0.5}
# As in docs/benchmarks/roofline.md: (fp32, fp64, bytes) by phase.
SOLVE = (0, 32**3 / 3 + 2 * 32**2, 8 * 32**2 + 16 * 32)
BY_HAND = {
    ("efcp_lowrank_mfac", "rank=4"): {
        "compress": (49152, 0, 19392),
        "dots": (0, 117760, 61504),
        "feedback": (24576, 0, 8896),
        "solve": SOLVE,
        "update": (789504, 0, 63488 + 24960),
    },
    ("efcp_sparse_mfac", "density=0.25,block_size=16"): {
        "compress": (0, 0, 18624),
        "dots": (0, 52224, 148800),
        "feedback": (768, 0, 10944),
        "solve": SOLVE,
        "update": (52224, 0, 153600 + 24960),
    },
    ("efcp_dense_mfac", ""): {
        "compress": (0, 0, 12480),
        "dots": (0, 199680, 386880),
        "feedback": (0, 0, 12480),
        "solve": SOLVE,
        "update": (199680, 0, 399360 + 24960),
    },
}


def with_common(optim_args):
    given = dict(pair.split("=") for pair in optim_args.split(",") if pair)
    return ",".join(f"{key}={value}" for key, value in {**COMMON, **given}.items())


@pytest.mark.parametrize(("name", "optim_args"), BY_HAND)
def test_counts_are_those_worked_out_by_hand(name, optim_args):
    counts = started(name, with_common(optim_args))[0].costs()
    assert {phase: (c.fp32, c.fp64, c.bytes) for phase, c in counts.items()} == {
        phase: pytest.approx(numbers) for phase, numbers in BY_HAND[name, optim_args].items()
    }


def test_the_counts_of_microadam():
    """64 x 48 and 48 numbers, density 0.25, blocks of 16, m = 10: k = 12. Of each row: 24 bytes of codes, 4 of bounds."""
    counts = started("efcp_microadam", "density=0.25,block_size=16,window_size=10")[0].costs()
    state = 65 * (2 * (24 + 4) + 12 * 11 * (2 + 2)) + 2 * 2 * 4
    assert counts["compress"].bytes == pytest.approx(3120 * 4 + state)
    assert counts["compress"].fp32 == 13 * 3120 + 65 * 5 * 10 * 12
    assert counts["update"].bytes == 2 * 3120 * 4


def test_the_counts_of_ldadamw():
    """64 x 48, whose 48 columns are projected, r = 16, errors in bf16: P 48 x 16, m and v 16 x 64; 48 numbers have AdamW."""
    counts = started("efcp_ldadamw", "rank=16,error_dtype=bf16")[0].costs()
    state = 2 * (4 * (48 * 16 + 2 * 16 * 64) + 2 * 3072 + 4) + 2 * (4 * 2 * 48 + 4)
    assert counts["compress"].bytes == 3120 * 4 + state
    assert counts["compress"].fp32 == 12 * 3072 * 16 + 12 * 48
    assert counts["update"].bytes == 2 * 3120 * 4


def test_the_counts_of_dct_adamw():
    """64 x 48, whose 48 columns are transformed, r = 16, errors in bf16: i of 16, m and v 64 x 16; 48 numbers have AdamW."""
    counts = started("efcp_dct_adamw", "rank=16,error_dtype=bf16")[0].costs()
    state = 2 * (4 * (16 + 2 * 64 * 16) + 2 * 3072 + 4) + 2 * (4 * 2 * 48 + 4)
    assert counts["compress"].bytes == 3120 * 4 + state
    assert counts["compress"].fp32 == pytest.approx(3072 * (4 * 16 + 2.5 * math.log2(48) + 2) + 12 * 48)
    assert counts["update"].bytes == 2 * 3120 * 4


def test_the_counts_of_dash():
    """64 x 48 in four blocks of 32 x 24: L, R, both roots, m and v; eigenvectors in one step of ten; AdamW as above."""
    counts = started("efcp_dash", "block_size=32")[0].costs()
    state = 2 * 4 * (2 * 4 * (32**2 + 24**2) + 2 * 3072 + 1) + 2 * (4 * 2 * 48 + 4)
    assert counts["compress"].bytes == 3120 * 4 + state
    roots = 4 * 11 * (32**3 + 24**3) / 10
    assert counts["compress"].fp32 == pytest.approx(4 * 3072 * (32 + 24) + 16 * 3072 + roots + 12 * 48)
    assert counts["update"].bytes == 2 * 3120 * 4


def test_the_counts_of_trion():
    """64 x 48, whose 48 columns are transformed, r = 16, M in bf16: five times two products and a square; AdamW as above."""
    counts = started("efcp_trion", "rank=16,error_dtype=bf16")[0].costs()
    assert counts["compress"].bytes == 3120 * 4 + 2 * (2 * 3072 + 4) + 2 * (4 * 2 * 48 + 4)
    steps = 5 * (2 * 2 * 64 * 16**2 + 2 * 16**3)
    assert counts["compress"].fp32 == pytest.approx(3072 * (4 * 16 + 2.5 * math.log2(48) + 2) + steps + 12 * 48)


def test_counts_follow_the_options():
    def total(optim_args, name="efcp_lowrank_mfac", dtype=torch.float32):
        counts = started(name, with_common(optim_args), dtype=dtype)[0].costs()
        return sum(counts.values(), Count()), counts

    plain, _ = total("")
    d = 64 * 48 + 48
    assert total("momentum=0.5")[0].bytes == plain.bytes + 8 * d
    assert total("weight_decay_mode=l2")[0].bytes == plain.bytes + 4 * d
    assert total("error_dtype=fp32")[0].bytes == plain.bytes + 2 * 2 * 64 * 48
    assert total("power_iterations=3")[0].fp32 == plain.fp32 + 2 * 4 * 64 * 48 * 4
    assert total("", dtype=torch.bfloat16)[0].bytes == plain.bytes - 3 * 2 * d
    assert total("scope=layer")[1]["solve"].fp64 == 2 * total("")[1]["solve"].fp64
    everything, _ = total("error_dtype=fp64", dtype=torch.float64)
    assert everything.fp32 == 0 and everything.fp64 == plain.fp32 + plain.fp64
    assert total("window_size=32", "efcp_lowrank_ggt")[1]["solve"].fp64 == pytest.approx(14 / 3 * 32**3)


def test_roofline_is_the_larger_of_two_times():
    counts = {"dots": Count(fp32=6e9, fp64=1e9, bytes=5e9), "update": Count(bytes=1e9)}
    found = roofline.report(counts, {"fp32_flops": 2e9, "fp64_flops": 1e9, "bandwidth": 2e9})
    assert (found["ms"], found["bound"], found["compute_ms"], found["memory_ms"]) == (4000, "compute", 4000, 3000)
    assert found["phases_ms"] == {"dots": 4000, "update": 500}
    assert roofline.report(counts, {"fp32_flops": 2e9, "fp64_flops": 1e9, "bandwidth": 1e9})["ms"] == 6000
