"""memory_budget: a choice that fits, the same everywhere, kept on resuming, or an error that says what would do."""

import copy
import logging
import math
import pickle
import re

import numpy as np
import pytest
import torch

import hf_efcp
from hf_efcp.options import OptionError, parse_bytes
from hf_efcp.registry import get_optimizer_info
from tests.optim.helpers import WINDOWED, differences, gradients_at, snapshot, train
from tests.reference import info, parameters

SHAPES = [(200, 64), (64, 200), (64, 64), (64,), (200,), (3, 64)]
COUNT = sum(torch.Size(s).numel() for s in SHAPES)


def build(name, budget, shapes=SHAPES, **options):
    params = parameters(shapes, torch.float32)
    return get_optimizer_info(name).cls(params, lr=0.01, update_rms=0.1, memory_budget=budget, **options), params


def chosen(optimizer):
    optimizer.memory_footprint()
    o = optimizer.options
    return o.window_size, o.window_format, o.window_dtype, o.error_format, o.error_dtype


@WINDOWED
def test_the_budget_is_kept_and_used(name):
    fits = 0
    for budget in [2**k * COUNT for k in range(0, 14)]:
        try:
            optimizer, params = build(name, budget)
            held = sum(optimizer.memory_footprint().values())
        except OptionError as error:
            assert "the least possible state" in str(error)
            assert fits == 0
            continue
        fits += 1
        assert held <= budget
        gradients_at(0, params)
        optimizer.step()
        assert sum(optimizer.memory_footprint().values()) == held
        o = optimizer.options
        if o.window_size < type(o)().window_size and o.window_size >= 32:  # the next longer window does not fit
            cls = type(optimizer)
            values = {**vars(o), "memory_budget": None, "window_size": min(2 * o.window_size, type(o)().window_size)}
            longer = cls(parameters(SHAPES, torch.float32), lr=0.01, **values)
            assert sum(longer.memory_footprint().values()) > budget
    assert fits >= 3
    assert o.window_size == type(o)().window_size and o.error_format == o.window_format == "plain"  # all that there is


@pytest.mark.parametrize("metric", ["factored", "diagonal", "tensor"])
@WINDOWED
def test_the_bytes_of_a_metric_count_and_are_no_choice(name, metric):
    """With so many bytes more, the choice is that without a metric; with the same number, the state keeps to them."""
    budget = 40 * COUNT * (10 if info(name).compression == "dense" else 1)
    without, _ = build(name, budget)
    choice = chosen(without)
    optimizer, params = build(name, None, metric=metric)
    more = optimizer.memory_footprint()["metric"]
    assert more >= {"factored": 4 * len(SHAPES), "diagonal": 4 * COUNT, "tensor": 4 * len(SHAPES)}[metric]
    assert chosen(build(name, budget + more, metric=metric)[0]) == choice
    optimizer, params = build(name, budget, metric=metric)
    assert optimizer.estimate_footprint() == optimizer.memory_footprint()
    train(optimizer, params, 0, 2)
    held = optimizer.memory_footprint()
    assert sum(held.values()) <= budget and held["metric"] == more and optimizer.options.metric == metric


@WINDOWED
def test_a_budget_leaves_the_metric_of_the_preset(name):
    budget = 10 * COUNT * (100 if info(name).compression == "dense" else 1)
    optimizer, _ = build(name, budget, preset="measured")
    assert sum(optimizer.memory_footprint().values()) <= budget
    assert optimizer.options.metric == type(optimizer).measured.get("metric", "none")


def test_formats_become_small_before_the_window_becomes_short():
    found = [chosen(build("efcp_lowrank_mfac", f"{kib}KiB")[0]) for kib in (6000, 1000, 500, 200, 100)]
    assert found[0][0] > 32
    assert found[-1][1:] == ("low_bit", None, "int4", None)
    sizes = [m for m, *_ in found]
    assert sizes == sorted(sizes, reverse=True)
    assert all(m >= 32 or rest == ["low_bit", None, "int4", None] for m, *rest in found)


def test_what_is_given_stays():
    optimizer, _ = build("efcp_lowrank_mfac", "170KiB", window_size=20, error_dtype="bf16")
    assert chosen(optimizer)[::2] == (20, optimizer.options.window_dtype, torch.bfloat16)
    assert optimizer.options.error_format == "plain" and optimizer.options.window_format == "low_bit"
    optimizer, _ = build("efcp_sparse_mfac", "1MB", block_size=4096, density=0.05)
    chosen(optimizer)
    assert (optimizer.options.density, optimizer.options.window_format) == (0.05, "plain")  # low bits want short blocks


def test_too_little_names_the_least():
    with pytest.raises(OptionError, match=r"memory_budget=1000 bytes is too small: .* takes (\d+) bytes") as caught:
        build("efcp_lowrank_mfac", 1000)
    least = int(str(caught.value).split(" takes ")[1].split()[0])
    again, _ = build("efcp_lowrank_mfac", least)
    assert sum(again.memory_footprint().values()) == least
    with pytest.raises(OptionError, match="too small"):
        build("efcp_lowrank_mfac", least - 1)
    with pytest.raises(OptionError, match=r"the least .* with window_size=500"):
        build("efcp_lowrank_mfac", least, window_size=500)


def test_the_choice_is_printed_once(caplog):
    optimizer, params = build("efcp_sparse_mfac", "1MiB")
    with caplog.at_level(logging.WARNING, "hf_efcp"):
        train(optimizer, params, 0, 3)
    (message,) = [r.getMessage() for r in caplog.records]
    o = optimizer.options
    assert message.startswith(f"SparseMFAC: memory_budget=1.00 MiB: window_size={o.window_size}, density={o.density}, ")
    assert f"window_format={o.window_format}" in message and f"error_format={o.error_format}" in message


@WINDOWED
def test_a_resumed_run_has_the_same_choice(name):
    optimizer, params = build(name, 40 * COUNT)
    untouched = copy.deepcopy(optimizer.state_dict())
    train(optimizer, params, 0, 3)
    saved, values = optimizer.state_dict(), [p.detach().clone() for p in params]
    train(optimizer, params, 3, 5)
    # Even where another version would choose something else.
    saved["efcp"]["options"]["memory_budget"] = 1
    for other, others in (build(name, 40 * COUNT), build(name, 10000 * COUNT)):
        with torch.no_grad():
            for p, value in zip(others, values, strict=True):
                p.copy_(value)
        other.load_state_dict(saved)
        train(other, others, 3, 5)
        assert differences(snapshot(optimizer, params), snapshot(other, others)) == []
    copied = pickle.loads(pickle.dumps(optimizer))
    assert chosen(copied) == chosen(optimizer)
    optimizer.load_state_dict(untouched)
    assert not optimizer.state


def test_parameters_that_join_may_exceed_it_with_a_warning():
    optimizer, params = build("efcp_lowrank_mfac", "300KiB")
    train(optimizer, params, 0, 1)
    optimizer.add_param_group({"params": parameters([(300, 200)], torch.float32)})
    with pytest.warns(UserWarning, match="memory_budget=300.00 KiB: with the new parameters the state takes"):
        optimizer.memory_footprint()


@pytest.mark.parametrize(
    ("text", "value"),
    [("2GiB", 2**31), ("1.5 mib", 3 * 2**19), ("500MB", 500_000_000), ("1e9", 10**9), ("77", 77), ("8 KB", 8000)],
)
def test_bytes_are_read_with_their_units(text, value):
    assert parse_bytes("memory_budget", text) == value
    assert build("efcp_dense_mfac", text, [()])[0].options.memory_budget == value


@pytest.mark.parametrize("value", [2e9, 2_000_000_000, np.float32(2e9), np.int64(2e9), "2e+9"], ids=repr)
def test_a_number_of_python_is_bytes(value):
    budget = build("efcp_dense_mfac", value)[0].options.memory_budget
    assert (budget, type(budget)) == (2_000_000_000, int)
    assert parse_bytes("memory_budget", 1.5) == 1


BAD = ["2 gigs", "GiB", "", "-1GiB", "1e", "0", "0.5", 0, 0.5, -1, -2e9, math.nan, math.inf, -math.inf, True, False, [1], 1j]


@pytest.mark.parametrize("bad", BAD, ids=repr)
def test_a_bad_budget_is_refused_at_once(bad):
    with pytest.raises(OptionError, match=rf"memory_budget={re.escape(repr(bad))}: expected bytes .*, a number >= 1"):
        build("efcp_lowrank_mfac", bad)
    for none in ("none", None):
        assert build("efcp_lowrank_mfac", none)[0].options.memory_budget is None


def test_the_defaults_of_optim_do_not_stand_in_its_way():
    defaults = hf_efcp.optim_defaults("efcp_lowrank_mfac", memory_budget="6MB", rank=2)
    assert defaults == {"preset": "measured", "shard": "auto", "memory_budget": "6MB", "rank": 2}
    optimizer = hf_efcp.create_optimizer("efcp_lowrank_mfac", parameters(SHAPES, torch.float32), lr=0.1, **defaults)
    assert chosen(optimizer)[0] > 32 and optimizer.options.rank == 2
    without = {**defaults, "memory_budget": None}
    optimizer = hf_efcp.create_optimizer("efcp_lowrank_mfac", parameters(SHAPES, torch.float32), lr=0.1, **without)
    assert chosen(optimizer)[0] == hf_efcp.LowRankMFAC.measured["window_size"]


def test_a_format_that_is_given_leaves_its_dtype_to_the_budget():
    """The smallest state with error_format=plain has bf16 errors, not fp32."""
    params = [torch.nn.Parameter(torch.zeros(128, 96))]
    least = hf_efcp.LowRankMFAC(params, 0.1, window_size=1, rank=1, window_format="low_bit", error_dtype=torch.bfloat16)
    budget = sum(least.estimate_footprint().values())
    optimizer = hf_efcp.LowRankMFAC(params, 0.1, memory_budget=budget, error_format="plain")
    assert sum(optimizer.memory_footprint().values()) <= budget
    assert optimizer.options.error_dtype == torch.bfloat16


def test_an_estimate_lets_the_budget_choose():
    params = [torch.nn.Parameter(torch.zeros(128, 96)), torch.nn.Parameter(torch.zeros(96))]
    optimizer = hf_efcp.LowRankMFAC(params, 0.1, memory_budget=100_000)
    estimated = optimizer.estimate_footprint()
    assert optimizer.options.window_size == 1024  # an estimate settles nothing
    assert estimated == optimizer.memory_footprint()
    assert sum(estimated.values()) <= 100_000


def test_an_estimate_refuses_what_a_step_would():
    """Everything is given, and is too much: of the parameters that are there, and of those that join before the first step."""
    given = {"window_size": 50, "window_dtype": "fp32", "error_dtype": "fp32"}
    message = r"memory_budget=976\.56 KiB: with window_size=50, .* the state takes"
    with pytest.raises(OptionError, match=message):
        build("efcp_dense_ggt", "1MB", **given)
    optimizer, params = build("efcp_dense_ggt", "1MB", SHAPES[-1:], **given)
    params += parameters(SHAPES[:-1], torch.float32)
    optimizer.add_param_group({"params": params[1:]})
    gradients_at(0, params)
    for attempt in (optimizer.estimate_footprint, optimizer.step):
        with pytest.raises(OptionError, match=message):
            attempt()


def test_a_budget_that_several_processes_keep_is_no_error_on_one_of_them(monkeypatch):
    with pytest.raises(OptionError, match="is too small"):
        build("efcp_lowrank_mfac", 12_000, shard="auto")
    monkeypatch.setenv("WORLD_SIZE", "4")
    build("efcp_lowrank_mfac", 12_000, shard="auto")


@pytest.mark.parametrize("text", ["1e999", "nan"])
def test_numbers_of_bytes_that_are_none(text):
    with pytest.raises(OptionError, match=r"memory_budget.*expected bytes"):
        hf_efcp.LowRankMFAC([torch.nn.Parameter(torch.zeros(4, 4))], 0.1, memory_budget=text)
