"""DCT-AdamW on several processes: columns that all choose alike, on both sides, with gradients of low rank at first."""

import pytest

from tests.distributed.processes import run
from tests.distributed.test_ldadamw import assert_they_are_those_of_one_process, train_everything

NAME = "efcp_dct_adamw"
OPTIONS = {
    "default": {},
    "interval": {"update_interval": 3},
    "2-norm": {"ell_norm": 2, "rotate": False},
    "full rank": {"rank": 100},
}


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_parameters_are_those_of_one_process(processes):
    everybody = run(processes, train_everything, OPTIONS, NAME)
    assert_they_are_those_of_one_process(everybody, OPTIONS, NAME)
