"""Presets: where options that are not given start."""

import copy

import pytest
import torch

import hf_efcp
from hf_efcp import OptionError
from hf_efcp.registry import get_optimizer_info
from tests.optim.helpers import EVERY, WINDOWED
from tests.reference import parameters


def made(name, **options):
    return hf_efcp.create_optimizer(name, parameters(dtype=torch.float32), lr=0.1, **options).options


def differing(options, others):
    return {name for name, value in vars(options).items() if value != getattr(others, name)}


@EVERY
def test_the_class_default_is_the_paper(name):
    info = get_optimizer_info(name)
    assert made(name) == made(name, preset="paper") == info.cls.options_type()
    assert made(name, preset="paper", rank=2).rank == 2 if "rank" in info.options() else True


@EVERY
def test_measured_is_what_optim_starts_from(name):
    cls = get_optimizer_info(name).cls
    measured = made(name, preset="measured")
    assert cls.measured or not get_optimizer_info(name).windowed  # MicroAdam's are its paper's
    assert differing(measured, cls.options_type()) <= {"preset", *cls.measured}
    assert {option: getattr(measured, option) for option in cls.measured} == dict(cls.measured)
    assert differing(measured, made(name, **hf_efcp.optim_defaults(name))) == {"shard"}
    assert made(name, **hf_efcp.optim_defaults(name)).shard == "auto"
    direct = cls(parameters(dtype=torch.float32), lr=0.1, preset="measured").options
    assert direct == measured


@EVERY
def test_optim_with_the_paper_still_divides_the_state(name):
    paper = made(name, **hf_efcp.optim_defaults(name, preset="paper"))
    assert (differing(paper, made(name)), paper.shard) == ({"shard"}, "auto")


@WINDOWED
def test_what_is_given_wins_over_the_preset(name):
    given = {"window_size": 7, "update_rms": None, "error_dtype": "float32"}
    options = made(name, preset="measured", **given)
    assert (options.window_size, options.update_rms, options.error_dtype) == (7, None, torch.float32)


def test_an_option_of_two_names_is_given_by_either(monkeypatch):
    monkeypatch.setattr(hf_efcp.LowRankGGT, "measured", {"window_momentum": 0.9, "update_rms": 1.0})
    options = made("efcp_lowrank_ggt", preset="measured", beta1=0.5)
    assert (options.beta1, options.window_momentum, options.update_rms) == (0.5, 0.0, 1.0)
    options = made("efcp_lowrank_ggt", preset="measured", window_momentum=0.7)
    assert (options.beta1, options.window_momentum) == (0.0, 0.7)


def test_a_budget_chooses_beside_the_preset(monkeypatch):
    monkeypatch.setattr(hf_efcp.LowRankMFAC, "measured", {"rank": 8, "error_dtype": torch.bfloat16, "damping": 0.1})
    options = made("efcp_lowrank_mfac", preset="measured", memory_budget="1GB")
    assert (options.rank, options.error_dtype, options.damping) == (4, None, 0.1)


@pytest.mark.parametrize("preset", ["papr", "", "Measured", 1])
def test_an_unknown_preset(preset):
    with pytest.raises(OptionError, match=r"preset=.*: (must be paper or measured|expected text)"):
        made("efcp_lowrank_mfac", preset=preset)


def test_a_preset_that_is_none():
    with pytest.raises(OptionError, match="preset=None: a value is needed"):
        made("efcp_lowrank_mfac", preset=None)


def test_bad_measured_values_are_refused(monkeypatch):
    monkeypatch.setattr(hf_efcp.LowRankMFAC, "measured", {"rank": 0})
    with pytest.raises(OptionError, match="rank=0: must be an integer >= 1"):
        made("efcp_lowrank_mfac", preset="measured")


def test_a_copy_has_the_preset():
    optimizer = hf_efcp.LowRankMFAC(parameters(dtype=torch.float32), 0.1, preset="measured")
    assert copy.deepcopy(optimizer).options == optimizer.options


@pytest.mark.parametrize("codes", ["int8", "int4"])
@pytest.mark.parametrize("name", ["efcp_lowrank_mfac", "efcp_sparse_ggt"])
def test_errors_in_codes_leave_vectors_exact_so_that_fsdp2_can_cut_them(name, codes):
    params = parameters(((64, 64), (300,)), torch.float32)
    optimizer = hf_efcp.create_optimizer(name, params, lr=0.1, preset="measured", error_format=codes)
    assert optimizer.options.window_dtype is None
    assert optimizer.estimate_footprint(processes=2, fsdp=True)
    given = hf_efcp.create_optimizer(name, params, lr=0.1, preset="measured", error_format=codes, window_dtype="bf16")
    with pytest.raises(OptionError, match=r"window_dtype=torch\.bfloat16"):
        given.estimate_footprint(processes=2, fsdp=True)
