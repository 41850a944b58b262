"""DCT-AdamW on several processes: columns that all choose alike, on both sides, with gradients of low rank at first."""

import pytest
import torch.distributed as dist

from tests.distributed import fsdp2
from tests.distributed.processes import run
from tests.distributed.test_ldadamw import trained
from tests.distributed.test_sharding import problem
from tests.reference import relative

NAME = "efcp_dct_adamw"
OPTIONS = {
    "default": {},
    "interval": {"update_interval": 3},
    "2-norm": {"ell_norm": 2, "rotate": False},
    "full rank": {"rank": 100},
}


def train_everything(rank):
    results = {}
    for key, options in OPTIONS.items():
        params = problem()
        optimizer = trained(params, NAME, process_group=dist.group.WORLD, **options)
        results[key, "DDP"] = fsdp2.flat(params), optimizer.sharding_plan()
        params = list(fsdp2.divided().parameters())
        trained(params, NAME, shard="auto", **options)
        results[key, "FSDP2"] = fsdp2.flat(params), ""
    return results


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_parameters_are_those_of_one_process(processes):
    everybody = run(processes, train_everything)
    for key, options in OPTIONS.items():
        for place, alone in (("DDP", problem()), ("FSDP2", list(fsdp2.Parameters().parameters()))):
            trained(alone, NAME, **options)
            for results in everybody:
                params, plan = results[key, place]
                assert params.equal(everybody[0][key, place][0])
                assert relative(params, fsdp2.flat(alone)) < 1e-9, (key, place)
                assert place == "FSDP2" or "parameter 0: rank 0 rows 0-" in plan
