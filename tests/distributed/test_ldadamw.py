"""LDAdamW on several processes: its sums over rows, its sides, and subspaces that the gradient does not fill."""

import pytest
import torch
import torch.distributed as dist

import hf_efcp
from tests.distributed import fsdp2
from tests.distributed.processes import run
from tests.distributed.test_sharding import problem
from tests.reference import relative

OPTIONS = {
    "std": {},
    "reverse_std": {"proj_type": "reverse_std"},
    "left": {"proj_type": "left"},
    "right": {"proj_type": "right"},
    "svd": {"proj_method": "svd"},
    "no feedback": {"error_feedback": False},
    "full rank": {"rank": 100},
}
STEPS = 16


def gradients(params, step):
    """Of rank 1 at first, of rank 2 next: a subspace of rank 4 has columns that nothing fills; then of full rank."""
    generator = torch.Generator().manual_seed(step)
    for p in params:
        whole = fsdp2.full(p)
        g = torch.randn(whole.shape, generator=generator, dtype=torch.float64)
        if whole.ndim == 2 and step < 8:
            rank = 1 + step // 4
            fixed = torch.randn(len(whole), rank, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
            g = fixed @ g[:rank]
        g = 0.1 * g + 0.05 * whole if step >= 8 or whole.ndim != 2 else 0.1 * g
        p.grad = torch.distributed.tensor.distribute_tensor(g, p.device_mesh, p.placements) if hasattr(p, "device_mesh") else g


def trained(params, name="efcp_ldadamw", **options):
    optimizer = hf_efcp.create_optimizer(name, params, lr=0.01, **{"rank": 4, **options})
    for step in range(STEPS):
        gradients(params, step)
        optimizer.step()
    return optimizer


def train_everything(rank, variants, name="efcp_ldadamw"):
    """Key of a variant and place -> parameters at the end, plan; variants: key -> options."""
    results = {}
    for key, options in variants.items():
        params = problem()
        optimizer = trained(params, name, process_group=dist.group.WORLD, **options)
        results[key, "DDP"] = fsdp2.flat(params), optimizer.sharding_plan()
        params = list(fsdp2.divided().parameters())
        trained(params, name, shard="auto", **options)
        results[key, "FSDP2"] = fsdp2.flat(params), ""
    return results


def assert_they_are_those_of_one_process(everybody, variants, name="efcp_ldadamw"):
    """What `train_everything` gave on every process is what one process gets."""
    for key, options in variants.items():
        for place, alone in (("DDP", problem()), ("FSDP2", list(fsdp2.Parameters().parameters()))):
            trained(alone, name, **options)
            for results in everybody:
                params, plan = results[key, place]
                assert params.equal(everybody[0][key, place][0])
                assert relative(params, fsdp2.flat(alone)) < 1e-9, (key, place)
                assert place == "FSDP2" or "parameter 0: rank 0 rows 0-" in plan


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_parameters_are_those_of_one_process(processes):
    assert_they_are_those_of_one_process(run(processes, train_everything, OPTIONS), OPTIONS)
