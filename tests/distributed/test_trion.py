"""Trion on several processes: momentum that is divided by rows, whole matrices whose factors travel, and FSDP2."""

import pytest
import torch.distributed as dist

import hf_efcp
from tests.distributed.processes import run
from tests.distributed.test_ldadamw import assert_they_are_those_of_one_process, gradients, train_everything
from tests.distributed.test_sharding import problem

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


def train(rank):
    return published(rank), train_everything(rank, OPTIONS, NAME)


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_parameters_are_those_of_one_process(processes):
    heard, everybody = zip(*run(processes, train), strict=True)
    for shapes, matrices in heard:
        assert matrices
        for shape in matrices:
            assert shape not in shapes and (max(shape), 2) in shapes and (2,) in shapes
    assert_they_are_those_of_one_process(everybody, OPTIONS, NAME)
