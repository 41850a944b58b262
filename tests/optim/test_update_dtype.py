"""`window_update_dtype` in whole steps: close to fp32, resumed bit for bit, without effect where it would cost time."""

import logging

import pytest
import torch

from hf_efcp.engine import formats
from hf_efcp.options import OptionError
from tests.optim.helpers import differences, resumed, snapshot, started, train
from tests.reference import info, make, names, parameters, relative

WITH_PRODUCTS = [*names(windowed=True, compression="low rank"), *names(windowed=True, compression="dense")]
BF16 = {"window_update_dtype": "bf16"}
STORED = [{}, {"window_dtype": "bf16"}, {"window_format": "low_bit"}]
EVERY = pytest.mark.parametrize("name", WITH_PRODUCTS)


@pytest.fixture(autouse=True)
def bf16_is_fast(monkeypatch):
    """On every machine."""
    monkeypatch.setattr(formats, "multiplies_bf16", lambda device: True)


def moved(name, **options):
    """How far a run has come; 7 steps from the same start."""
    _, params = started(name, steps=7, **options)
    start = parameters(dtype=params[0].dtype)
    return torch.cat([(p.detach() - q.detach()).double().flatten() for p, q in zip(params, start, strict=True)])


@EVERY
@pytest.mark.parametrize("stored", STORED, ids=str)
@pytest.mark.parametrize("options", [{"weight_decay": 0.1}, {"momentum": 0.5, "scope": "layer"}], ids=str)
def test_a_run_is_close_to_that_of_fp32(name, stored, options):
    exact, fast = (moved(name, **stored, **options, **more) for more in ({}, BF16))
    assert relative(fast, exact) < 2e-2
    has_product = info(name).compression == "low rank" or stored.get("window_dtype") == "bf16"
    assert torch.equal(fast, exact) != has_product


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_parameters_of_few_bits(name, dtype):
    exact, fast = (moved(name, dtype=dtype, **more) for more in ({}, BF16))
    assert relative(fast, exact) < 0.2


@EVERY
def test_fp64_stays_as_it_is(name):
    stored = {"window_dtype": "bf16"}
    assert torch.equal(moved(name, dtype=torch.float64, **stored), moved(name, dtype=torch.float64, **stored, **BF16))


@EVERY
@pytest.mark.parametrize("stored", STORED, ids=str)
def test_the_state_is_the_same(name, stored):
    optimizer, _ = started(name, **stored, **BF16)
    plain, _ = started(name, **stored)
    assert optimizer.memory_footprint() == plain.memory_footprint()
    assert make(name, parameters(dtype=torch.float32), window_size=4, **stored, **BF16).estimate_footprint() == (
        optimizer.memory_footprint()
    )


@EVERY
@pytest.mark.parametrize("stored", STORED, ids=str)
def test_a_resumed_run_is_the_same_bit_for_bit(name, stored):
    optimizer, params = started(name, **stored, **BF16)
    other, others = resumed(name, optimizer, params, **stored, **BF16)
    for run in ((optimizer, params), (other, others)):
        train(*run, 6, 12)
    assert differences(snapshot(optimizer, params), snapshot(other, others)) == []


@EVERY
def test_a_run_may_go_on_with_another_product(name):
    optimizer, params = started(name)
    other, others = resumed(name, optimizer, params, **BF16)
    train(other, others, 6, 8)
    assert other.options.window_update_dtype == torch.bfloat16


@EVERY
def test_without_instructions_for_bf16_fp32_stays_and_the_log_says_so_once(name, monkeypatch, caplog):
    monkeypatch.setattr(formats, "multiplies_bf16", lambda device: False)
    with caplog.at_level(logging.WARNING, "hf_efcp"):
        assert torch.equal(moved(name, window_dtype="bf16"), moved(name, window_dtype="bf16", **BF16))
        moved(name, preset="measured")  # has it where it helps, and has nothing to say else
    lines = [record.getMessage().split(": ")[1] for record in caplog.records]
    assert lines == ["window_update_dtype=bfloat16 has no effect on this CPU"]
    moved(name, preset="measured", **BF16)  # who gives it wants to know
    assert caplog.records[-1].getMessage().split(": ")[1] == lines[0]


@pytest.mark.parametrize("value", ["fp32", "fp64", "fp16", torch.float32, 1])
def test_other_values_are_refused(value):
    with pytest.raises(OptionError, match=r"window_update_dtype=.*bfloat16"):
        make("efcp_lowrank_mfac", parameters(), window_update_dtype=value)


@pytest.mark.parametrize("name", names(compression="sparse", windowed=True))
def test_sparse_entries_have_no_product(name):
    with pytest.raises(OptionError, match="window_update_dtype=bfloat16: sparse entries are added one by one"):
        make(name, parameters(), **BF16)
