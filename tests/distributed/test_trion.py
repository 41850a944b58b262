"""Trion on several processes: momentum that is divided by rows, whole matrices whose factors travel, and FSDP2."""

import pytest
import torch.distributed as dist

import hf_efcp
from tests.distributed import fsdp2
from tests.distributed.processes import run
from tests.distributed.test_ldadamw import gradients, trained
from tests.distributed.test_sharding import problem
from tests.reference import relative

NAME = "efcp_trion"
OPTIONS = {"default": {"adam_lr_ratio": 0.5}, "full rank": {"rank": 100, "scaling_type": "kimi"}}


def published(rank):
    """What the processes of DDP send each other after a step, by shape, and the whole matrices that have a message."""
    params = problem()
    optimizer = hf_efcp.create_optimizer(NAME, params, lr=0.01, rank=2, process_group=dist.group.WORLD)
    placement, shapes = optimizer.setup().placement, []
    publish = placement.publish

    def hear(params, owners):
        shapes.extend(tuple(p.shape) for p in params)
        publish(params, owners)

    placement.publish = hear
    gradients(params, 0)
    optimizer.step()
    owners = optimizer.setup().owners
    return shapes, [tuple(p.shape) for p in params if len(owners[p]) == 1 and p.ndim == 2]


def train_everything(rank):
    results = {"published": published(rank)}
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
    for shapes, matrices in (results["published"] for results in everybody):
        assert matrices
        for shape in matrices:
            assert shape not in shapes and (max(shape), 2) in shapes and (2,) in shapes
    for key, options in OPTIONS.items():
        for place, alone in (("DDP", problem()), ("FSDP2", list(fsdp2.Parameters().parameters()))):
            trained(alone, NAME, **options)
            for results in everybody:
                params, plan = results[key, place]
                assert params.equal(everybody[0][key, place][0])
                assert relative(params, fsdp2.flat(alone)) < 1e-9, (key, place)
                assert place == "FSDP2" or "parameter 0: rank 0 rows 0-" in plan
