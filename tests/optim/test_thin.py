"""max_rank_fraction: thin matrices, such as LoRA's, have a smaller rank than the others, and the log says so."""

import logging

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import hf_efcp
from hf_efcp import OptionError
from tests.optim.helpers import clones, train
from tests.reference import parameters

NAME = "efcp_lowrank_mfac"
SHAPES = ((8, 64), (64, 8), (3, 64), (48, 64), (40,))


def made(shapes=SHAPES, **options):
    params = parameters(shapes, torch.float32)
    return hf_efcp.create_optimizer(NAME, params, lr=0.01, **options), params


def ranks(optimizer, params):
    specs = optimizer.setup().specs
    return [specs[p]["warm_start"].shape[1] if "warm_start" in specs[p] else None for p in params]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"rank": 8, "max_rank_fraction": 0.25}, [2, 2, None, 8, None]),  # 3 rows of 64 are kept whole
        ({"rank": 8, "max_rank_fraction": 0.5}, [4, 4, None, 8, None]),
        ({"rank": 2, "max_rank_fraction": 0.25}, [2, 2, 2, 2, None]),
        ({"rank": 1, "max_rank_fraction": 0.25}, [1, 1, 1, 1, None]),
        ({"rank": 8}, [None, None, None, 8, None]),  # the factors would take as much as the matrix
    ],
    ids=str,
)
def test_a_thin_matrix_has_a_fraction_of_its_shorter_side(options, expected):
    optimizer, params = made(window_size=4, **options)
    assert ranks(optimizer, params) == expected
    assert sum(optimizer.estimate_footprint().values()) == sum(optimizer.memory_footprint().values())


def test_the_log_says_which_matrices_and_why(caplog):
    caplog.set_level(logging.WARNING, "hf_efcp")
    optimizer, params = made(preset="measured")
    train(optimizer, params, 0, 2)
    assert [r.message for r in caplog.records] == [
        "LowRankMFAC: rank 2 instead of 8 for 2 small or thin matrices, such as 8 x 64 (max_rank_fraction=0.25)"
    ]


def test_the_log_speaks_of_what_trains(caplog):
    """Nothing is said before the first step, of a state that is replaced, or twice; matrices that join are counted."""
    caplog.set_level(logging.WARNING, "hf_efcp")
    saved, params = made(preset="measured", max_rank_fraction=1.0)
    train(saved, params, 0, 1)
    optimizer, others = made(preset="measured")
    optimizer.memory_footprint()
    optimizer.load_state_dict(saved.state_dict())
    train(optimizer, others, 0, 1)
    assert not [r for r in caplog.records if "instead of" in r.message]
    optimizer, params = made([(64, 64)], preset="measured")
    train(optimizer, params, 0, 2)
    assert not [r for r in caplog.records if "instead of" in r.message]
    added = parameters([(8, 256)] * 4, torch.float32)
    optimizer.add_param_group({"params": added})
    train(optimizer, [*params, *added], 2, 4)
    (line,) = [r.message for r in caplog.records if "instead of" in r.message]
    assert " for 4 small or thin matrices, such as 8 x 256 " in line


@pytest.mark.parametrize("shapes", [[(48, 64), (40,)], [(48, 64), (2, 48)]], ids=["none", "a head"])
def test_nothing_is_said_of_a_few_parameters(shapes, caplog):
    optimizer, params = made(shapes, preset="measured")
    train(optimizer, params, 0, 1)
    assert not caplog.records


def test_a_rank_that_is_given_is_the_rank_of_all():
    optimizer, params = made(preset="measured", rank=4)
    assert optimizer.options.max_rank_fraction == 1.0
    assert ranks(optimizer, params) == [4, 4, None, 4, None]


@pytest.mark.parametrize("value", [0, -0.5, 1.5, float("nan")])
def test_a_fraction_out_of_range_is_refused(value):
    with pytest.raises(OptionError, match=r"max_rank_fraction.*\(0, 1\]"):
        made(max_rank_fraction=value)


@pytest.mark.filterwarnings("ignore:.*assuming the intent is to (load|save) in a single process")
@pytest.mark.parametrize("way", ["state_dict", "dcp"])
@pytest.mark.parametrize(
    ("fraction", "resumed"),
    [(1.0, {"preset": "measured"}), (0.25, {"preset": "measured", "rank": 8}), (0.25, {})],
    ids=["a run without", "into a given rank", "into the class defaults"],
)
def test_a_run_goes_on_with_the_ranks_that_it_has(way, fraction, resumed, tmp_path):
    """Also a checkpoint of before the option."""
    shapes, same = ((64, 64), (16, 64)), {"preset": "measured"}
    saved, params = made(shapes, preset="measured", max_rank_fraction=fraction)
    train(saved, params, 0, 3)
    other, others = made(shapes, **resumed)
    with torch.no_grad():
        for p, q in zip(others, params, strict=True):
            p.copy_(q)
    if way == "state_dict":
        other.load_state_dict(saved.state_dict())
    else:
        model, copy = torch.nn.ParameterList(params), torch.nn.ParameterList(others)
        dcp.save({"o": get_optimizer_state_dict(model, saved)}, checkpoint_id=tmp_path)
        other.choose_as(tmp_path)
        there = {"o": get_optimizer_state_dict(copy, other)}
        dcp.load(there, checkpoint_id=tmp_path)
        set_optimizer_state_dict(copy, other, there["o"])
    assert other.options.max_rank_fraction == fraction
    if way == "dcp" and resumed != same:  # what tensors do not tell is the new run's
        return
    for optimizer, tensors in ((saved, params), (other, others)):
        train(optimizer, tensors, 3, 5)
    assert all(map(torch.equal, clones(params), clones(others)))


def test_another_fraction_that_is_given_is_refused():
    saved, params = made(preset="measured", max_rank_fraction=0.5)
    train(saved, params, 0, 1)
    other, _ = made(preset="measured", max_rank_fraction=0.25)
    with pytest.raises(OptionError, match=r"max_rank_fraction=0\.5"):
        other.load_state_dict(saved.state_dict())
