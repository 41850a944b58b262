"""What `estimate` says of several processes is what the fullest of them holds."""

import pytest
import torch.distributed as dist
from torch import nn

import hf_efcp
from tests.distributed.processes import run
from tests.reference import NAMES, known_to, lossy_options

VARIANTS = [{}, {"scope": "layer", "momentum": 0.5}, {"error_dtype": "bf16", "window_dtype": "bf16"}]


def optimizer(name, group=None, **options):
    model = nn.Sequential(nn.Embedding(400, 16), *(nn.Linear(16, 16) for _ in range(3)), nn.Linear(16, 48))
    given = known_to(name, {"lr": 0.1, "window_size": 6, **lossy_options(name), **options})
    return hf_efcp.create_optimizer(name, model, process_group=group, **given)


def footprints(rank):
    return [[optimizer(name, dist.group.WORLD, **v).memory_footprint() for v in VARIANTS] for name in NAMES]


@pytest.mark.parametrize("processes", [2, 3])
def test_of_several_processes_the_fullest(processes):
    everybody = run(processes, footprints)
    for i, name in enumerate(NAMES):
        for j, variant in enumerate(VARIANTS):
            held = [found[i][j] for found in everybody]
            largest = max(held, key=lambda kinds: sum(kinds.values()))
            assert optimizer(name, **variant).estimate_footprint(processes) == largest, (name, variant)
